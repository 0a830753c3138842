//! dQ summed in one order: that of the keys, from the last to the first, whatever else runs and whatever comes first.
//!
//! A block of keys adds to dQ of a block of queries when the keys behind its own have. Under a causal mask these have fewer
//! queries, but those are met in the same order; so one counter a block of keys says how far it is, and who comes next looks at it
//! alone. Each warpgroup's part has a thread that adds it, and a counter. Whom nobody comes before stores: nothing has to be
//! cleared. The first keys come last, and all queries that see any see them: where sequences are short to these comes what the
//! others have summed, and the warpgroup adds its own in registers, and finishes dQ, with sums that the L2 cache still has. Many
//! short heads are faster so than without an order. Where sequences are long the blocks of the first keys, the last to end, would
//! take longer by more than a kernel does that comes after.
//!
//! Blocks of threads wait for blocks before them alone: the last keys come first. A block of keys that begins when the one behind
//! it does falls behind by as long as an addition takes to end and to be heard of, likely two blocks of queries, and from then on
//! neither waits. Under a causal mask the mask itself lets them fall behind: each begins with the queries that the next keys do
//! not have. That the longest come last costs up to 7 % there by a model of it; the other way round, with the last queries first
//! (the descending walk of Qiang et al., "DASH: Deterministic Attention Scheduling for High-throughput Reproducible LLM Training",
//! arXiv 2601.21824), costs 40 %, where additions take longer than blocks of queries, in that model and on an H100. Without a mask
//! heads take turns, so that few keys of a head begin at the same time, and no more than the cache holds.
//!
//! A block of threads that takes all keys of a head has dQ to itself, and waits for nobody: the bits are the same.
use super::memory::{Destination, Outgoing};
use super::prepare::{clear_unseeing, rows_without_keys};
use super::{GROUP_ROWS, GROUPS, Params, Step, Work, can_finish_in_order, config_of, next_keys, walk};
use crate::attention::{Attention, Sequence};
use crate::config::Config;
use crate::flash2_backward::fused::{PREPARE_THREADS, prepare_block};
use crate::schedule::{self, KeyBlock};
use cuda_std::arrivals::Arrivals;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
use cuda_std::math::unknown_before;
use cuda_std::thread::{block_idx_x, grid_dim_x, thread_idx_x};
use cuda_std::{Global, bulk, grid, kernel};

/// Who has added to dQ how often, and who finishes it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// [`COUNTERS`](Self::COUNTERS) for each block of keys of each head of K of each sequence, of so many as the longest has;
    /// [`prepare_ordered()`] clears them. Null: there is no order.
    pub counters: Global<u32>,
    /// Whether the first keys finish dQ, if they [can](super::can_finish_in_order); 0: [`finish()`](super::finish()) does.
    pub finishes: u32,
}

impl Order {
    /// For kernels that add whenever they can.
    pub const NONE: Order = Order { counters: Global::NULL, finishes: 0 };

    /// Keys of a block of threads, or of a cluster, that add at a time.
    pub const BLOCK_N: u32 = GROUPS * GROUP_ROWS;

    /// Counters of a block of keys: one for each warpgroup of a cluster. A block of threads that is none has half of them.
    pub const COUNTERS: u32 = 2 * GROUPS;

    /// Counts the blocks of queries to whose dQ warpgroup `group` of a block of keys has added: of all warpgroups that have them.
    #[inline(always)]
    pub fn added<T>(self, a: &Attention<T>, block: KeyBlock, group: u32) -> Arrivals {
        let pair = block.sequence.batch * a.nheads_k + block.head_k;
        let number = pair * a.seqlen_k.div_ceil(Self::BLOCK_N) + block.first_key / Self::BLOCK_N;
        Arrivals::at(self.counters.offset((number * Self::COUNTERS + group) as usize))
    }

    /// Before the launch nobody has added. Said by all threads of a grid.
    #[inline(always)]
    #[track_caller]
    fn clear<T>(self, a: &Attention<T>) {
        let counters = a.batch * a.nheads_k * a.seqlen_k.div_ceil(Self::BLOCK_N) * Self::COUNTERS;
        let mut counter = block_idx_x() * PREPARE_THREADS + thread_idx_x();
        while counter < counters {
            Arrivals::at(self.counters.offset(counter as usize)).clear();
            counter += grid_dim_x() * PREPARE_THREADS;
        }
    }
}

/// Block `number` of keys: heads take turns, as in [`schedule::key_block_in_turn`], but their last keys come first.
#[inline(always)]
#[track_caller]
pub(super) fn key_block_in_order<T>(a: &Attention<T>, heads_in_turn: u32, number: u32) -> KeyBlock {
    let block = schedule::key_block_in_turn_at(a, Order::BLOCK_N, heads_in_turn, number);
    let last_key_block = (a.seqlen_k.div_ceil(Order::BLOCK_N) - 1) * Order::BLOCK_N;
    KeyBlock { first_key: last_key_block - block.first_key, ..block }
}

/// The keys of this block of threads, or of its cluster of so many, once more: they are found anew once `x` is known, and take
/// no registers before.
#[inline(always)]
#[track_caller]
pub(super) fn key_block_in_order_anew<T>(a: &Attention<T>, heads_in_turn: u32, cluster: u32, x: u32) -> KeyBlock {
    let anew = |n| unknown_before(n, x);
    let a = Attention {
        seqlen_k: anew(a.seqlen_k),
        nheads_k: anew(a.nheads_k),
        cu_seqlens_k: a.cu_seqlens_k.offset(anew(0) as usize),
        ..*a
    };
    key_block_in_order(&a, heads_in_turn, anew(block_idx_x()) / cluster)
}

/// How far the keys behind are.
pub(super) struct Behind {
    added: Arrivals,
    /// Their steps that the next one waits for, and those that they are known to have done.
    needed: u32,
    known: u32,
}

impl Behind {
    /// Those behind `block`, as far as warpgroup `group` goes.
    #[inline(always)]
    pub fn of<T>(order: Order, a: &Attention<T>, block: KeyBlock, group: u32) -> Self {
        let behind = KeyBlock { first_key: block.first_key + Order::BLOCK_N, ..block };
        Behind { added: order.added(a, behind, group), needed: 0, known: 0 }
    }

    /// Waits for their next step, after which it is these keys' turn.
    #[inline(always)]
    #[track_caller]
    pub fn wait(&mut self) {
        self.needed += 1;
        if self.known < self.needed {
            self.known = self.added.wait_for_all(self.needed);
        }
    }
}

/// Where dQ of a step is finished.
#[inline(always)]
pub(super) fn destination(p: &Params, block: KeyBlock, step: Step, has_sums: bool) -> Destination {
    // Found in each step: kept, it would take registers that a thread which copies does not have.
    let anew = |x| unknown_before(x, step.place);
    let Sequence { batch, first_q, seqlen_q, .. } = block.sequence;
    let first = p.backward.d_q.index(anew(batch), step.head, (anew(first_q) + step.first_row).into());
    Destination { rows: seqlen_q - step.first_row, has_sums, first }
}

/// Sums what warpgroup `group` has of dQ, each time in its turn, for all keys of a `WALK` from `block` on.
#[inline(always)]
#[track_caller]
pub(super) fn sum_in_order<
    T,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const CAUSAL: bool,
    const WALK: u32,
>(
    p: &Params,
    a: &Attention<T>,
    outgoing: Outgoing<HEADDIM, BLOCK_M>,
    mut block: KeyBlock,
    group: u32,
) {
    let part = Outgoing::<HEADDIM, BLOCK_M>::PART;
    let waits = const { WALK == walk::ORDERED };
    let finishes = const { can_finish_in_order(HEADDIM as u32, BLOCK_M as u32) } && (!waits || p.order.finishes != 0);
    let mut parts = outgoing.parts.consumer_at(group);
    loop {
        let work = Work::of::<T, CAUSAL, WALK>(a, block, BLOCK_M as u32, BLOCK_N as u32);
        let alone_before = work.alone_before::<T, CAUSAL>(a, BLOCK_M as u32, BLOCK_N as u32);
        let mut behind = Behind::of(p.order, a, block, group);
        let mut walk = work.walk(a, BLOCK_M as u32);
        let sums = |place: u32| p.backward.d_q_sums.offset(place as usize * HEADDIM + (group * part) as usize);
        // The step before the first: nothing to add.
        let mut slot = parts.wait();
        parts.next_round();
        if block.first_key > 0 || !finishes {
            slot.release();
            while let Some(step) = walk.next() {
                slot = parts.wait();
                parts.next_round();
                if step.first_row < alone_before {
                    bulk::store(sums(step.place), outgoing.part(group), part);
                } else {
                    if waits {
                        behind.wait();
                    }
                    bulk::add(sums(step.place), outgoing.part(group), part);
                }
                bulk::commit();
                bulk::wait_read::<0>();
                slot.release();
                if waits {
                    bulk::wait::<0>();
                    p.order.added(a, block, group).arrive();
                }
            }
            // What comes next adds to these sums.
            bulk::wait::<0>();
        } else {
            while let Some(step) = walk.next() {
                let to = destination(p, block, step, step.first_row >= alone_before);
                outgoing.destinations.set(group, to);
                if to.has_sums {
                    if waits {
                        behind.wait();
                    }
                    bulk::load(outgoing.part(group), sums(step.place), part, slot.release_with(4 * part));
                } else {
                    slot.release();
                }
                slot = parts.wait();
                parts.next_round();
            }
            slot.release();
        }
        let Some(next) = next_keys::<T, WALK>(a, block, BLOCK_N as u32) else { break };
        block = next;
    }
}

/// For kernels whose arguments are those of a pass with blocks of so many keys.
const fn prepare_config<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>() -> Config {
    Config {
        family: "flash3.backward.prepare",
        block_m: BLOCK_M,
        block_n: Order::BLOCK_N,
        threads: PREPARE_THREADS,
        min_blocks_per_sm: 4,
        ..config_of(T::DTYPE, HEADDIM, None)
    }
}

/// [`prepare_heads()`](super::prepare_heads()) for [`ordered()`](super::ordered()), with its counters. Where that does not finish
/// dQ, the sums of queries that see no key are cleared. Grid: as there.
#[kernel(
    name = "flash3_bwd_prepare_ordered_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128), (128, 64), (128, 80), (256, 64)],
    config = prepare_config,
    table = PREPARE_ORDERED,
)]
pub fn prepare_ordered<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let a: Attention<T> = p.backward.attention.of::<T>();
    p.order.clear(&a);
    let finishes = p.order.finishes != 0;
    prepare_block::<T, HEADDIM, BLOCK_M>(p.backward, !finishes && rows_without_keys(&a, BLOCK_M) > 0);
    if finishes {
        clear_unseeing::<T, BLOCK_M>(&p.backward, &a);
    }
}
