//! Problems with one feature each, and with all of them.
use ferroflash::{AttentionOptions, DType};

use crate::combination::Combination;
use crate::placed::Placement;

/// A feature, and how a problem gets it.
pub type Feature = (&'static str, fn(&mut Combination));

/// All that problems may have besides Q, K and V, one by one and together.
pub const FEATURES: [Feature; 14] = [
    ("nothing", |_| ()),
    ("causal", |problem| problem.options.causal = true),
    ("window", window),
    ("scale", |problem| problem.options.softmax_scale = Some(-0.1)),
    ("softcap", softcap),
    ("alibi", |problem| problem.alibi = Some(true)),
    ("bias", |problem| problem.bias = Some([false; 3])),
    ("broadcast bias", |problem| problem.bias = Some([true, false, true])),
    ("mask", mask),
    ("dropout", dropout),
    ("sinks", |problem| problem.sinks = true),
    ("varlen", varlen),
    ("dlse", |problem| problem.dlse = true),
    ("everything", |problem| {
        let all = [window, softcap, mask, dropout, varlen];
        all.into_iter().for_each(|feature| feature(problem));
        (problem.alibi, problem.bias) = (Some(false), Some([true, false, false]));
        (problem.sinks, problem.dlse) = (true, true);
    }),
];

fn window(problem: &mut Combination) {
    problem.options = problem.options.clone().window_size(20, 5);
}

fn softcap(problem: &mut Combination) {
    problem.options.softcap = Some(10.0);
}

fn mask(problem: &mut Combination) {
    problem.mask = Some([false, true, false]);
}

fn dropout(problem: &mut Combination) {
    problem.options = problem.options.clone().dropout(0.17, 7, 3);
}

fn varlen(problem: &mut Combination) {
    problem.varlen = true;
    problem.lengths.extend([(0, 3), (9, 0), (17, 40)]);
}

/// Two sequences with two heads of K and V and twice as many of Q, and nothing else.
pub fn plain(dtype: DType, lengths: (usize, usize), headdims: (usize, usize)) -> Combination {
    Combination {
        dtype,
        lengths: vec![lengths; 2],
        varlen: false,
        nheads_k: 2,
        group: 2,
        headdim: headdims.0,
        headdim_v: headdims.1,
        options: AttentionOptions::new(),
        bias: None,
        mask: None,
        alibi: None,
        sinks: false,
        dlse: false,
        placement: Placement::Packed,
        seed: 1,
    }
}
