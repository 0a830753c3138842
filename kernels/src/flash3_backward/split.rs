//! The pass for wide heads: of each block of queries one warpgroup computes P and sums dV, the other computes dS and
//! sums dK. One runs ahead of the other, so that one multiplies while the other computes.
//!
//! A block of threads has so few keys that what it adds to dQ would take longer than all its products, at the rate at
//! which the L2 cache adds. So two blocks of threads are a cluster: each has keys of its own, and sends its dS to the other.
//! Of dQ each finds half of the columns, over the keys of both, which halves the additions; of Q and dO each fetches half,
//! for both.
use super::memory::{Destination, Destinations, Inputs};
use super::order::{Behind, destination, key_block_in_order};
use super::producer::load;
use super::{GROUP_ROWS, GROUPS, Params, STAGES, Walk, Work, config_of, key_block_at, walk};
use crate::attention::{Attention, Tensor, Untyped};
use crate::config::Config;
use crate::mask::Mask;
use crate::schedule::KeyBlock;
use cuda_std::barrier::{NamedBarrier, NamedBarriers};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, ex2, fma, unknown, unknown_before};
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::{Consumer, Pipeline, Slot};
use cuda_std::shared::dynamic_shared;
use cuda_std::tensor::TensorMapRef;
use cuda_std::thread::{WARP, block_idx_x, lane_id, thread_idx_x};
use cuda_std::warp::{ALL, shuffle, sync_warp};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, InFlight, Registers, TransposedRows};
use cuda_std::{Global, GlobalMatrix, SmemTile, bulk, cluster, fence, grid, kernel};

/// Blocks of threads that have the same queries.
const CLUSTER: u32 = 2;

/// What a block of threads keeps in shared memory. `HALF` are the columns of dQ that it finds.
#[derive(Clone, Copy)]
struct Memory<T, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    /// K of the other block's keys, in the columns of dQ that this one finds.
    other_k: SmemTile<T, BLOCK_N, HALF>,
    /// dS of the present step, and of the one before: a row a query.
    d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    /// The same of the other block's keys.
    other_d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    /// Pᵀ, from one warpgroup to the other. In f16, which is exacter than bf16 for what is at most 1.
    p: SmemTile<f16, BLOCK_N, BLOCK_M>,
    /// Of `other_k`.
    other_keys: Pipeline<1>,
    /// Of dS: a stage is full when the other block's has come, and empty when that has read what came from here.
    exchange: Pipeline<STAGES>,
    /// Where blocks of keys add to dQ in their order: what becomes of a warpgroup's part.
    destinations: Destinations,
}

impl<T: PackedElement, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    Memory<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>
{
    const TILE_BYTES: u32 = Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::TILE_BYTES;
    const BYTES: u32 = Self::TILE_BYTES
        + SmemTile::<T, BLOCK_N, HALF>::BYTES
        + 2 * STAGES * SmemTile::<T, BLOCK_M, BLOCK_N>::BYTES
        + SmemTile::<f16, BLOCK_N, BLOCK_M>::BYTES
        + Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::OTHER_BYTES
        + Pipeline::<1>::BYTES
        + Pipeline::<STAGES>::BYTES;

    #[inline(always)]
    fn of_block() -> Self {
        let bytes = dynamic_shared::<u8>();
        let other_k = SmemTile::at(bytes.offset(Self::TILE_BYTES).cast());
        let d_s = SmemTile::at(other_k.end());
        let other_d_s = SmemTile::at(d_s.stage(STAGES - 1).end());
        let p = SmemTile::at(other_d_s.stage(STAGES - 1).end());
        let inputs = Inputs::at(bytes.cast(), p.end());
        let other_keys = Pipeline::at(inputs.end());
        let exchange = Pipeline::at(other_keys.end());
        let destinations = Destinations::at(bytes.offset(const { Self::BYTES.next_multiple_of(16) }).cast());
        Memory { inputs, other_k, d_s, other_d_s, p, other_keys, exchange, destinations }
    }

    /// As [`Inputs::init_barriers`].
    #[inline(always)]
    #[track_caller]
    fn init_barriers(self) {
        self.inputs.init_barriers(CLUSTER);
        self.other_keys.init(1, 1);
        self.exchange.init(1, WARPS);
    }
}

/// Warps that multiply.
const WARPS: u32 = GROUPS * WARPGROUP / 32;

/// Threads of both warpgroups.
const BOTH: u32 = GROUPS * WARPGROUP;

/// P is there.
const P_FULL: NamedBarrier<1, BOTH> = NamedBarrier;
/// P has been read.
const P_EMPTY: NamedBarrier<2, BOTH> = NamedBarrier;
/// One of the two tiles of dS is there.
const D_S_FULL: NamedBarriers<3, 2, BOTH> = NamedBarriers;
/// The threads that wrote dS meet.
const D_S_WRITTEN: NamedBarrier<5, WARPGROUP> = NamedBarrier;
/// It is a warpgroup's turn to add to dQ.
const TURN: NamedBarriers<6, GROUPS, { WARPGROUP + WARP }> = NamedBarriers;
/// It has.
const ADDED: NamedBarriers<8, GROUPS, { WARPGROUP + WARP }> = NamedBarriers;

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(
        16 * STEPS == BLOCK_M && 8 * S_COLUMNS == BLOCK_M && 8 * D_COLUMNS == HEADDIM && 4 * Q_COLUMNS == D_COLUMNS
    );
    assert!(BLOCK_N == GROUP_ROWS as usize && BLOCK_M == GROUP_ROWS as usize && 2 * HALF == HEADDIM);
    Config {
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        shared_bytes: Memory::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>::BYTES,
        barriers: 10,
        ..config_of(T::DTYPE, HEADDIM, Some(CAUSAL))
    }
}

/// With the destinations.
const fn ordered_config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    let split = config::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL>();
    let shared_bytes = split.shared_bytes.next_multiple_of(16) + Destinations::BYTES;
    // A turn and its end: at both places where each warpgroup adds, and where a warp sees to it.
    Config { shared_bytes, barriers: split.barriers + 2 * (2 * GROUPS + 1), ..split }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ: for heads so wide that a warpgroup can
/// have the sums of only one of them. Grid: `2 ceil(seqlen_k / 2 BLOCK_N) * nheads_k * batch`.
///
/// Sᵀ is `S_COLUMNS`, and dK and dV are `D_COLUMNS` blocks of eight columns wide, Pᵀ `STEPS` of sixteen. A block of threads
/// finds dQ of `HALF` columns, each warpgroup `Q_COLUMNS` blocks of eight of them, which it adds from its registers: shared
/// memory has no room for them. Tensors may have fewer columns than `HEADDIM`.
#[kernel(
    name = "flash3_bwd_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            // As in the table of narrow heads: 294, 525, 627, 642 (218, 348, 368, 367); causal 167, 404, 607, 650
            // (155, 312, 416, 406).
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
        CAUSAL in [false, true],
    config = config,
    table = SPLIT,
)]
pub fn split<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::ONE }>(
        &p,
        &a,
        |a, number| key_block_at::<T, CAUSAL>(a, CLUSTER * BLOCK_N as u32, p.heads_in_turn, number),
    );
}

/// [`split()`], whose blocks of keys add to dQ in their order, as those of [`ordered()`](super::ordered()). Grid: as for
/// [`split()`].
#[kernel(
    name = "flash3_bwd_ordered_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            // 348, 442, 554, 575 (216, 290, 383, 360); causal 226, 333, 503, 577 (156, 239, 366, 395), whose gradients are not
            // deterministic.
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
        CAUSAL in [false, true],
    config = ordered_config,
    table = ORDERED_SPLIT,
)]
pub fn split_ordered<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::ORDERED }>(
        &p,
        &a,
        |a, number| key_block_in_order(a, p.heads_in_turn, number),
    );
}

/// The keys of a cluster, `keys_of` its number, with dQ as a `WALK` has it ([`walk`]).
#[inline(always)]
#[track_caller]
fn pass<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
    const WALK: u32,
>(
    p: &Params,
    a: &Attention<T>,
    keys_of: impl Fn(&Attention<T>, u32) -> KeyBlock,
) {
    let work = Work::of::<T, CAUSAL>(a, keys_of(a, block_idx_x() / CLUSTER), BLOCK_M as u32, CLUSTER * BLOCK_N as u32);
    if work.block.rows() == 0 {
        // As in `whole`.
        grid::wait_for_prerequisites();
        return;
    }
    let memory = Memory::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>::of_block();
    if thread_idx_x() == 0 {
        memory.init_barriers();
        fence::mbarrier_init();
    }
    cluster::sync();
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    // In order the keys are found anew by each warpgroup, and once its sums are there: kept, they would take registers that
    // these have not left.
    let keys_anew = |x: u32| {
        if WALK != walk::ORDERED {
            return work.block;
        }
        let anew = |n| unknown_before(n, x);
        keys_of(
            &Attention {
                seqlen_k: anew(a.seqlen_k),
                nheads_k: anew(a.nheads_k),
                cu_seqlens_k: a.cu_seqlens_k.offset(anew(0) as usize),
                ..*a
            },
            anew(block_idx_x()) / CLUSTER,
        )
    };
    let keys_once_known = |sums: &Accumulator<1, D_COLUMNS>| keys_anew(sums.fold_row(0, 0, |x, _| x).to_bits());
    let work_anew = |x: u32| match WALK {
        walk::ORDERED => Work::of::<T, CAUSAL>(a, keys_anew(x), BLOCK_M as u32, CLUSTER * BLOCK_N as u32),
        _ => work,
    };
    let work = if WALK == walk::ORDERED { work_anew(warpgroup_id()) } else { work };
    let consumer = SplitConsumer { p, a, memory, work };
    match warpgroup_id() {
        0 => {
            release_registers::<40>();
            if work.steps() > 0 {
                match thread_idx_x() {
                    0 => load::<_, HEADDIM, BLOCK_M, BLOCK_N, CLUSTER, CAUSAL, { walk::ONE }>(
                        p,
                        a,
                        memory.inputs,
                        work.block,
                    ),
                    32 => consumer.load_other_keys(),
                    thread @ 64.. if WALK == walk::ORDERED => {
                        consumer.take_turns::<CAUSAL>(shuffle(ALL, thread / 32 - 2, 0));
                    }
                    _ => {}
                }
            }
        }
        1 => {
            claim_registers::<232>();
            let consumer =
                if WALK == walk::ORDERED { SplitConsumer { work: work_anew(lane_id()), ..consumer } } else { consumer };
            let d_v = consumer.values::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, WALK>();
            // What the blocks tell each other finds them until both have ended.
            cluster::arrive();
            d_v.store_rows(consumer.own_rows(keys_once_known(&d_v), p.backward.d_v, a.headdim_v));
            cluster::wait();
        }
        _ => {
            claim_registers::<232>();
            let mut d_k = consumer.keys::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, WALK>();
            cluster::arrive();
            d_k.map(|_, _, d_k| d_k * a.softmax_scale);
            d_k.store_rows(consumer.own_rows(keys_once_known(&d_k), p.backward.d_k, a.headdim));
            cluster::wait();
        }
    }
}

/// A warpgroup that multiplies.
#[derive(Clone, Copy)]
struct SplitConsumer<'a, T, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    p: &'a Params,
    a: &'a Attention<T>,
    memory: Memory<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
    work: Work,
}

impl<T: PackedElement, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>
{
    /// The first key of a block of the cluster, in its sequence.
    #[inline(always)]
    fn first_key(&self, rank: u32) -> u32 {
        self.work.block.first_key + BLOCK_N as u32 * rank
    }

    /// K of the other block's keys, in the columns of dQ that this one finds.
    #[inline(always)]
    #[track_caller]
    fn load_other_keys(self) {
        let Self { p, a, memory: Memory { other_k, other_keys, .. }, work: Work { block, .. } } = self;
        let rank = cluster::block_rank();
        let key = (block.sequence.first_k + self.first_key(1 - rank)) as i32;
        let batch = a.batch_of_map(block.sequence.batch) as i32;
        let slot = other_keys.producer().acquire();
        slot.expect(SmemTile::<T, BLOCK_N, HALF>::BYTES);
        for panel in 0..SmemTile::<T, BLOCK_N, HALF>::PANELS {
            let column = HALF as u32 * rank + SmemTile::<T, BLOCK_N, HALF>::PANEL_COLUMNS * panel;
            let at = [column as i32, key, block.head_k as i32, batch];
            TensorMapRef::of(p, &p.k).load(other_k.panel(panel), at, slot.full());
        }
    }

    /// A warp that sees to it that warpgroup `group` adds to dQ in its turn, and says where.
    #[inline(always)]
    #[track_caller]
    fn take_turns<const CAUSAL: bool>(self, group: u32) {
        let Self { p, a, memory: Memory { destinations, .. }, work } = self;
        let (block_m, block_n) = (BLOCK_M as u32, CLUSTER * BLOCK_N as u32);
        let alone_before = work.alone_before::<T, CAUSAL>(a, block_m, block_n);
        let finishes = work.block.first_key == 0 && p.order.finishes != 0;
        let of_cluster = GROUPS * cluster::block_rank() + group;
        let mut behind = Behind::of(p.order, a, work.block, of_cluster);
        let mut walk = work.walk(a, block_m);
        while let Some(step) = walk.next() {
            let has_sums = step.first_row >= alone_before;
            if lane_id() == 0 {
                if has_sums {
                    behind.wait();
                }
                destinations.set(
                    group,
                    match (finishes, has_sums) {
                        (true, has_sums) => destination(p, work.block, step, has_sums),
                        (false, true) => Destination::SUMS,
                        (false, false) => Destination::FIRST,
                    },
                );
            }
            sync_warp(ALL);
            TURN.arrive(group);
            ADDED.sync(group);
            if lane_id() == 0 && !finishes {
                p.order.added(a, work.block, of_cluster).arrive();
            }
        }
    }

    /// dV, as the sum of Pᵀ dO.
    #[inline(always)]
    #[track_caller]
    fn values<
        const STEPS: usize,
        const S_COLUMNS: usize,
        const D_COLUMNS: usize,
        const Q_COLUMNS: usize,
        const CAUSAL: bool,
        const WALK: u32,
    >(
        self,
    ) -> Accumulator<1, D_COLUMNS> {
        let Self { a, memory: Memory { p: p_tile, inputs, .. }, work, .. } = self;
        let mask = Mask::of::<T, CAUSAL, false>(a, &work.block.sequence);
        let scale = a.softmax_scale * LOG2_E;
        let own_key = 16 * warp_in_group();
        let first_key = self.first_key(cluster::block_rank()) + own_key;
        let mut d_v = Accumulator::<1, D_COLUMNS>::zero();
        if work.steps() == 0 {
            return d_v;
        }
        let mut d_q = QuarterOfQueries::new(&self, 0);
        let mut queries = inputs.queries.consumer();
        let first = first_step();
        let mut block = work.blocks.begin;
        for step in 0..work.steps() {
            let slot = queries.wait();
            let s = wgmma::product(inputs.k.rows(0), inputs.q.stage(slot.index).rows(0));
            let mut p: Accumulator<1, S_COLUMNS> = s.wait::<0>();
            if block < work.masked {
                mask.apply_transposed(&mut p, first_key, block * BLOCK_M as u32);
            }
            p.zip_shared_columns(inputs.bases(slot.index), |s, base| ex2(fma(s, scale, -base)));
            P_EMPTY.sync();
            p.store(p_tile, own_key);
            P_FULL.arrive();
            let d_o_slot = queries.beside(inputs.d_outputs).wait();
            let rounded = Registers::<T, STEPS>::of(&p);
            release(slot);
            if step > first {
                D_S_FULL.sync(1 - slot.index);
                let d_q_in_flight = d_q.product::<Q_COLUMNS>();
                let d_v_in_flight = wgmma::add_product(d_v, rounded, inputs.d_o.columns(0));
                d_q.add::<Q_COLUMNS, WALK>(&self, d_q_in_flight.wait::<1>());
                d_v = d_v_in_flight.wait::<0>();
            } else {
                d_v = wgmma::add_product(d_v, rounded, inputs.d_o.columns(0)).wait::<0>();
            }
            release(d_o_slot);
            queries.advance();
            block += 1;
            if block == work.blocks.end {
                block = work.blocks.begin;
            }
        }
        P_EMPTY.sync();
        D_S_FULL.sync(1 - queries.slot().index);
        let last = d_q.product::<Q_COLUMNS>();
        d_q.add::<Q_COLUMNS, WALK>(&self, last.wait::<0>());
        d_v
    }

    /// dK, as the sum of dSᵀ Q, without the scale.
    #[inline(always)]
    #[track_caller]
    fn keys<
        const STEPS: usize,
        const S_COLUMNS: usize,
        const D_COLUMNS: usize,
        const Q_COLUMNS: usize,
        const WALK: u32,
    >(
        self,
    ) -> Accumulator<1, D_COLUMNS> {
        let Self { memory: Memory { p: p_tile, d_s: d_s_tiles, other_d_s, inputs, exchange, .. }, work, .. } = self;
        let own_key = 16 * warp_in_group();
        let own_d_s = TransposedRows::of(d_s_tiles, own_key);
        let other = 1 - cluster::block_rank();
        let mut d_k = Accumulator::<1, D_COLUMNS>::zero();
        if work.steps() == 0 {
            return d_k;
        }
        let mut d_q = QuarterOfQueries::new(&self, 1);
        let mut queries = inputs.queries.consumer();
        let first = first_step();
        let mut sent = exchange.producer();
        P_EMPTY.arrive();
        let steps = if WALK == walk::ORDERED { unknown(work.steps()) } else { work.steps() };
        for step in 0..steps {
            let slot = queries.beside(inputs.d_outputs).wait();
            let d_p = wgmma::product(inputs.v.rows(0), inputs.d_o.rows(0));
            let mut d_s: Accumulator<1, S_COLUMNS> = d_p.wait::<0>();
            d_s.zip_shared_columns(inputs.sums(slot.index), |d_p, sum| d_p - sum);
            P_FULL.sync();
            d_s.zip_tile(p_tile, own_key, 0, |d_p, p| d_p * p);
            P_EMPTY.arrive();
            let rounded = Registers::<T, STEPS>::of(&d_s);
            let exchanged = sent.acquire();
            rounded.store_transposed(own_d_s.stage(slot.index));
            release(slot);
            fence::proxy_async();
            D_S_FULL.arrive(slot.index);
            D_S_WRITTEN.sync();
            if thread_idx_x() == GROUPS * WARPGROUP {
                let stage = exchanged.index;
                exchanged.expect(SmemTile::<T, BLOCK_M, BLOCK_N>::BYTES);
                let (to, from) = (other_d_s.stage(stage).start::<T>(), d_s_tiles.stage(stage).start());
                bulk::send(to, from, (BLOCK_M * BLOCK_N) as u32, exchanged.full(), other);
            }
            sent.advance();
            let q_slot = queries.wait();
            if step > first {
                let d_q_in_flight = d_q.product::<Q_COLUMNS>();
                let d_k_in_flight = wgmma::add_product(d_k, rounded, inputs.q.stage(slot.index).columns(0));
                d_q.add::<Q_COLUMNS, WALK>(&self, d_q_in_flight.wait::<1>());
                d_k = d_k_in_flight.wait::<0>();
            } else {
                d_k = wgmma::add_product(d_k, rounded, inputs.q.stage(slot.index).columns(0)).wait::<0>();
            }
            release(q_slot);
            queries.advance();
        }
        let last = d_q.product::<Q_COLUMNS>();
        d_q.add::<Q_COLUMNS, WALK>(&self, last.wait::<0>());
        d_k
    }

    /// The rows of the gradient of K or V, of the cluster's keys, that this warp has.
    #[inline(always)]
    fn own_rows(self, keys: KeyBlock, tensor: Tensor<Untyped>, columns: u32) -> GlobalMatrix<T> {
        let row = keys.first_key + BLOCK_N as u32 * cluster::block_rank() + 16 * warp_in_group();
        keys.sequence.key_matrix(&tensor.cast(), keys.head_k, row, columns, true)
    }
}

/// This warp needs a stage no more, which both blocks fill.
#[inline(always)]
#[track_caller]
fn release(slot: Slot<STAGES>) {
    if lane_id() == 0 {
        for rank in 0..CLUSTER {
            slot.release_at(rank);
        }
    }
}

/// 0, which the compiler does not know: it would have the first step, in which there is no dQ yet, as a copy of its
/// own, with the barriers in it.
#[inline(always)]
fn first_step() -> u32 {
    unknown(0)
}

/// What a warpgroup adds to dQ: a quarter of its columns, a step after the other.
struct QuarterOfQueries<T, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    memory: Memory<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
    rank: u32,
    group: u32,
    /// The sums of all rows.
    sums: Global<f32>,
    /// One step behind that which is computed, as is `received`. Found from that one's place they would be on the way from
    /// its products to the next one's: the pass takes 3 % longer.
    walk: Walk,
    /// dS of the other block's keys.
    received: Consumer<STAGES>,
}

impl<T: PackedElement, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    QuarterOfQueries<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>
{
    /// Waits for K of the other block's keys.
    #[inline(always)]
    #[track_caller]
    fn new(consumer: &SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>, group: u32) -> Self {
        let memory = consumer.memory;
        memory.other_keys.consumer().wait();
        QuarterOfQueries {
            memory,
            rank: cluster::block_rank(),
            group,
            sums: consumer.p.backward.d_q_sums,
            walk: consumer.work.walk(consumer.a, BLOCK_M as u32),
            received: memory.exchange.consumer(),
        }
    }

    /// dS K of the next step, over the keys of both blocks, once this block's dS is there.
    #[inline(always)]
    #[track_caller]
    fn product<const Q_COLUMNS: usize>(&self) -> InFlight<Q_COLUMNS> {
        let Memory { inputs, other_k, d_s, other_d_s, .. } = self.memory;
        let column = 8 * Q_COLUMNS as u32 * self.group;
        let own = inputs.k.columns(HALF as u32 * self.rank + column);
        let stage = self.received.wait().index;
        wgmma::product(d_s.stage(stage).rows(0), own)
            .add_product(other_d_s.stage(stage).rows(0), other_k.columns(column))
    }

    /// Adds what that product was to the sums of its rows; or in a `WALK` in order does what the destination says.
    #[inline(always)]
    #[track_caller]
    fn add<const Q_COLUMNS: usize, const WALK: u32>(
        &mut self,
        consumer: &SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
        mut d_q: Accumulator<1, Q_COLUMNS>,
    ) {
        if lane_id() == 0 {
            self.received.slot().release_at(1 - self.rank);
        }
        self.received.advance();
        let Some(step) = self.walk.next() else { return };
        // Where dQ is finished, a warp has the columns of both groups.
        let quarter = Accumulator::<1, Q_COLUMNS>::ELEMENTS;
        let part = (4 * self.rank + warp_in_group()) as usize * GROUPS as usize + self.group as usize;
        let sums = self.sums.offset(step.place as usize * HEADDIM + part * quarter);
        if WALK != walk::ORDERED {
            d_q.add_to(sums);
            return;
        }
        TURN.sync(self.group);
        let to = self.memory.destinations.of(self.group);
        if to.rows == 0 {
            if to.has_sums {
                d_q.add_to(sums);
            } else {
                d_q.store_to(sums);
            }
        } else {
            if to.has_sums {
                d_q.zip_sums(sums, |d_q, sum| d_q + sum);
            }
            let a = consumer.a;
            d_q.map(|_, _, d_q| d_q * a.softmax_scale);
            // What follows from the lane is found here: kept, it would take the registers of the sums of dK and dV.
            let anew = |x| unknown_before(x, to.rows);
            let Tensor { data, row_stride, .. } = consumer.p.backward.d_q.cast::<T>();
            let column = HALF as u32 * self.rank + 8 * Q_COLUMNS as u32 * self.group;
            let first = data.offset((to.first + column as u64) as usize);
            d_q.store_rows_anew(to.rows, first, anew(a.headdim.saturating_sub(column)), |row| {
                let row = 16 * anew(warp_in_group()) + row;
                (row as u64 * row_stride, row < to.rows)
            });
        }
        ADDED.arrive(self.group);
    }
}
