//! Turns to add to dQ, where clusters do so in their order: a warp gives them to a warpgroup, which adds from its registers.
use super::CLUSTER;
use super::consumer::SplitConsumer;
use super::memory::Memory;
use crate::attention::Tensor;
use crate::flash3_backward::memory::Destination;
use crate::flash3_backward::order::{Behind, destination, key_block_in_order_anew};
use crate::flash3_backward::{GROUPS, Work, walk};
use crate::schedule::KeyBlock;
use cuda_std::barrier::NamedBarriers;
use cuda_std::fragment::Accumulator;
use cuda_std::math::unknown_before;
use cuda_std::matrix::PackedElement;
use cuda_std::thread::{WARP, lane_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::warpgroup::{WARPGROUP, warp_in_group};
use cuda_std::{Global, cluster};

/// It is a warpgroup's turn to add to dQ.
const TURN: NamedBarriers<6, GROUPS, { WARPGROUP + WARP }> = NamedBarriers;
/// It has.
const ADDED: NamedBarriers<8, GROUPS, { WARPGROUP + WARP }> = NamedBarriers;

impl<T: PackedElement, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>
{
    /// The same, with work that is found anew once `x` is known. In order each warpgroup does so, and once its sums are there
    /// finds the keys: kept, they would take registers that the sums have not left.
    #[inline(always)]
    #[track_caller]
    pub fn anew<const CAUSAL: bool>(self, x: u32) -> Self {
        let keys = key_block_in_order_anew(self.a, self.p.heads_in_turn, CLUSTER, x);
        SplitConsumer {
            work: Work::of::<T, CAUSAL, { walk::ORDERED }>(self.a, keys, BLOCK_M as u32, CLUSTER * BLOCK_N as u32),
            ..self
        }
    }

    /// The keys, once their sums are known.
    #[inline(always)]
    #[track_caller]
    pub fn keys_once_known<const D_COLUMNS: usize, const WALK: u32>(
        self,
        sums: &Accumulator<1, D_COLUMNS>,
    ) -> KeyBlock {
        if WALK != walk::ORDERED {
            return self.work.block;
        }
        let known = sums.fold_row(0, 0, |x, _| x).to_bits();
        key_block_in_order_anew(self.a, self.p.heads_in_turn, CLUSTER, known)
    }

    /// A warp that sees to it that warpgroup `group` adds to dQ in its turn, and says where.
    #[inline(always)]
    #[track_caller]
    pub fn give_turns<const CAUSAL: bool>(self, group: u32) {
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
}

/// Does with a part of dQ what its destination says, once it is the turn of warpgroup `group`.
#[inline(always)]
#[track_caller]
pub(super) fn add_in_turn<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const Q_COLUMNS: usize,
>(
    consumer: &SplitConsumer<'_, T, HEADDIM, HALF, BLOCK_M, BLOCK_N>,
    group: u32,
    mut d_q: Accumulator<1, Q_COLUMNS>,
    sums: Global<f32>,
) {
    TURN.sync(group);
    let to = consumer.memory.destinations.of(group);
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
        let column = HALF as u32 * cluster::block_rank() + 8 * Q_COLUMNS as u32 * group;
        let first = data.offset((to.first + column as u64) as usize);
        d_q.store_rows_anew(to.rows, first, anew(a.headdim.saturating_sub(column)), |row| {
            let row = 16 * anew(warp_in_group()) + row;
            (row as u64 * row_stride, row < to.rows)
        });
    }
    ADDED.arrive(group);
}
