//! What a caller may choose.
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Arguments of attention besides the tensors. Start from `AttentionOptions::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AttentionOptions {
    /// What Q Kᵀ is multiplied with before the softmax: positive and finite. `None`: 1/√headdim.
    pub softmax_scale: Option<f32>,
    /// Whether query i sees only the keys j <= i + seqlen_k - seqlen_q: a causal mask, aligned to the bottom right corner
    /// when the lengths differ. A row that sees no key has output 0 and LSE -inf.
    pub causal: bool,
}

impl AttentionOptions {
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
    pub enum Kernel: "kernel", "auto, standard, flash1, flash2" {
        /// The best that can run the problem.
        #[default]
        Auto = "auto",
        /// S and P in HBM, three passes: the baseline of the FlashAttention paper. Memory quadratic in the length.
        Standard = "standard",
        /// FlashAttention: outer loop over K and V; O, l and m in HBM.
        Flash1 = "flash1",
        /// FlashAttention-2: outer loop over Q, tensor cores.
        Flash2 = "flash2",
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
