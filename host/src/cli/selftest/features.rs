//! Problems with one feature each, forward and backward.
use super::grid::{backward_part, part};
use crate::cli::inputs::normal;
use anyhow::Result;
use ferroflash::accuracy;
use ferroflash::{AttentionOptions, BackwardInputs, DType, Inputs, Session, Tensor};

const BATCH: usize = 2;
const SEQLEN_Q: usize = 35;
const SEQLEN_K: usize = 70;
/// Of Hopper's tiles several, and a tail.
const LONG: (usize, usize) = (300, 700);
const NHEADS: usize = 2;
const NHEADS_K: usize = 1;

/// Something that problems may have besides Q, K and V.
#[derive(Clone, Copy)]
pub struct Feature {
    pub name: &'static str,
    /// Whether only problems of f32 have it.
    f32_only: bool,
    /// Whether sequences are as long as several of Hopper's tiles.
    long: bool,
    /// Of the gradients that are computed, which are to be `deterministic`.
    gradients: &'static [bool],
    ask: fn(&mut Problem),
}

/// A problem of a dtype and a head dimension that its feature may change.
struct Problem {
    seqlen_q: usize,
    seqlen_k: usize,
    headdim: usize,
    headdim_v: usize,
    options: AttentionOptions,
    /// (batch, nheads, seqlen_q), of which some may be 1.
    bias: Option<[usize; 3]>,
    mask: Option<[usize; 3]>,
    alibi: bool,
    sinks: bool,
    varlen: bool,
    dlse: bool,
}

const fn feature(name: &'static str, ask: fn(&mut Problem)) -> Feature {
    Feature { name, f32_only: false, long: false, gradients: &[false, true], ask }
}

/// Of flash3, whose general gradients are summed in any order.
const fn of_hopper(name: &'static str, ask: fn(&mut Problem)) -> Feature {
    Feature { long: true, gradients: &[false], ..feature(name, ask) }
}

const FEATURES: [Feature; 14] = [
    feature("window", |problem| problem.options = problem.options.clone().window_size(20, 5)),
    feature("softmax_scale", |problem| problem.options.softmax_scale = Some(-0.1)),
    feature("softcap", |problem| problem.options.softcap = Some(10.0)),
    feature("ALiBi", |problem| problem.alibi = true),
    feature("bias", |problem| problem.bias = Some([BATCH, NHEADS, SEQLEN_Q])),
    feature("bias of all queries", |problem| problem.bias = Some([1, NHEADS, 1])),
    feature("mask", |problem| problem.mask = Some([BATCH, 1, 1])),
    feature("dropout", |problem| problem.options = problem.options.clone().dropout(0.17, 1, 0)),
    feature("sinks", |problem| problem.sinks = true),
    feature("varlen, causal", |problem| (problem.varlen, problem.options.causal) = (true, true)),
    feature("headdim of V", |problem| problem.headdim_v = problem.headdim / 2 + 8),
    // Rows that begin anywhere.
    feature("odd headdim", |problem| (problem.headdim, problem.headdim_v) = (problem.headdim - 5, problem.headdim - 3)),
    feature("dLSE", |problem| problem.dlse = true),
    Feature { f32_only: true, ..feature("tf32", |problem| problem.options.allow_tf32 = true) },
];

/// Those of flash3's general kernels.
pub const OF_HOPPER: [Feature; 9] = [
    of_hopper("window", |problem| problem.options = problem.options.clone().window_size(100, 30)),
    of_hopper("window, causal", |problem| {
        problem.options = problem.options.clone().window_size(200, None).causal(true)
    }),
    of_hopper("softmax_scale", |problem| problem.options.softmax_scale = Some(-0.1)),
    of_hopper("softcap", |problem| problem.options = problem.options.clone().softcap(10.0).causal(true)),
    of_hopper("softcap of 1", |problem| problem.options.softcap = Some(1.0)),
    of_hopper("ALiBi", |problem| problem.alibi = true),
    of_hopper("sinks, window", |problem| {
        (problem.sinks, problem.options) = (true, problem.options.clone().window_size(128, None).causal(true));
    }),
    Feature {
        gradients: &[],
        ..of_hopper("headdim of V, sinks", |problem| {
            (problem.sinks, problem.headdim_v) = (true, problem.headdim / 2 + 8);
        })
    },
    of_hopper("all, varlen", |problem| {
        problem.options = problem.options.clone().window_size(250, 10).softcap(20.0);
        (problem.alibi, problem.sinks, problem.varlen) = (true, true, true);
    }),
];

/// Those that problems of a dtype have.
pub fn of(dtype: DType) -> impl Iterator<Item = Feature> {
    FEATURES.into_iter().filter(move |feature| dtype == DType::F32 || !feature.f32_only)
}

impl Feature {
    /// Computes a problem that has it, with its gradients, and compares with f64.
    /// Returns the largest error as a part of the error that is allowed.
    pub fn check(&self, session: &Session, dtype: DType, headdim: usize) -> Result<f64> {
        let mut problem = Problem::plain(headdim);
        if self.long {
            (problem.seqlen_q, problem.seqlen_k) = LONG;
        }
        (self.ask)(&mut problem);
        problem.check(session, dtype, self.gradients)
    }
}

impl Problem {
    fn plain(headdim: usize) -> Self {
        Problem {
            seqlen_q: SEQLEN_Q,
            seqlen_k: SEQLEN_K,
            headdim,
            headdim_v: headdim,
            options: AttentionOptions::new(),
            bias: None,
            mask: None,
            alibi: false,
            sinks: false,
            varlen: false,
            dlse: false,
        }
    }

    fn check(&self, session: &Session, dtype: DType, gradients: &[bool]) -> Result<f64> {
        let &Problem { seqlen_q, seqlen_k, .. } = self;
        let tokens = |seqlen, nheads, headdim, seed| match self.varlen {
            false => normal(&[BATCH, seqlen, nheads, headdim], dtype, seed),
            true => normal(&[BATCH * seqlen, nheads, headdim], dtype, seed),
        };
        let q = tokens(seqlen_q, NHEADS, self.headdim, 1)?;
        let k = tokens(seqlen_k, NHEADS_K, self.headdim, 2)?;
        let v = tokens(seqlen_k, NHEADS_K, self.headdim_v, 3)?;
        let dout = tokens(seqlen_q, NHEADS, self.headdim_v, 4)?;
        let (starts_q, starts_k) = (starts(BATCH * seqlen_q)?, starts(BATCH * seqlen_k)?);
        let bias = self.bias.map(|[b, h, q]| normal(&[b, h, q, seqlen_k], dtype, 5)).transpose()?;
        let mask = self.mask.map(|[b, h, q]| seen(&[b, h, q, seqlen_k])).transpose()?;
        let slopes = self.alibi.then(|| Tensor::from_vec(vec![0.5f32, 0.125], &[NHEADS])).transpose()?;
        let sinks = self.sinks.then(|| normal(&[NHEADS], DType::F32, 6)).transpose()?;

        let mut inputs = Inputs::new(&q, &k, &v);
        inputs.bias = bias.as_ref().map(Tensor::view);
        inputs.mask = mask.as_ref().map(Tensor::view);
        inputs.alibi_slopes = slopes.as_ref().map(Tensor::view);
        inputs.sinks = sinks.as_ref().map(Tensor::view);
        if self.varlen {
            inputs = inputs.cu_seqlens(&starts_q, &starts_k);
        }
        let forward = session.attention_with(&inputs, &self.options)?;
        let mut worst = part(&accuracy::check_with(&inputs, &self.options, &forward)?)?;
        let dlse = self.dlse.then(|| normal(forward.softmax_lse.shape(), DType::F32, 7)).transpose()?;
        let mut backward = BackwardInputs::new(inputs.clone(), &forward.out, &forward.softmax_lse, &dout);
        backward.dlse = dlse.as_ref().map(Tensor::view);
        for &deterministic in gradients {
            let options = self.options.clone().deterministic(deterministic);
            let gradients = session.attention_backward_with(&backward, &options)?;
            let (dout, dlse) = (dout.view(), backward.dlse.as_ref());
            let accuracy = accuracy::check_backward_with(&inputs, &dout, dlse, &options, &gradients)?;
            worst = worst.max(backward_part(&accuracy)?);
        }
        Ok(worst)
    }
}

/// Three sequences: one of two tokens, one of none, and one of all others.
fn starts(total: usize) -> Result<Tensor> {
    Ok(Tensor::from_vec(vec![0, 2, 2, total as i32], &[4])?)
}

/// A mask that hides about one key of five.
fn seen(shape: &[usize]) -> Result<Tensor> {
    let seen = normal(shape, DType::F32, 8)?.to_f32().into_iter().map(|x| u8::from(x < 0.84)).collect();
    Ok(Tensor::from_vec::<u8>(seen, shape)?)
}
