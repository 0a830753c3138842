//! Stages of shared memory that some threads fill and others empty, in turn: the full and the empty barriers of all
//! stages, and who is at which stage in which phase. sm_90.
//!
//! ```text
//! producer                                consumer
//! let slot = producer.acquire();          let slot = consumer.wait();
//! slot.expect(bytes);                     .. reads tile.stage(slot.index) ..
//! map.load_tile(.., slot.full());         slot.release();
//! producer.advance();                     consumer.advance();
//! ```
use crate::Shared;
use crate::mbarrier::Mbarrier;

/// The barriers of `STAGES` stages.
#[derive(Clone, Copy)]
pub struct Pipeline<const STAGES: u32> {
    /// One a stage: the full barriers, then the empty ones.
    barriers: Mbarrier,
}

impl<const STAGES: u32> Pipeline<STAGES> {
    /// What it takes of shared memory.
    pub const BYTES: u32 = 2 * STAGES * Mbarrier::BYTES;

    /// The pipeline whose barriers begin at `base`, aligned to 8 bytes.
    #[inline(always)]
    pub fn at(base: Shared<u64>) -> Self {
        Pipeline { barriers: Mbarrier::at(base) }
    }

    /// The first address after the barriers.
    #[inline(always)]
    pub fn end(self) -> Shared<u64> {
        Shared::from_address(self.barriers.address() + Self::BYTES)
    }

    /// Initialises the barriers: a stage is full when `producers` threads have arrived and their bytes have come, and
    /// empty when `consumers` threads have released it. Said by one thread, before
    /// [`fence::mbarrier_init`](crate::fence::mbarrier_init) and a barrier of the block.
    #[inline(always)]
    #[track_caller]
    pub fn init(self, producers: u32, consumers: u32) {
        for stage in 0..STAGES {
            self.barriers.offset(stage).init(producers);
            self.barriers.offset(STAGES + stage).init(consumers);
        }
    }

    /// The state of a thread that fills: at the first stage, which is empty.
    #[inline(always)]
    pub fn producer(self) -> Producer<STAGES> {
        // The phase before the first counts as complete.
        Producer { pipeline: self, at: Position { index: 0, parity: 1 } }
    }

    /// The state of a thread that fills stage `index` alone, of which each thread that fills has one.
    #[inline(always)]
    pub fn producer_at(self, index: u32) -> Producer<STAGES> {
        Producer { pipeline: self, at: Position { index, parity: 1 } }
    }

    /// The state of a thread that empties: at the first stage, which is not full yet.
    #[inline(always)]
    pub fn consumer(self) -> Consumer<STAGES> {
        Consumer { pipeline: self, at: Position { index: 0, parity: 0 } }
    }

    /// The state of a thread that empties stage `index` first, and then every `n`-th: [`advance_by`](Consumer::advance_by).
    #[inline(always)]
    pub fn consumer_at(self, index: u32) -> Consumer<STAGES> {
        Consumer { pipeline: self, at: Position { index, parity: 0 } }
    }

    #[inline(always)]
    fn slot(self, at: Position) -> Slot<STAGES> {
        Slot { index: at.index, pipeline: self }
    }
}

/// A stage, and the parity of the phase that is waited for there.
#[derive(Clone, Copy)]
struct Position {
    index: u32,
    parity: u32,
}

impl Position {
    #[inline(always)]
    fn advance<const STAGES: u32>(&mut self) {
        self.index += 1;
        if self.index == STAGES {
            self.index = 0;
            self.parity ^= 1;
        }
    }

    /// One stage before.
    #[inline(always)]
    fn behind<const STAGES: u32>(self) -> Self {
        let Position { index, parity } = self;
        if index == 0 {
            Position { index: STAGES - 1, parity: parity ^ 1 }
        } else {
            Position { index: index - 1, parity }
        }
    }
}

/// Where a thread that fills stages is.
#[derive(Clone, Copy)]
pub struct Producer<const STAGES: u32> {
    pipeline: Pipeline<STAGES>,
    at: Position,
}

impl<const STAGES: u32> Producer<STAGES> {
    /// Waits until the stage is empty.
    #[inline(always)]
    #[track_caller]
    pub fn acquire(&self) -> Slot<STAGES> {
        self.pipeline.barriers.offset(STAGES + self.at.index).wait(self.at.parity);
        self.pipeline.slot(self.at)
    }

    /// As [`Consumer::beside`], for pipelines that are filled in step.
    #[inline(always)]
    pub fn beside(&self, pipeline: Pipeline<STAGES>) -> Self {
        Producer { pipeline, at: self.at }
    }

    /// The state of a thread that is one stage ahead of this one. What it acquires is empty when what was filled last, of
    /// two stages, has been emptied: for what has barriers of two stages and memory of one.
    #[inline(always)]
    pub fn ahead(&self) -> Self {
        let mut ahead = *self;
        ahead.advance();
        ahead
    }

    /// As [`Consumer::behind`], for pipelines that are filled in turn.
    #[inline(always)]
    pub fn behind(&self, pipeline: Pipeline<STAGES>) -> Self {
        Producer { pipeline, at: self.at.behind::<STAGES>() }
    }

    /// Goes on to the next stage.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.at.advance::<STAGES>();
    }

    /// Goes on to the same stage in the next round.
    #[inline(always)]
    pub fn next_round(&mut self) {
        self.at.parity ^= 1;
    }
}

/// Where a thread that empties stages is.
#[derive(Clone, Copy)]
pub struct Consumer<const STAGES: u32> {
    pipeline: Pipeline<STAGES>,
    at: Position,
}

impl<const STAGES: u32> Consumer<STAGES> {
    /// Waits until the stage is full.
    #[inline(always)]
    #[track_caller]
    pub fn wait(&self) -> Slot<STAGES> {
        self.pipeline.barriers.offset(self.at.index).wait(self.at.parity);
        self.pipeline.slot(self.at)
    }

    /// The stage that it is at, which it has waited for.
    #[inline(always)]
    pub fn slot(&self) -> Slot<STAGES> {
        self.pipeline.slot(self.at)
    }

    /// The state of a thread that is at the same stage of another pipeline, in the same phase: of pipelines that are
    /// emptied in step, one state is enough.
    #[inline(always)]
    pub fn beside(&self, pipeline: Pipeline<STAGES>) -> Self {
        Consumer { pipeline, at: self.at }
    }

    /// The state of a thread that is one stage behind this one, in another pipeline: of pipelines that are emptied in turn,
    /// one state is enough.
    #[inline(always)]
    pub fn behind(&self, pipeline: Pipeline<STAGES>) -> Self {
        Consumer { pipeline, at: self.at.behind::<STAGES>() }
    }

    /// Goes on to the next stage. The slot of this one may be released later.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.at.advance::<STAGES>();
    }

    /// Goes on to the same stage in the next round.
    #[inline(always)]
    pub fn next_round(&mut self) {
        self.at.parity ^= 1;
    }

    /// Goes on by `n` stages, at most all: where others empty those between.
    #[inline(always)]
    pub fn advance_by(&mut self, n: u32) {
        self.at.index += n;
        if self.at.index >= STAGES {
            self.at.index -= STAGES;
            self.at.parity ^= 1;
        }
    }
}

/// A stage that a thread may use.
#[derive(Clone, Copy)]
pub struct Slot<const STAGES: u32> {
    /// Which stage: for [`SmemTile::stage`](crate::SmemTile::stage).
    pub index: u32,
    pipeline: Pipeline<STAGES>,
}

impl<const STAGES: u32> Slot<STAGES> {
    /// The barrier that copies into the stage complete on.
    #[inline(always)]
    pub fn full(self) -> Mbarrier {
        self.pipeline.barriers.offset(self.index)
    }

    /// The producer arrives, and announces `bytes`.
    #[inline(always)]
    #[track_caller]
    pub fn expect(self, bytes: u32) {
        self.full().arrive_expect(bytes);
    }

    /// The producer, which has filled the stage itself, arrives.
    #[inline(always)]
    #[track_caller]
    pub fn fill(self) {
        self.full().arrive();
    }

    /// The consumer needs the stage no more. Said by as many threads as the pipeline counts.
    #[inline(always)]
    #[track_caller]
    pub fn release(self) {
        self.pipeline.barriers.offset(STAGES + self.index).arrive();
    }

    /// As [`release`](Self::release), but the stage comes back with something in it: copies of `bytes` by the consumer,
    /// which complete on the barrier that this gives.
    #[inline(always)]
    #[track_caller]
    pub fn release_with(self, bytes: u32) -> Mbarrier {
        let empty = self.pipeline.barriers.offset(STAGES + self.index);
        empty.arrive_expect(bytes);
        empty
    }

    /// As [`release`](Self::release), to the producer in block `rank` of the cluster.
    #[inline(always)]
    #[track_caller]
    pub fn release_at(self, rank: u32) {
        self.pipeline.barriers.offset(STAGES + self.index).arrive_at(rank);
    }
}

/// A barrier whose phases a thread waits for one after the other: for what has one stage, and is filled once or is not
/// handed back through a barrier of its own.
#[derive(Clone, Copy)]
pub struct Phases {
    barrier: Mbarrier,
    parity: u32,
}

impl Phases {
    /// The state of a thread that waits for the first phase of `barrier`.
    #[inline(always)]
    pub fn of(barrier: Mbarrier) -> Self {
        Phases { barrier, parity: 0 }
    }

    /// Waits until the phase is complete; the next wait is for the next one.
    #[inline(always)]
    #[track_caller]
    pub fn wait(&mut self) {
        self.barrier.wait(self.parity);
        self.parity ^= 1;
    }
}
