//! C = (A Bᵀ) V, as a kernel that uses Hopper's words together: a producer warp loads tiles of A and
//! B through a pipeline, a consumer warpgroup multiplies them from shared memory, then from registers, and stores by
//! TMA.
//!
//! A is (M, K), B is (N, K), V is (N, D), all bf16; S = A Bᵀ over all of K, C = bf16(S) V, (M, D), for M in tiles of
//! 64, one block each, N = 128 columns and D = 64.
use cuda_std::element::bf16;
use cuda_std::fragment::Accumulator;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::{Phases, Pipeline};
use cuda_std::shared::dynamic_shared;
use cuda_std::tensor::{TensorMap, TensorMapRef};
use cuda_std::thread::{block_idx_x, lane_id, sync_threads, thread_idx_x};
use cuda_std::warpgroup::{self, thread_in_group, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, Registers};
use cuda_std::{SmemTile, barrier::NamedBarrier, bulk, fence, kernel, warp};

pub const TILE_M: usize = 64;
pub const TILE_N: usize = 128;
pub const TILE_K: usize = 64;
pub const WIDTH: usize = 64;
pub const STAGES: u32 = 2;
pub const THREADS: u32 = 256;

type TileA = SmemTile<bf16, TILE_M, TILE_K>;
type TileB = SmemTile<bf16, TILE_N, TILE_K>;
type TileV = SmemTile<bf16, TILE_N, WIDTH>;
type TileC = SmemTile<bf16, TILE_M, WIDTH>;

/// Dynamic shared memory.
pub const SHARED_BYTES: u32 = STAGES * (TileA::BYTES + TileB::BYTES) + TileV::BYTES + TileC::BYTES + 64;

/// Its parameters.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Params {
    /// Tiles of (M, K).
    pub a: TensorMap,
    /// Tiles of (N, K).
    pub b: TensorMap,
    /// Tiles of (N, D).
    pub v: TensorMap,
    /// Tiles of (M, D).
    pub c: TensorMap,
    /// Tiles along K.
    pub steps: u32,
}

#[kernel(name = "hopper_product", arch = sm_90a, threads = THREADS)]
pub fn hopper_product(p: Params) {
    let a = TileA::at(dynamic_shared());
    let b = TileB::at(a.stage(STAGES - 1).end());
    let v = TileV::at(b.stage(STAGES - 1).end());
    let c = TileC::at(v.end());
    let pipeline = Pipeline::<STAGES>::at(c.end());
    let v_full = Mbarrier::at(pipeline.end());
    if thread_idx_x() == 0 {
        pipeline.init(1, 4);
        v_full.init(1);
        fence::mbarrier_init();
    }
    sync_threads();

    let row = (block_idx_x() * TILE_M as u32) as i32;
    if warpgroup_id() == 0 {
        warpgroup::release_registers::<40>();
        if thread_idx_x() == 0 {
            let [a_map, b_map, v_map] = [&p.a, &p.b, &p.v].map(|map| TensorMapRef::of(&p, map));
            v_full.arrive_expect(TileV::BYTES);
            v_map.load_tile(v, 0, [], v_full);
            let mut producer = pipeline.producer();
            for step in 0..p.steps {
                let slot = producer.acquire();
                slot.expect(TileA::BYTES + TileB::BYTES);
                let column = (step * TILE_K as u32) as i32;
                a_map.load(a.stage(slot.index).chunk(0, 0), [column, row], slot.full());
                b_map.load(b.stage(slot.index).chunk(0, 0), [column, 0], slot.full());
                producer.advance();
            }
        }
    } else {
        warpgroup::claim_registers::<232>();
        let mut consumer = pipeline.consumer();
        let mut s = Accumulator::<1, { TILE_N / 8 }>::zero();
        for _ in 0..p.steps {
            let slot = consumer.wait();
            s = wgmma::add_product(s, a.stage(slot.index).rows(0), b.stage(slot.index).rows(0)).wait::<0>();
            if lane_id() == 0 {
                slot.release();
            }
            consumer.advance();
        }
        Phases::of(v_full).wait();
        let s = Registers::<bf16, { TILE_N / 16 }>::of(&s);
        let product: Accumulator<1, { WIDTH / 8 }> = wgmma::product(s, v.columns(0)).wait::<0>();
        product.store(c, 16 * warp_in_group());
        fence::proxy_async();
        NamedBarrier::<1, 128>.sync();
        if thread_in_group() == 0 {
            TensorMapRef::of(&p, &p.c).store_tile(c, row, []);
            bulk::commit();
            bulk::wait_read::<0>();
        }
        warp::sync_warp(warp::ALL);
    }
}
