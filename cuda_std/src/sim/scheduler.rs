//! Which thread of a block runs next, and what the others wait for.
use super::WARP;
use super::block::{Block, suspend, with};
use super::rendezvous::Word;
use super::site::Site;
use super::warpgroups::GroupWord;
use std::collections::VecDeque;

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiting {
    /// It runs, or may.
    Nothing,
    /// For the other members of its warp.
    Warp { word: Word, members: u32 },
    /// For the other threads of its warpgroup.
    Warpgroup(GroupWord),
    /// For the other threads of a barrier.
    Barrier(u32),
    /// For the phase of this parity of the mbarrier at this address.
    Mbarrier { address: u32, parity: u32 },
    /// For the other threads of the cluster.
    Cluster,
    /// It has returned from the kernel.
    Exited,
}

/// Accesses after which the other threads get their turn.
const SLICE: u32 = 1 << 12;

/// Accesses and turns that threads may take while none of them changes anything: then they spin for what never comes.
const PATIENCE: u32 = 1 << 26;

/// A failed poll counts for so many accesses.
const POLL: u32 = 1 << 8;

/// The threads that can run.
#[derive(Default)]
pub(super) struct Ready {
    queue: VecDeque<u16>,
    /// The state of the generator that chooses, if it is not the first in the queue.
    random: Option<u64>,
    /// Accesses until the running thread must let others run.
    slice: u32,
    /// Accesses and turns until the block is given up, unless something changes.
    patience: u32,
}

impl Ready {
    /// Begins a block, with all threads ready.
    pub fn reset(&mut self, threads: usize, seed: u64, block: u32) {
        self.queue.clear();
        self.queue.extend(0..threads as u16);
        self.random = (seed != 0).then(|| split_mix(seed ^ (block as u64) << 32));
        self.slice = SLICE;
        self.patience = PATIENCE;
    }

    pub fn push(&mut self, thread: usize) {
        self.queue.push_back(thread as u16);
    }

    /// The next thread to run.
    pub fn pop(&mut self) -> Option<usize> {
        if let Some(random) = &mut self.random
            && self.queue.len() > 1
        {
            *random = split_mix(*random);
            let chosen = (*random % self.queue.len() as u64) as usize;
            self.queue.swap(0, chosen);
        }
        self.spend(SLICE - self.slice + 1);
        self.slice = SLICE;
        self.queue.pop_front().map(usize::from)
    }

    /// Something has changed that a spinning thread may wait for.
    #[inline(always)]
    pub fn progress(&mut self) {
        self.patience = PATIENCE;
    }

    /// Whether the threads that are ready do nothing but spin.
    pub fn is_spinning(&self) -> bool {
        self.patience == 0
    }

    fn spend(&mut self, accesses: u32) {
        self.patience = self.patience.saturating_sub(accesses);
    }
}

/// Counts an access: a thread that spins must let others run.
#[inline(always)]
pub(super) fn count_access(site: Site) {
    let exhausted = with(|block| {
        block.ready.slice -= 1;
        block.ready.slice == 0
    });
    if exhausted {
        pause(0, site);
    }
}

/// Counts an atomic that changed nothing: most likely a poll that failed.
#[inline(always)]
pub(super) fn count_poll(site: Site) {
    pause(POLL, site);
}

#[cold]
#[inline(never)]
fn pause(cost: u32, site: Site) {
    with(|block| {
        block.threads[block.current].site = Some(site);
        block.ready.spend(cost);
        block.ready.push(block.current);
    });
    suspend();
    with(|block| {
        if block.traffic.is_long(block.current) {
            block.traffic.settle(block.current / WARP);
        }
    });
}

impl Block {
    /// The running thread waits from now on.
    #[inline(always)]
    pub fn wait(&mut self, waiting: Waiting, site: Site) {
        let thread = &mut self.threads[self.current];
        thread.waiting = waiting;
        thread.site = Some(site);
    }

    /// A thread has what it waited for.
    #[inline(always)]
    pub fn wake(&mut self, thread: usize) {
        self.threads[thread].waiting = Waiting::Nothing;
        self.ready.push(thread);
    }
}

/// Vigna's SplitMix64.
fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
