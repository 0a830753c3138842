//! The threads that copy: one brings Q and dO, others take dQ away.
use super::memory::{Inputs, Outgoing};
use super::shares::own_work;
use super::{GROUPS, Params, STAGES, next_keys, ring, walk};
use crate::attention::Attention;
use crate::schedule::KeyBlock;
use cuda_std::cluster::Blocks;
use cuda_std::matrix::PackedElement;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::tensor::{CachePolicy, TensorMapRef};
use cuda_std::{Global, SmemTile, bulk, cluster};

/// Q and dO of each step with their statistics, K with the first Q and V with the first dO: the first products wait for no
/// more than they need. Of all blocks of keys that the block of threads takes. Of `CLUSTER` blocks of threads that have as
/// many blocks of keys, each takes one.
#[inline(always)]
#[track_caller]
pub(super) fn load<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const CLUSTER: u32,
    const CAUSAL: bool,
    const WALK: u32,
>(
    p: &Params,
    a: &Attention<T>,
    inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    mut block: KeyBlock,
) {
    let map = |map| TensorMapRef::of(p, map);
    // K and V are read once.
    let once = |map| TensorMapRef::of(p, map).cached(CachePolicy::evict_first());
    let mut queries = inputs.queries.producer();
    let mut keys = inputs.keys.producer();
    loop {
        let batch = a.batch_of_map(block.sequence.batch) as i32;
        let of_keys = [block.head_k as i32, batch];
        let work = own_work::<T, CAUSAL, WALK>(p, a, block, BLOCK_M as u32, BLOCK_N as u32, CLUSTER);
        let rank = if CLUSTER > 1 { cluster::block_rank() } else { 0 };
        let key = (block.sequence.first_k + block.first_key + BLOCK_N as u32 * rank) as i32;
        keys.acquire();
        if WALK == walk::HEAD {
            inputs.lengths.store_vector(0, [block.sequence.seqlen_q, block.sequence.seqlen_k]);
        }
        let of_tile = SmemTile::<T, BLOCK_N, HEADDIM>::BYTES;
        let mut is_first = true;
        let mut walk = work.walk(a, BLOCK_M as u32);
        while let Some(step) = walk.next() {
            let matrix = [step.head as i32, batch];
            let row = (block.sequence.first_q + step.first_row) as i32;
            let statistics = p.backward.statistics.offset(2 * step.place as usize);
            let bytes = SmemTile::<T, BLOCK_M, HEADDIM>::BYTES + 4 * BLOCK_M as u32;

            let slot = queries.acquire();
            slot.expect(bytes + if is_first { of_tile } else { 0 });
            if is_first {
                once(&p.k).load_tile(inputs.k, key, of_keys, slot.full());
            }
            load_queries::<_, _, _, CLUSTER>(map(&p.q), inputs.q.stage(slot.index), row, matrix, slot.full());
            bulk::load(inputs.bases(slot.index), statistics, BLOCK_M as u32, slot.full());

            let d_outputs = queries.beside(inputs.d_outputs);
            if const { Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::D_O_TILES < STAGES } {
                d_outputs.ahead().acquire();
            }
            let slot = d_outputs.acquire();
            slot.expect(bytes + if is_first { of_tile } else { 0 });
            if is_first {
                once(&p.v).load_tile(inputs.v, key, of_keys, slot.full());
                is_first = false;
            }
            load_queries::<_, _, _, CLUSTER>(map(&p.d_o), inputs.d_o_at(slot.index), row, matrix, slot.full());
            bulk::load(inputs.sums(slot.index), statistics.offset(BLOCK_M), BLOCK_M as u32, slot.full());
            queries.advance();
        }
        let Some(next) = next_keys::<T, WALK>(a, block, BLOCK_N as u32) else { break };
        block = next;
        keys.advance();
    }
}

/// Loads a tile of the queries. Of a cluster, whose blocks have the same queries, each loads some of the columns for all.
#[inline(always)]
#[track_caller]
fn load_queries<T: PackedElement, const R: usize, const C: usize, const CLUSTER: u32>(
    map: TensorMapRef,
    to: SmemTile<T, R, C>,
    row: i32,
    matrix: [i32; 2],
    barrier: Mbarrier,
) {
    if CLUSTER == 1 {
        map.load_tile(to, row, matrix, barrier);
        return;
    }
    let panels = const { SmemTile::<T, R, C>::PANELS / CLUSTER };
    for panel in 0..panels {
        let panel = panels * cluster::block_rank() + panel;
        let column = SmemTile::<T, R, C>::PANEL_COLUMNS * panel;
        let at = [column as i32, row, matrix[0], matrix[1]];
        map.load_multicast(to.panel(panel), at, barrier, Blocks::first(CLUSTER));
    }
}

/// Adds what the warpgroups have of dQ to its sums.
#[inline(always)]
#[track_caller]
pub(super) fn add_queries<
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
) {
    let part = Outgoing::<HEADDIM, BLOCK_M>::PART;
    let mut parts = outgoing.parts.consumer();
    loop {
        let work = own_work::<T, CAUSAL, WALK>(p, a, block, BLOCK_M as u32, BLOCK_N as u32, 1);
        let mut walk = if walk::is_ring(WALK) {
            let first_place = p.ring.first_place(a, &block.sequence, block.head_k * work.group, BLOCK_M as u32);
            work.walk_from(first_place, ring::places_of_head(a, BLOCK_M as u32), BLOCK_M as u32)
        } else {
            work.walk(a, BLOCK_M as u32)
        };
        // The step before the first: nothing to add.
        for _ in 0..GROUPS {
            parts.wait().release();
            parts.advance();
        }
        let pair = ring::pair(a, &block.sequence, block.head_k);
        if walk::is_ring(WALK) {
            p.ring.take_over(a, pair, BLOCK_N as u32);
        }
        while let Some(step) = walk.next() {
            let sums: Global<f32> = p.backward.d_q_sums.offset(step.place as usize * HEADDIM);
            let mut add = || {
                let slot = parts.wait();
                let (to, from) = (sums.offset((slot.index * part) as usize), outgoing.part(slot.index));
                if walk::is_ring(WALK) {
                    bulk::add_cached(to, from, part, CachePolicy::evict_last());
                } else {
                    bulk::add(to, from, part);
                }
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
        if walk::is_ring(WALK) {
            bulk::wait::<0>();
            p.ring.add(pair);
        }
        let Some(next) = next_keys::<T, WALK>(a, block, BLOCK_N as u32) else { break };
        block = next;
    }
}
