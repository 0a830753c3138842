//! What happened before what: vector clocks of the threads of a cluster.
//!
//! Each thread counts its own epochs, and knows of each other thread the last epoch that happened before its present.
//! The barrier of the whole block is by far the most frequent order, so it has a short form: a `floor` that all epochs
//! up to it lie below, and after it all threads are in the same epoch again.
//!
//! What the async proxy does, it does through agents: one for the copies that each mbarrier is told of, and one for the
//! products of each warp. An agent knows what the thread that employs it knew then; others know what it did once they
//! have waited for it, but by nothing else. Agents are numbered behind the threads, and count epochs that no floor
//! reaches.
use super::WARP;

/// Room is made for so many at a time.
const MORE_AGENTS: usize = 32;

const FIRST_OF_AGENTS: u32 = 1 << 31;

/// A proxy fence of global memory, by `thread`, whose next epoch is `next`: the async proxy sees what it knew by then, of each
/// thread the last epoch.
struct GlobalFence {
    thread: usize,
    next: u32,
    known: Vec<u32>,
}

/// The vector clocks of a cluster: most are of one block.
#[derive(Default)]
pub(super) struct Clocks {
    threads: usize,
    /// The epoch that each thread and each agent is in.
    own: Vec<u32>,
    /// `known[t * own.len() + u]`: the last epoch of `u` that happened before the present of `t`.
    known: Vec<u32>,
    /// Of each agent the thread that last employed it.
    agents: Vec<usize>,
    /// By thread: the epochs that its proxy fences have ended.
    fences: Vec<Vec<u32>>,
    /// The proxy fences of global memory.
    global_fences: Vec<GlobalFence>,
    /// By thread: the epochs in which copies of it wrote global memory, and nothing else did for it.
    copied: Vec<Vec<u32>>,
    /// Epochs up to this one, of all threads, happened before the present of all threads.
    floor: u32,
    /// Whether a thread may know more of another warp than the floor says.
    across_warps: bool,
    scratch: Vec<u32>,
}

impl Clocks {
    /// Begins a cluster.
    pub fn reset(&mut self, threads: usize) {
        self.threads = threads;
        self.own.clear();
        self.own.resize(threads, 1);
        self.known.clear();
        self.known.resize(threads * threads, 0);
        self.agents.clear();
        self.fences.clear();
        self.global_fences.clear();
        self.copied.clear();
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

    /// The threads of a block, `count` from `first` on, meet.
    pub fn join_block(&mut self, first: usize, count: usize) {
        if count == self.threads {
            self.join_all();
        } else {
            self.join(first..first + count, &[]);
        }
    }

    fn join_all(&mut self) {
        self.floor = self.own[..self.threads].iter().copied().max().unwrap_or(0);
        self.own[..self.threads].fill(self.floor + 1);
        self.across_warps = false;
        if !self.agents.is_empty() {
            let agents = self.threads..self.threads + self.agents.len();
            self.gather_known(0..self.threads, agents.clone());
            (0..self.threads).for_each(|thread| self.learn(thread, agents.clone()));
        }
    }

    /// The lanes of `members` meet in their warp, which begins at thread `first`.
    pub fn join_warp(&mut self, first: usize, members: u32) {
        let lanes = first..(first + WARP).min(self.threads);
        let known_of = if self.across_warps { 0..self.own.len() } else { lanes.clone() };
        let is_member = |thread: usize| members >> (thread - first) & 1 == 1;
        self.gather(lanes.clone().filter(|&t| is_member(t)), known_of.clone());
        let next = self.next_epoch(lanes.clone().filter(|&t| is_member(t)));
        for thread in lanes.filter(|&t| is_member(t)) {
            self.learn(thread, known_of.clone());
            self.own[thread] = next;
        }
    }

    /// All of `waiting`, threads of the block that begins at `first`, meet, and see what others have `released`.
    pub fn join_some(&mut self, first: usize, waiting: &[u16], released: &[u32]) {
        self.join(waiting.iter().map(move |&thread| first + thread as usize), released);
    }

    fn join(&mut self, threads: impl Iterator<Item = usize> + Clone, released: &[u32]) {
        self.across_warps = true;
        let all = 0..self.own.len();
        self.gather(threads.clone(), all.clone());
        for (all, &released) in self.scratch.iter_mut().zip(released) {
            *all = (*all).max(released);
        }
        let next = self.next_epoch(threads.clone());
        for thread in threads {
            self.learn(thread, all.clone());
            self.own[thread] = next;
        }
    }

    /// What the thread did so far happens before what those do that [`acquire`](Self::acquire) from `released`.
    pub fn release(&mut self, thread: usize, released: &mut Vec<u32>) {
        let len = self.own.len();
        released.resize(len, 0);
        for (all, &known) in released.iter_mut().zip(&self.known[thread * len..][..len]) {
            *all = (*all).max(known);
        }
        released[thread] = released[thread].max(self.own[thread]);
        self.begin_epoch(thread);
    }

    /// What was released happens before the present of the thread.
    pub fn acquire(&mut self, thread: usize, released: &[u32]) {
        self.across_warps = true;
        let len = self.own.len();
        for (known, &other) in self.known[thread * len..][..len].iter_mut().zip(released) {
            *known = (*known).max(other);
        }
    }

    /// The epochs of all threads that happened before the present of the thread; another epoch of it begins.
    pub fn tell(&mut self, thread: usize) -> Vec<u32> {
        let mut told = Vec::new();
        self.release(thread, &mut told);
        told[..self.threads].iter_mut().for_each(|epoch| *epoch = (*epoch).max(self.floor));
        told
    }

    /// Another epoch of the thread begins.
    pub fn begin_epoch(&mut self, thread: usize) -> u32 {
        self.own[thread] = self.own[thread].saturating_add(1);
        self.own[thread]
    }

    /// A new agent, behind all threads.
    pub fn add_agent(&mut self) -> usize {
        let (old, agent) = (self.own.len(), self.threads + self.agents.len());
        self.agents.push(0);
        if agent == old {
            let new = old + MORE_AGENTS;
            let mut known = vec![0; new * new];
            for (new, old) in known.chunks_exact_mut(new).zip(self.known.chunks_exact(old)) {
                new[..old.len()].copy_from_slice(old);
            }
            self.known = known;
            self.own.resize(new, FIRST_OF_AGENTS);
            self.scratch.resize(new, 0);
        }
        agent
    }

    /// A thread gives the agent something to do, which knows what the thread knows.
    pub fn employ(&mut self, agent: usize, thread: usize) {
        self.agents[agent - self.threads] = thread;
        let len = self.own.len();
        self.known.copy_within(thread * len..(thread + 1) * len, agent * len);
        self.known[agent * len + thread] = self.own[thread];
    }

    /// The agent has done it: the epoch in which it did, after which another begins.
    pub fn dismiss(&mut self, agent: usize) -> u32 {
        let epoch = self.own[agent];
        self.own[agent] = epoch.saturating_add(1);
        epoch
    }

    /// What the agent did up to an epoch happens before the present of the thread.
    pub fn learn_of(&mut self, thread: usize, agent: usize, epoch: u32) {
        self.across_warps = true;
        let known = &mut self.known[thread * self.own.len() + agent];
        *known = (*known).max(epoch);
    }

    /// The thread that did something, or that last employed the agent that did.
    pub fn thread_of(&self, actor: usize) -> usize {
        actor.checked_sub(self.threads).map_or(actor, |agent| self.agents[agent])
    }

    /// What the agent did so far is released.
    pub fn release_agent(&mut self, agent: usize, released: &mut Vec<u32>) {
        released.resize(self.own.len(), 0);
        released[agent] = self.dismiss(agent);
    }

    /// The thread makes what it has written visible to the async proxy.
    pub fn fence(&mut self, thread: usize) {
        self.fences.resize(self.threads, Vec::new());
        self.fences[thread].push(self.own[thread]);
        self.begin_epoch(thread);
    }

    /// Whether the async proxy sees, on behalf of `reader`, what `writer` wrote in `epoch`: a fence of the writer lies
    /// between.
    pub fn is_visible(&self, writer: usize, epoch: u32, reader: usize) -> bool {
        if writer >= self.threads {
            return true;
        }
        let fences = self.fences.get(writer).map_or(&[][..], |fences| fences);
        let next = fences.get(fences.partition_point(|&fence| fence < epoch));
        next.is_some_and(|&fence| self.is_before(writer, fence.saturating_add(1), reader))
    }

    /// The thread makes what it knows to be written to global memory visible to the async proxy: another epoch of it begins.
    pub fn fence_globally(&mut self, thread: usize) -> u32 {
        let known = self.tell(thread);
        let next = self.own[thread];
        self.global_fences.push(GlobalFence { thread, next, known });
        next
    }

    /// A copy of the thread writes global memory, in an epoch that begins here, and ends with `end_of_copy`.
    pub fn begin_of_copy(&mut self, thread: usize) {
        let epoch = self.begin_epoch(thread);
        self.copied.resize(self.threads, Vec::new());
        self.copied[thread].push(epoch);
    }

    pub fn end_of_copy(&mut self, thread: usize) {
        self.begin_epoch(thread);
    }

    /// Whether the async proxy sees, on behalf of `user`, what `writer` wrote to global memory in `epoch`, if that comes first:
    /// it wrote that itself, or a fence lies between, of any thread.
    pub fn is_fenced_globally(&self, writer: usize, epoch: u32, user: usize) -> bool {
        let copied = self.copied.get(writer).is_some_and(|copied| copied.binary_search(&epoch).is_ok());
        let lies_between = |fence: &GlobalFence| {
            fence.known.get(writer) >= Some(&epoch) && self.is_before(fence.thread, fence.next, user)
        };
        copied || self.global_fences.iter().any(lies_between)
    }

    /// Gathers in `scratch` what the `threads` know together, of the threads `of`, among which they are.
    fn gather(&mut self, threads: impl Iterator<Item = usize> + Clone, of: std::ops::Range<usize>) {
        self.gather_known(threads.clone(), of);
        for thread in threads {
            self.scratch[thread] = self.scratch[thread].max(self.own[thread]);
        }
    }

    fn gather_known(&mut self, threads: impl Iterator<Item = usize>, of: std::ops::Range<usize>) {
        self.scratch[of.clone()].fill(0);
        for thread in threads {
            let known = &self.known[thread * self.own.len()..][of.clone()];
            for (all, &known) in self.scratch[of.clone()].iter_mut().zip(known) {
                *all = (*all).max(known);
            }
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
