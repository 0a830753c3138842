//! The threads that copy: one brings Q and dO, another takes dQ away.
use super::memory::{Inputs, Outgoing};
use super::{GROUPS, Params, Work};
use crate::attention::Attention;
use cuda_std::bulk;
use cuda_std::matrix::PackedElement;
use cuda_std::tensor::TensorMapRef;
use cuda_std::{Global, SmemTile};

/// K and V, then Q and dO of each step with their statistics.
#[inline(always)]
#[track_caller]
pub(super) fn load<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>(
    p: &Params,
    a: &Attention<T>,
    inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    work: Work,
) {
    let map = |map| TensorMapRef::of(p, map);
    let batch = a.batch_of_map(work.block.sequence.batch) as i32;
    let mut queries = inputs.queries.producer();

    let key = (work.block.sequence.first_k + work.block.first_key) as i32;
    let of_keys = [work.block.head_k as i32, batch];
    inputs.keys.arrive_expect(2 * SmemTile::<T, BLOCK_N, HEADDIM>::BYTES);
    map(&p.k).load_tile(inputs.k, key, of_keys, inputs.keys);
    let mut is_first = true;
    let mut walk = work.walk(a, BLOCK_M as u32);
    while let Some(step) = walk.next() {
        let matrix = [step.head as i32, batch];
        let row = (work.block.sequence.first_q + step.first_row) as i32;
        let statistics = p.backward.statistics.offset(2 * step.place as usize);
        let bytes = SmemTile::<T, BLOCK_M, HEADDIM>::BYTES + 4 * BLOCK_M as u32;

        let slot = queries.acquire();
        slot.expect(bytes);
        map(&p.q).load_tile(inputs.q.stage(slot.index), row, matrix, slot.full());
        bulk::load(inputs.bases(slot.index), statistics, BLOCK_M as u32, slot.full());
        if is_first {
            map(&p.v).load_tile(inputs.v, key, of_keys, inputs.keys);
            is_first = false;
        }

        let slot = queries.beside(inputs.d_outputs).acquire();
        slot.expect(bytes);
        map(&p.d_o).load_tile(inputs.d_o.stage(slot.index), row, matrix, slot.full());
        bulk::load(inputs.sums(slot.index), statistics.offset(BLOCK_M), BLOCK_M as u32, slot.full());
        queries.advance();
    }
}

/// Adds what the warpgroups have of dQ to its sums.
#[inline(always)]
#[track_caller]
pub(super) fn add_queries<T, const HEADDIM: usize, const BLOCK_M: usize>(
    p: &Params,
    a: &Attention<T>,
    outgoing: Outgoing<HEADDIM, BLOCK_M>,
    work: Work,
) {
    let part = Outgoing::<HEADDIM, BLOCK_M>::PART;
    let mut parts = outgoing.parts.consumer();
    // The step before the first: nothing to add.
    for _ in 0..GROUPS {
        parts.wait().release();
        parts.advance();
    }
    let mut walk = work.walk(a, BLOCK_M as u32);
    while let Some(step) = walk.next() {
        let sums: Global<f32> = p.backward.d_q_sums.offset(step.place as usize * HEADDIM);
        let mut add = || {
            let slot = parts.wait();
            bulk::add(sums.offset((slot.index * part) as usize), outgoing.part(slot.index), part);
            bulk::commit();
            parts.advance();
            slot
        };
        let (first, second) = (add(), add());
        bulk::wait_read::<1>();
        first.release();
        bulk::wait_read::<0>();
        second.release();
    }
}
