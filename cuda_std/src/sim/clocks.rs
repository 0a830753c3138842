//! What happened before what: vector clocks of the threads of a block.
//!
//! Each thread counts its own epochs, and knows of each other thread the last epoch that happened before its present. The
//! barrier of the whole block is by far the most frequent order, so it has a short form: a `floor` that all epochs up to
//! it lie below, and after it all threads are in the same epoch again.
use super::WARP;

/// The vector clocks of a block.
#[derive(Default)]
pub(super) struct Clocks {
    /// The epoch that each thread is in.
    own: Vec<u32>,
    /// `known[t * threads + u]`: the last epoch of `u` that happened before the present of `t`.
    known: Vec<u32>,
    /// Epochs up to this one, of all threads, happened before the present of all threads.
    floor: u32,
    /// Whether a thread may know more of another warp than the floor says.
    across_warps: bool,
    scratch: Vec<u32>,
}

impl Clocks {
    /// Begins a block.
    pub fn reset(&mut self, threads: usize) {
        self.own.clear();
        self.own.resize(threads, 1);
        self.known.clear();
        self.known.resize(threads * threads, 0);
        self.scratch.resize(threads, 0);
        self.floor = 0;
        self.across_warps = false;
    }

    /// The epoch that `thread` is in.
    #[inline(always)]
    pub fn now(&self, thread: usize) -> u32 {
        self.own[thread]
    }

    /// Whether all threads have seen `epoch` of any thread.
    #[inline(always)]
    pub fn is_past(&self, epoch: u32) -> bool {
        epoch <= self.floor
    }

    /// Whether what `other` did in `epoch` happened before the present of `thread`.
    #[inline(always)]
    pub fn is_before(&self, other: usize, epoch: u32, thread: usize) -> bool {
        epoch <= self.floor || other == thread || epoch <= self.known[thread * self.own.len() + other]
    }

    /// All threads meet.
    pub fn join_all(&mut self) {
        self.floor = self.own.iter().copied().max().unwrap_or(0);
        self.own.fill(self.floor + 1);
        self.across_warps = false;
    }

    /// The lanes of `members` meet in their warp, which begins at thread `first`.
    pub fn join_warp(&mut self, first: usize, members: u32) {
        let lanes = first..(first + WARP).min(self.own.len());
        let known_of = if self.across_warps { 0..self.own.len() } else { lanes.clone() };
        let is_member = |thread: usize| members >> (thread - first) & 1 == 1;
        self.gather(lanes.clone().filter(|&t| is_member(t)), known_of.clone());
        let next = self.next_epoch(lanes.clone().filter(|&t| is_member(t)));
        for thread in lanes.filter(|&t| is_member(t)) {
            self.learn(thread, known_of.clone());
            self.own[thread] = next;
        }
    }

    /// All of `arrived` release what they did, and those of `waiting` see it.
    pub fn join_some(&mut self, arrived: &[u16], waiting: &[u16]) {
        self.across_warps = true;
        let all = 0..self.own.len();
        self.gather(arrived.iter().map(|&t| t as usize), all.clone());
        let next = self.next_epoch(arrived.iter().map(|&t| t as usize));
        for &thread in waiting {
            self.learn(thread as usize, all.clone());
        }
        for &thread in arrived {
            self.own[thread as usize] = next;
        }
    }

    /// Gathers in `scratch` what the `threads` know together, of the threads `of`.
    fn gather(&mut self, threads: impl Iterator<Item = usize>, of: std::ops::Range<usize>) {
        self.scratch[of.clone()].fill(0);
        for thread in threads {
            let known = &self.known[thread * self.own.len()..][of.clone()];
            for (all, &known) in self.scratch[of.clone()].iter_mut().zip(known) {
                *all = (*all).max(known);
            }
            self.scratch[thread] = self.scratch[thread].max(self.own[thread]);
        }
    }

    fn learn(&mut self, thread: usize, of: std::ops::Range<usize>) {
        self.known[thread * self.own.len()..][of.clone()].copy_from_slice(&self.scratch[of]);
    }

    fn next_epoch(&self, threads: impl Iterator<Item = usize>) -> u32 {
        // On overflow epochs stand still: then races may be missed, but none is made up.
        threads.map(|t| self.own[t]).max().unwrap_or(0).saturating_add(1)
    }
}
