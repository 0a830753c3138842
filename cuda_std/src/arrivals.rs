//! Blocks of a grid that wait for blocks before them: counters in global memory. PTX ISA: `red.release.gpu`,
//! `ld.acquire.gpu`, `fence.proxy.async.global`. sm_90.
//!
//! A block may wait for blocks before it in the grid alone. These have started, as blocks start in their order; so the
//! first that has not ended waits for none, and all end.
use crate::{Global, machine};

/// A counter of the blocks, or of their warps, that have done something.
#[derive(Clone, Copy, Debug)]
pub struct Arrivals {
    counter: Global<u32>,
}

impl Arrivals {
    /// Those counted at `counter`.
    #[inline(always)]
    pub fn at(counter: Global<u32>) -> Self {
        Arrivals { counter }
    }

    /// None yet. For an earlier launch to say.
    #[inline(always)]
    #[track_caller]
    pub fn clear(self) {
        self.counter.store(0, 0);
    }

    /// One more. Who waits for it sees what this thread has written to global memory or knows to be written: also by bulk
    /// copies, once this thread has [waited](crate::bulk::wait) for their end. PTX ISA: `red.release.gpu.global.add.u32`.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self) {
        machine::arrive_in_grid(self.counter.address());
    }

    /// Waits until there are `count`. This thread, and its bulk copies, see what those have written that are counted. PTX
    /// ISA: `ld.acquire.gpu.global.u32`, `fence.proxy.async.global`.
    #[inline(always)]
    #[track_caller]
    pub fn wait(self, count: u32) {
        machine::wait_in_grid(self.counter.address(), count);
    }

    /// As [`wait`](Self::wait), for all that have arrived by then: so many, at least `count`. PTX ISA: as there.
    #[inline(always)]
    #[track_caller]
    pub fn wait_for_all(self, count: u32) -> u32 {
        machine::wait_in_grid_for_all(self.counter.address(), count)
    }
}
