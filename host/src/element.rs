//! Element types as a host sees them.
use cuda_std::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::Error;

/// A type that tensors have elements of: those of [`Element`], and `i32` and `u8` for tensors of indices and masks.
pub trait Datum:
    cuda_std::Scalar + bytemuck::Pod + Default + std::fmt::Debug + PartialEq + Send + Sync + Stored
{
    /// Widens `from` into the first elements of `to`. Exact, but for an `i32` beyond 2^24.
    #[doc(hidden)]
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds `from` to nearest, ties to even, into the first elements of `to`.
    #[doc(hidden)]
    fn narrow(from: &[f32], to: &mut [Self]);
}

/// A type that attention is computed on: `f32`, `half::f16` or `half::bf16`.
pub trait Element: cuda_std::Element + Datum {}

impl Element for f32 {}
impl Element for f16 {}
impl Element for bf16 {}

impl Datum for f32 {
    #[inline]
    fn widen(from: &[f32], to: &mut [f32]) {
        to[..from.len()].copy_from_slice(from);
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [f32]) {
        to[..from.len()].copy_from_slice(from);
    }
}

impl Datum for f16 {
    #[inline]
    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(&mut to[..from.len()]);
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [f16]) {
        to[..from.len()].convert_from_f32_slice(from);
    }
}

impl Datum for bf16 {
    #[inline]
    fn widen(from: &[bf16], to: &mut [f32]) {
        // A plain shift, which vectorises; `bf16::to_f32` quiets signalling NaNs on the way.
        for (to, &from) in to.iter_mut().zip(from.reinterpret_cast()) {
            *to = f32::from_bits(u32::from(from) << 16);
        }
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [bf16]) {
        to[..from.len()].convert_from_f32_slice(from);
    }
}

macro_rules! integer {
    ($($t:ty),*) => {$(
        impl Datum for $t {
            #[inline]
            fn widen(from: &[$t], to: &mut [f32]) {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from as f32);
            }
            #[inline]
            fn narrow(from: &[f32], to: &mut [$t]) {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from.round_ties_even() as $t);
            }
        }
    )*};
}
integer!(i32, u8);

/// The data of a tensor, of any of the element types.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Integers.
    I32(&'a [i32]),
    /// Bytes.
    U8(&'a [u8]),
}

/// The same, to be written.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// binary32.
    F32(&'a mut [f32]),
    /// binary16.
    F16(&'a mut [f16]),
    /// bfloat16.
    BF16(&'a mut [bf16]),
    /// Integers.
    I32(&'a mut [i32]),
    /// Bytes.
    U8(&'a mut [u8]),
}

/// The same, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Buffer {
    /// binary32.
    F32(Vec<f32>),
    /// binary16.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
    /// Integers.
    I32(Vec<i32>),
    /// Bytes.
    U8(Vec<u8>),
}

/// Evaluates `$body` with the slice of `$data`, one of the enums above, bound to `$slice`.
macro_rules! for_each_dtype {
    ($kind:ident, $data:expr, $slice:ident => $body:expr) => {
        match $data {
            $crate::element::$kind::F32($slice) => $body,
            $crate::element::$kind::F16($slice) => $body,
            $crate::element::$kind::BF16($slice) => $body,
            $crate::element::$kind::I32($slice) => $body,
            $crate::element::$kind::U8($slice) => $body,
        }
    };
}
pub(crate) use for_each_dtype;

/// Evaluates `$body` with the type `$T` that `$dtype` names: a [`Datum`].
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            cuda_std::DType::F32 => {
                type $T = f32;
                $body
            }
            cuda_std::DType::F16 => {
                type $T = half::f16;
                $body
            }
            cuda_std::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            cuda_std::DType::I32 => {
                type $T = i32;
                $body
            }
            cuda_std::DType::U8 => {
                type $T = u8;
                $body
            }
        }
    };
}
pub(crate) use with_dtype;

/// Evaluates `$body` with the type `$T` that the dtype of the tensor `$argument` names: an [`Element`]. Another dtype is an
/// error, which the function returns.
macro_rules! with_element {
    ($argument:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            cuda_std::DType::F32 => {
                type $T = f32;
                $body
            }
            cuda_std::DType::F16 => {
                type $T = half::f16;
                $body
            }
            cuda_std::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other @ (cuda_std::DType::I32 | cuda_std::DType::U8) => {
                return Err($crate::element::no_element($argument, other));
            }
        }
    };
}
pub(crate) use with_element;

/// The error of a tensor that attention cannot be computed on.
pub fn no_element(argument: &'static str, dtype: DType) -> Error {
    Error::DType { argument, found: dtype.name(), allowed: "f32, f16, bf16".to_owned() }
}

impl Slice<'_> {
    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::F16(_) => DType::F16,
            Slice::BF16(_) => DType::BF16,
            Slice::I32(_) => DType::I32,
            Slice::U8(_) => DType::U8,
        }
    }
}

/// How a slice of the type goes into the enums, and out of them. Nameable only in this crate: it seals [`Datum`].
pub trait Stored: Sized {
    /// The dtype that stands for the type.
    const STORED: DType;
    fn wrap(data: &[Self]) -> Slice<'_>;
    fn wrap_mut(data: &mut [Self]) -> SliceMut<'_>;
    fn store(data: Vec<Self>) -> Buffer;
    fn unwrap(data: Slice<'_>) -> Option<&[Self]>;
    fn unwrap_mut(data: SliceMut<'_>) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($t:ty: $variant:ident),*) => {$(
        impl Stored for $t {
            const STORED: DType = DType::$variant;
            fn wrap(data: &[Self]) -> Slice<'_> {
                Slice::$variant(data)
            }
            fn wrap_mut(data: &mut [Self]) -> SliceMut<'_> {
                SliceMut::$variant(data)
            }
            fn store(data: Vec<Self>) -> Buffer {
                Buffer::$variant(data)
            }
            fn unwrap(data: Slice<'_>) -> Option<&[Self]> {
                if let Slice::$variant(data) = data { Some(data) } else { None }
            }
            fn unwrap_mut(data: SliceMut<'_>) -> Option<&mut [Self]> {
                if let SliceMut::$variant(data) = data { Some(data) } else { None }
            }
        }
    )*};
}
stored!(f32: F32, f16: F16, bf16: BF16, i32: I32, u8: U8);
