//! dQ of a step, from the warpgroup that multiplied it to the thread that copies.
use crate::attention::{Attention, Tensor};
use crate::flash3_backward::memory::{Destination, Outgoing};
use crate::flash3_backward::{GROUP_ROWS, GROUPS, Params, can_finish_in_order, walk};
use cuda_std::fragment::Accumulator;
use cuda_std::math::unknown_before;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Producer;
use cuda_std::thread::lane_id;
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::warpgroup::warp_in_group;
use cuda_std::{Shared, fence};

/// Gives a part of dQ to the thread that adds it to its sums, once that has taken the one before. Where the keys of a
/// `WALK` add in their order, these may be the first: then adds to it what the others have summed, and finishes it.
#[inline(always)]
#[track_caller]
pub(super) fn hand_over<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const WALK: u32,
>(
    params: &Params,
    a: &Attention<T>,
    mut d_q: Accumulator<1, Q_COLUMNS>,
    outgoing: Outgoing<HEADDIM, BLOCK_M>,
    part: &mut Producer<GROUPS>,
) {
    let slot = part.acquire();
    let own = outgoing.part(slot.index).offset(warp_in_group() * Accumulator::<1, Q_COLUMNS>::ELEMENTS as u32);
    let may_finish = const { walk::is_in_order(WALK) && can_finish_in_order(HEADDIM as u32, BLOCK_M as u32) };
    let to = if may_finish { outgoing.destinations.of(slot.index) } else { Destination::SUMS };
    if to.rows == 0 {
        d_q.store_registers(own);
    } else {
        if to.has_sums {
            d_q.zip_registers(own, |d_q, sum| d_q + sum);
        }
        d_q.map(|_, _, d_q| d_q * a.softmax_scale);
        let Tensor { data, row_stride, .. } = params.backward.d_q.cast::<T>();
        let data = data.offset(to.first as usize);
        // Through shared memory, where the sums were. What follows from the lane is found here: kept, it would take the
        // registers of the sums of dK and dV.
        let anew = |x| unknown_before(x, to.rows);
        let lane = anew(lane_id());
        let own_first = GROUP_ROWS * anew(slot.index) + 16 * anew(warp_in_group());
        let blocks: Shared<T> = own.cast();
        sync_warp(ALL);
        d_q.store_blocks::<T, TRANSPOSED>(blocks);
        sync_warp(ALL);
        for i in 0..Q_COLUMNS as u32 / 2 {
            let (upper, left) = (8 * (lane / 8 % 2), 8 * (2 * i + lane / 16));
            let (row, column) = if TRANSPOSED { (left, upper + own_first) } else { (upper + own_first, left) };
            let row = row + lane % 8;
            let eight = blocks.offset(256 * i + 8 * lane).cast::<u32>().load_vector::<4>(0);
            if row < to.rows && column < a.headdim {
                let at = data.offset((row as u64 * row_stride + column as u64) as usize);
                at.cast::<u32>().store_vector(0, eight);
            }
        }
    }
    fence::proxy_async();
    sync_warp(ALL);
    if lane_id() == 0 {
        slot.fill();
    }
    part.next_round();
}
