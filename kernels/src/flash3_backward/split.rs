//! The pass for wide heads: of each block of queries one warpgroup computes P and sums dV, the other computes dS and
//! sums dK. One runs ahead of the other, so that one multiplies while the other computes.
use super::memory::Inputs;
use super::producer::load;
use super::{GROUP_ROWS, GROUPS, Params, Walk, Work, config_of, release, walk};
use crate::attention::{Attention, Tensor, Untyped};
use crate::config::Config;
use crate::mask::Mask;
use cuda_std::barrier::{NamedBarrier, NamedBarriers};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, ex2, fma, unknown};
use cuda_std::matrix::PackedElement;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, InFlight, Registers, TransposedRows};
use cuda_std::{Global, GlobalMatrix, SmemTile, fence, grid, kernel};

/// What a block of threads keeps in shared memory.
#[derive(Clone, Copy)]
struct Memory<T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    /// dS of the present step, and of the one before: a row a query.
    d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    /// Pᵀ, from one warpgroup to the other. In f16, which is exacter than bf16 for what is at most 1.
    p: SmemTile<f16, BLOCK_N, BLOCK_M>,
}

impl<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    Memory<T, HEADDIM, BLOCK_M, BLOCK_N>
{
    const TILE_BYTES: u32 = Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::TILE_BYTES;
    const BYTES: u32 = Self::TILE_BYTES
        + 2 * SmemTile::<T, BLOCK_M, BLOCK_N>::BYTES
        + SmemTile::<f16, BLOCK_N, BLOCK_M>::BYTES
        + Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::OTHER_BYTES;

    #[inline(always)]
    fn of_block() -> Self {
        let bytes = dynamic_shared::<u8>();
        let d_s = SmemTile::at(bytes.offset(Self::TILE_BYTES).cast());
        let p = SmemTile::at(d_s.stage(1).end());
        Memory { inputs: Inputs::at(bytes.cast(), p.end()), d_s, p }
    }
}

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

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(
        16 * STEPS == BLOCK_M && 8 * S_COLUMNS == BLOCK_M && 8 * D_COLUMNS == HEADDIM && 2 * Q_COLUMNS == D_COLUMNS
    );
    assert!(BLOCK_N == GROUP_ROWS as usize && BLOCK_M == GROUP_ROWS as usize);
    Config {
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        shared_bytes: Memory::<T, HEADDIM, BLOCK_M, BLOCK_N>::BYTES,
        barriers: 11,
        ..config_of(T::DTYPE, HEADDIM, Some(CAUSAL))
    }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ: for heads so wide that a warpgroup can
/// have the sums of only one of them. Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`.
///
/// Sᵀ is `S_COLUMNS`, dK and dV are `D_COLUMNS` and a warpgroup's half of dQ `Q_COLUMNS` blocks of eight columns wide,
/// Pᵀ `STEPS` of sixteen. Each warpgroup adds its half of dQ from its registers: shared memory has no room for it.
/// Tensors may have fewer columns than `HEADDIM`.
#[kernel(
    name = "flash3_bwd_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            // As in the table of narrow heads: 255, 411, 469, 476 (217, 350, 372, 373); causal 157, 321, 437, 466
            // (156, 312, 416, 415).
            (256, 64, 64, 4, 8, 32, 16),
        ],
        CAUSAL in [false, true],
    config = config,
    table = SPLIT,
)]
pub fn split<
    T: PackedElement,
    const HEADDIM: usize,
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
    let work = Work::of_block::<T, CAUSAL>(&a, BLOCK_M as u32, BLOCK_N as u32, p.heads_in_turn);
    if work.block.rows() == 0 {
        return;
    }
    let memory = Memory::<T, HEADDIM, BLOCK_M, BLOCK_N>::of_block();
    if thread_idx_x() == 0 {
        memory.inputs.init_barriers();
        fence::mbarrier_init();
    }
    sync_threads();
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let consumer = SplitConsumer { p: &p, a: &a, memory, work };
    match warpgroup_id() {
        0 => {
            release_registers::<24>();
            if work.steps() > 0 && thread_idx_x() == 0 {
                load::<_, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, { walk::ONE }>(&p, &a, memory.inputs, work.block);
            }
        }
        1 => {
            claim_registers::<240>();
            let d_v = consumer.values::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL>();
            d_v.store_rows(consumer.own_rows(p.backward.d_v, a.headdim_v));
        }
        _ => {
            claim_registers::<240>();
            let mut d_k = consumer.keys::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS>();
            d_k.map(|_, _, d_k| d_k * a.softmax_scale);
            d_k.store_rows(consumer.own_rows(p.backward.d_k, a.headdim));
        }
    }
}

/// A warpgroup that multiplies.
#[derive(Clone, Copy)]
struct SplitConsumer<'a, T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    p: &'a Params,
    a: &'a Attention<T>,
    memory: Memory<T, HEADDIM, BLOCK_M, BLOCK_N>,
    work: Work,
}

impl<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    SplitConsumer<'_, T, HEADDIM, BLOCK_M, BLOCK_N>
{
    /// dV, as the sum of Pᵀ dO.
    #[inline(always)]
    #[track_caller]
    fn values<
        const STEPS: usize,
        const S_COLUMNS: usize,
        const D_COLUMNS: usize,
        const Q_COLUMNS: usize,
        const CAUSAL: bool,
    >(
        self,
    ) -> Accumulator<1, D_COLUMNS> {
        let Self { a, memory: Memory { p: p_tile, inputs, .. }, work, .. } = self;
        let mask = Mask::of::<T, CAUSAL, false>(a, &work.block.sequence);
        let scale = a.softmax_scale * LOG2_E;
        let own_key = 16 * warp_in_group();
        let mut d_v = Accumulator::<1, D_COLUMNS>::zero();
        if work.steps() == 0 {
            return d_v;
        }
        let mut d_q = HalfOfQueries::new(&self, 0);
        let mut queries = inputs.queries.consumer();
        let first = first_step();
        let mut block = work.blocks.begin;
        for step in 0..work.steps() {
            let slot = queries.wait();
            let s = wgmma::product(inputs.k.rows(0), inputs.q.stage(slot.index).rows(0));
            let mut p: Accumulator<1, S_COLUMNS> = s.wait::<0>();
            if block < work.masked {
                mask.apply_transposed(&mut p, work.block.first_key + own_key, block * BLOCK_M as u32);
            }
            p.zip_shared_columns(inputs.bases(slot.index), |s, base| ex2(fma(s, scale, -base)));
            P_EMPTY.sync();
            p.store(p_tile, own_key);
            P_FULL.arrive();
            let d_o_slot = queries.beside(inputs.d_outputs).wait();
            let rounded = Registers::<T, STEPS>::of(&p);
            let d_v_in_flight = wgmma::add_product(d_v, rounded, inputs.d_o.stage(slot.index).columns(0));
            release(slot);
            if step > first {
                D_S_FULL.sync(1 - slot.index);
                d_q.add::<Q_COLUMNS>(1 - slot.index);
            }
            d_v = d_v_in_flight.wait::<0>();
            release(d_o_slot);
            queries.advance();
            block += 1;
            if block == work.blocks.end {
                block = work.blocks.begin;
            }
        }
        P_EMPTY.sync();
        let last = (work.steps() % 2) ^ 1;
        D_S_FULL.sync(last);
        d_q.add::<Q_COLUMNS>(last);
        d_v
    }

    /// dK, as the sum of dSᵀ Q, without the scale.
    #[inline(always)]
    #[track_caller]
    fn keys<const STEPS: usize, const S_COLUMNS: usize, const D_COLUMNS: usize, const Q_COLUMNS: usize>(
        self,
    ) -> Accumulator<1, D_COLUMNS> {
        let Self { memory: Memory { p: p_tile, d_s: d_s_tiles, inputs }, work, .. } = self;
        let own_key = 16 * warp_in_group();
        let own_d_s = TransposedRows::of(d_s_tiles, own_key);
        let mut d_k = Accumulator::<1, D_COLUMNS>::zero();
        if work.steps() == 0 {
            return d_k;
        }
        let mut d_q = HalfOfQueries::new(&self, 1);
        let mut queries = inputs.queries.consumer();
        let first = first_step();
        P_EMPTY.arrive();
        for step in 0..work.steps() {
            let slot = queries.beside(inputs.d_outputs).wait();
            let d_p = wgmma::product(inputs.v.rows(0), inputs.d_o.stage(slot.index).rows(0));
            let mut d_s: Accumulator<1, S_COLUMNS> = d_p.wait::<0>();
            d_s.zip_shared_columns(inputs.sums(slot.index), |d_p, sum| d_p - sum);
            P_FULL.sync();
            d_s.zip_tile(p_tile, own_key, 0, |d_p, p| d_p * p);
            P_EMPTY.arrive();
            let rounded = Registers::<T, STEPS>::of(&d_s);
            rounded.store_transposed(own_d_s.stage(slot.index));
            release(slot);
            fence::proxy_async();
            D_S_FULL.arrive(slot.index);
            let q_slot = queries.wait();
            let d_k_in_flight = wgmma::add_product(d_k, rounded, inputs.q.stage(slot.index).columns(0));
            if step > first {
                d_q.add::<Q_COLUMNS>(1 - slot.index);
            }
            d_k = d_k_in_flight.wait::<0>();
            release(q_slot);
            queries.advance();
        }
        D_S_WRITTEN.sync();
        d_q.add::<Q_COLUMNS>((work.steps() % 2) ^ 1);
        d_k
    }

    /// The rows of the gradient of K or V that this warp has.
    #[inline(always)]
    fn own_rows(self, tensor: Tensor<Untyped>, columns: u32) -> GlobalMatrix<T> {
        let keys = self.work.block;
        let row = keys.first_key + 16 * warp_in_group();
        keys.sequence.key_matrix(&tensor.cast(), keys.head_k, row, columns, true)
    }
}

/// 0, which the compiler does not know: it would have the first step, in which there is no dQ yet, as a copy of its
/// own, with the barriers in it.
#[inline(always)]
fn first_step() -> u32 {
    unknown(0)
}

/// What a warpgroup adds to dQ: half of its columns, a step after the other.
struct HalfOfQueries<T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    k: SmemTile<T, BLOCK_N, HEADDIM>,
    d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    half: u32,
    /// The sums of all rows.
    sums: Global<f32>,
    walk: Walk,
}

impl<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    HalfOfQueries<T, HEADDIM, BLOCK_M, BLOCK_N>
{
    #[inline(always)]
    fn new(consumer: &SplitConsumer<'_, T, HEADDIM, BLOCK_M, BLOCK_N>, half: u32) -> Self {
        let Memory { d_s, inputs, .. } = consumer.memory;
        let walk = consumer.work.walk(consumer.a, BLOCK_M as u32);
        HalfOfQueries { k: inputs.k, d_s, half, sums: consumer.p.backward.d_q_sums, walk }
    }

    /// Adds dS K of the next step, whose dS is in tile `stage`, once all products of this warpgroup have ended.
    #[inline(always)]
    #[track_caller]
    fn add<const Q_COLUMNS: usize>(&mut self, stage: u32) {
        let Some(step) = self.walk.next() else { return };
        let columns = self.k.columns(self.half * 8 * Q_COLUMNS as u32);
        let d_q: InFlight<Q_COLUMNS> = wgmma::product(self.d_s.stage(stage).rows(0), columns);
        let part = (4 * self.half + warp_in_group()) as usize * Accumulator::<1, Q_COLUMNS>::ELEMENTS;
        d_q.wait::<0>().add_to(self.sums.offset(step.place as usize * HEADDIM + part));
    }
}
