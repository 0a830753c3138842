//! The state of a block, and how words get at it.
//!
//! Words run on the stacks of simulated threads, which take turns. So no reference to the state may live while a thread
//! is suspended: another changes it in the meantime, which a compiler that sees `&mut` does not expect. Words therefore
//! change the state in the closures of [`with`], which cannot suspend, and suspend between them.
use super::WARP;
use super::arrivals::News;
use super::barriers::Barrier;
use super::bulk::BulkGroups;
use super::clocks::Clocks;
use super::cluster::ClusterBarrier;
use super::copies::Copies;
use super::global_shadow::GlobalShadow;
use super::launch::{Context, unravel};
use super::mbarriers::Mbarrier;
use super::products::Products;
use super::rendezvous::Warp;
use super::report::{Finding, FindingKind, Findings, Party};
use super::scheduler::{Ready, Waiting};
use super::shared_memory::SharedMemory;
use super::site::Site;
use super::traffic::Traffic;
use super::uninitialised::FirstRead;
use super::unit::Actor;
use super::warpgroups::Warpgroup;
use corosensei::Yielder;
use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::Location;
use std::sync::Arc;

/// A block of threads, and all that they share.
pub(super) struct Block {
    pub context: Arc<Context>,
    /// Its place in the order in which blocks start.
    pub number: u32,
    pub index: [u32; 3],
    /// Its index in its cluster.
    pub rank: u32,
    /// All blocks of the cluster, by rank.
    pub cluster: Vec<*mut Block>,
    pub threads: Vec<Thread>,
    /// The thread that runs.
    pub current: usize,
    pub ready: Ready,
    /// Threads that have returned from the kernel.
    pub exited: usize,
    /// A fault has ended it.
    pub stopped: bool,
    /// Whether all blocks before it have ended.
    pub is_first: bool,
    pub warps: Vec<Warp>,
    pub warpgroups: Vec<Warpgroup>,
    pub barriers: [Barrier; 16],
    pub mbarriers: Vec<Mbarrier>,
    pub products: Products,
    /// The clocks of the cluster, while a thread of this block runs.
    pub clocks: Clocks,
    /// Likewise.
    pub cluster_barrier: ClusterBarrier,
    pub shared: SharedMemory,
    pub global: GlobalShadow,
    pub first_reads: Vec<FirstRead>,
    pub news: News,
    pub traffic: Traffic,
    pub findings: Findings,
}

/// A thread of a block.
pub(super) struct Thread {
    pub index: [u32; 3],
    pub waiting: Waiting,
    /// Where it last waited.
    pub site: Option<Site>,
    pub copies: Copies,
    pub bulk: BulkGroups,
    /// Products of its warpgroup that it has not waited for.
    pub products: VecDeque<u32>,
    pub yielder: *const Yielder<(), ()>,
}

/// A fault that ends the block: the thread must not go on.
pub(super) struct Stop;

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(std::ptr::null_mut()) };
}

/// Makes `block` the one that words act on, on this thread of the host.
pub(super) fn enter(block: *mut Block) {
    CURRENT.set(block);
}

/// Whether this thread of the host runs a kernel at the moment.
pub(super) fn in_kernel() -> bool {
    !CURRENT.get().is_null()
}

/// Acts on the state of the block that runs. `act` must neither suspend nor call `with`.
#[inline(always)]
pub(super) fn with<R>(act: impl FnOnce(&mut Block) -> R) -> R {
    let block = CURRENT.get();
    if block.is_null() {
        outside_of_a_launch()
    }
    // SAFETY: `cluster::run` entered the block and keeps it until it leaves. The reference is the only one: it ends
    // with `act`, before another thread of the block or the scheduler can run. Other blocks are reached by
    // `Block::peer` alone.
    act(unsafe { &mut *block })
}

#[cold]
#[inline(never)]
fn outside_of_a_launch() -> ! {
    panic!("a word of the device, outside of a kernel on the simulated GPU")
}

/// Lets other threads run, until one of them or the scheduler makes this one ready.
#[inline(always)]
pub(super) fn suspend() {
    let yielder = with(|block| block.threads[block.current].yielder);
    // SAFETY: the yielder of the coroutine that runs, which lives as long as its stack.
    unsafe { &*yielder }.suspend(());
}

/// The result of a word, unless it ended the block.
#[inline(always)]
pub(super) fn unless_stopped<T>(result: Result<T, Stop>) -> T {
    match result {
        Ok(value) => value,
        Err(Stop) => stop(),
    }
}

#[cold]
#[inline(never)]
fn stop() -> ! {
    with(|block| block.stopped = true);
    loop {
        suspend();
    }
}

/// The place in a kernel's source that says a word.
#[inline(always)]
#[track_caller]
pub(super) fn here() -> Site {
    Site::of(Location::caller())
}

impl Block {
    /// A block that has not begun.
    pub fn new(context: Arc<Context>, rank: u32) -> Self {
        let count = context.block.iter().product::<u32>();
        let thread = |number| Thread {
            index: unravel(number, context.block),
            waiting: Waiting::Nothing,
            site: None,
            copies: Copies::default(),
            bulk: BulkGroups::default(),
            products: VecDeque::new(),
            yielder: std::ptr::null(),
        };
        let lanes = |warp: usize| (count as usize - warp * WARP).min(WARP);
        Block {
            number: 0,
            index: [0; 3],
            rank,
            cluster: Vec::new(),
            threads: (0..count).map(thread).collect(),
            current: 0,
            ready: Ready::default(),
            exited: 0,
            stopped: false,
            is_first: false,
            warps: (0..(count as usize).div_ceil(WARP)).map(|warp| Warp::new(lanes(warp))).collect(),
            warpgroups: Warpgroup::all_of(count as usize),
            barriers: Default::default(),
            mbarriers: Vec::new(),
            products: Products::default(),
            clocks: Clocks::default(),
            cluster_barrier: ClusterBarrier::default(),
            shared: SharedMemory::default(),
            global: GlobalShadow::default(),
            first_reads: Vec::new(),
            news: News::default(),
            traffic: Traffic::new(count as usize, context.allocations.len()),
            findings: Findings::default(),
            context,
        }
    }

    /// Begins block `number` of the launch.
    pub fn begin(&mut self, number: u32) {
        self.number = number;
        self.index = self.context.block_index(number);
        for thread in &mut self.threads {
            thread.waiting = Waiting::Nothing;
            thread.site = None;
            thread.copies.clear();
            thread.bulk.clear();
            thread.products.clear();
        }
        self.ready.reset(self.threads.len(), self.context.seed, number);
        self.exited = 0;
        self.stopped = false;
        self.is_first = false;
        self.warps.iter_mut().for_each(Warp::reset);
        self.warpgroups.iter_mut().for_each(Warpgroup::reset);
        self.barriers.iter_mut().for_each(Barrier::reset);
        self.mbarriers.clear();
        self.products.clear();
        self.shared.reset(self.context.shared_bytes);
        self.global.clear();
        self.first_reads.clear();
        self.news.clear();
    }

    /// The number of its first thread among those of the cluster.
    #[inline(always)]
    pub fn first_id(&self) -> usize {
        self.rank as usize * self.threads.len()
    }

    /// A thread of this block, among those of the cluster, and what it is at.
    #[inline(always)]
    pub fn actor(&self, thread: usize, site: Site) -> Actor {
        Actor::new(self.first_id() + thread, site)
    }

    /// Another block of the cluster, or none if it is this one, which the caller has.
    pub fn peer(&mut self, rank: u32) -> Option<&mut Block> {
        // SAFETY: the blocks of a cluster live as long as it runs, on one thread of the host; the word that runs has a
        // reference to this one, and gets one to another only here, with this one borrowed.
        (rank != self.rank).then(|| unsafe { &mut *self.cluster[rank as usize] })
    }

    /// Reports what the running thread does at `site`.
    #[cold]
    #[inline(never)]
    pub fn report(&mut self, kind: FindingKind, site: Site, other: Option<Party>, message: String) {
        self.report_of(self.current, kind, site, other, message);
    }

    /// Reports what `thread` does at `site`.
    #[cold]
    #[inline(never)]
    pub fn report_of(&mut self, thread: usize, kind: FindingKind, site: Site, other: Option<Party>, message: String) {
        self.report_lazily(thread, kind, site, other, |_| message);
    }

    /// Reports what `thread` does at `site`, in words that are only made if nothing is known of the same places.
    pub fn report_lazily(
        &mut self,
        thread: usize,
        kind: FindingKind,
        site: Site,
        other: Option<Party>,
        message: impl FnOnce(&Block) -> String,
    ) {
        let mut findings = std::mem::take(&mut self.findings);
        let location = site.location();
        findings.count((kind, location, other.map(|other| other.location)), 1, || Finding {
            kind,
            kernel: self.context.kernel,
            block: self.index,
            thread: self.threads[thread].index,
            location,
            other,
            message: message(self),
            occurrences: 1,
        });
        self.findings = findings;
    }

    /// Reports a fault after which the running thread cannot go on.
    #[cold]
    #[inline(never)]
    pub fn fault(&mut self, kind: FindingKind, site: Site, other: Option<Party>, message: String) -> Stop {
        self.report(kind, site, other, message);
        Stop
    }

    /// A thread of the cluster, or the one that told an agent, as the other side of a finding.
    pub fn party_of(&self, actor: Actor) -> Party {
        let (rank, thread) = {
            let (id, count) = (self.clocks.thread_of(actor.thread()), self.threads.len());
            ((id / count) as u32, id % count)
        };
        let block = self.context.block_index(self.number - self.rank + rank);
        Party { block, thread: self.threads[thread].index, location: actor.site().location() }
    }

    /// A thread of this block as the other side of a finding.
    pub fn party(&self, thread: usize, site: Site) -> Party {
        Party { block: self.index, thread: self.threads[thread].index, location: site.location() }
    }
}
