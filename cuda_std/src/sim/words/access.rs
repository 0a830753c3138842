//! Loads, stores, and where shared memory lies.
use super::super::block::{here, unless_stopped, with};
use super::super::memory::Bits;
use super::super::report::FindingKind;
use super::super::scheduler::count_access;

/// What one access moves: 1, 2, 4, 8 or 16 bytes.
pub trait Access: Bits {
    /// Loads from shared memory.
    #[inline(always)]
    #[track_caller]
    fn load_shared(address: u32) -> Self {
        let site = here();
        count_access(site);
        unless_stopped(with(|block| block.load_shared(address, site)))
    }

    /// Stores to shared memory.
    #[inline(always)]
    #[track_caller]
    fn store_shared(self, address: u32) {
        let site = here();
        count_access(site);
        unless_stopped(with(|block| block.store_shared(address, self, site)))
    }

    /// Loads from global memory.
    #[inline(always)]
    #[track_caller]
    fn load_global(address: u64) -> Self {
        let site = here();
        count_access(site);
        unless_stopped(with(|block| block.load_global(address, site)))
    }

    /// Stores to global memory.
    #[inline(always)]
    #[track_caller]
    fn store_global(self, address: u64) {
        let site = here();
        count_access(site);
        unless_stopped(with(|block| block.store_global(address, self, site)))
    }
}

impl<T: Bits> Access for T {}

#[inline(always)]
pub(crate) fn dynamic_shared() -> u32 {
    0
}

#[inline(always)]
#[track_caller]
pub(crate) fn static_shared<T, const N: usize>() -> u32 {
    let site = here();
    unless_stopped(with(|block| {
        let bytes = (N * size_of::<T>()) as u32;
        block.shared.static_array(site, size_of::<T>(), bytes).ok_or_else(|| {
            let message = format!("no room for an array of {bytes} bytes: the block has {}", block.shared.bytes());
            block.fault(FindingKind::Launch, site, None, message)
        })
    }))
}
