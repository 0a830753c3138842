//! The gradient of the bias: dS before the cap, summed over all that the bias is broadcast over.
//!
//! A block of threads owns a tile of the bias and visits every batch, head and block of queries that the tile was added to,
//! in a fixed order: no atomic addition, and no memory but the gradient. HBM traffic: for each visit its tiles of Q, dO, K
//! and V, and the gradient once.
use super::probabilities::{Probabilities, exponent_base};
use super::{Params, config};
use crate::attention::{Attention, divisor};
use crate::config::Config;
use crate::flash2::threads;
use crate::mask::Mask;
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement, RowVector};
use cuda_std::shared::{Shared, dynamic_shared};
use cuda_std::thread::{WARP, block_idx_x, lane_id, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::{ALL, any, shuffle_xor};
use cuda_std::{Global, SmemTile, TileStream, copy, kernel};

/// Rows of a warp.
const ROWS: usize = 16;

const fn bias_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const S_COLUMNS: usize,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && BLOCK_N <= threads(BLOCK_M, 1) as usize);
    let tiles = (BLOCK_M + BLOCK_N) * (HEADDIM + HEADDIM_V) * size_of::<T>();
    let column_sums = BLOCK_M / ROWS * BLOCK_N * size_of::<f32>();
    Config {
        family: "flash2.bias",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: threads(BLOCK_M, 1),
        accumulators: 3 * Accumulator::<1, S_COLUMNS>::REGISTERS as u32,
        shared_bytes: (tiles + column_sums) as u32,
        barriers: 3,
        ..config::<T>(HEADDIM, HEADDIM_V, false, true)
    }
}

/// What a block of threads owns: a tile of the bias, and everything that it was added to.
struct Tile {
    batches: Extent,
    heads: Extent,
    row_blocks: Extent,
    first_key: u32,
}

/// Some of the batches, heads or blocks of queries.
#[derive(Clone, Copy)]
struct Extent {
    begin: u32,
    count: u32,
}

impl Extent {
    /// Number `index`, or all of them where the bias has but one.
    #[inline(always)]
    fn new(index: u32, of_bias: u32, all: u32) -> Self {
        if of_bias == 1 { Extent { begin: 0, count: all } } else { Extent { begin: index, count: 1 } }
    }
}

impl Tile {
    /// That of this block of threads.
    #[inline(always)]
    fn new<T>(p: &Params, a: &Attention<T>, block_m: u32, block_n: u32) -> Self {
        let row_blocks = a.seqlen_q.div_ceil(block_m);
        let row_blocks_of_bias = if p.bias_rows == 1 { 1 } else { row_blocks };
        let (column_blocks, rows, heads) =
            (divisor(a.seqlen_k.div_ceil(block_n)), divisor(row_blocks_of_bias), divisor(p.bias_heads));
        let (column_block, index) = (block_idx_x() % column_blocks, block_idx_x() / column_blocks);
        let (row_block, index) = (index % rows, index / rows);
        let (head, batch) = (index % heads, index / heads);
        Tile {
            batches: Extent::new(batch, p.bias_batch, a.batch),
            heads: Extent::new(head, p.bias_heads, a.nheads),
            row_blocks: Extent::new(row_block, row_blocks_of_bias, row_blocks),
            first_key: column_block * block_n,
        }
    }

    /// How many blocks of queries of a head and a batch it was added to.
    #[inline(always)]
    fn visits(&self) -> u32 {
        self.batches.count * self.heads.count * self.row_blocks.count
    }

    /// Batch, head and block of queries of a visit.
    #[inline(always)]
    fn visit(&self, visit: u32) -> (u32, u32, u32) {
        let (row_blocks, heads) = (divisor(self.row_blocks.count), divisor(self.heads.count));
        let (row_block, index) = (visit % row_blocks, visit / row_blocks);
        let (batch, head) = (index / heads, index % heads);
        (self.batches.begin + batch, self.heads.begin + head, self.row_blocks.begin + row_block)
    }
}

/// The gradient of a tile of the bias, `BLOCK_M` rows, or the one that all rows share, and `BLOCK_N` keys.
///
/// Grid: `ceil(seqlen_k / BLOCK_N) * (ceil(seqlen_q / BLOCK_M), or 1 if bias_rows is 1) * bias_heads * bias_batch`. A warp
/// has 16 rows.
#[kernel(
    name = "flash2_bwd_dbias_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}",
    // TFLOP/s of this kernel alone (two products) on an H100 at 4096 tokens, with a bias of each head: 28, 53, 70, 84,
    // 111, 99. What it reads and writes of the bias bounds it where heads are narrow.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V) in [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (192, 128)],
        (BLOCK_M, BLOCK_N, S_COLUMNS) in [(64, 64, 8)],
    // 83.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V) in [(256, 256)],
        (BLOCK_M, BLOCK_N, S_COLUMNS) in [(32, 64, 8)],
    // In f32 13, 17.2, 19.1, in tf32 18.1, 27, 40.
    for T in [f32, tf32],
        (HEADDIM, HEADDIM_V) in [(32, 32), (64, 64), (128, 128)],
        (BLOCK_M, BLOCK_N, S_COLUMNS) in [(32, 32, 4)],
    // 3.7 and 21.
    for T in [f32, tf32],
        (HEADDIM, HEADDIM_V) in [(256, 256)],
        (BLOCK_M, BLOCK_N, S_COLUMNS) in [(16, 32, 4)],
    config = bias_config,
    table = BIAS,
)]
pub fn bias<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const S_COLUMNS: usize,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let (d_o, d_bias) = (p.d_o.cast::<T>(), p.d_bias.cast::<T>());
    let threads = const { threads(BLOCK_M, 1) };
    let tile = Tile::new(&p, &a, BLOCK_M as u32, BLOCK_N as u32);
    let first_key = tile.first_key;

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM_V>::at(q.end());
    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(d_o_tile.end());
    let v = SmemTile::<T, BLOCK_N, HEADDIM_V>::at(k.end());
    let column_sums: Shared<f32> = v.end();

    let own_row = warp_id() * ROWS as u32;
    let mut sum = Accumulator::<1, S_COLUMNS>::zero();
    for visit in 0..tile.visits() {
        let (batch, head, row_block) = tile.visit(visit);
        let (sequence, head_k, first_row) = (a.sequence(batch), a.head_k(head), row_block * BLOCK_M as u32);
        let mask = Mask::of::<T, false, true>(&a, &sequence);
        let blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);
        let block = first_key / BLOCK_N as u32;
        if first_row >= sequence.seqlen_q || block < blocks.begin || block >= blocks.end {
            continue;
        }
        let aligned = a.is_aligned::<true>();
        let rows_of = |tensor, columns| sequence.query_matrix(tensor, head, first_row, columns, aligned);
        let keys_of = |tensor, columns| sequence.key_matrix(tensor, head_k, first_key, columns, aligned);
        // No warp reads the tiles of the visit before.
        sync_threads();
        TileStream::new(threads, rows_of(&a.q, a.headdim)).copy_async(q);
        TileStream::new(threads, rows_of(&d_o, a.headdim_v)).copy_async(d_o_tile);
        TileStream::new(threads, keys_of(&a.k, a.headdim)).copy_async(k);
        TileStream::new(threads, keys_of(&a.v, a.headdim_v)).copy_async(v);
        copy::commit();
        let first = a.first_row(&sequence, head) + first_row as usize;
        let statistic = |of: Global<f32>, absent: f32| {
            let load = |row| if first_row + row < sequence.seqlen_q { of.load(first + row as usize) } else { absent };
            RowVector::<1>::new(|row| load(own_row + row))
        };
        let bases = statistic(a.softmax_lse, f32::NEG_INFINITY).map(exponent_base);
        let sums = statistic(p.row_sums, 0.0);
        copy::wait::<0>();
        sync_threads();

        let probabilities = Probabilities::new::<true>(&a, &sequence, head, mask);
        let place = (first_row + own_row, first_key);
        let mut s = Accumulator::<1, S_COLUMNS>::zero();
        for depth in 0..HEADDIM / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, 1>::load(q, own_row, depth), k, 0, depth);
        }
        probabilities.of_scores(&mut s, &bases, place, blocks.is_partial(block));
        let p = s;

        let mut d_s = Accumulator::<1, S_COLUMNS>::zero();
        for depth in 0..HEADDIM_V / T::DEPTH {
            d_s.add_product_transposed(&LeftOperand::<T, 1>::load(d_o_tile, own_row, depth), v, 0, depth);
        }
        probabilities.drop(&mut d_s, place);
        d_s.zip_rows(&sums, |d_p, sum| d_p - sum);
        d_s.zip(&p, |d_p, p| d_p * p);
        // What is hidden is 0, even 0 · NaN.
        let nonfinite = |half| d_s.fold_row(0, half, |x, y| x * 0.0 + y * 0.0) != 0.0;
        if any(ALL, nonfinite(0) || nonfinite(1)) {
            let sees = |row, column| probabilities.sees(place.0 + row, place.1 + column);
            d_s.map(|row, column, d_s| if sees(row, column) { d_s } else { 0.0 });
        }
        sum.zip(&d_s, |sum, d_s| sum + d_s);
    }

    let (batch, head) = (tile.batches.begin, tile.heads.begin);
    if p.bias_rows == 1 {
        store_column_sums(sum, column_sums);
        sync_threads();
        let column = thread_idx_x();
        if column < BLOCK_N as u32 && first_key + column < a.seqlen_k {
            let mut sum = 0.0;
            for warp in 0..(BLOCK_M / ROWS) as u32 {
                sum += column_sums.load(warp * BLOCK_N as u32 + column);
            }
            d_bias.row(batch, head, 0).store((first_key + column) as usize, T::from_f32(sum));
        }
    } else {
        let first_row = tile.row_blocks.begin * BLOCK_M as u32;
        let (whole, pair) = (first_key + BLOCK_N as u32 <= a.seqlen_k, 2 * size_of::<T>() as u64);
        for half in 0..2 {
            let row = first_row + own_row + Accumulator::<1, S_COLUMNS>::row(0, half);
            if row >= a.seqlen_q {
                continue;
            }
            let to = d_bias.row(batch, head, row as u64);
            let in_pairs = whole && to.address().is_multiple_of(pair);
            for n in 0..S_COLUMNS {
                let key = first_key + Accumulator::<1, S_COLUMNS>::column(n, 0);
                let d_bias = [0, 1].map(|i| T::from_f32(*sum.element_mut(0, n, half, i)));
                if in_pairs {
                    to.store_vector(key as usize, d_bias);
                } else {
                    for i in 0..2 {
                        if key + (i as u32) < a.seqlen_k {
                            to.store(key as usize + i, d_bias[i]);
                        }
                    }
                }
            }
        }
    }
}

/// Writes the sum of each column over the warp's rows, after those of the warp before.
#[inline(always)]
#[track_caller]
fn store_column_sums<const N: usize>(mut x: Accumulator<1, N>, to: Shared<f32>) {
    for n in 0..N {
        for i in 0..2 {
            let mut sum = *x.element_mut(0, n, 0, i) + *x.element_mut(0, n, 1, i);
            let mut lane_mask = 4;
            while lane_mask < WARP {
                sum += shuffle_xor(ALL, sum, lane_mask);
                lane_mask *= 2;
            }
            if lane_id() < 4 {
                to.store(warp_id() * 8 * N as u32 + Accumulator::<1, N>::column(n, i), sum);
            }
        }
    }
}
