//! Shared memory: the SRAM of one streaming multiprocessor, shared by the threads of a block.
use crate::element::Scalar;
use crate::machine::{self, Access};
use core::marker::PhantomData;

/// A typed address in shared memory: 32 bits, in the block's own window.
pub struct Shared<T> {
    address: u32,
    of: PhantomData<*mut T>,
}

impl<T> Clone for Shared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

/// The block's dynamic shared memory, whose size the launch chooses; aligned to 1024 bytes.
#[inline(always)]
pub fn dynamic_shared<T>() -> Shared<T> {
    Shared::from_address(machine::dynamic_shared())
}

impl<T> Shared<T> {
    /// The element at `address`, in bytes of the block's window.
    #[inline(always)]
    pub fn from_address(address: u32) -> Self {
        Shared { address, of: PhantomData }
    }

    /// The address in bytes of the block's window.
    #[inline(always)]
    pub fn address(self) -> u32 {
        self.address
    }

    /// The address `elements` further on.
    #[inline(always)]
    pub fn offset(self, elements: u32) -> Self {
        Shared::from_address(self.address + elements * size_of::<T>() as u32)
    }

    /// The same address, as that of another type.
    #[inline(always)]
    pub fn cast<U>(self) -> Shared<U> {
        Shared::from_address(self.address)
    }
}

impl<T: Scalar> Shared<T> {
    /// Loads element `index`. PTX ISA: `ld.shared`.
    #[inline(always)]
    #[track_caller]
    pub fn load(self, index: u32) -> T {
        T::from_bits(Access::load_shared(self.offset(index).address))
    }

    /// Stores element `index`. PTX ISA: `st.shared`.
    #[inline(always)]
    #[track_caller]
    pub fn store(self, index: u32, value: T) {
        value.to_bits().store_shared(self.offset(index).address);
    }

    /// Loads `N` elements from `index` on, in one access of 2, 4, 8 or 16 bytes, to which the address is aligned.
    #[inline(always)]
    #[track_caller]
    pub fn load_vector<const N: usize>(self, index: u32) -> [T; N] {
        const { assert!(is_access(N * size_of::<T>()), "one access moves 2, 4, 8 or 16 bytes") };
        let address = self.offset(index).address;
        match const { N * size_of::<T>() } {
            2 => from_vector(u16::load_shared(address)),
            4 => from_vector(u32::load_shared(address)),
            8 => from_vector(<[u32; 2]>::load_shared(address)),
            _ => from_vector(<[u32; 4]>::load_shared(address)),
        }
    }

    /// Stores `N` elements from `index` on, in one access of 2, 4, 8 or 16 bytes, to which the address is aligned.
    #[inline(always)]
    #[track_caller]
    pub fn store_vector<const N: usize>(self, index: u32, values: [T; N]) {
        const { assert!(is_access(N * size_of::<T>()), "one access moves 2, 4, 8 or 16 bytes") };
        let address = self.offset(index).address;
        match const { N * size_of::<T>() } {
            2 => to_vector::<T, u16, N>(values).store_shared(address),
            4 => to_vector::<T, u32, N>(values).store_shared(address),
            8 => to_vector::<T, [u32; 2], N>(values).store_shared(address),
            _ => to_vector::<T, [u32; 4], N>(values).store_shared(address),
        }
    }
}

/// `N` elements in shared memory whose size the kernel fixes: [`shared_array!`](crate::shared_array) makes one.
pub struct SharedArray<T, const N: usize>(Shared<T>);

impl<T, const N: usize> Clone for SharedArray<T, N> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const N: usize> Copy for SharedArray<T, N> {}

impl<T: Scalar, const N: usize> SharedArray<T, N> {
    #[doc(hidden)]
    #[inline(always)]
    #[track_caller]
    pub fn allocate() -> Self {
        SharedArray(Shared::from_address(machine::static_shared::<T, N>()))
    }

    /// Its first element.
    #[inline(always)]
    pub fn as_shared(self) -> Shared<T> {
        self.0
    }

    /// Loads element `index`.
    #[inline(always)]
    #[track_caller]
    pub fn load(self, index: u32) -> T {
        self.0.load(index)
    }

    /// Stores element `index`.
    #[inline(always)]
    #[track_caller]
    pub fn store(self, index: u32, value: T) {
        self.0.store(index, value);
    }
}

/// `shared_array![T; N]`: a [`SharedArray`] of its own for this place in the source, the same for all threads of a block.
///
/// Say it once, at the top of a kernel: a copy of the call that an optimiser makes (an unrolled loop) is another array.
#[macro_export]
macro_rules! shared_array {
    ($t:ty; $n:expr) => {
        $crate::SharedArray::<$t, { $n }>::allocate()
    };
}

/// Whether one access can move `bytes`.
pub(crate) const fn is_access(bytes: usize) -> bool {
    matches!(bytes, 2 | 4 | 8 | 16)
}

/// The elements that make up one machine word.
#[inline(always)]
pub(crate) fn from_vector<T: Scalar, W: Access, const N: usize>(word: W) -> [T; N] {
    // SAFETY: callers match the sizes, and every bit pattern is a valid T (`Scalar` is implemented for numbers alone).
    unsafe { core::mem::transmute_copy(&word) }
}

/// The machine word that elements make up.
#[inline(always)]
pub(crate) fn to_vector<T: Scalar, W: Access, const N: usize>(values: [T; N]) -> W {
    // SAFETY: callers match the sizes, and every bit pattern is a valid word (`Access` is implemented for integers alone).
    unsafe { core::mem::transmute_copy(&values) }
}
