//! Whether variants are right, and how fast they are.
use super::variants::Candidate;
use crate::cli::inputs::{normal, shuffle};
use anyhow::Result;
use ferroflash::{AttentionOptions, DType, Session, Tensor, TensorRef, accuracy};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::thread::sleep;
use std::time::Duration;

/// How long the GPU rests before each measurement: its clock falls under load.
const REST: Duration = Duration::from_millis(100);

/// Columns of O, of all heads.
const WIDTH: usize = 2048;

/// (batch, seqlen_q, seqlen_k) to check: within a block, beyond one, many with a last one that is not full; and more tiles
/// than a GPU has multiprocessors, with the mask, too, in units of two, so that blocks of threads go on to a next tile.
const CHECKED: [[usize; 3]; 5] = [[1, 1, 1], [2, 63, 200], [1, 257, 257], [1, 520, 777], [35, 260, 200]];
/// With grouped queries.
const HEADS: [usize; 2] = [4, 2];

/// What all measurements have in common.
pub struct Setting {
    pub session: Session,
    /// In ascending order.
    pub seqlens: Vec<usize>,
    pub tokens: usize,
    pub rounds: usize,
    pub repetitions: usize,
}

/// A variant with its TFLOP/s at each length.
#[derive(Clone, Debug)]
pub struct Measured {
    pub candidate: Candidate,
    pub tflops: Vec<f64>,
}

/// A variant's name, and what is wrong with it.
type Wrong = (&'static str, String);

/// The variants that agree with the reference, and those that do not.
pub fn check(session: &Session, candidates: Vec<Candidate>) -> Result<(Vec<Candidate>, Vec<Wrong>)> {
    let bar = bar(candidates.len());
    let (mut right, mut wrong) = (Vec::new(), Vec::new());
    for candidate in candidates {
        let name = candidate.variant.name();
        bar.set_message(format!("checking {name}"));
        match complaint(session, &candidate)? {
            None => right.push(candidate),
            Some(reason) => wrong.push((name, reason)),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((right, wrong))
}

/// What is wrong with a variant.
fn complaint(session: &Session, candidate: &Candidate) -> Result<Option<String>> {
    let config = candidate.variant.config();
    let (headdim, headdim_v) = (config.headdim as usize, config.headdim_v as usize);
    let session = session.clone().flash3_variant(candidate.variant);
    for [batch, seqlen_q, seqlen_k] in CHECKED {
        let tensor = |seqlen, nheads, headdim, seed| normal(&[batch, seqlen, nheads, headdim], config.dtype, seed);
        let q = tensor(seqlen_q, HEADS[0], headdim, 1)?;
        let k = tensor(seqlen_k, HEADS[1], headdim, 2)?;
        let v = tensor(seqlen_k, HEADS[1], headdim_v, 3)?;
        let options = options(candidate);
        let passed = session.attention(&q, &k, &v, &options).and_then(|result| {
            let accuracy = accuracy::check(&q, &k, &v, &options, &result)?;
            Ok((!accuracy.passed()).then(|| accuracy.to_string()))
        });
        match passed {
            Ok(None) => (),
            Ok(Some(inaccuracy)) => return Ok(Some(format!("{seqlen_q} queries, {seqlen_k} keys: {inaccuracy}"))),
            Err(error) => return Ok(Some(error.to_string())),
        }
    }
    Ok(None)
}

fn options(candidate: &Candidate) -> AttentionOptions {
    AttentionOptions::new().causal(candidate.variant.config().causal == Some(true))
}

/// Measures all variants at all lengths, in another order in each round.
pub fn measure(setting: &Setting, candidates: Vec<Candidate>) -> Result<Vec<Measured>> {
    let inputs = Inputs::random(&candidates, setting)?;
    let lengths = setting.seqlens.len();
    let mut turns: Vec<(usize, usize)> =
        (0..candidates.len()).flat_map(|i| (0..lengths).map(move |l| (i, l))).collect();
    let mut tflops = vec![Vec::with_capacity(setting.rounds); candidates.len() * lengths];
    let bar = bar(turns.len() * setting.rounds);
    for round in 0..setting.rounds {
        shuffle(&mut turns, round as u64);
        for &(index, length) in &turns {
            let (candidate, seqlen) = (&candidates[index], setting.seqlens[length]);
            bar.set_message(format!("{} at {seqlen} tokens", candidate.variant.name()));
            let [q, k, v] = inputs.of(candidate, seqlen, setting.tokens)?;
            let session = setting.session.clone().flash3_variant(candidate.variant).repetitions(2, setting.repetitions);
            sleep(REST);
            tflops[index * lengths + length].push(session.attention(q, k, v, &options(candidate))?.report.tflops());
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let of = |(index, candidate)| {
        let medians = tflops[index * lengths..][..lengths].iter().map(|rounds| median(rounds)).collect();
        Measured { candidate, tflops: medians }
    };
    Ok(candidates.into_iter().enumerate().map(of).collect())
}

fn median(x: &[f64]) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Q, K and V of a dtype and head dimensions, of one sequence as long as all. Others take their beginnings: random numbers
/// are made once.
struct Inputs(BTreeMap<Kind, [Tensor; 3]>);

/// The name of the dtype, and the head dimensions.
type Kind = (&'static str, usize, usize);

fn kind(candidate: &Candidate) -> (Kind, DType) {
    let config = candidate.variant.config();
    ((config.dtype.name(), config.headdim as usize, config.headdim_v as usize), config.dtype)
}

/// As many heads as O is wide.
fn heads(headdim_v: usize) -> usize {
    (WIDTH / headdim_v).max(1)
}

impl Inputs {
    fn random(candidates: &[Candidate], setting: &Setting) -> Result<Self> {
        let longest = setting.seqlens.iter().copied().max().unwrap_or(0).max(setting.tokens);
        let mut inputs = BTreeMap::new();
        for candidate in candidates {
            let (kind @ (_, headdim, headdim_v), dtype) = kind(candidate);
            if let Entry::Vacant(entry) = inputs.entry(kind) {
                let rows = longest * heads(headdim_v);
                let tensor = |columns, seed| normal(&[rows * columns], dtype, seed);
                entry.insert([tensor(headdim, 1)?, tensor(headdim, 2)?, tensor(headdim_v, 3)?]);
            }
        }
        Ok(Inputs(inputs))
    }

    /// As many sequences of a length as there are tokens for, at least one.
    fn of(&self, candidate: &Candidate, seqlen: usize, tokens: usize) -> Result<[TensorRef<'_>; 3]> {
        let (kind @ (_, headdim, headdim_v), _) = kind(candidate);
        let (batch, heads) = ((tokens / seqlen).max(1), heads(headdim_v));
        let [q, k, v] = &self.0[&kind];
        let part = |tensor, headdim| part(tensor, [batch, seqlen, heads, headdim]);
        Ok([part(q, headdim)?, part(k, headdim)?, part(v, headdim_v)?])
    }
}

/// The beginning of a tensor, in another shape.
fn part(tensor: &Tensor, shape: [usize; 4]) -> Result<TensorRef<'_>> {
    let bytes = shape.iter().product::<usize>() * tensor.dtype().bytes();
    Ok(TensorRef::from_bytes(tensor.dtype(), &tensor.bytes()[..bytes], &shape)?)
}

fn bar(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}, {elapsed}").expect("a valid template");
    ProgressBar::new(steps as u64).with_style(style)
}
