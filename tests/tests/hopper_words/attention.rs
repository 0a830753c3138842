//! O = softmax(Q Kᵀ) V as FlashAttention-3 schedules it (Shah et al., 2024, algorithm 2): the scores of the next block
//! of keys and the output of the present one are in flight at once, under the softmax of the scores. What it needs of
//! the words is what this checks: no mask, no tail, one tile of queries a block.
//!
//! Q, K, V and O are (heads, length, 128), bf16; length is a multiple of 128 and of 176.
use cuda_std::barrier::NamedBarrier;
use cuda_std::element::bf16;
use cuda_std::fragment::Accumulator;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::{Phases, Pipeline};
use cuda_std::shared::dynamic_shared;
use cuda_std::tensor::{TensorMap, TensorMapRef};
use cuda_std::thread::{block_idx_x, block_idx_y, lane_id, sync_threads, thread_idx_x};
use cuda_std::warpgroup::{self, thread_in_group, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, Registers};
use cuda_std::{SmemTile, bulk, fence, kernel, math, warp};

pub const TILE_M: usize = 128;
pub const TILE_N: usize = 176;
pub const WIDTH: usize = 128;
pub const THREADS: u32 = 384;

type TileQ = SmemTile<bf16, TILE_M, WIDTH>;
type TileKv = SmemTile<bf16, TILE_N, WIDTH>;
/// What one warpgroup has of O: in the place of Q.
pub type TileO = SmemTile<bf16, { TILE_M / 2 }, WIDTH>;

type Scores = Accumulator<1, { TILE_N / 8 }>;
type Output = Accumulator<1, { WIDTH / 8 }>;
type Probabilities = Registers<bf16, { TILE_N / 16 }>;

/// Dynamic shared memory.
pub const SHARED_BYTES: u32 = TileQ::BYTES + 4 * TileKv::BYTES + 2 * Pipeline::<2>::BYTES + Mbarrier::BYTES;

/// Its parameters.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Params {
    /// Tiles of 128 rows.
    pub q: TensorMap,
    /// Tiles of 176 rows.
    pub k: TensorMap,
    /// Tiles of 176 rows.
    pub v: TensorMap,
    /// Tiles of 64 rows.
    pub o: TensorMap,
    /// Blocks of keys.
    pub blocks: u32,
    /// log2(e) times the factor of the scores.
    pub scale: f32,
}

/// Of this thread's two rows: the maximum of the scores, and the sum of the exponentials that this thread has.
struct Softmax {
    m: [f32; 2],
    l: [f32; 2],
}

impl Softmax {
    /// Replaces scores by probabilities, up to the factor that comes last; what O is to be multiplied with before.
    #[inline(always)]
    fn step(&mut self, s: &mut Scores, scale: f32) -> [f32; 2] {
        let mut rescale = [0.0; 2];
        for half in 0..2 {
            let of_row = warp::reduce::<4, f32>(s.fold_row(0, half, math::max), math::max);
            let m = math::max(self.m[half], of_row);
            rescale[half] = math::ex2((self.m[half] - m) * scale);
            self.m[half] = m;
            s.map_row(0, half, |x| math::ex2(math::fma(x, scale, -m * scale)));
            self.l[half] = self.l[half] * rescale[half] + s.fold_row(0, half, |a, b| a + b);
        }
        rescale
    }
}

#[kernel(name = "hopper_attention", arch = sm_90a, threads = THREADS)]
pub fn hopper_attention(p: Params) {
    let q = TileQ::at(dynamic_shared());
    let k = TileKv::at(q.end());
    let v = TileKv::at(k.stage(1).end());
    let k_pipeline = Pipeline::<2>::at(v.stage(1).end());
    let v_pipeline = Pipeline::<2>::at(k_pipeline.end());
    let q_full = Mbarrier::at(v_pipeline.end());
    if thread_idx_x() == 0 {
        k_pipeline.init(1, 8);
        v_pipeline.init(1, 8);
        q_full.init(1);
        fence::mbarrier_init();
    }
    sync_threads();
    let (row, head) = ((block_idx_x() * TILE_M as u32) as i32, block_idx_y() as i32);
    let group = warpgroup_id();
    if group == 0 {
        warpgroup::release_registers::<40>();
        if thread_idx_x() == 0 {
            let (k_map, v_map) = (TensorMapRef::of(&p, &p.k), TensorMapRef::of(&p, &p.v));
            q_full.arrive_expect(TileQ::BYTES);
            TensorMapRef::of(&p, &p.q).load_tile(q, row, [head], q_full);
            let (mut k_producer, mut v_producer) = (k_pipeline.producer(), v_pipeline.producer());
            for block in 0..p.blocks {
                let key = (block * TILE_N as u32) as i32;
                let slot = k_producer.acquire();
                slot.expect(TileKv::BYTES);
                k_map.load_tile(k.stage(slot.index), key, [head], slot.full());
                k_producer.advance();
                let slot = v_producer.acquire();
                slot.expect(TileKv::BYTES);
                v_map.load_tile(v.stage(slot.index), key, [head], slot.full());
                v_producer.advance();
            }
        }
    } else {
        warpgroup::claim_registers::<232>();
        let group = group - 1;
        let q_rows = q.rows(64 * group);
        let (mut k_consumer, mut v_consumer) = (k_pipeline.consumer(), v_pipeline.consumer());
        let leads = lane_id() == 0;
        let mut softmax = Softmax { m: [f32::NEG_INFINITY; 2], l: [0.0; 2] };
        let mut o = Output::zero();

        Phases::of(q_full).wait();
        let k_slot = k_consumer.wait();
        k_consumer.advance();
        let mut s: Scores = wgmma::product(q_rows, k.stage(k_slot.index).rows(0)).wait::<0>();
        if leads {
            k_slot.release();
        }
        softmax.step(&mut s, p.scale);
        let mut probabilities = Probabilities::of(&s);
        for _ in 1..p.blocks {
            let k_slot = k_consumer.wait();
            k_consumer.advance();
            let s_in_flight = wgmma::product(q_rows, k.stage(k_slot.index).rows(0));
            let v_slot = v_consumer.wait();
            let o_in_flight = wgmma::add_product(o, probabilities, v.stage(v_slot.index).columns(0));
            let mut s: Scores = s_in_flight.wait::<1>();
            if leads {
                k_slot.release();
            }
            let rescale = softmax.step(&mut s, p.scale);
            // The exponentials stay before the wait: the assembler moves it up to the next barrier, which this is.
            wgmma::pin(&mut s);
            v_consumer.wait();
            v_consumer.advance();
            o = o_in_flight.wait::<0>();
            wgmma::pin(&mut s);
            if leads {
                v_slot.release();
            }
            probabilities = Probabilities::of(&s);
            for half in 0..2 {
                o.map_row(0, half, |x| x * rescale[half]);
            }
        }
        let v_slot = v_consumer.wait();
        o = wgmma::add_product(o, probabilities, v.stage(v_slot.index).columns(0)).wait::<0>();
        for half in 0..2 {
            let factor = math::rcp(warp::reduce::<4, f32>(softmax.l[half], |a, b| a + b));
            o.map_row(0, half, |x| x * factor);
        }
        store(&o, TileO::at(q.chunk(0, 0)).stage(group), TensorMapRef::of(&p, &p.o), row + 64 * group as i32, head);
    }
}

/// A warpgroup stores its 64 rows, by way of shared memory. Both have read their queries.
#[inline(always)]
#[track_caller]
fn store(o: &Output, tile: TileO, map: TensorMapRef<'_>, row: i32, head: i32) {
    NamedBarrier::<1, 256>.sync();
    o.store(tile, 16 * warp_in_group());
    fence::proxy_async();
    NamedBarrier::<2, 256>.sync();
    if thread_in_group() == 0 {
        map.store_tile(tile, row, [head]);
        bulk::commit();
        bulk::wait_read::<0>();
    }
}
