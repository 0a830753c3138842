//! The grid of shapes.
use super::features::{self, Feature};
use crate::cli::inputs;
use anyhow::{Result, ensure};
use ferroflash::accuracy::{self, Accuracy, BackwardAccuracy};
use ferroflash::{Attention, AttentionOptions, Backend, DType, Kernel, Session, SoftmaxMethod};
use std::fmt;

/// Around the edges of blocks of 16, 64 and 128 rows.
const LENGTHS: [usize; 9] = [1, 15, 16, 17, 63, 64, 65, 113, 257];
/// Those of tensors.
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Queries and keys of unequal lengths.
const UNEQUAL: [(usize, usize); 4] = [(1, 257), (65, 17), (17, 65), (130, 113)];
/// Sequences, queries, keys, heads of Q and of K: a step of decoding, whose keys flash3 divides among multiprocessors.
const DECODING: [usize; 5] = [2, 1, 3000, 8, 2];
/// So many heads that flash3's backward pass lets them take turns at sums.
const MANY_HEADS: [usize; 5] = [50, 130, 130, 4, 4];
/// So few blocks of keys that there several blocks of threads share each.
const FEW_KEYS: [usize; 5] = [1, 1100, 300, 4, 2];

/// Cases of one kind.
pub struct Group {
    pub name: String,
    pub kernel: Kernel,
    pub cases: Vec<Case>,
}

/// One computation.
pub enum Case {
    Attention { dtype: DType, q: [usize; 4], k: [usize; 4], causal: bool },
    Backward { dtype: DType, q: [usize; 4], k: [usize; 4], causal: bool },
    Feature { feature: Feature, dtype: DType, headdim: usize },
    Softmax { dtype: DType, rows: usize, columns: usize, method: SoftmaxMethod },
}

/// How much of the grid to compute: the simulator takes milliseconds where the others take microseconds.
struct Extent {
    headdims: &'static [usize],
    lengths: &'static [usize],
    unequal: &'static [(usize, usize)],
    /// Of problems with features: the kernels that know all of these are other ones.
    feature_dtypes: &'static [DType],
    feature_headdims: &'static [usize],
    columns: &'static [usize],
}

impl Extent {
    fn of(backend: Backend, quick: bool) -> Extent {
        let all = Extent {
            headdims: &[32, 64, 128],
            lengths: &LENGTHS,
            unequal: &UNEQUAL,
            feature_dtypes: &DTYPES,
            feature_headdims: &[32, 64, 96, 128, 192, 256],
            columns: &[1, 31, 32, 33, 1000, 4099],
        };
        match (backend, quick) {
            (Backend::Simulator, true) => Extent {
                headdims: &[32],
                lengths: &[17],
                unequal: &[(17, 65)],
                feature_dtypes: &[DType::F16],
                feature_headdims: &[32],
                columns: &[33],
            },
            (Backend::Simulator, false) => Extent {
                lengths: &[1, 17, 64, 113],
                unequal: &UNEQUAL[1..3],
                feature_headdims: &[32, 64],
                columns: &[1, 33, 1000],
                ..all
            },
            (_, true) => Extent {
                headdims: &[64],
                lengths: &[1, 17, 65],
                unequal: &UNEQUAL[1..3],
                feature_dtypes: &[DType::F32, DType::BF16],
                feature_headdims: &[64],
                columns: &[1, 1000],
            },
            (_, false) => all,
        }
    }
}

/// The groups for a backend that has these kernels.
pub fn groups(backend: Backend, kernels: &[Kernel], quick: bool) -> Vec<Group> {
    let extent = Extent::of(backend, quick);
    // The CPU has one algorithm.
    let kernels = if kernels.is_empty() { &[Kernel::Auto] } else { kernels };
    let large = |kernel, shapes: &'static [[usize; 5]]| {
        let has_them = backend == Backend::Cuda && kernel == Kernel::Flash3;
        if has_them { shapes } else { &[] }
    };
    let mut groups = Vec::new();
    for &kernel in kernels {
        for dtype in dtypes_of(kernel) {
            for &headdim in extent.headdims {
                let name = if kernel == Kernel::Auto { "attention" } else { kernel.name() };
                let name = format!("{name} {} headdim {headdim}", dtype.name());
                let cases = attention_cases(&extent, large(kernel, &[DECODING]), dtype, headdim);
                groups.push(Group { name, kernel, cases });
            }
        }
    }
    for kernel in kernels.iter().copied().filter(|kernel| kernel.has_backward()) {
        for dtype in dtypes_of(kernel) {
            for &headdim in extent.headdims {
                let family = if kernel == Kernel::Auto { String::new() } else { format!("{kernel} ") };
                let name = format!("{family}backward {} headdim {headdim}", dtype.name());
                let cases = backward_cases(&extent, large(kernel, &[MANY_HEADS, FEW_KEYS]), dtype, headdim);
                groups.push(Group { name, kernel, cases });
            }
        }
    }
    if kernels.contains(&Kernel::Flash3) {
        for &dtype in extent.feature_dtypes.iter().filter(|&&dtype| dtype != DType::F32) {
            for &headdim in extent.feature_headdims {
                let cases = features::OF_HOPPER.map(|feature| Case::Feature { feature, dtype, headdim });
                let name = format!("flash3 features {} headdim {headdim}", dtype.name());
                groups.push(Group { name, kernel: Kernel::Flash3, cases: cases.into() });
            }
        }
    }
    let kernel = if backend == Backend::Cpu { Kernel::Auto } else { Kernel::Flash2 };
    for &dtype in extent.feature_dtypes {
        for &headdim in extent.feature_headdims {
            let cases = features::of(dtype).map(|feature| Case::Feature { feature, dtype, headdim });
            let name = format!("features {} headdim {headdim}", dtype.name());
            groups.push(Group { name, kernel, cases: cases.collect() });
        }
    }
    for &method in SoftmaxMethod::ALL {
        for dtype in DTYPES {
            let cases = extent.columns.iter().map(|&columns| Case::Softmax { dtype, rows: 5, columns, method });
            let name = format!("softmax {method} {}", dtype.name());
            groups.push(Group { name, kernel: Kernel::Auto, cases: cases.collect() });
        }
    }
    groups
}

/// The dtypes of a kernel: Hopper's products are of 16 bits.
fn dtypes_of(kernel: Kernel) -> impl Iterator<Item = DType> {
    DTYPES.into_iter().filter(move |&dtype| (kernel, dtype) != (Kernel::Flash3, DType::F32))
}

fn attention_cases(extent: &Extent, large: &[[usize; 5]], dtype: DType, headdim: usize) -> Vec<Case> {
    shapes(extent, large, headdim).map(|(q, k, causal)| Case::Attention { dtype, q, k, causal }).collect()
}

fn backward_cases(extent: &Extent, large: &[[usize; 5]], dtype: DType, headdim: usize) -> Vec<Case> {
    shapes(extent, large, headdim).map(|(q, k, causal)| Case::Backward { dtype, q, k, causal }).collect()
}

/// The shapes of Q and of K and V, with `large` ones or without, and whether the mask is causal.
fn shapes(
    extent: &Extent,
    large: &[[usize; 5]],
    headdim: usize,
) -> impl Iterator<Item = ([usize; 4], [usize; 4], bool)> {
    let equal = extent.lengths.iter().map(|&length| (length, length));
    let lengths = equal.chain(extent.unequal.iter().copied());
    // One sequence with two heads; and, once, two sequences whose heads of Q share heads of K and V.
    let mut shapes: Vec<_> = lengths.map(|(q, k)| ([1, q, 2, headdim], [1, k, 2, headdim])).collect();
    shapes.push(([2, 17, 4, headdim], [2, 17, 2, headdim]));
    shapes.extend(
        large.iter().map(|&[batch, q, k, heads, heads_k]| ([batch, q, heads, headdim], [batch, k, heads_k, headdim])),
    );
    [false, true].into_iter().flat_map(move |causal| shapes.clone().into_iter().map(move |(q, k)| (q, k, causal)))
}

impl Case {
    /// Computes it, and compares the result with that of f64 arithmetic. Returns its error as a part of the error that is
    /// allowed.
    pub fn check(&self, session: &Session) -> Result<f64> {
        match *self {
            Case::Feature { feature, dtype, headdim } => feature.check(session, dtype, headdim),
            Case::Attention { dtype, q, k, causal } => {
                let v = inputs::normal(&k, dtype, 3)?;
                let (q, k) = (inputs::normal(&q, dtype, 1)?, inputs::normal(&k, dtype, 2)?);
                let options = AttentionOptions::default().causal(causal);
                let result = session.attention(&q, &k, &v, &options)?;
                part(&accuracy::check(&q, &k, &v, &options, &result)?)
            }
            Case::Backward { dtype, q, k, causal } => {
                let (dout, v) = (inputs::normal(&q, dtype, 4)?, inputs::normal(&k, dtype, 3)?);
                let (q, k) = (inputs::normal(&q, dtype, 1)?, inputs::normal(&k, dtype, 2)?);
                let options = AttentionOptions::default().causal(causal);
                let Attention { out, softmax_lse, .. } = session.attention(&q, &k, &v, &options)?;
                let gradients = session.attention_backward(&q, &k, &v, &out, &softmax_lse, &dout, &options)?;
                backward_part(&accuracy::check_backward(&q, &k, &v, &dout, &options, &gradients)?)
            }
            Case::Softmax { dtype, rows, columns, method } => {
                let x = inputs::normal(&[rows, columns], dtype, 1)?;
                let result = session.softmax(&x, method)?;
                part(&accuracy::check_softmax(&x, &result)?)
            }
        }
    }
}

/// The error of a result that keeps the rule, as a part of what is allowed.
pub fn part(accuracy: &Accuracy) -> Result<f64> {
    ensure!(accuracy.passed(), "{accuracy}");
    Ok((accuracy.out_error / accuracy.out_bound).max(accuracy.lse_error / accuracy.lse_bound))
}

/// Likewise of gradients: the largest part.
pub fn backward_part(accuracy: &BackwardAccuracy) -> Result<f64> {
    ensure!(accuracy.passed(), "{accuracy}");
    Ok(accuracy.gradients().iter().fold(0.0, |worst, (_, gradient)| f64::max(worst, gradient.error / gradient.bound)))
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Attention { q, k, causal, .. } | Case::Backward { q, k, causal, .. } => {
                write!(f, "q {q:?}, k {k:?}{}", if *causal { ", causal" } else { "" })
            }
            Case::Feature { feature, .. } => f.write_str(feature.name),
            Case::Softmax { rows, columns, .. } => write!(f, "x [{rows}, {columns}]"),
        }
    }
}
