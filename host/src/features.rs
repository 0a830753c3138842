//! What a problem asks of a kernel beyond plain attention, one by one: each is a reason for which a kernel may be
//! refused.
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

impl Feature {
    /// The argument and its value, as a problem asks for it.
    pub fn asked(self, problem: &Problem) -> String {
        let shape = |shape: Option<[usize; 4]>| format!("{:?}", shape.unwrap_or_default());
        match self {
            Feature::Causal => "causal".to_owned(),
            Feature::Window => format!("window_size {}", problem.window),
            Feature::Scale => format!("softmax_scale {}", problem.softmax_scale),
            Feature::Softcap | Feature::ExtremeSoftcap => {
                format!("softcap {}", in_units(problem.softcap.unwrap_or_default()))
            }
            Feature::Alibi => "alibi_slopes".to_owned(),
            Feature::Bias => format!("bias {}", shape(problem.bias)),
            Feature::Mask => format!("mask {}", shape(problem.mask)),
            Feature::Dropout => format!("dropout_p {}", problem.dropout.map_or(0.0, |dropout| dropout.p)),
            Feature::Sinks => "sinks".to_owned(),
            Feature::GroupedQueries => format!("nheads_k {}", problem.nheads_k),
            Feature::Varlen => format!("cu_seqlens of {} sequences", problem.batch),
            Feature::NoQueries => "seqlen_q 0".to_owned(),
            Feature::NoKeys => "seqlen_k 0".to_owned(),
            Feature::HeaddimV => format!("headdim {} of v", problem.headdim_v),
            Feature::OddHeaddim if problem.headdim.is_multiple_of(8) => format!("headdim {} of v", problem.headdim_v),
            Feature::OddHeaddim => format!("headdim {}", problem.headdim),
            Feature::Unaligned => "addresses or strides that are no multiples of 16 bytes".to_owned(),
            Feature::Unmapped => "strides of 0 or of 2^40 bytes and more".to_owned(),
        }
    }

    /// What that argument may be where this is not known.
    pub fn allowed(self, problem: &Problem) -> String {
        match self {
            Feature::Causal => "no causal".to_owned(),
            Feature::Window => "no window_size, or causal".to_owned(),
            Feature::Scale => "a softmax_scale above 0".to_owned(),
            Feature::Softcap => "no softcap".to_owned(),
            Feature::ExtremeSoftcap => "a softcap of 1e-20 to 1e20".to_owned(),
            Feature::Alibi => "no alibi_slopes".to_owned(),
            Feature::Bias => "no bias".to_owned(),
            Feature::Mask => "no mask".to_owned(),
            Feature::Dropout => "dropout_p 0".to_owned(),
            Feature::Sinks => "no sinks".to_owned(),
            Feature::GroupedQueries => format!("nheads_k {}, as nheads", problem.nheads),
            Feature::Varlen => "no cu_seqlens".to_owned(),
            Feature::NoQueries => "a seqlen_q of 1 or more".to_owned(),
            Feature::NoKeys => "a seqlen_k of 1 or more".to_owned(),
            Feature::HeaddimV => format!("headdim {} of v, as of q", problem.headdim),
            Feature::OddHeaddim => "a headdim that is a multiple of 8".to_owned(),
            Feature::Unaligned => "multiples of 16 bytes".to_owned(),
            Feature::Unmapped => "strides of 1 element to 2^40 bytes".to_owned(),
        }
    }
}

/// A number as it was probably written: without the many zeros of one that is very large or small.
fn in_units(x: f32) -> String {
    if (1e-4..1e7).contains(&x) { x.to_string() } else { format!("{x:e}") }
}
