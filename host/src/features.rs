//! What a problem asks of a kernel beyond plain attention, one by one: each is a reason for which a kernel may be
//! refused.
use std::fmt;

use crate::options::WindowSize;
use crate::parameters::Access;
use crate::problem::Problem;

/// One thing that not every kernel can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feature {
    /// A causal mask, and no other window.
    Causal,
    /// A window that is neither a causal mask nor none.
    Window,
    /// A scale of 0 or less.
    Scale,
    /// A cap of the scores.
    Softcap,
    /// One in whose units numbers overflow or vanish.
    ExtremeSoftcap,
    /// ALiBi slopes.
    Alibi,
    /// A bias.
    Bias,
    /// A boolean mask.
    Mask,
    /// Dropout of P.
    Dropout,
    /// Attention sinks.
    Sinks,
    /// Fewer heads of K and V than of Q.
    GroupedQueries,
    /// Sequences of different lengths.
    Varlen,
    /// No queries at all.
    NoQueries,
    /// No keys at all.
    NoKeys,
    /// Heads of V that are longer or shorter than those of K.
    HeaddimV,
    /// Heads that are no multiple of eight elements.
    OddHeaddim,
    /// Addresses or strides that are no multiples of 16 bytes.
    Unaligned,
    /// Strides that no tensor map has.
    Unmapped,
}

impl Feature {
    /// What flash2's kernels know that are not `general`: whatever leaves the scores and the accesses as they are.
    pub const PLAIN: &[Feature] = &[
        Feature::Causal,
        Feature::Sinks,
        Feature::GroupedQueries,
        Feature::Varlen,
        Feature::NoQueries,
        Feature::NoKeys,
        Feature::HeaddimV,
        Feature::Unmapped,
    ];

    /// What kernels know that are `general`, unless they are for Hopper.
    pub const ALL: &[Feature] = &[
        Feature::Causal,
        Feature::Window,
        Feature::Scale,
        Feature::Softcap,
        Feature::ExtremeSoftcap,
        Feature::Alibi,
        Feature::Bias,
        Feature::Mask,
        Feature::Dropout,
        Feature::Sinks,
        Feature::GroupedQueries,
        Feature::Varlen,
        Feature::NoQueries,
        Feature::NoKeys,
        Feature::HeaddimV,
        Feature::OddHeaddim,
        Feature::Unaligned,
        Feature::Unmapped,
    ];

    /// What flash3's kernels know that are not `general`.
    pub const OF_HOPPER: &[Feature] =
        &[Feature::Causal, Feature::GroupedQueries, Feature::Varlen, Feature::NoQueries, Feature::HeaddimV];

    /// What its `general` ones know: whatever takes no tensor of scores and no random numbers, and has a tensor map.
    pub const OF_GENERAL_HOPPER: &[Feature] = &[
        Feature::Causal,
        Feature::Window,
        Feature::Scale,
        Feature::Softcap,
        Feature::Alibi,
        Feature::Sinks,
        Feature::GroupedQueries,
        Feature::Varlen,
        Feature::NoQueries,
        Feature::HeaddimV,
    ];

    /// What those of its backward pass know that are not `general`. Sinks are in the LSE already.
    pub const OF_HOPPER_BACKWARD: &[Feature] =
        &[Feature::Causal, Feature::Sinks, Feature::GroupedQueries, Feature::Varlen];

    /// What its `general` ones know.
    pub const OF_GENERAL_HOPPER_BACKWARD: &[Feature] = &[
        Feature::Causal,
        Feature::Window,
        Feature::Scale,
        Feature::Softcap,
        Feature::Alibi,
        Feature::Sinks,
        Feature::GroupedQueries,
        Feature::Varlen,
    ];

    /// What flash1 and standard attention know.
    pub const OF_ELDERS: &[Feature] =
        &[Feature::Causal, Feature::GroupedQueries, Feature::NoQueries, Feature::Unmapped];

    /// All that a problem asks for, whose tensors may be accessed so.
    pub fn of(problem: &Problem, Access { aligned, mapped }: Access) -> Vec<Feature> {
        let is_odd = |headdim: usize| !headdim.is_multiple_of(8);
        let odd = is_odd(problem.headdim) || is_odd(problem.headdim_v);
        let no_queries = problem.seqlen_q == 0 || problem.varlen.as_ref().is_some_and(|varlen| varlen.total_q == 0);
        let no_keys = problem.seqlen_k == 0 || problem.varlen.as_ref().is_some_and(|varlen| varlen.total_k == 0);
        let windowed = problem.window != WindowSize::default() && !problem.is_causal();
        [
            (problem.is_causal(), Feature::Causal),
            (windowed, Feature::Window),
            (problem.softmax_scale <= 0.0, Feature::Scale),
            (problem.softcap.is_some(), Feature::Softcap),
            (problem.softcap.is_some_and(|softcap| !(1e-20..=1e20).contains(&softcap)), Feature::ExtremeSoftcap),
            (problem.alibi, Feature::Alibi),
            (problem.bias.is_some(), Feature::Bias),
            (problem.mask.is_some(), Feature::Mask),
            (problem.dropout.is_some(), Feature::Dropout),
            (problem.sinks, Feature::Sinks),
            (problem.nheads_k != problem.nheads, Feature::GroupedQueries),
            (problem.varlen.is_some(), Feature::Varlen),
            (no_queries, Feature::NoQueries),
            (no_keys, Feature::NoKeys),
            (problem.headdim_v != problem.headdim, Feature::HeaddimV),
            (odd, Feature::OddHeaddim),
            (!aligned && !odd, Feature::Unaligned),
            (!mapped, Feature::Unmapped),
        ]
        .into_iter()
        .filter_map(|(asked, feature)| asked.then_some(feature))
        .collect()
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Causal => "a causal mask",
            Feature::Window => "window_size",
            Feature::Scale => "a softmax_scale of 0 or less",
            Feature::Softcap => "softcap",
            Feature::ExtremeSoftcap => "a softcap below 1e-20 or above 1e20",
            Feature::Alibi => "alibi_slopes",
            Feature::Bias => "bias",
            Feature::Mask => "mask",
            Feature::Dropout => "dropout",
            Feature::Sinks => "sinks",
            Feature::GroupedQueries => "fewer nheads_k than nheads",
            Feature::Varlen => "cu_seqlens",
            Feature::NoQueries => "a seqlen_q of 0",
            Feature::NoKeys => "a seqlen_k of 0",
            Feature::HeaddimV => "another headdim of v",
            Feature::OddHeaddim => "a headdim that is no multiple of 8",
            Feature::Unaligned => "addresses and strides that are no multiples of 16 bytes",
            Feature::Unmapped => "strides of 0 or of 2^40 bytes and more",
        })
    }
}
