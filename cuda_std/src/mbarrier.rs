//! Barriers in shared memory that count arrivals and bytes. PTX ISA: `mbarrier`. sm_90.
//!
//! A phase is complete when as many threads have arrived as the barrier counts, and as many bytes as they announced
//! have come; then the next one begins. Waits name a phase by its parity: kernels say them through
//! [`Pipeline`](crate::pipeline::Pipeline) and [`Phases`](crate::pipeline::Phases), which keep it.
use crate::Shared;
use crate::machine;

/// A barrier in shared memory: 8 bytes, aligned to as many.
#[derive(Clone, Copy)]
pub struct Mbarrier(u32);

impl Mbarrier {
    /// What it takes of shared memory.
    pub const BYTES: u32 = 8;

    /// The barrier at `address`, which one thread must [initialise](Self::init).
    #[inline(always)]
    pub fn at(address: Shared<u64>) -> Self {
        Mbarrier(address.address())
    }

    /// The barrier `index` barriers further on.
    #[inline(always)]
    pub fn offset(self, index: u32) -> Self {
        Mbarrier(self.0 + index * Self::BYTES)
    }

    /// Its address in the block's window of shared memory.
    #[inline(always)]
    pub fn address(self) -> u32 {
        self.0
    }

    /// Begins the first phase; `count` arrivals complete each. Said by one thread, which then says
    /// [`fence::mbarrier_init`](crate::fence::mbarrier_init), before a barrier of the block. PTX ISA:
    /// `mbarrier.init.shared::cta.b64`.
    #[inline(always)]
    #[track_caller]
    pub fn init(self, count: u32) {
        machine::mbarrier_init(self.0, count);
    }

    /// Arrives: threads that wait for the phase see what this one wrote before. PTX ISA: `mbarrier.arrive`.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self) {
        machine::mbarrier_arrive(self.0);
    }

    /// Arrives, and announces that copies will bring `bytes` in this phase. PTX ISA: `mbarrier.arrive.expect_tx`.
    #[inline(always)]
    #[track_caller]
    pub fn arrive_expect(self, bytes: u32) {
        machine::mbarrier_arrive_expect(self.0, bytes);
    }

    /// Arrives at the barrier that block `rank` of the cluster has at this address. PTX ISA: `mapa`,
    /// `mbarrier.arrive.shared::cluster`.
    #[inline(always)]
    #[track_caller]
    pub fn arrive_at(self, rank: u32) {
        machine::mbarrier_arrive_at(self.0, rank);
    }

    /// Waits until the phase of this parity is complete: what was written before its arrivals, and what its copies
    /// brought, is seen. PTX ISA: `mbarrier.try_wait.parity`, until it says yes.
    #[inline(always)]
    #[track_caller]
    pub fn wait(self, parity: u32) {
        machine::mbarrier_wait(self.0, parity);
    }
}
