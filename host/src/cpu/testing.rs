//! What the CPU backend is tested with: random problems of all features, and attention by its definition in f64, an
//! element of S at a time.
use cuda_std::DType;
use proptest::prelude::*;

use super::tile::BLOCK;
use crate::accuracy::largest;
use crate::element::Element;
use crate::inputs::Inputs;
use crate::operands::Operands;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::sequences::Sequences;
use crate::tensor::{Tensor, TensorRef};

pub mod naive;

/// What of (batch, nheads, seqlen_q) a tensor of scores has one for all.
pub type Broadcast = [bool; 3];

/// A problem, and the seed of its tensors.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: DType,
    /// seqlen_q and seqlen_k of each sequence. All alike, unless they follow each other in one tensor.
    pub sequences: Vec<(usize, usize)>,
    pub varlen: bool,
    pub nheads_k: usize,
    pub group: usize,
    pub headdim: usize,
    pub headdim_v: usize,
    pub options: AttentionOptions,
    pub bias: Option<Broadcast>,
    pub mask: Option<Broadcast>,
    /// Whether the slopes differ from one sequence to the next.
    pub alibi: Option<bool>,
    pub sinks: bool,
    pub seed: u64,
}

impl Case {
    /// Plain attention of two sequences.
    pub fn plain(seqlen_q: usize, seqlen_k: usize, options: AttentionOptions) -> Self {
        Case {
            dtype: DType::F32,
            sequences: vec![(seqlen_q, seqlen_k); 2],
            varlen: false,
            nheads_k: 2,
            group: 2,
            headdim: 16,
            headdim_v: 16,
            options,
            bias: None,
            mask: None,
            alibi: None,
            sinks: false,
            seed: 1,
        }
    }

    /// The tensors. All but slopes and sinks are small numbers of either sign.
    pub fn tensors(&self) -> Tensors {
        let Case { dtype, nheads_k, headdim, headdim_v, seed, .. } = *self;
        let nheads = nheads_k * self.group;
        let (batch, total): (_, fn(usize, usize) -> usize) =
            if self.varlen { (None, |sum, x| sum + x) } else { (Some(self.sequences.len()), |_, x| x) };
        let total_q = self.sequences.iter().map(|&(q, _)| q).fold(0, total);
        let total_k = self.sequences.iter().map(|&(_, k)| k).fold(0, total);
        let tokens = |total, nheads, headdim| batch.into_iter().chain([total, nheads, headdim]).collect::<Vec<_>>();
        let longest = |of: fn(&(usize, usize)) -> usize| self.sequences.iter().map(of).max().unwrap_or(0);
        let scores = |[one_batch, one_head, one_row]: Broadcast| {
            let extent = |one, extent| if one { 1 } else { extent };
            let batches = extent(one_batch, self.sequences.len());
            [batches, extent(one_head, nheads), extent(one_row, longest(|&(q, _)| q)), longest(|&(_, k)| k)]
        };
        let f32s = |shape: &[usize], seed| random(shape, self.seed ^ seed);
        let make = |shape: &[usize], seed| f32s(shape, seed).convert(dtype);
        let lse = match batch {
            Some(batch) => vec![batch, nheads, total_q],
            None => vec![nheads, total_q],
        };
        Tensors {
            q: make(&tokens(total_q, nheads, headdim), 2),
            k: make(&tokens(total_k, nheads_k, headdim), 3),
            v: make(&tokens(total_k, nheads_k, headdim_v), 4),
            dout: make(&tokens(total_q, nheads, headdim_v), 5),
            dlse: f32s(&lse, 6),
            bias: self.bias.map(|broadcast| make(&scores(broadcast), 7)),
            mask: self.mask.map(|broadcast| {
                // Here and there a key is hidden, and all of one block, if there are so many.
                let shape = scores(broadcast);
                let hidden = |i: usize| i % shape[3] / BLOCK == (seed % 8) as usize;
                let visible = random(&shape, seed ^ 8).to_f32().into_iter().enumerate();
                let visible = visible.map(|(i, x)| if hidden(i) || x < -0.7 { 0 } else { 1 + i as u8 % 255 }).collect();
                Tensor::from_vec::<u8>(visible, &shape).expect("as many")
            }),
            slopes: self.alibi.map(|each| {
                let shape = if each { vec![self.sequences.len(), nheads] } else { vec![nheads] };
                let slopes = f32s(&shape, 9).to_f32().iter().map(|x| 0.1 * x.abs()).collect();
                Tensor::from_vec::<f32>(slopes, &shape).expect("as many")
            }),
            sinks: self.sinks.then(|| f32s(&[nheads], 10)),
            cu_seqlens: self.varlen.then(|| {
                [|&(q, _): &(usize, usize)| q as i32, |&(_, k): &(usize, usize)| k as i32].map(|of| {
                    let mut ends = vec![0];
                    self.sequences.iter().for_each(|sequence| ends.push(ends[ends.len() - 1] + of(sequence)));
                    let shape = [ends.len()];
                    Tensor::from_vec(ends, &shape).expect("as many")
                })
            }),
            options: self.options.clone(),
        }
    }
}

/// Numbers that look random, between -3 and 3.
fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let data = (0..shape.iter().product()).map(|_| next() + next() + next()).collect::<Vec<_>>();
    Tensor::from_vec(data, shape).expect("as many as the shape says")
}

/// Any combination of features.
pub fn cases() -> impl Strategy<Value = Case> {
    let lengths = || prop_oneof![4 => 0..150usize, 1 => Just(1), 1 => Just(64), 1 => Just(128)];
    let broadcast = || prop::option::of(any::<Broadcast>());
    let options = (
        (prop_oneof![Just(None), Just(Some(-0.3f32)), Just(Some(0.0)), Just(Some(0.7))], any::<bool>()),
        (prop::option::of(0..100usize), prop::option::of(0..100usize)),
        prop::option::of(0.5..20f32),
        prop::option::of(0.05..0.6f32),
    )
        .prop_map(|((scale, causal), (left, right), softcap, dropout)| {
            let mut options = AttentionOptions::new().causal(causal).window_size(left, right);
            (options.softmax_scale, options.softcap) = (scale, softcap);
            dropout.map_or(options.clone(), |p| options.dropout(p, 0x0123_4567_89ab_cdef, 1 << 33 | 5))
        });
    let shapes = (prop::collection::vec((lengths(), lengths()), 1..3), 1..3usize, 1..3usize, 1..40usize, 1..40usize);
    let dtypes = prop_oneof![2 => Just(DType::F32), 1 => Just(DType::F16), 1 => Just(DType::BF16)];
    let tensors = (broadcast(), broadcast(), prop::option::of(any::<bool>()), any::<bool>());
    (dtypes, shapes, any::<bool>(), options, tensors, any::<u64>()).prop_map(
        |(dtype, (mut sequences, nheads_k, group, headdim, headdim_v), varlen, options, tensors, seed)| {
            let (bias, mask, alibi, sinks) = tensors;
            if !varlen {
                let first = sequences[0];
                sequences.fill(first);
            }
            Case {
                dtype,
                sequences,
                varlen,
                nheads_k,
                group,
                headdim,
                headdim_v,
                options,
                bias,
                mask,
                alibi,
                sinks,
                seed,
            }
        },
    )
}

/// A feature each, and the names of them.
pub fn features() -> Vec<(&'static str, Case)> {
    let options = AttentionOptions::new;
    let plain = |options| Case::plain(100, 150, options);
    let with = |change: fn(&mut Case)| {
        let mut case = plain(options());
        change(&mut case);
        case
    };
    vec![
        ("plain", plain(options())),
        ("causal", plain(options().causal(true))),
        ("causal, more queries than keys", Case::plain(150, 100, options().causal(true))),
        ("window", plain(options().window_size(20, 30))),
        ("window to the left", Case::plain(200, 200, options().window_size(10, 0))),
        ("negative scale", plain(options().softmax_scale(-0.2))),
        ("no scale", plain(options().softmax_scale(0.0))),
        ("softcap", plain(options().softcap(2.0))),
        ("dropout", plain(options().dropout(0.3, 11, 7))),
        ("bias", with(|case| case.bias = Some([false; 3]))),
        ("bias of all", with(|case| case.bias = Some([true; 3]))),
        ("bias of heads", with(|case| case.bias = Some([true, false, false]))),
        ("mask", with(|case| case.mask = Some([false; 3]))),
        ("key-padding mask", with(|case| case.mask = Some([false, true, true]))),
        ("ALiBi", with(|case| case.alibi = Some(false))),
        ("sinks", with(|case| case.sinks = true)),
        ("head dims", with(|case| (case.headdim, case.headdim_v) = (24, 40))),
        ("f16", with(|case| case.dtype = DType::F16)),
        ("bf16", with(|case| case.dtype = DType::BF16)),
        (
            "sequences of different lengths",
            Case { varlen: true, sequences: vec![(70, 130), (0, 5), (100, 3), (5, 0), (1, 70)], ..plain(options()) },
        ),
    ]
}

/// What a case is computed from.
pub struct Tensors {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub dout: Tensor,
    pub dlse: Tensor,
    pub bias: Option<Tensor>,
    pub mask: Option<Tensor>,
    pub slopes: Option<Tensor>,
    pub sinks: Option<Tensor>,
    cu_seqlens: Option<[Tensor; 2]>,
    options: AttentionOptions,
}

impl Tensors {
    fn inputs(&self) -> Inputs<TensorRef<'_>> {
        let mut inputs = Inputs::new(&self.q, &self.k, &self.v);
        inputs.bias = self.bias.as_ref().map(Tensor::view);
        inputs.mask = self.mask.as_ref().map(Tensor::view);
        inputs.alibi_slopes = self.slopes.as_ref().map(Tensor::view);
        inputs.sinks = self.sinks.as_ref().map(Tensor::view);
        if let Some([q, k]) = &self.cu_seqlens {
            inputs = inputs.cu_seqlens(q, k);
        }
        inputs
    }

    /// The problem that they pose.
    pub fn problem(&self) -> Problem {
        let inputs = self.inputs();
        let sequences = Sequences::read(&inputs).expect("valid");
        Problem::of(&inputs.map(|_, tensor| tensor.layout()), sequences, &self.options).expect("valid")
    }

    /// The operands, of the type that their dtype says.
    pub fn operands<T: Element>(&self) -> Operands<'_, T> {
        Operands::new(&self.problem(), &self.inputs())
    }
}

/// Puts a number into an f32 tensor, if there is a place for it.
pub fn put(tensor: &mut Tensor, index: prop::sample::Index, x: f32) {
    if !tensor.is_empty() {
        let index = index.index(tensor.len());
        tensor.as_mut_slice::<f32>().expect("of f32")[index] = x;
    }
}

/// Checks numbers of a dtype: within a rounding of it and 1e-5 of the largest; NaN and infinities where they are
/// expected.
pub fn assert_close(what: &str, dtype: DType, found: &[f32], expected: &[f64]) {
    assert_close_beside(what, dtype, found, expected, largest(expected));
}

/// The same where NaN may have taken the place of the largest, which are known from elsewhere.
pub fn assert_close_beside(what: &str, dtype: DType, found: &[f32], expected: &[f64], largest: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let rounding = match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.0,
    };
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let found = f64::from(found);
        let close = (found - expected).abs() <= 1e-5 * largest + rounding * expected.abs();
        let same = found == expected || found.is_nan() && expected.is_nan();
        assert!(close || same, "{what} at {i}: {found:e}, but {expected:e} is right; the largest is {largest:e}");
    }
}
