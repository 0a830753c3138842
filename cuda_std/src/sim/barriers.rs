//! The barriers of a block: 0 for all its threads, 1 to 15 for as many as the words say.
use super::WARP;
use super::block::{Block, Stop, suspend, unless_stopped, with};
use super::rendezvous::Lanes;
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;

/// One barrier, in its present phase.
#[derive(Default)]
pub(super) struct Barrier {
    /// How many threads it takes, as the first to come said.
    pub threads: u32,
    pub arrived: Vec<u16>,
    waiting: Vec<u16>,
    /// What those did before that have arrived and gone on.
    released: Vec<u32>,
    /// By warp: where its first lane arrived, and which lanes have.
    warps: [(Option<Site>, u32); 32],
    /// Whether its threads vote, as the first to come did; and whether one has voted yes.
    votes: bool,
    any: bool,
    /// What the last phase's vote came to. Who waited there reads it before this phase can end.
    outcome: bool,
}

impl Barrier {
    pub fn reset(&mut self) {
        *self = Barrier::default();
    }
}

/// The running thread arrives at barrier `id` of `threads` threads, and waits there if it is to.
#[inline(always)]
pub(super) fn barrier(id: u32, threads: u32, waits: bool, site: Site) {
    if unless_stopped(with(|block| block.arrive_at_barrier(id, threads, waits, site))) {
        suspend();
    }
}

/// The running thread waits for all threads of the block.
#[inline(always)]
pub(super) fn block_barrier(site: Site) {
    let must_wait = with(|block| {
        let threads = block.threads.len() as u32;
        block.join_barrier(0, threads, true, None, site)
    });
    if unless_stopped(must_wait) {
        suspend();
    }
}

/// The running thread waits for all threads of the block, and learns whether one of them has voted yes.
#[inline(always)]
pub(super) fn block_vote(vote: bool, site: Site) -> bool {
    let must_wait = with(|block| {
        let threads = block.threads.len() as u32;
        block.join_barrier(0, threads, true, Some(vote), site)
    });
    if unless_stopped(must_wait) {
        suspend();
    }
    with(|block| block.barriers[0].outcome)
}

impl Block {
    /// Whether the thread must wait.
    #[inline(always)]
    fn arrive_at_barrier(&mut self, id: u32, threads: u32, waits: bool, site: Site) -> Result<bool, Stop> {
        let most = self.threads.len() as u32;
        let message = if id > 15 {
            format!("barrier {id}: there are 0 to 15")
        } else if threads == 0 || !threads.is_multiple_of(WARP as u32) {
            format!("barrier {id} of {threads} threads: a barrier counts whole warps")
        } else if threads > most {
            format!("barrier {id} of {threads} threads, but the block has {most}")
        } else {
            return self.join_barrier(id, threads, waits, None, site);
        };
        Err(self.fault(FindingKind::Barrier, site, None, message))
    }

    #[inline(always)]
    fn join_barrier(
        &mut self,
        id: u32,
        threads: u32,
        waits: bool,
        vote: Option<bool>,
        site: Site,
    ) -> Result<bool, Stop> {
        let thread = self.current;
        let (warp, lane) = (thread / WARP, thread % WARP);
        let barrier = &mut self.barriers[id as usize];
        if barrier.arrived.is_empty() {
            barrier.threads = threads;
            barrier.votes = vote.is_some();
        }
        let (place, lanes) = &mut barrier.warps[warp];
        let differs = barrier.threads != threads || barrier.votes != vote.is_some();
        if differs || *lanes >> lane & 1 == 1 || place.is_some_and(|place| place != site) {
            return Err(self.misused_barrier(id, threads, site));
        }
        *place = Some(site);
        *lanes |= 1 << lane;
        barrier.any |= vote == Some(true);
        barrier.arrived.push(thread as u16);
        let is_last = barrier.arrived.len() as u32 == threads;
        if waits {
            barrier.waiting.push(thread as u16);
            self.wait(Waiting::Barrier(id), site);
        } else {
            self.threads[thread].site = Some(site);
            if self.context.race_detector {
                let releasing = self.first_id() + thread;
                self.clocks.release(releasing, &mut self.barriers[id as usize].released);
            }
        }
        if is_last {
            self.complete_barrier(id, site)?;
        }
        Ok(waits)
    }

    /// The running thread is the last to come.
    fn complete_barrier(&mut self, id: u32, site: Site) -> Result<(), Stop> {
        let mut barrier = std::mem::take(&mut self.barriers[id as usize]);
        let torn = |w: &usize| barrier.warps[*w].1 != 0 && barrier.warps[*w].1 != self.warps[*w].lanes;
        if let Some(warp) = (0..self.warps.len()).find(torn) {
            let lanes = Lanes(barrier.warps[warp].1);
            let message = format!("barrier {id} of {} threads: of warp {warp} only {lanes} came", barrier.threads);
            return Err(self.fault(FindingKind::Barrier, site, None, message));
        }
        if barrier.waiting.len() == self.threads.len() {
            self.clocks.join_block(self.first_id(), self.threads.len());
        } else if self.context.race_detector {
            self.clocks.join_some(self.first_id(), &barrier.waiting, &barrier.released);
        }
        // In the order of their indices, unless a seed shuffles them.
        barrier.waiting.sort_unstable();
        for &thread in &barrier.waiting {
            self.wake(thread as usize);
        }
        for warp in 0..self.warps.len() {
            if barrier.warps[warp].1 != 0 {
                self.traffic.settle(warp);
            }
        }
        // The next phase begins, in the same allocations.
        barrier.arrived.clear();
        barrier.waiting.clear();
        barrier.released.clear();
        barrier.warps = Default::default();
        barrier.outcome = std::mem::take(&mut barrier.any);
        self.barriers[id as usize] = barrier;
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn misused_barrier(&mut self, id: u32, threads: u32, site: Site) -> Stop {
        let (warp, lane) = (self.current / WARP, self.current % WARP);
        let barrier = &self.barriers[id as usize];
        let (place, lanes) = barrier.warps[warp];
        let (kind, other, message) = if barrier.threads != threads {
            let message = format!("barrier {id} of {threads} threads here, of {} there", barrier.threads);
            (FindingKind::Barrier, barrier.arrived[0] as usize, message)
        } else if lanes >> lane & 1 == 1 {
            let message = format!("arrives at barrier {id} again, before the phase that it has arrived at is complete");
            (FindingKind::Barrier, self.current, message)
        } else if place.is_some_and(|place| place != site) {
            let message = format!("the warp diverges: its lanes are at barrier {id} at two places");
            (FindingKind::Divergence, warp * WARP + lanes.trailing_zeros() as usize, message)
        } else {
            let message = format!("of the threads at barrier {id} some vote and some do not");
            (FindingKind::Barrier, barrier.arrived[0] as usize, message)
        };
        let other_site = barrier.warps[other / WARP].0.or(place);
        let other = other_site.map(|site| self.party(other, site));
        self.fault(kind, site, other, message)
    }
}
