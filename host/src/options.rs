//! What a caller may choose.
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Arguments of attention besides the tensors. Start from `AttentionOptions::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AttentionOptions {
    /// What Q Kᵀ is multiplied with before the softmax: finite. `None`: 1/√headdim.
    pub softmax_scale: Option<f32>,
    /// Whether query i sees only the keys j <= i + seqlen_k - seqlen_q: a causal mask, aligned to the bottom right corner
    /// when the lengths differ. A row that sees no key has output 0 and LSE -inf. The same as a window of 0 keys to the right.
    pub causal: bool,
    /// How far from its own place, i + seqlen_k - seqlen_q, query i sees.
    pub window_size: WindowSize,
    /// The scores S become `softcap · tanh(S / softcap)`: positive and finite. `None`: they stay as they are.
    pub softcap: Option<f32>,
    /// Which part of P is dropped. `None`: nothing.
    pub dropout: Option<Dropout>,
    /// Whether gradients must be the same bits in every run and in every batch. Else a faster way may be taken: dQ summed by
    /// atomic additions. Of [`Kernel::Flash2`](crate::Kernel::Flash2) no NaN or infinity reaches the gradients of what does not see
    /// it then either; of [`Kernel::Flash3`](crate::Kernel::Flash3) it may, if it is seen by others in the same block.
    pub deterministic: bool,
    /// Whether products of f32 tensors may be computed in tf32, with 10 bits of mantissa, on tensor cores. f16 and bf16 are
    /// not affected.
    pub allow_tf32: bool,
    /// Into how many parts the keys of a tile of queries are divided among the multiprocessors of a GPU, in kernels that can:
    /// 0 for as many as seems best, which depends on nothing but the lengths, 1 for no division, at most
    /// [`MOST_SPLITS`](Self::MOST_SPLITS). It changes results in their last bits.
    pub num_splits: usize,
    /// The longest sequence of queries, where `cu_seqlens_q` says where each begins. Needed where that is in device memory;
    /// else found out.
    pub max_seqlen_q: Option<usize>,
    /// The longest sequence of keys, likewise.
    pub max_seqlen_k: Option<usize>,
}

/// A sliding window: query i sees the keys from `i + seqlen_k - seqlen_q - left` to `i + seqlen_k - seqlen_q + right`, both
/// included. `None`: as many as there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WindowSize {
    /// Keys to the left.
    pub left: Option<usize>,
    /// Keys to the right. At most 0 with a causal mask.
    pub right: Option<usize>,
}

impl fmt::Display for WindowSize {
    /// `(128, 0)`; `(128, all)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |keys: Option<usize>| keys.map_or_else(|| "all".to_owned(), |keys| keys.to_string());
        write!(f, "({}, {})", side(self.left), side(self.right))
    }
}

/// Dropout of P, with numbers that depend on nothing but these, the batch, the head, the query and the key: the same on
/// every backend, forward and backward, and never stored. The generator is Philox4x32-10.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability that an element of P becomes 0; at least 0, below 1, honoured to the next 1/65536. The others are
    /// divided by 1 - p.
    pub p: f32,
    /// The key of the generator.
    pub seed: u64,
    /// Where in the generator's sequence to begin: another number for each layer and step. Its low 32 bits are a word of the
    /// counter, its high 32 bits are added to those of the key: seed s with offset 2^32 drops what seed s + 2^32 with offset 0
    /// does. Offsets below 2^32 give each seed numbers of its own.
    pub offset: u64,
}

impl AttentionOptions {
    /// The most parts that keys are divided into.
    pub const MOST_SPLITS: usize = 128;

    /// No mask, scale 1/√headdim.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the scale.
    pub fn softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Sets or clears the causal mask.
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Sets the window: keys to the left and to the right, `None` for as many as there are.
    pub fn window_size(mut self, left: impl Into<Option<usize>>, right: impl Into<Option<usize>>) -> Self {
        self.window_size = WindowSize { left: left.into(), right: right.into() };
        self
    }

    /// Sets the cap of the scores.
    pub fn softcap(mut self, softcap: f32) -> Self {
        self.softcap = Some(softcap);
        self
    }

    /// Sets dropout.
    pub fn dropout(mut self, p: f32, seed: u64, offset: u64) -> Self {
        self.dropout = Some(Dropout { p, seed, offset });
        self
    }

    /// Asks for gradients that are the same bits in every run, or does not.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Allows tf32 products of f32 tensors, or does not.
    pub fn allow_tf32(mut self, allow_tf32: bool) -> Self {
        self.allow_tf32 = allow_tf32;
        self
    }

    /// Says into how many parts keys are divided.
    pub fn num_splits(mut self, num_splits: usize) -> Self {
        self.num_splits = num_splits;
        self
    }

    /// Says how long the longest sequences are, where `cu_seqlens_q` and `cu_seqlens_k` say where each begins.
    pub fn max_seqlens(mut self, q: usize, k: usize) -> Self {
        (self.max_seqlen_q, self.max_seqlen_k) = (Some(q), Some(k));
        self
    }
}

/// Defines an enum whose variants have a name each, printed and parsed.
macro_rules! named_choices {
    (
        $(#[$enum_attribute:meta])* $vis:vis enum $choice:ident: $what:literal, $allowed:literal {
            $($(#[$attribute:meta])* $variant:ident = $name:literal,)*
        }
    ) => {
        $(#[$enum_attribute])*
        $vis enum $choice {
            $($(#[$attribute])* $variant,)*
        }

        impl $choice {
            /// All of them.
            pub const ALL: &'static [$choice] = &[$($choice::$variant),*];

            /// Their names, in the same order.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// Its name, as commands and reports use it.
            pub const fn name(self) -> &'static str {
                match self {
                    $($choice::$variant => $name,)*
                }
            }
        }

        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $choice {
            type Err = Error;

            fn from_str(word: &str) -> Result<Self> {
                let found = Self::ALL.iter().find(|choice| choice.name() == word);
                found.copied().ok_or_else(|| Error::Choice { what: $what, found: word.to_owned(), allowed: $allowed })
            }
        }
    };
}
pub(crate) use named_choices;

named_choices! {
    /// Which kernel family computes attention on a GPU, or on the simulated one.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[non_exhaustive]
    pub enum Kernel: "kernel", "auto, standard, flash1, flash2, flash3" {
        /// The best that can run the problem.
        #[default]
        Auto = "auto",
        /// S and P in HBM, three passes: the baseline of the FlashAttention paper. Memory quadratic in the length.
        Standard = "standard",
        /// FlashAttention: outer loop over K and V; O, l and m in HBM.
        Flash1 = "flash1",
        /// FlashAttention-2: outer loop over Q, tensor cores.
        Flash2 = "flash2",
        /// FlashAttention-3: the same on Hopper, with asynchronous copies and products, and specialised warps.
        Flash3 = "flash3",
    }
}

impl Kernel {
    /// Whether the family has a backward pass.
    pub const fn has_backward(self) -> bool {
        matches!(self, Kernel::Auto | Kernel::Flash2 | Kernel::Flash3)
    }
}

named_choices! {
    /// How a row's softmax is computed.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[non_exhaustive]
    pub enum SoftmaxMethod: "softmax method", "two-pass, online" {
        /// The maximum in a first pass over the row, the sum in a second, the result in a third.
        TwoPass = "two-pass",
        /// Maximum and sum in one pass, the result in a second.
        #[default]
        Online = "online",
    }
}
