//! Runs the threads of a cluster on one thread of the host, as coroutines: those of one block as far as they can, then
//! those of the next.
use super::block::{self, Block, Stop, with};
use super::clocks::Clocks;
use super::launch::Context;
use super::order::Ended;
use super::panics::{self, KernelPanic};
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;
use super::stacks::{self, ThreadStack};
use super::traffic::Tally;
use super::words;
use corosensei::{Coroutine, Yielder};
use std::panic::Location;
use std::sync::Arc;

type SimulatedThread = Coroutine<(), (), (), ThreadStack>;

/// Runs one cluster after the other, as long as `take` gives the first block of one, each on these stacks.
pub(super) fn work(
    context: &Arc<Context>,
    mut stacks: Vec<ThreadStack>,
    take: impl Fn() -> Option<u32>,
    kernel: &(impl Fn() + Sync),
    progress: impl Fn(u64),
) -> Tally {
    let new = |rank| Box::into_raw(Box::new(Block::new(context.clone(), rank)));
    let blocks: Vec<*mut Block> = (0..context.cluster).map(new).collect();
    let mut clocks = Clocks::default();
    let _ = words::math::take_flops();
    while let Some(first) = take() {
        for &block in &blocks {
            // SAFETY: made above, and freed below. Nothing else refers to a block while none runs.
            let block = unsafe { &mut *block };
            block.cluster.clone_from(&blocks);
            block.begin(first + block.rank);
        }
        run(&blocks, &mut clocks, &mut stacks, kernel);
        for &block in &blocks {
            // SAFETY: as above.
            end(unsafe { &mut *block }, context, &progress);
        }
    }
    stacks::give_back(stacks);
    let mut tally = Tally::new(context.allocations.len());
    for block in blocks {
        // SAFETY: made above.
        let block = unsafe { Box::from_raw(block) };
        tally.merge(block.traffic.tally);
    }
    tally.flops += words::math::take_flops();
    tally
}

/// Hands over what is left of a block.
fn end(block: &mut Block, context: &Context, progress: &impl Fn(u64)) {
    for warp in 0..block.warps.len() {
        block.traffic.settle(warp);
    }
    let ended = Ended {
        findings: block.findings.take(),
        footprint: block.global.footprint(&block.news),
        first_reads: std::mem::take(&mut block.first_reads),
        heard: block.news.take_heard(),
    };
    context.order.end(block.number, ended, context, progress);
    block.traffic.tally.blocks += 1;
}

/// Runs the blocks of a cluster to their end.
fn run(blocks: &[*mut Block], clocks: &mut Clocks, stacks: &mut Vec<ThreadStack>, kernel: &(impl Fn() + Sync)) {
    let mut barrier = ClusterBarrier::default();
    // Runs `act` with one of the blocks as the one that words act on; it has the state of the cluster meanwhile.
    let mut enter = |block: *mut Block, act: &mut dyn FnMut()| {
        block::enter(block);
        let mut exchange = || {
            with(|block| {
                std::mem::swap(&mut block.clocks, clocks);
                std::mem::swap(&mut block.cluster_barrier, &mut barrier);
            })
        };
        exchange();
        act();
        exchange();
        block::enter(std::ptr::null_mut());
    };
    let mut threads_of = Vec::new();
    for &block in blocks {
        enter(block, &mut || {
            let count = with(|block| block.threads.len());
            with(|block| {
                if block.rank == 0 {
                    block.clocks.reset(count * blocks.len());
                    block.cluster_barrier.running = (count * blocks.len()) as u32;
                }
            });
            let rest = stacks.split_off(stacks.len() - count);
            threads_of.push(rest.into_iter().map(|stack| start(stack, kernel)).collect::<Vec<SimulatedThread>>());
        });
    }
    let (mut runs, mut stopped) = (true, false);
    while runs && !stopped {
        runs = false;
        for (&block, threads) in blocks.iter().zip(&mut threads_of) {
            enter(block, &mut || {
                while let Some(thread) = with(Block::next_thread) {
                    threads[thread].resume(());
                    runs = true;
                }
                stopped |= with(|block| block.stopped);
            });
        }
    }
    for (&block, threads) in blocks.iter().zip(threads_of) {
        let mut threads = Some(threads);
        enter(block, &mut || {
            with(|block| {
                if !stopped && block.exited < block.threads.len() {
                    block.report_deadlock();
                }
                block.stopped = true;
            });
            for mut thread in threads.take().into_iter().flatten() {
                // A thread that a fault has stopped unwinds, so that what is on its stack is dropped.
                thread.force_unwind();
                stacks.push(thread.into_stack());
            }
        });
    }
}

fn start(stack: ThreadStack, kernel: &(impl Fn() + Sync)) -> SimulatedThread {
    let body = move |yielder: &Yielder<(), ()>, ()| {
        with(|block| block.threads[block.current].yielder = yielder);
        let result = panics::catch(kernel);
        with(|block| block.leave(result));
    };
    // SAFETY: the body borrows the kernel, which outlives the coroutine: `run` ends each before it returns.
    unsafe { Coroutine::with_stack_unchecked(stack, body) }
}

/// The barrier of the cluster.
#[derive(Default)]
pub(super) struct ClusterBarrier {
    /// Threads that have not exited.
    running: u32,
    arrived: u32,
    phase: u32,
    /// What happened before the arrivals of this phase, and before those of the last.
    gathered: Vec<u32>,
    released: Vec<u32>,
    /// By thread of the cluster: the phase that it has arrived at, and is to wait for.
    arrivals: Vec<Option<u32>>,
}

impl Block {
    fn next_thread(&mut self) -> Option<usize> {
        if self.stopped {
            return None;
        }
        self.current = self.ready.pop()?;
        if self.ready.is_spinning() {
            self.report_spinning();
            return None;
        }
        self.traffic.tally.switches += 1;
        Some(self.current)
    }

    /// The running thread has returned from the kernel, or panicked.
    fn leave(&mut self, result: Result<(), Option<KernelPanic>>) {
        if self.stopped {
            return;
        }
        if let Err(panic) = result {
            let panic = panic.unwrap_or(KernelPanic {
                message: "a panic whose message went elsewhere".to_owned(),
                location: Location::caller(),
            });
            self.report(FindingKind::Panic, Site::of(panic.location), None, panic.message);
            self.stopped = true;
            return;
        }
        self.threads[self.current].waiting = Waiting::Exited;
        self.exited += 1;
        self.ready.progress();
        self.leave_copies();
        self.leave_products();
        if self.leave_bulk_groups().is_err() {
            self.stopped = true;
        }
        self.leave_warp();
        self.leave_warpgroup();
        self.cluster_barrier.running -= 1;
        self.complete_cluster_barrier();
    }

    /// The running thread arrives at the barrier of the cluster.
    pub fn arrive_at_cluster(&mut self, site: Site) -> Result<(), Stop> {
        let id = self.first_id() + self.current;
        let barrier = &mut self.cluster_barrier;
        if barrier.arrivals.len() <= id {
            barrier.arrivals.resize(id + 1, None);
        }
        if barrier.arrivals[id].is_some() {
            let message = "arrives at the barrier of the cluster again, without a wait in between".to_owned();
            return Err(self.fault(FindingKind::Barrier, site, None, message));
        }
        barrier.arrivals[id] = Some(barrier.phase);
        barrier.arrived += 1;
        if self.context.race_detector {
            self.clocks.release(id, &mut self.cluster_barrier.gathered);
        }
        self.threads[self.current].site = Some(site);
        self.complete_cluster_barrier();
        Ok(())
    }

    /// Whether the running thread may go on; else it waits for the barrier of the cluster.
    pub fn poll_cluster(&mut self, site: Site) -> Result<bool, Stop> {
        let id = self.first_id() + self.current;
        let Some(phase) = self.cluster_barrier.arrivals.get(id).copied().flatten() else {
            let message = "waits at the barrier of the cluster without having arrived".to_owned();
            return Err(self.fault(FindingKind::Barrier, site, None, message));
        };
        if phase == self.cluster_barrier.phase {
            self.wait(Waiting::Cluster, site);
            return Ok(false);
        }
        self.cluster_barrier.arrivals[id] = None;
        if self.context.race_detector {
            self.clocks.acquire(id, &self.cluster_barrier.released);
        }
        Ok(true)
    }

    fn complete_cluster_barrier(&mut self) {
        let barrier = &mut self.cluster_barrier;
        if barrier.arrived == 0 || barrier.arrived < barrier.running {
            return;
        }
        barrier.arrived = 0;
        barrier.phase += 1;
        barrier.released.clone_from(&barrier.gathered);
        self.wake_those_at_cluster();
        for rank in 0..self.cluster.len() as u32 {
            if let Some(peer) = self.peer(rank) {
                peer.wake_those_at_cluster();
            }
        }
    }

    fn wake_those_at_cluster(&mut self) {
        for thread in 0..self.threads.len() {
            if self.threads[thread].waiting == Waiting::Cluster {
                self.wake(thread);
            }
        }
        self.ready.progress();
    }
}
