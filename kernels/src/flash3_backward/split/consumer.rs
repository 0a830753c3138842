//! The warpgroups that multiply: one sums dV, the other dK.
use super::CLUSTER;
use super::memory::Memory;
use super::queries::QuarterOfQueries;
use crate::attention::{Attention, Tensor, Untyped};
use crate::flash3_backward::general::Probabilities;
use crate::flash3_backward::{GROUPS, Params, STAGES, Work, mask_of, walk};
use crate::schedule::KeyBlock;
use crate::scores::Scores;
use cuda_std::barrier::{NamedBarrier, NamedBarriers};
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, ex2, fma, unknown};
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Slot;
use cuda_std::tensor::TensorMapRef;
use cuda_std::thread::{lane_id, thread_idx_x};
use cuda_std::warpgroup::{WARPGROUP, warp_in_group};
use cuda_std::wgmma::{self, Registers, TransposedRows};
use cuda_std::{GlobalMatrix, SmemTile, bulk, cluster, fence};

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

/// A warpgroup that multiplies.
#[derive(Clone, Copy)]
pub(super) struct SplitConsumer<
    'a,
    T,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
> {
    pub p: &'a Params,
    pub a: &'a Attention<T>,
    pub memory: Memory<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
    pub work: Work,
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
    pub fn load_other_keys(self) {
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

    /// dV, as the sum of Pᵀ dO.
    #[inline(always)]
    #[track_caller]
    pub fn values<
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
        let is_general = const { WALK == walk::GENERAL };
        let mask = mask_of::<T, CAUSAL, WALK>(a, &work.block.sequence);
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
        // For ALiBi, in a general pass alone.
        let mut head = work.block.head_k * work.group;
        for step in 0..work.steps() {
            let slot = queries.wait();
            let s = wgmma::product(inputs.k.rows(0), inputs.q.stage(slot.index).rows(0));
            let mut p: Accumulator<1, S_COLUMNS> = s.wait::<0>();
            let is_masked = work.is_masked::<WALK>(block);
            let mut rounded = Registers::<T, STEPS>::zero();
            if is_general {
                let scores = Scores::new(a, &work.block.sequence, head, mask);
                scores.cap(&mut p);
                let probabilities = Probabilities {
                    scores: &scores,
                    first_key,
                    first_row: block * BLOCK_M as u32,
                    is_partial: is_masked,
                    bases: inputs.bases(slot.index),
                };
                rounded = probabilities.with_weights(&mut p);
            } else {
                if is_masked {
                    mask.apply_transposed(&mut p, first_key, block * BLOCK_M as u32);
                }
                p.zip_shared_columns(inputs.bases(slot.index), |s, base| ex2(fma(s, scale, -base)));
            }
            P_EMPTY.sync();
            p.store(p_tile, own_key);
            P_FULL.arrive();
            let d_o_slot = queries.beside(inputs.d_outputs).wait();
            if !is_general {
                rounded = Registers::of(&p);
            }
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
                head += 1;
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
    pub fn keys<
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
    pub fn own_rows(self, keys: KeyBlock, tensor: Tensor<Untyped>, columns: u32) -> GlobalMatrix<T> {
        let row = keys.first_key + BLOCK_N as u32 * cluster::block_rank() + 16 * warp_in_group();
        keys.sequence.key_matrix(&tensor.cast(), keys.head_k, row, columns, true)
    }
}

/// This warp needs a stage no more, which both blocks fill. One lane says so for all, as in the pass for narrow heads.
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
