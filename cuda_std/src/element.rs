//! The types that a kernel loads, stores and computes with.
use crate::machine::{self, Access};
pub use half::{bf16, f16};

/// The dtype of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// Signed integers of 32 bits: where sequences begin.
    I32,
    /// Bytes: a boolean mask, in which 0 is false.
    U8,
}

impl DType {
    /// The size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 => 1,
        }
    }

    /// The name that kernel names and reports use: `f32`, `f16`, `bf16`, `i32` or `u8`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }
}

/// A value that fits one memory access.
pub trait Scalar: Copy + 'static {
    /// The same bits as the machine loads and stores them.
    type Bits: Access;
    /// Its bits.
    fn to_bits(self) -> Self::Bits;
    /// The value that has these bits.
    fn from_bits(bits: Self::Bits) -> Self;
}

/// A [`Scalar`] that attention is computed on. Arithmetic is in f32.
pub trait Element: Scalar + Send + Sync {
    /// Which one it is.
    const DTYPE: DType;
    /// The bits of infinity, in each element of a word of 32 bits.
    const INFINITIES: u32;
    /// The bits of the signs, likewise.
    const SIGNS: u32 = Self::INFINITIES << 1 & !Self::INFINITIES;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Rounds two at once.
    fn from_f32_pair(pair: [f32; 2]) -> [Self; 2];
    /// Which elements of a word of 32 bits are infinite or NaN: a bit in the place of the sign of each.
    #[inline(always)]
    fn nonfinite(word: u32) -> u32 {
        // A magnitude of infinity or more carries into the sign.
        ((word & !Self::SIGNS) + (Self::SIGNS - Self::INFINITIES)) & Self::SIGNS
    }
}

macro_rules! plain_scalar {
    ($($t:ty: $bits:ty),*) => {$(
        impl Scalar for $t {
            type Bits = $bits;
            #[inline(always)]
            fn to_bits(self) -> $bits { self as $bits }
            #[inline(always)]
            fn from_bits(bits: $bits) -> Self { bits as $t }
        }
    )*};
}
plain_scalar!(u8: u8, u16: u16, u32: u32, i32: u32, u64: u64, i64: u64);

macro_rules! float_scalar {
    ($($t:ty: $bits:ty),*) => {$(
        impl Scalar for $t {
            type Bits = $bits;
            #[inline(always)]
            fn to_bits(self) -> $bits { <$t>::to_bits(self) }
            #[inline(always)]
            fn from_bits(bits: $bits) -> Self { <$t>::from_bits(bits) }
        }
    )*};
}
float_scalar!(f32: u32, f64: u64, f16: u16, bf16: u16);

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const INFINITIES: u32 = 0x7f80_0000;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn from_f32_pair(pair: [f32; 2]) -> [Self; 2] {
        pair
    }
}

/// An f32 that products may round to TF32, 10 bits of mantissa; sums are in f32. Tensors of it are tensors of f32.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct tf32(f32);

impl Scalar for tf32 {
    type Bits = u32;
    #[inline(always)]
    fn to_bits(self) -> u32 {
        self.0.to_bits()
    }
    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        tf32(f32::from_bits(bits))
    }
}

impl Element for tf32 {
    const DTYPE: DType = DType::F32;
    const INFINITIES: u32 = f32::INFINITIES;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.0
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        tf32(x)
    }
    #[inline(always)]
    fn from_f32_pair(pair: [f32; 2]) -> [Self; 2] {
        pair.map(tf32)
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const INFINITIES: u32 = 0x7c00_7c00;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        machine::f16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_bits(machine::f32_to_f16(x))
    }
    #[inline(always)]
    fn from_f32_pair([low, high]: [f32; 2]) -> [Self; 2] {
        halves(machine::pack_f16(low, high)).map(f16::from_bits)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    const INFINITIES: u32 = 0x7f80_7f80;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_bits(machine::f32_to_bf16(x))
    }
    #[inline(always)]
    fn from_f32_pair([low, high]: [f32; 2]) -> [Self; 2] {
        halves(machine::pack_bf16(low, high)).map(bf16::from_bits)
    }
}

/// The lower and the upper half of a register.
#[inline(always)]
fn halves(x: u32) -> [u16; 2] {
    [x as u16, (x >> 16) as u16]
}
