//! Sums of dQ in one order: that of the keys, whatever else runs and whatever comes first.
//!
//! A block of keys adds to dQ of a block of queries when the keys behind its own have. Under a causal mask these have fewer
//! queries, but all that they have they share, and meet in the same order ([`Rounds`]); so one counter a block of keys says how far
//! it is, and who comes next looks at it alone. Each warpgroup's part has a thread that adds it, and a counter. Whom nobody comes
//! before stores: nothing has to be cleared.
//!
//! Blocks of threads wait for blocks before them alone: the last keys come first. A block of keys that begins when the one behind
//! it does falls behind by as long as an addition takes to end and to be heard of, likely two blocks of queries, and from then on
//! neither waits. Under a causal mask the mask itself lets them fall behind: each begins with the queries that the next keys do
//! not have. That the longest come last costs up to 7 % there by a model of it; the other way round, with the last queries first
//! (the descending walk of Qiang et al., "DASH: Deterministic Attention Scheduling for High-throughput Reproducible LLM Training",
//! arXiv 2601.21824), costs 40 %, where additions take longer than blocks of queries, in that model and on an H100. Without a mask
//! heads take turns, as many as the cache holds, so that few keys of a head begin at the same time.
use super::memory::Outgoing;
use super::{GROUP_ROWS, GROUPS, Params, Step, Work, config_of};
use crate::attention::Attention;
use crate::config::Config;
use crate::flash2_backward::fused::{PREPARE_THREADS, first_place, prepare_block};
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use cuda_std::arrivals::Arrivals;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
use cuda_std::math::unknown;
use cuda_std::thread::{block_idx_x, grid_dim_x, thread_idx_x};
use cuda_std::{Global, bulk, grid, kernel};

/// Who has added to dQ how often.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// [`COUNTERS`](Self::COUNTERS) for each block of keys of each head of K of each sequence, of so many as the longest has;
    /// [`prepare_ordered()`] clears them. Null: there is no order.
    pub counters: Global<u32>,
}

impl Order {
    /// For kernels that add whenever they can.
    pub const NONE: Order = Order { counters: Global::NULL };

    /// Counters of a block of keys: one for each warpgroup.
    pub const COUNTERS: u32 = GROUPS;

    /// Counts the blocks of queries to whose dQ warpgroup `group` of a block of keys has added.
    #[inline(always)]
    fn added<T>(self, a: &Attention<T>, block: KeyBlock, block_n: u32, group: u32) -> Arrivals {
        let pair = block.sequence.batch * a.nheads_k + block.head_k;
        let number = pair * a.seqlen_k.div_ceil(block_n) + block.first_key / block_n;
        Arrivals::at(self.counters.offset((number * Self::COUNTERS + group) as usize))
    }

    /// Before the launch nobody has added. Said by all threads of a grid.
    #[inline(always)]
    #[track_caller]
    fn clear<T>(self, a: &Attention<T>, block_n: u32) {
        let counters = a.batch * a.nheads_k * a.seqlen_k.div_ceil(block_n) * Self::COUNTERS;
        let mut counter = block_idx_x() * PREPARE_THREADS + thread_idx_x();
        while counter < counters {
            Arrivals::at(self.counters.offset(counter as usize)).clear();
            counter += grid_dim_x() * PREPARE_THREADS;
        }
    }
}

/// The block of keys of this block of threads: heads take turns, as in [`schedule::key_block_in_turn`], but their last keys come
/// first.
#[inline(always)]
#[track_caller]
pub(super) fn key_block_in_order<T>(a: &Attention<T>, block_n: u32, heads_in_turn: u32) -> KeyBlock {
    let block = schedule::key_block_in_turn(a, block_n, heads_in_turn);
    let last_key_block = (a.seqlen_k.div_ceil(block_n) - 1) * block_n;
    KeyBlock { first_key: last_key_block - block.first_key, ..block }
}

/// A walk over the blocks of queries that a block of keys needs: of one after the other those of all heads that share the keys.
pub(super) struct Rounds {
    next: Step,
    left: u32,
    group: u32,
    end_head: u32,
    /// Places from one head to the next.
    to_next_head: u32,
    block_m: u32,
}

impl Rounds {
    /// All steps of a block of keys.
    #[inline(always)]
    pub fn of<T>(work: &Work, a: &Attention<T>, block_m: u32) -> Self {
        let first_place = |head| first_place(a, &work.block.sequence, head, block_m);
        let head = work.block.head_k * work.group;
        let first_row = block_m * work.blocks.begin;
        Rounds {
            next: Step { head, first_row, place: first_place(head) + first_row },
            left: work.steps(),
            group: work.group,
            end_head: head + work.group,
            to_next_head: first_place(1) - first_place(0),
            block_m,
        }
    }

    #[inline(always)]
    pub fn next(&mut self) -> Option<Step> {
        if self.left == 0 {
            return None;
        }
        // The loop stays one, as that of a walk by heads.
        self.left = unknown(self.left - 1);
        let step = self.next;
        self.next.head += 1;
        self.next.place += self.to_next_head;
        if self.next.head == self.end_head {
            self.next.head -= self.group;
            self.next.first_row += self.block_m;
            self.next.place = self.next.place - self.group * self.to_next_head + self.block_m;
        }
        Some(step)
    }
}

/// Adds what warpgroup `group` has of dQ to its sums, each time in its turn.
#[inline(always)]
#[track_caller]
pub(super) fn add_in_order<T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize, const CAUSAL: bool>(
    p: &Params,
    a: &Attention<T>,
    outgoing: Outgoing<HEADDIM, BLOCK_M>,
    block: KeyBlock,
    group: u32,
) {
    let part = Outgoing::<HEADDIM, BLOCK_M>::PART;
    let work = Work::of::<T, CAUSAL>(a, block, BLOCK_M as u32, BLOCK_N as u32);
    let behind = KeyBlock { first_key: block.first_key + BLOCK_N as u32, ..block };
    // So many steps are of queries that the keys behind do not have.
    let alone = if behind.rows() > 0 {
        let blocks = Work::of::<T, CAUSAL>(a, behind, BLOCK_M as u32, BLOCK_N as u32).blocks;
        (blocks.begin - work.blocks.begin) * work.group
    } else {
        work.steps()
    };
    let added = p.order.added(a, block, BLOCK_N as u32, group);
    let added_behind = p.order.added(a, behind, BLOCK_N as u32, group);

    let mut parts = outgoing.parts.consumer_at(group);
    // The step before the first: nothing to add.
    parts.wait().release();
    parts.next_round();
    // Steps of the keys behind that the next one waits for: none, while it is not more than 0; and how many they are known to
    // have done.
    let (mut needed, mut known) = (-(alone as i32), 0);
    let mut rounds = Rounds::of(&work, a, BLOCK_M as u32);
    while let Some(step) = rounds.next() {
        needed += 1;
        if known < needed {
            known = added_behind.wait_for_all(needed as u32) as i32;
        }
        let slot = parts.wait();
        parts.next_round();
        let to = p.backward.d_q_sums.offset(step.place as usize * HEADDIM + (group * part) as usize);
        let from = outgoing.part(group);
        if needed <= 0 {
            bulk::store(to, from, part);
        } else {
            bulk::add(to, from, part);
        }
        bulk::commit();
        bulk::wait_read::<0>();
        slot.release();
        bulk::wait::<0>();
        added.arrive();
    }
}

/// For kernels whose arguments are those of a pass with blocks of so many keys.
const fn prepare_config<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>() -> Config {
    Config {
        family: "flash3.backward.prepare",
        block_m: BLOCK_M,
        block_n: GROUPS * GROUP_ROWS,
        threads: PREPARE_THREADS,
        min_blocks_per_sm: 4,
        ..config_of(T::DTYPE, HEADDIM, None)
    }
}

/// [`prepare()`](super::prepare()) for [`ordered()`](super::ordered()), which stores the first of the sums: those alone are
/// cleared to which nobody adds, of queries that see no key. And the counters. Grid: as there.
#[kernel(
    name = "flash3_bwd_prepare_ordered_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128), (128, 64), (128, 80)],
    config = prepare_config,
    table = PREPARE_ORDERED,
)]
pub fn prepare_ordered<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let a: Attention<T> = p.backward.attention.of::<T>();
    p.order.clear(&a, GROUPS * GROUP_ROWS);
    let block = schedule::query_block(&a, BLOCK_M);
    let rows = block.rows().min(BLOCK_M);
    let sees_keys = rows > 0 && Mask::of::<T, false, true>(&a, &block.sequence).end(block.first_row + rows - 1) > 0;
    prepare_block::<T, HEADDIM, BLOCK_M>(p.backward, !sees_keys);
}
