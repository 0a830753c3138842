//! Element types as a host sees them.
use cuda_std::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A type that tensors have elements of: `f32`, `half::f16` or `half::bf16`.
pub trait Element: cuda_std::Element + bytemuck::Pod + Default + std::fmt::Debug + PartialEq + Stored {
    /// Widens `from` into the first elements of `to`. Exact.
    #[doc(hidden)]
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds `from` to nearest even, into the first elements of `to`.
    #[doc(hidden)]
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    #[inline]
    fn widen(from: &[f32], to: &mut [f32]) {
        to[..from.len()].copy_from_slice(from);
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [f32]) {
        to[..from.len()].copy_from_slice(from);
    }
}

impl Element for f16 {
    #[inline]
    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(&mut to[..from.len()]);
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [f16]) {
        to[..from.len()].convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
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

/// The data of a tensor, of any of the element types.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
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
}

/// Evaluates `$body` with the slice of `$data`, one of the enums above, bound to `$slice`.
macro_rules! for_each_dtype {
    ($kind:ident, $data:expr, $slice:ident => $body:expr) => {
        match $data {
            $crate::element::$kind::F32($slice) => $body,
            $crate::element::$kind::F16($slice) => $body,
            $crate::element::$kind::BF16($slice) => $body,
        }
    };
}
pub(crate) use for_each_dtype;

/// Evaluates `$body` with the type `$T` that `$dtype` names.
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
        }
    };
}
pub(crate) use with_dtype;

impl Slice<'_> {
    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::F16(_) => DType::F16,
            Slice::BF16(_) => DType::BF16,
        }
    }
}

/// How a slice of the type goes into the enums, and out of them. Nameable only in this crate: it seals [`Element`].
pub trait Stored: Sized {
    fn wrap(data: &[Self]) -> Slice<'_>;
    fn wrap_mut(data: &mut [Self]) -> SliceMut<'_>;
    fn store(data: Vec<Self>) -> Buffer;
    fn unwrap(data: Slice<'_>) -> Option<&[Self]>;
    fn unwrap_mut(data: SliceMut<'_>) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($t:ty: $variant:ident),*) => {$(
        impl Stored for $t {
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
stored!(f32: F32, f16: F16, bf16: BF16);
