//! Named barriers: some warps of a block wait for each other. PTX ISA: `bar.sync id, count`, `bar.arrive id, count`.
use crate::machine;

/// Hardware barrier `ID` (1 to 15; 0 is [`sync_threads`](crate::thread::sync_threads)) for `THREADS` threads, whole warps.
#[derive(Clone, Copy, Debug, Default)]
pub struct NamedBarrier<const ID: u32, const THREADS: u32>;

impl<const ID: u32, const THREADS: u32> NamedBarrier<ID, THREADS> {
    const VALID: () =
        assert!(ID > 0 && ID < 16 && THREADS > 0 && THREADS.is_multiple_of(32), "barriers 1 to 15, whole warps");

    /// Arrives, waits until `THREADS` threads have arrived, and sees what they wrote before.
    #[inline(always)]
    #[track_caller]
    pub fn sync(self) {
        let () = Self::VALID;
        machine::barrier_sync(ID, THREADS);
    }

    /// Arrives without waiting: those that [`sync`](Self::sync) see what this thread wrote before.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self) {
        let () = Self::VALID;
        machine::barrier_arrive(ID, THREADS);
    }
}
