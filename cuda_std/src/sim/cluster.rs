//! Runs the threads of a cluster on one thread of the host, as coroutines. A cluster is one block, until there are words
//! for more.
use super::block::{self, Block, with};
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

/// Runs one block after the other, as long as `take` gives one, each on these stacks.
pub(super) fn work(
    context: &Arc<Context>,
    mut stacks: Vec<ThreadStack>,
    take: impl Fn() -> Option<u32>,
    kernel: &(impl Fn() + Sync),
    progress: impl Fn(u64),
) -> Tally {
    let mut block = Box::new(Block::new(context.clone()));
    let _ = words::math::take_flops();
    while let Some(number) = take() {
        block.begin(number);
        run(&mut *block, &mut stacks, kernel);
        for warp in 0..block.warps.len() {
            block.traffic.settle(warp);
        }
        let ended = Ended {
            findings: block.findings.take(),
            touches: block.global.footprint(),
            first_reads: std::mem::take(&mut block.first_reads),
        };
        context.order.end(number, ended, context, &progress);
        block.traffic.tally.blocks += 1;
    }
    stacks::give_back(stacks);
    let mut tally = std::mem::take(&mut block.traffic.tally);
    tally.flops += words::math::take_flops();
    tally
}

/// Runs a block to its end.
fn run(block: *mut Block, stacks: &mut Vec<ThreadStack>, kernel: &(impl Fn() + Sync)) {
    block::enter(block);
    let mut threads: Vec<SimulatedThread> = stacks.drain(..).map(|stack| start(stack, kernel)).collect();
    while let Some(thread) = with(Block::next_thread) {
        threads[thread].resume(());
    }
    with(|block| {
        if !block.stopped && block.exited < block.threads.len() {
            block.report_deadlock();
        }
        block.stopped = true;
    });
    for mut thread in threads {
        // A thread that a fault has stopped unwinds, so that what is on its stack is dropped.
        thread.force_unwind();
        stacks.push(thread.into_stack());
    }
    block::enter(std::ptr::null_mut());
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
        self.leave_warp();
    }
}
