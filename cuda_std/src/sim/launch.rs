//! Launches of kernels.
use super::arrivals;
use super::cluster;
use super::memory::{Allocation, Memory};
use super::order::Order;
use super::report::{Finding, FindingKind, Party, Report};
use super::shared_memory::MOST_SHARED_BYTES;
use super::traffic::Tally;
use super::unit::Actor;
use super::{panics, stacks};
use std::panic::Location;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// What to launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// How reports call the kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block: at most 1024.
    pub block: [u32; 3],
    /// Dynamic shared memory, in bytes.
    pub shared_bytes: u32,
}

/// How to launch it.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Whether to look for races and for reads of what nobody has written. Without it, whatever a launch may have
    /// written counts as written.
    pub race_detector: bool,
    /// Whether to count what is moved. Flops are always counted.
    pub counters: bool,
    /// Another order in which the threads of a block take turns for each seed; 0: they run in the order of their
    /// indices as far as they can.
    pub seed: u64,
    /// Threads of the host; 0: one for each of its cores.
    pub workers: usize,
    /// Is told how many blocks have ended, and of how many.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options { race_detector: true, counters: true, seed: 0, workers: 0, progress: None }
    }
}

const MOST_THREADS: u64 = 1024;

/// Runs `kernel` in each thread of each block of a launch, on a simulated GPU with this memory. It returns when all
/// have ended; a block with a fault that it cannot go on from ends early, and the others run all the same.
#[track_caller]
pub fn launch(launch: &Launch, memory: &Memory, options: &Options<'_>, kernel: impl Fn() + Sync) -> Report {
    launch_clusters(launch, 1, memory, options, kernel)
}

/// As [`launch()`], in clusters of `cluster` blocks that are neighbours in the first dimension of the grid. The blocks
/// of a cluster run on one thread of the host.
#[track_caller]
pub fn launch_clusters(
    launch: &Launch,
    cluster: u32,
    memory: &Memory,
    options: &Options<'_>,
    kernel: impl Fn() + Sync,
) -> Report {
    let product = |dimensions: [u32; 3]| dimensions.into_iter().fold(1u64, |all, n| all.saturating_mul(n as u64));
    let (blocks, threads) = (product(launch.grid), product(launch.block));
    let why = why_impossible(blocks, threads, launch.shared_bytes);
    if let Some(message) = why.or_else(|| why_no_clusters(cluster, launch.grid, threads)) {
        return refuse(launch, Location::caller(), message);
    }
    panics::install_hook();
    let context = Arc::new(Context {
        kernel: launch.kernel,
        grid: launch.grid,
        block: launch.block,
        cluster,
        shared_bytes: launch.shared_bytes,
        race_detector: options.race_detector,
        counters: options.counters,
        seed: options.seed,
        allocations: memory.allocations(),
        order: Order::default(),
        counters_in_grid: arrivals::Counters::default(),
    });
    let (next, tally) = (AtomicU32::new(0), Mutex::new(Tally::new(context.allocations.len())));
    let progress = |done| options.progress.iter().for_each(|progress| progress(done, blocks));
    let work = |stacks| {
        let take = || Some(next.fetch_add(cluster, Relaxed)).filter(|&number| (number as u64) < blocks);
        let done = cluster::work(&context, stacks, take, &kernel, progress);
        tally.lock().unwrap().merge(done);
    };
    let threads_at_once = threads as usize * cluster as usize;
    let stacks = stacks::take(threads_at_once, true).expect("waited for");
    std::thread::scope(|scope| {
        for _ in 1..worker_count(options.workers, blocks / cluster as u64) {
            let Some(stacks) = stacks::take(threads_at_once, false) else { break };
            let work = &work;
            scope.spawn(move || work(stacks));
        }
        work(stacks);
    });
    if !options.race_detector {
        context.allocations.iter().for_each(|allocation| allocation.set_all_written());
    }
    let findings = context.order.finish(&context.allocations);
    Report { findings, counters: tally.into_inner().unwrap().into_counters(&context.allocations) }
}

fn worker_count(asked: usize, blocks: u64) -> u64 {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = if asked == 0 { cores() } else { asked };
    (workers as u64).min(blocks)
}

fn why_impossible(blocks: u64, threads: u64, shared_bytes: u32) -> Option<String> {
    if blocks == 0 || blocks > u32::MAX as u64 {
        Some(format!("{blocks} blocks"))
    } else if threads == 0 || threads > MOST_THREADS {
        Some(format!("{threads} threads a block; 1 to {MOST_THREADS} are allowed"))
    } else if shared_bytes > MOST_SHARED_BYTES {
        Some(format!("{shared_bytes} bytes of shared memory; at most {MOST_SHARED_BYTES} are allowed"))
    } else {
        None
    }
}

/// The most threads of a cluster that the race detector tells apart, besides the agents of its mbarriers.
const MOST_CLUSTER_THREADS: u64 = 3072;

fn why_no_clusters(cluster: u32, grid: [u32; 3], threads: u64) -> Option<String> {
    if cluster == 0 || cluster > 16 || !grid[0].is_multiple_of(cluster) {
        Some(format!("clusters of {cluster} blocks, in a grid that is {} wide", grid[0]))
    } else if cluster > 1 && cluster as u64 * threads > MOST_CLUSTER_THREADS {
        Some(format!("clusters of {cluster} blocks of {threads} threads; {MOST_CLUSTER_THREADS} threads are allowed"))
    } else {
        None
    }
}

fn refuse(launch: &Launch, location: &'static Location<'static>, message: String) -> Report {
    let finding = Finding {
        kind: FindingKind::Launch,
        kernel: launch.kernel,
        block: [0; 3],
        thread: [0; 3],
        location,
        other: None,
        message,
        occurrences: 1,
    };
    Report { findings: vec![finding], ..Report::default() }
}

/// What all blocks of a launch share.
pub(super) struct Context {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks a cluster.
    pub cluster: u32,
    pub shared_bytes: u32,
    pub race_detector: bool,
    pub counters: bool,
    pub seed: u64,
    pub allocations: Vec<Arc<Allocation>>,
    pub order: Order,
    /// What blocks that have arrived at counters in global memory tell others.
    pub counters_in_grid: arrivals::Counters,
}

impl Context {
    pub fn block_index(&self, number: u32) -> [u32; 3] {
        unravel(number, self.grid)
    }

    /// A thread of any block, for a finding.
    pub fn party(&self, block: u32, actor: Actor) -> Party {
        Party {
            block: self.block_index(block),
            thread: unravel(actor.thread() as u32 % self.block.iter().product::<u32>(), self.block),
            location: actor.site().location(),
        }
    }
}

/// The index, in three dimensions, of element `number` of a grid or block: x runs fastest.
pub(super) fn unravel(number: u32, [x, y, _]: [u32; 3]) -> [u32; 3] {
    [number % x, number / x % y, number / x / y]
}
