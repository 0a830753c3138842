//! Who fetches.
use super::memory::Memory;
use super::schedule::{Tile, Tiles};
use super::{GROUP_ROWS, Params};
use crate::attention::Attention;
use cuda_std::SmemTile;
use cuda_std::matrix::PackedElement;
use cuda_std::tensor::TensorMapRef;

/// The producer, one thread: Q of each tile, and its blocks of K and V in the order in which they are used.
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
>(
    p: &Params,
    a: &Attention<T>,
    memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
    mut tiles: Tiles<CAUSAL>,
) {
    let [q_map, k_map, v_map] = [&p.q, &p.k, &p.v].map(|map| TensorMapRef::of(p, map));
    q_map.prefetch();
    k_map.prefetch();
    v_map.prefetch();
    let mut queries = memory.queries.producer();
    let mut keys = memory.keys.producer();
    let mut values = memory.values.producer();
    while let Some(Tile { first_row, head, sequence, blocks }) = tiles.next(a) {
        let batch = a.batch_of_map(sequence.batch) as i32;
        let (of_q, of_k) = ([head as i32, batch], [a.head_k(head) as i32, batch]);
        let mut load_queries = |group: u32| {
            let slot = queries.acquire();
            slot.expect(SmemTile::<T, { GROUP_ROWS as usize }, HEADDIM>::BYTES);
            let row = sequence.first_q + first_row + group * GROUP_ROWS;
            q_map.load_tile(memory.q.stage(slot.index), row as i32, of_q, slot.full());
            queries.advance();
        };
        let row_of = |block: u32| (sequence.first_k + block * BLOCK_N as u32) as i32;
        let mut load_keys = |block: u32| {
            let slot = keys.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM>::BYTES);
            k_map.load_tile(memory.k.stage(slot.index), row_of(block), of_k, slot.full());
            keys.advance();
        };
        let mut load_values = |block: u32| {
            let slot = values.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM_V>::BYTES);
            v_map.load_tile(memory.v.stage(slot.index), row_of(block), of_k, slot.full());
            values.advance();
        };
        load_queries(0);
        load_keys(blocks.end - 1);
        for group in 1..GROUPS {
            load_queries(group);
        }
        for block in (blocks.begin + 1..blocks.end).rev() {
            load_keys(block - 1);
            load_values(block);
        }
        load_values(blocks.begin);
    }
}
