//! Which vector instructions the tiles are compiled for.
//!
//! One generic body each, compiled once for every instruction set. Most of a body are plain loops over arrays, which LLVM
//! vectorises with what the enclosing function may use; only the register tile of the products says [`Vector`].

/// A vector register.
pub trait Vector: Copy {
    /// Numbers in it.
    const LANES: usize;
    /// Whether a·b + c is one instruction. Else it is two, and not a call into libm.
    const FMA: bool;

    /// The same number in each lane.
    ///
    /// # Safety
    /// The CPU has the instructions of this type: so for all functions here.
    unsafe fn splat(x: f32) -> Self;
    /// The first `LANES` numbers of a slice, of which there are so many.
    ///
    /// # Safety
    /// As [`splat`](Self::splat).
    unsafe fn load(from: &[f32]) -> Self;
    /// Overwrites the first `LANES` numbers of a slice, of which there are so many.
    ///
    /// # Safety
    /// As [`splat`](Self::splat).
    unsafe fn store(self, to: &mut [f32]);
    /// self · b + c.
    ///
    /// # Safety
    /// As [`splat`](Self::splat).
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// Any CPU: an array, of as many lanes as two registers of SSE or NEON have.
impl Vector for [f32; 8] {
    const LANES: usize = 8;
    const FMA: bool = cfg!(target_arch = "aarch64");

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(from: &[f32]) -> Self {
        *from.first_chunk().expect("LANES numbers")
    }
    #[inline(always)]
    unsafe fn store(self, to: &mut [f32]) {
        to[..8].copy_from_slice(&self);
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        let mut sums = c;
        for lane in 0..8 {
            sums[lane] = mul_add::<Self>(self[lane], b[lane], c[lane]);
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($type:ty: $lanes:literal, $set1:ident, $loadu:ident, $storeu:ident, $fmadd:ident) => {
            impl Vector for $type {
                const LANES: usize = $lanes;
                const FMA: bool = true;

                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller promises the instructions.
                    unsafe { $set1(x) }
                }
                #[inline(always)]
                unsafe fn load(from: &[f32]) -> Self {
                    let from: &[f32; $lanes] = from.first_chunk().expect("LANES numbers");
                    // SAFETY: the caller promises the instructions; the numbers are there.
                    unsafe { $loadu(from.as_ptr()) }
                }
                #[inline(always)]
                unsafe fn store(self, to: &mut [f32]) {
                    let to: &mut [f32; $lanes] = to.first_chunk_mut().expect("LANES numbers");
                    // SAFETY: the caller promises the instructions; the numbers are there.
                    unsafe { $storeu(to.as_mut_ptr(), self) }
                }
                #[inline(always)]
                unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                    // SAFETY: the caller promises the instructions.
                    unsafe { $fmadd(self, b, c) }
                }
            }
        };
    }
    vector!(__m256: 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    vector!(__m512: 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
}

/// a·b + c.
#[inline(always)]
pub fn mul_add<V: Vector>(a: f32, b: f32, c: f32) -> f32 {
    if V::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every CPU of the architecture has.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, with which come 32 registers of 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// All that this machine has.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        match Self::detect() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => vec![Isa::Portable, Isa::Avx2, Isa::Avx512],
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => vec![Isa::Portable, Isa::Avx2],
            Isa::Portable => vec![Isa::Portable],
        }
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "AVX-512",
        }
    }
}

/// Defines `$name`, which runs a generic body, compiled for the instruction set that it is given.
///
/// `body::<T, V, ROWS>` is `#[inline(always)]`, and `unsafe` in that the CPU must have the instructions of V; its register
/// tile has `ROWS` rows of two vectors V.
macro_rules! multiversion {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident<$T:ident>($($argument:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$attribute])*
        $vis fn $name<$T: $crate::element::Element>(isa: $crate::cpu::isa::Isa, $($argument: $type),*) {
            use $crate::cpu::isa::Isa;

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$T: $crate::element::Element>($($argument: $type),*) {
                // SAFETY: this function may only be called where the CPU has them.
                unsafe { $body::<$T, std::arch::x86_64::__m256, 4>($($argument),*) }
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            fn avx512<$T: $crate::element::Element>($($argument: $type),*) {
                // SAFETY: as above.
                unsafe { $body::<$T, std::arch::x86_64::__m512, 8>($($argument),*) }
            }

            match isa {
                // SAFETY: every CPU has what an array needs.
                Isa::Portable => unsafe { $body::<$T, [f32; 8], 4>($($argument),*) },
                // SAFETY: an `Isa` is made by `detect`, which has found these instructions.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2::<$T>($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512::<$T>($($argument),*) },
            }
        }
    };
}
pub(super) use multiversion;
