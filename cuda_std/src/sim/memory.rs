//! Global memory: named allocations at addresses that are the same in every run.
//!
//! Allocation `i` lies at `(i + 1) << 40`. So an address names its allocation, nothing lies next to anything else, and an
//! access out of bounds never hits a neighbour.
use crate::{Global, Scalar};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, RwLock};

/// The global memory of a simulated GPU.
#[derive(Default)]
pub struct Memory {
    allocations: RwLock<Vec<Arc<Allocation>>>,
}

/// An allocation of `len` elements in a [`Memory`].
#[derive(Debug)]
pub struct Buffer<T> {
    allocation: usize,
    len: usize,
    of: PhantomData<fn(T)>,
}

impl<T> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Buffer<T> {}

impl<T> Buffer<T> {
    /// The address of its first element, for a kernel.
    pub fn global(&self) -> Global<T> {
        // SAFETY: the simulator checks each access against the allocations of the memory that a launch is given.
        unsafe { Global::from_address(base(self.allocation)) }
    }

    /// Its elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Memory {
    /// A memory without allocations.
    pub fn new() -> Self {
        Memory::default()
    }

    /// A new allocation that holds `values`. Reports call it `name`.
    pub fn upload<T: Scalar>(&self, name: &'static str, values: &[T]) -> Buffer<T> {
        let allocation = Allocation::new(name, size_of::<T>(), values.len(), true);
        // SAFETY: both hold as many bytes, and nobody else has seen the new allocation.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), allocation.data(), size_of_val(values)) };
        self.add(allocation, values.len())
    }

    /// A new allocation of `len` elements that nobody has written: a kernel that reads one before one has is reported.
    pub fn allocate<T: Scalar>(&self, name: &'static str, len: usize) -> Buffer<T> {
        self.add(Allocation::new(name, size_of::<T>(), len, false), len)
    }

    /// What the allocation holds. Elements that nobody has written are all ones: NaN.
    ///
    /// # Panics
    /// If the buffer is of another memory, and not as large there.
    pub fn read<T: Scalar>(&self, buffer: &Buffer<T>) -> Vec<T> {
        let allocation = self.allocations.read().unwrap()[buffer.allocation].clone();
        assert!(allocation.bytes >= buffer.len * size_of::<T>(), "a buffer of another memory");
        let mut values = Vec::with_capacity(buffer.len);
        // SAFETY: there are as many bytes on both sides, and each pattern of bits is a value (a `Scalar` is a number). A
        // kernel that runs at the same time may change them: then any value will do.
        unsafe {
            std::ptr::copy_nonoverlapping(allocation.data().cast(), values.as_mut_ptr(), buffer.len);
            values.set_len(buffer.len);
        }
        values
    }

    pub(super) fn allocations(&self) -> Vec<Arc<Allocation>> {
        self.allocations.read().unwrap().clone()
    }

    fn add<T>(&self, allocation: Allocation, len: usize) -> Buffer<T> {
        let mut allocations = self.allocations.write().unwrap();
        allocations.push(Arc::new(allocation));
        Buffer { allocation: allocations.len() - 1, len, of: PhantomData }
    }
}

const ADDRESS_BITS: u32 = 40;

fn base(allocation: usize) -> u64 {
    (allocation as u64 + 1) << ADDRESS_BITS
}

/// The allocation that an address lies in, if there are so many, and the bytes from its base.
#[inline(always)]
pub(super) fn locate(address: u64) -> (usize, u64) {
    (((address >> ADDRESS_BITS) as usize).wrapping_sub(1), address & ((1 << ADDRESS_BITS) - 1))
}

/// What a memory keeps of an allocation.
pub(super) struct Allocation {
    pub name: &'static str,
    pub bytes: usize,
    element: usize,
    data: Box<[Line]>,
    /// For each granule of 16 bytes which pairs of bytes have been written; nothing where all have.
    written: Option<Box<[AtomicU8]>>,
}

/// 16 bytes, which several workers may access: atomics, so that a race of a kernel is none of the simulator.
#[repr(C, align(16))]
struct Line([AtomicU64; 2]);

impl Allocation {
    fn new(name: &'static str, element: usize, len: usize, written: bool) -> Self {
        let bytes = element * len;
        let lines = bytes.div_ceil(size_of::<Line>());
        let data = (0..lines).map(|_| Line([AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX)])).collect();
        let written = (!written).then(|| (0..lines).map(|_| AtomicU8::new(0)).collect());
        Allocation { name, bytes, element, data, written }
    }

    /// Where the data lie: `bytes` of them, which may change at any time, and only through [`Bits`].
    #[inline(always)]
    pub fn data(&self) -> *mut u8 {
        self.data.as_ptr() as *mut u8
    }

    /// Which pairs of bytes of a granule were written before the launch.
    pub fn written(&self, granule: usize) -> u8 {
        let Some(written) = &self.written else { return 0xff };
        written.get(granule).map_or(0, |mask| mask.load(Relaxed))
    }

    /// Remembers that pairs of bytes have been written.
    pub fn set_written(&self, granule: usize, mask: u8) {
        if let Some(written) = &self.written {
            written[granule].fetch_or(mask, Relaxed);
        }
    }

    /// Remembers that any of it may have been written.
    pub fn set_all_written(&self) {
        for mask in self.written.iter().flatten() {
            mask.store(0xff, Relaxed);
        }
    }

    /// How many elements it has.
    fn len(&self) -> usize {
        self.bytes / self.element
    }
}

/// How a report calls the element at an address.
pub(super) fn describe(address: u64, allocations: &[Arc<Allocation>]) -> String {
    let (allocation, offset) = locate(address);
    // An index below zero ends up far behind the allocation before.
    let before = (1u64 << ADDRESS_BITS) - offset;
    let next = allocations.get(allocation.wrapping_add(1));
    match (allocations.get(allocation), next) {
        (_, Some(next)) if offset >> (ADDRESS_BITS - 1) == 1 => {
            format!("{}[-{}]; it has {} elements", next.name, before.div_ceil(next.element as u64), next.len())
        }
        (Some(allocation), _) => {
            let (name, index) = (allocation.name, offset / allocation.element as u64);
            let outside = if (index as usize) < allocation.len() {
                String::new()
            } else {
                format!("; it has {} elements", allocation.len())
            };
            format!("{name}[{index}]{outside}")
        }
        (None, _) => format!("address {address:#x}, where nothing is allocated"),
    }
}

/// What one access moves.
pub trait Bits: Copy + 'static {
    /// Its size.
    const BYTES: u32;

    /// Loads from global memory.
    ///
    /// # Safety
    /// `from` points to [`BYTES`](Self::BYTES) bytes of an allocation, aligned to as many.
    unsafe fn load(from: *mut u8) -> Self;

    /// Stores to global memory.
    ///
    /// # Safety
    /// As for [`load`](Self::load).
    unsafe fn store(self, to: *mut u8);
}

macro_rules! bits {
    ($($t:ty: $atomic:ty),*) => {$(
        impl Bits for $t {
            const BYTES: u32 = size_of::<$t>() as u32;
            #[inline(always)]
            unsafe fn load(from: *mut u8) -> Self {
                // SAFETY: the caller's promise; allocations consist of atomics.
                unsafe { <$atomic>::from_ptr(from.cast()) }.load(Relaxed)
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut u8) {
                // SAFETY: as above.
                unsafe { <$atomic>::from_ptr(to.cast()) }.store(self, Relaxed)
            }
        }
    )*};
}
bits!(u8: AtomicU8, u16: AtomicU16, u32: AtomicU32, u64: AtomicU64);

macro_rules! vector_bits {
    ($($n:literal),*) => {$(
        impl Bits for [u32; $n] {
            const BYTES: u32 = 4 * $n;
            #[inline(always)]
            unsafe fn load(from: *mut u8) -> Self {
                // SAFETY: the caller's promise, for each half.
                let halves: [u64; $n / 2] = std::array::from_fn(|i| unsafe { u64::load(from.add(8 * i)) });
                // SAFETY: integers of the same size.
                unsafe { std::mem::transmute(halves) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut u8) {
                // SAFETY: integers of the same size.
                let halves: [u64; $n / 2] = unsafe { std::mem::transmute(self) };
                for (i, half) in halves.into_iter().enumerate() {
                    // SAFETY: the caller's promise, for each half.
                    unsafe { half.store(to.add(8 * i)) };
                }
            }
        }
    )*};
}
vector_bits!(2, 4);
