//! The stacks that simulated threads run on: kept for the next launch, as a fresh one costs 10 µs.
use corosensei::stack::{DefaultStack, Stack, StackPointer};
use std::sync::{Condvar, Mutex};

/// Room for an unoptimised kernel and a panic; the system commits what is used.
const STACK_BYTES: usize = 256 << 10;

/// Each stack is two mappings of at most 65530 that Linux by default gives a process.
const MOST_STACKS: usize = 24_000;

/// A stack whose top is shifted, so that the tops of neighbours do not fall into the same cache sets.
pub(super) struct ThreadStack {
    mapping: DefaultStack,
    shift: usize,
}

// SAFETY: a part of the mapping, which keeps its guard page; the shift is a multiple of the stack alignment and far
// smaller than the mapping.
unsafe impl Stack for ThreadStack {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.mapping.base().get() - self.shift).expect("the shift is smaller than the stack")
    }

    fn limit(&self) -> StackPointer {
        self.mapping.limit()
    }
}

struct Pool {
    free: Vec<ThreadStack>,
    made: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), made: 0 });
static RETURNED: Condvar = Condvar::new();

/// Takes `count` stacks. If the process has no more: waits for other launches where `wait`, else gives `None`.
pub(super) fn take(count: usize, wait: bool) -> Option<Vec<ThreadStack>> {
    let mut pool = POOL.lock().unwrap();
    while pool.free.len() + (MOST_STACKS - pool.made) < count {
        if !wait {
            return None;
        }
        pool = RETURNED.wait(pool).unwrap();
    }
    let kept = pool.free.len().saturating_sub(count);
    let mut stacks = pool.free.split_off(kept);
    while stacks.len() < count {
        let shift = pool.made % 32 * 192;
        let mapping = DefaultStack::new(STACK_BYTES).expect("memory for the stack of a simulated thread");
        stacks.push(ThreadStack { mapping, shift });
        pool.made += 1;
    }
    Some(stacks)
}

/// Gives stacks back.
pub(super) fn give_back(stacks: Vec<ThreadStack>) {
    POOL.lock().unwrap().free.extend(stacks);
    RETURNED.notify_all();
}
