//! What the warpgroups add to dQ.
use super::consumer::SplitConsumer;
use super::memory::Memory;
use super::turns::add_in_turn;
use crate::flash3_backward::{GROUPS, STAGES, Walk, walk};
use cuda_std::fragment::Accumulator;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Consumer;
use cuda_std::thread::lane_id;
use cuda_std::warpgroup::warp_in_group;
use cuda_std::wgmma::{self, InFlight};
use cuda_std::{Global, cluster};

/// What a warpgroup adds to dQ: a quarter of its columns, a step after the other.
pub(super) struct QuarterOfQueries<
    T,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
> {
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
    pub fn new(consumer: &SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>, group: u32) -> Self {
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
    pub fn product<const Q_COLUMNS: usize>(&self) -> InFlight<Q_COLUMNS> {
        let Memory { inputs, other_k, d_s, other_d_s, .. } = self.memory;
        let column = 8 * Q_COLUMNS as u32 * self.group;
        let own = inputs.k.columns(HALF as u32 * self.rank + column);
        let stage = self.received.wait().index;
        wgmma::product(d_s.stage(stage).rows(0), own)
            .add_product(other_d_s.stage(stage).rows(0), other_k.columns(column))
    }

    /// Adds what that product was to the sums of its rows; in a `WALK` in order when it is its turn.
    #[inline(always)]
    #[track_caller]
    pub fn add<const Q_COLUMNS: usize, const WALK: u32>(
        &mut self,
        consumer: &SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
        d_q: Accumulator<1, Q_COLUMNS>,
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
        if WALK == walk::ORDERED {
            add_in_turn(consumer, self.group, d_q, sums);
        } else {
            d_q.add_to(sums);
        }
    }
}
