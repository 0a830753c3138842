//! Global memory: the GPU's HBM.
use crate::element::Scalar;
use crate::machine::Access;
use crate::shared::{from_vector, is_access, to_vector};

/// A typed address in global memory: 8 bytes, as a kernel parameter or in a parameter struct.
///
/// Indices count elements, from a 64-bit base, so that tensors may exceed 2^31 elements.
#[repr(transparent)]
pub struct Global<T>(*mut T);

impl<T> Clone for Global<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Global<T> {}

// SAFETY: an address only; what is at it is reached through words, which each machine orders by its own rules.
unsafe impl<T> Send for Global<T> {}
// SAFETY: as for `Send`.
unsafe impl<T> Sync for Global<T> {}

impl<T> core::fmt::Debug for Global<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.address())
    }
}

impl<T> Global<T> {
    /// No memory: for a parameter that a kernel does not use.
    pub const NULL: Self = Global(core::ptr::null_mut());

    /// The element at `address`, a device address in bytes.
    ///
    /// # Safety
    /// The device memory at `address` must be alive, and as large as the kernel that gets it takes it to be, for as long
    /// as a launch uses it.
    #[inline(always)]
    pub const unsafe fn from_address(address: u64) -> Self {
        Global(address as *mut T)
    }

    /// The device address in bytes.
    #[inline(always)]
    pub fn address(self) -> u64 {
        self.0 as u64
    }

    /// Whether this is [`Global::NULL`].
    #[inline(always)]
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// The address `elements` further on.
    #[inline(always)]
    pub fn offset(self, elements: usize) -> Self {
        Global(self.0.wrapping_add(elements))
    }

    /// The same address, as that of another type.
    #[inline(always)]
    pub fn cast<U>(self) -> Global<U> {
        Global(self.0 as *mut U)
    }
}

impl<T: Scalar> Global<T> {
    /// Loads element `index`. PTX ISA: `ld.global`.
    #[inline(always)]
    #[track_caller]
    pub fn load(self, index: usize) -> T {
        T::from_bits(Access::load_global(self.offset(index).address()))
    }

    /// Stores element `index`. PTX ISA: `st.global`.
    #[inline(always)]
    #[track_caller]
    pub fn store(self, index: usize, value: T) {
        value.to_bits().store_global(self.offset(index).address());
    }

    /// Loads `N` elements from `index` on, in one access of 2, 4, 8 or 16 bytes, to which the address is aligned.
    /// PTX ISA: `ld.global.v2`, `ld.global.v4`.
    #[inline(always)]
    #[track_caller]
    pub fn load_vector<const N: usize>(self, index: usize) -> [T; N] {
        const { assert!(is_access(N * size_of::<T>()), "one access moves 2, 4, 8 or 16 bytes") };
        let address = self.offset(index).address();
        match const { N * size_of::<T>() } {
            2 => from_vector(u16::load_global(address)),
            4 => from_vector(u32::load_global(address)),
            8 => from_vector(<[u32; 2]>::load_global(address)),
            _ => from_vector(<[u32; 4]>::load_global(address)),
        }
    }

    /// Stores `N` elements from `index` on, in one access of 2, 4, 8 or 16 bytes, to which the address is aligned.
    /// PTX ISA: `st.global.v2`, `st.global.v4`.
    #[inline(always)]
    #[track_caller]
    pub fn store_vector<const N: usize>(self, index: usize, values: [T; N]) {
        const { assert!(is_access(N * size_of::<T>()), "one access moves 2, 4, 8 or 16 bytes") };
        let address = self.offset(index).address();
        match const { N * size_of::<T>() } {
            2 => to_vector::<T, u16, N>(values).store_global(address),
            4 => to_vector::<T, u32, N>(values).store_global(address),
            8 => to_vector::<T, [u32; 2], N>(values).store_global(address),
            _ => to_vector::<T, [u32; 4], N>(values).store_global(address),
        }
    }
}
