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

/// Groups of threads that take turns: each waits until the one before it lets it, and lets the next one. `FIRST` and the
/// barriers that follow it are theirs, one a group; a group is `THREADS` threads, whole warps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turns<const FIRST: u32, const GROUPS: u32, const THREADS: u32>;

impl<const FIRST: u32, const GROUPS: u32, const THREADS: u32> Turns<FIRST, GROUPS, THREADS> {
    const VALID: () = assert!(
        FIRST > 0 && GROUPS > 1 && FIRST + GROUPS <= 16 && THREADS > 0 && THREADS.is_multiple_of(32),
        "barriers 1 to 15, whole warps"
    );

    /// Waits for the turn of `group`, which all its threads say.
    #[inline(always)]
    #[track_caller]
    pub fn take(self, group: u32) {
        let () = Self::VALID;
        machine::barrier_sync(FIRST + group, 2 * THREADS);
    }

    /// Ends the turn of `group`, which all its threads say: the group after it has the next. The last group says it once
    /// more before the first turn, and group 0 [takes](Self::take) one more turn after the last: it has none.
    #[inline(always)]
    #[track_caller]
    pub fn pass(self, group: u32) {
        let () = Self::VALID;
        let next = if group + 1 == GROUPS { 0 } else { group + 1 };
        machine::barrier_arrive(FIRST + next, 2 * THREADS);
    }
}

/// Hardware barriers `FIRST` to `FIRST + COUNT`, each for `THREADS` threads, of which a number known to whole warps
/// says one: for threads that wait at a different one in each step, or each at their own.
#[derive(Clone, Copy, Debug, Default)]
pub struct NamedBarriers<const FIRST: u32, const COUNT: u32, const THREADS: u32>;

impl<const FIRST: u32, const COUNT: u32, const THREADS: u32> NamedBarriers<FIRST, COUNT, THREADS> {
    const VALID: () = assert!(
        FIRST > 0 && FIRST + COUNT <= 16 && THREADS > 0 && THREADS.is_multiple_of(32),
        "barriers 1 to 15, whole warps"
    );

    /// As [`NamedBarrier::sync`], at barrier `index` of these.
    #[inline(always)]
    #[track_caller]
    pub fn sync(self, index: u32) {
        let () = Self::VALID;
        machine::barrier_sync(FIRST + index, THREADS);
    }

    /// As [`NamedBarrier::arrive`], at barrier `index` of these.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self, index: u32) {
        let () = Self::VALID;
        machine::barrier_arrive(FIRST + index, THREADS);
    }
}
