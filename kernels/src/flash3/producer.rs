//! Who fetches.
use super::memory::Memory;
use super::schedule::{Place, Tile, Tiles};
use super::{GROUP_ROWS, Params};
use crate::attention::Attention;
use cuda_std::SmemTile;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline;
use cuda_std::tensor::{CachePolicy, TensorMapRef};

/// The producer, one thread: which tile comes next, its Q, and its blocks of K and V in the order in which they are used.
#[inline(always)]
#[track_caller]
pub fn produce<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const CAUSAL: bool,
    const FEW: bool,
    const GENERAL: bool,
>(
    p: &Params,
    a: &Attention<T>,
    memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
    mut tiles: Tiles<CAUSAL, FEW, GENERAL>,
) {
    let [q_map, k_map, v_map] = [&p.q, &p.k, &p.v].map(|map| TensorMapRef::of(p, map));
    // Q of a tile is read once, K and V by all tiles of their heads, which of few queries are one.
    let (q_map, [k_map, v_map]) = if FEW {
        (q_map, [k_map, v_map])
    } else {
        (q_map.cached(CachePolicy::evict_first()), [k_map, v_map].map(|map| map.cached(CachePolicy::evict_last())))
    };
    q_map.prefetch();
    k_map.prefetch();
    v_map.prefetch();
    let mut queries = memory.queries.producer();
    let mut keys = memory.keys.producer();
    let mut next = tiles.next(a);
    while let Some(place) = next {
        let packing = tiles.packing();
        let Tile { first_row, pack, sequence, blocks, .. } = tiles.tile(a, place);
        let batch = a.batch_of_map(sequence.batch) as i32;
        let head = packing.first_head(pack);
        let of_k = [a.head_k(head) as i32, batch];
        let mut load_queries = |group: u32| {
            let slot = queries.acquire();
            memory.places.store_vector(4 * slot.index, place.words());
            slot.expect(SmemTile::<T, { GROUP_ROWS as usize }, HEADDIM>::BYTES);
            let query = sequence.first_q + packing.query(first_row + group * GROUP_ROWS);
            q_map.load_tile(memory.q.stage(slot.index), head as i32, [query as i32, batch], slot.full());
            queries.advance();
        };
        let row_of = |block: u32| (sequence.first_k + block * BLOCK_N as u32) as i32;
        let load_keys = |keys: &mut pipeline::Producer<STAGES>, block: u32| {
            let slot = keys.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM>::BYTES);
            k_map.load_tile(memory.k.stage(slot.index), row_of(block), of_k, slot.full());
            keys.advance();
        };
        let load_values = |values: pipeline::Producer<STAGES>, block: u32| {
            let slot = values.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM_V>::BYTES);
            v_map.load_tile(memory.v.stage(slot.index), row_of(block), of_k, slot.full());
        };
        load_queries(0);
        load_keys(&mut keys, blocks.end - 1);
        for group in 1..GROUPS {
            load_queries(group);
        }
        for block in (blocks.begin + 1..blocks.end).rev() {
            let values = keys.behind(memory.values);
            load_keys(&mut keys, block - 1);
            load_values(values, block);
        }
        // Looked up before it waits for a stage: then the stages are full, and nobody waits for it.
        next = tiles.next(a);
        load_values(keys.behind(memory.values), blocks.begin);
    }
    for _ in 0..GROUPS {
        let slot = queries.acquire();
        memory.places.store_vector(4 * slot.index, Place::NOWHERE);
        slot.fill();
        queries.advance();
    }
}
