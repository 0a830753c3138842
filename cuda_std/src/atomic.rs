//! Atomic read-modify-write, relaxed, at the scope of the GPU (global) or of the block (shared). Each returns the old value.
//! PTX ISA: `atom.global`, `atom.shared`.
use crate::machine;
use crate::{Global, Shared};

macro_rules! atomics {
    ($($(#[$doc:meta])* $global:ident, $shared:ident: $t:ty;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[track_caller]
        pub fn $global(at: Global<$t>, x: $t) -> $t {
            machine::$global(at.address(), x)
        }

        $(#[$doc])*
        #[inline(always)]
        #[track_caller]
        pub fn $shared(at: Shared<$t>, x: $t) -> $t {
            machine::$shared(at.address(), x)
        }
    )*};
}

atomics! {
    /// Adds `x`, wrapping.
    global_add_u32, shared_add_u32: u32;
    /// Adds `x`, rounding to nearest: the sum depends on the order of the adds.
    global_add_f32, shared_add_f32: f32;
    /// Stores the larger of the two.
    global_max_u32, shared_max_u32: u32;
    /// Adds one; a value of `x` or more becomes 0: a counter that resets itself.
    global_inc_u32, shared_inc_u32: u32;
}

/// Stores `new` if the value is `expected`.
#[inline(always)]
#[track_caller]
pub fn global_cas_u32(at: Global<u32>, expected: u32, new: u32) -> u32 {
    machine::global_cas_u32(at.address(), expected, new)
}

/// Stores `new` if the value is `expected`.
#[inline(always)]
#[track_caller]
pub fn shared_cas_u32(at: Shared<u32>, expected: u32, new: u32) -> u32 {
    machine::shared_cas_u32(at.address(), expected, new)
}
