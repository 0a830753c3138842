//! Sums of dQ in one order: that of the keys, whatever else runs and whatever comes first.
//!
//! A block of keys adds to dQ of a block of queries when the keys before its own have. These have the same queries or more, and
//! meet them in the same order; so one counter a block of keys says how far it is, and who comes next looks at it alone. Each
//! warpgroup's part has a thread that adds it, and a counter. The first keys store: nothing has to be cleared before.
//!
//! Blocks of threads wait for blocks before them alone. A block of keys that begins when the one before it does falls behind by
//! as long as an addition takes to end and to be heard of, and from then on neither waits. That is paid for once, if the blocks
//! of a head begin one after the other: so heads take turns, as many as fill the machine. Under a causal mask all blocks of
//! keys have the last queries, and the first keys most before them: all walk from the last queries to the first, so that the
//! queries that a block shares with those before it are not those that they come to last.
//!
//! The order is that of Qiang et al., "DASH: Deterministic Attention Scheduling for High-throughput Reproducible LLM Training",
//! its descending walk.
use super::memory::Outgoing;
use super::{GROUP_ROWS, GROUPS, Params, Work, config_of, walk};
use crate::attention::Attention;
use crate::config::Config;
use crate::flash2_backward::fused::{PREPARE_THREADS, prepare_block};
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use cuda_std::arrivals::Arrivals;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
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
    let is_first = block.first_key == 0;
    let first_key_before = block.first_key.saturating_sub(BLOCK_N as u32);
    let before = KeyBlock { first_key: first_key_before, ..block };
    // So many more blocks of a head are those before done with when they come to the next head.
    let more = Work::of::<T, CAUSAL>(a, before, BLOCK_M as u32, BLOCK_N as u32).blocks.count() - work.blocks.count();
    let added = p.order.added(a, block, BLOCK_N as u32, group);
    let added_before = p.order.added(a, before, BLOCK_N as u32, group);
    let (mut needed, mut known) = (0, 0);

    let mut parts = outgoing.parts.consumer_at(group);
    // The step before the first: nothing to add.
    parts.wait().release();
    parts.next_round();
    let mut walk = work.walk_in_order::<T, { walk::ORDERED }, CAUSAL>(a, BLOCK_M as u32);
    let mut head = block.head_k * work.group;
    while let Some(step) = walk.next() {
        needed += 1;
        if step.head != head {
            head = step.head;
            needed += more;
        }
        if !is_first && known < needed {
            known = added_before.wait_for_all(needed);
        }
        let slot = parts.wait();
        parts.next_round();
        let to = p.backward.d_q_sums.offset(step.place as usize * HEADDIM + (group * part) as usize);
        let from = outgoing.part(group);
        if is_first {
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
