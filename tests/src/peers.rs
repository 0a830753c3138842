//! FlashAttention's own tests: the grid of its `test_flash_attn_output` and `test_flash_attn_varlen_output`, and the
//! rule that they hold results to. Source: Dao-AILab/flash-attention, tests/test_flash_attn.py.
use std::fmt;

use ferroflash::{AttentionOptions, DType, Session, Tensor, reference};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::combination::Combination;
use crate::placed::Placement;

/// The grid's dtypes.
pub const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// Its head dimensions.
pub const HEAD_DIMS: [usize; 12] = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256];
/// Its (seqlen_q, seqlen_k).
pub const LENGTHS: [(usize, usize); 10] = [
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
    (2048, 2048),
];
/// Its heads of K and V, for six of Q.
const NHEADS_K: [usize; 3] = [6, 1, 2];
const DROPOUT: f32 = 0.17;
const SOFTCAP: f32 = 50.0;

/// A cell of the grid.
#[derive(Clone, Debug)]
pub struct Cell {
    dtype: DType,
    headdim: usize,
    lengths: (usize, usize),
    nheads_k: usize,
    deterministic: bool,
    alibi: bool,
    local: bool,
    causal: bool,
    /// Never together with a cap, as there.
    dropout: bool,
    softcap: bool,
    varlen: bool,
    batch: usize,
    seed: u64,
    /// Whether errors may be larger by two roundings at the scale of 0.3, and means are not compared, as in the tests of
    /// FlashAttention-3: of one key a plain implementation makes no error at all.
    roundings: bool,
}

/// (seqlen_q, seqlen_k) of their other tests, which are not in the grid.
pub const OTHER_LENGTHS: [(usize, usize); 4] = [(97, 97), (200, 200), (768, 768), (1025, 1025)];
/// Those of few tokens on one side.
pub const ODD_LENGTHS: [(usize, usize); 4] = [(239, 1), (799, 3), (1, 239), (3, 799)];

/// Cells of these lengths, by the grid's rule and with roundings.
pub fn named() -> Vec<Cell> {
    let mut cells = Vec::new();
    let lengths = OTHER_LENGTHS.map(|lengths| (lengths, false)).into_iter();
    for (lengths, roundings) in lengths.chain(ODD_LENGTHS.map(|lengths| (lengths, true))) {
        for headdim in [32, 64, 96, 128, 192, 256] {
            for causal in [false, true] {
                let seed = cells.len() as u64;
                let cell = Cell::drawn(DTYPES[seed as usize / 2 % 2], headdim, lengths, 1, seed);
                cells.push(Cell { causal, roundings, ..cell });
                // And nothing else, which is a kernel of its own.
                let nothing =
                    Cell { alibi: false, local: false, dropout: false, softcap: false, varlen: false, ..cell };
                cells.push(Cell { causal, roundings, ..nothing });
            }
        }
    }
    cells
}

/// The largest difference that adding 0.3 and taking it away again makes.
pub fn roundoff(dtype: DType, values: &[f32]) -> f32 {
    let rounded = |values: Vec<f32>| {
        let count = values.len();
        Tensor::from_vec(values, &[count]).expect("as many").convert(dtype).to_f32()
    };
    let offset = rounded(vec![0.3])[0];
    let there = rounded(values.iter().map(|x| x + offset).collect());
    let back = rounded(there.into_iter().map(|x| x - offset).collect());
    back.iter().zip(values).map(|(back, x)| (back - x).abs()).fold(0.0, f32::max)
}

fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

/// The grid: of each head dimension and pair of lengths one cell, of short sequences more and of both dtypes. The other
/// parameters differ from cell to cell, so that any two meet in all ways. All 46080 cells would take a day in f64.
pub fn grid() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (i, lengths) in LENGTHS.into_iter().enumerate() {
        let (batch, draws) = match lengths.0 * lengths.1 {
            ..100_000 => (2, 3),
            100_000..1_000_000 => (1, 2),
            _ => (1, 1),
        };
        for (j, headdim) in HEAD_DIMS.into_iter().enumerate() {
            let dtypes = if draws > 1 { &DTYPES[..] } else { std::slice::from_ref(&DTYPES[(i + j) % 2]) };
            for &dtype in dtypes {
                let seed = cells.len() as u64;
                cells.extend((seed..seed + draws).map(|seed| Cell::drawn(dtype, headdim, lengths, batch, seed)));
            }
        }
    }
    cells
}

impl Cell {
    fn drawn(dtype: DType, headdim: usize, lengths: (usize, usize), batch: usize, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Cell {
            dtype,
            headdim,
            lengths,
            nheads_k: NHEADS_K[seed as usize / 3 % 3],
            deterministic: random.random(),
            alibi: random.random(),
            local: random.random(),
            causal: random.random(),
            dropout: seed % 3 == 1,
            softcap: seed % 3 == 2,
            varlen: random.random(),
            batch,
            seed,
            roundings: false,
        }
    }

    /// Whether its sequences are among the short ones of the grid.
    pub fn is_short(&self) -> bool {
        self.lengths.0.max(self.lengths.1) <= 256
    }

    /// Whether it has no more than a mask.
    pub fn is_plain(&self) -> bool {
        !(self.alibi || self.local || self.dropout || self.softcap)
    }

    /// The problem that it poses.
    fn problem(&self) -> Combination {
        let Cell { dtype, headdim, lengths, nheads_k, causal, alibi, varlen, batch, seed, .. } = *self;
        let mut random = StdRng::seed_from_u64(!seed);
        let mut options = AttentionOptions::new().causal(causal).deterministic(self.deterministic);
        if self.local {
            let mut side = || random.random_range(0..lengths.1);
            options = options.window_size(side(), side());
        }
        if self.dropout {
            options = options.dropout(DROPOUT, seed, 0);
        }
        if self.softcap {
            // Its Q is as many times as large, so that the cap has something to do.
            options = options.softcap(SOFTCAP).softmax_scale(SOFTCAP / (headdim as f32).sqrt());
        }
        // Sequences in a padded batch are there shorter than it by up to 20.
        let mut length = |longest: usize| {
            if varlen { random.random_range(longest.saturating_sub(20).max(1)..=longest) } else { longest }
        };
        Combination {
            dtype,
            lengths: (0..batch).map(|_| (length(lengths.0), length(lengths.1))).collect(),
            varlen,
            nheads_k,
            group: 6 / nheads_k,
            headdim,
            headdim_v: headdim,
            options,
            bias: None,
            mask: None,
            alibi: alibi.then_some(true),
            sinks: false,
            dlse: false,
            placement: Placement::Packed,
            seed,
        }
    }

    /// Runs it forward and backward. The largest error against f64 is at most twice, of gradients thrice, that of a
    /// plain implementation in the same dtype: their rule. And no mean error is larger than the plain implementation's.
    ///
    /// # Errors
    /// Whatever is broken.
    pub fn check(&self, session: &Session) -> Result<(), String> {
        let broken = self.broken(session).map_err(|error| format!("{self}: {error}"))?;
        if broken.is_empty() { Ok(()) } else { Err(format!("{self}: {}", broken.join(", "))) }
    }

    fn broken(&self, session: &Session) -> Result<Vec<String>, ferroflash::Error> {
        let problem = self.problem();
        let tensors = problem.tensors();
        let forward = problem.forward(session, &tensors)?;
        let gradients = problem.backward(session, &tensors, &forward)?;

        let backward = tensors.backward_inputs(&forward);
        let (inputs, dout, options) = (&backward.forward, &backward.dout, &problem.options);
        let exact = reference::attention_with(inputs, options)?;
        let plain = reference::plain_with(inputs, options)?;
        let exact_gradients = reference::attention_backward_with(inputs, dout, None, options)?;
        let plain_gradients = reference::plain_backward_with(inputs, dout, None, options)?;
        let compared = [
            ("out", 2.0, &forward.out, &plain.out, &exact.out),
            ("dq", 3.0, &gradients.dq, &plain_gradients.dq, &exact_gradients.dq),
            ("dk", 3.0, &gradients.dk, &plain_gradients.dk, &exact_gradients.dk),
            ("dv", 3.0, &gradients.dv, &plain_gradients.dv, &exact_gradients.dv),
        ];
        let broken = compared.into_iter().filter_map(|(name, factor, found, plain, exact)| {
            let (found, plain) = (Errors::of(&found.to_f32(), exact), Errors::of(plain, exact));
            let kept = match self.roundings {
                true => found.max <= factor * plain.max + 2.0 * f64::from(roundoff(self.dtype, &single(exact))),
                false => found.max <= factor * plain.max && found.mean <= plain.mean,
            };
            (!kept).then(|| format!("{name}: {found}; plain implementation {plain}"))
        });
        Ok(broken.collect())
    }

    /// The parameters of the grid, and what they are here.
    pub fn parameters(&self) -> [(&'static str, String); 11] {
        [
            ("dtype", self.dtype.name().to_owned()),
            ("headdim", self.headdim.to_string()),
            ("lengths", format!("{:?}", self.lengths)),
            ("nheads_k", self.nheads_k.to_string()),
            ("deterministic", self.deterministic.to_string()),
            ("alibi", self.alibi.to_string()),
            ("local", self.local.to_string()),
            ("causal", self.causal.to_string()),
            ("dropout", self.dropout.to_string()),
            ("softcap", self.softcap.to_string()),
            ("varlen", self.varlen.to_string()),
        ]
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameters = self.parameters().map(|(name, value)| format!("{name} {value}"));
        write!(f, "{}, batch {}, seed {}", parameters.join(", "), self.batch, self.seed)
    }
}

/// Errors against f64.
struct Errors {
    max: f64,
    mean: f64,
}

impl Errors {
    /// Of all elements. That of a NaN is NaN, which no bound allows.
    fn of(found: &[f32], exact: &[f64]) -> Self {
        assert_eq!(found.len(), exact.len());
        let errors = || found.iter().zip(exact).map(|(&found, exact)| (f64::from(found) - exact).abs());
        let max = errors().max_by(f64::total_cmp).unwrap_or(0.0);
        Errors { max, mean: errors().sum::<f64>() / found.len().max(1) as f64 }
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "max {:.2e}, mean {:.3e}", self.max, self.mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn any_two_parameters_meet_in_all_ways() {
        let mut values = BTreeMap::<_, BTreeSet<_>>::new();
        let mut met = BTreeMap::<_, BTreeSet<_>>::new();
        for cell in grid() {
            let parameters = cell.parameters();
            for (i, (name, value)) in parameters.iter().enumerate() {
                values.entry(*name).or_default().insert(value.clone());
                for (other, other_value) in &parameters[..i] {
                    met.entry((*other, *name)).or_default().insert((other_value.clone(), value.clone()));
                }
            }
        }
        for ((one, other), met) in met {
            let both = if (one, other) == ("dropout", "softcap") { 1 } else { 0 };
            assert_eq!(met.len(), values[one].len() * values[other].len() - both, "{one} and {other}");
        }
        assert_eq!(values["headdim"].len(), HEAD_DIMS.len());
        assert_eq!(values["lengths"].len(), LENGTHS.len());
    }

    #[test]
    fn a_nan_is_an_error_that_nothing_allows() {
        let errors = Errors::of(&[1.0, f32::NAN, 1.0], &[1.0, 1.0, 3.0]);
        assert!(errors.max.is_nan() && errors.mean.is_nan());
        let errors = Errors::of(&[1.0, 2.0], &[1.5, 4.0]);
        assert_eq!((errors.max, errors.mean), (2.0, 1.25));
    }
}
