//! Two blocks that share what they load: each brings half of a tile X to both (multicast), and takes its stages back
//! when both have read them. Each block multiplies Xᵀ, of all rows, by its own columns of Y, adds the product to C, and
//! tells the other how many rounds it has made.
//!
//! X is (rounds K, 64) and Y (rounds K, 64), f16, K = 64; C = Xᵀ Y is (64, 64), f32, 32 columns a block.
use cuda_std::cluster::{self, Blocks};
use cuda_std::element::f16;
use cuda_std::fragment::Accumulator;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::{Phases, Pipeline};
use cuda_std::shared::dynamic_shared;
use cuda_std::tensor::{CachePolicy, TensorMap, TensorMapRef};
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x};
use cuda_std::warp::{self, ALL};
use cuda_std::warpgroup::{thread_in_group, warp_in_group, warpgroup_id};
use cuda_std::{Global, SmemTile, barrier::NamedBarrier, bulk, fence, kernel, wgmma};

pub const DEPTH: usize = 64;
pub const SIZE: usize = 64;
pub const HALF: usize = 32;
pub const THREADS: u32 = 160;
pub const BLOCKS: u32 = 2;

type TileX = SmemTile<f16, DEPTH, SIZE>;
type HalfX = SmemTile<f16, { DEPTH / 2 }, SIZE>;
type TileY = SmemTile<f16, DEPTH, HALF>;
type TileC = SmemTile<f32, SIZE, HALF>;

/// Dynamic shared memory.
pub const SHARED_BYTES: u32 = TileX::BYTES + TileY::BYTES + TileC::BYTES + 512 + 64;

/// Its parameters.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Params {
    /// Tiles of half as many rows of X.
    pub x: TensorMap,
    /// Tiles of (rounds K, 32) for each block.
    pub y: TensorMap,
    /// Tiles of (64, 32) for each block.
    pub c: TensorMap,
    /// A number to add for each block, four times.
    pub weights: Global<f32>,
    /// Four sums of the weights.
    pub sums: Global<f32>,
    /// For each block the rounds of the other.
    pub seen: Global<u32>,
    /// Tiles along K.
    pub rounds: u32,
}

#[kernel(name = "hopper_cluster", arch = sm_90a, cluster = BLOCKS, threads = THREADS)]
pub fn hopper_cluster(p: Params) {
    let x = TileX::at(dynamic_shared());
    let y = TileY::at(x.end());
    let c = TileC::at(y.end());
    let weight = c.end::<f32>();
    let mailbox = weight.offset(64).cast::<u32>();
    let pipeline = Pipeline::<1>::at(weight.offset(128).cast());
    let weight_full = Mbarrier::at(pipeline.end());
    let rank = cluster::block_rank();
    if thread_idx_x() == 0 {
        pipeline.init(1, 4 * BLOCKS);
        weight_full.init(1);
        fence::mbarrier_init();
    }
    sync_threads();
    cluster::sync();

    if warpgroup_id() == 1 {
        if warp::elect(ALL) {
            let x_map = TensorMapRef::of(&p, &p.x).cached(CachePolicy::evict_last());
            let y_map = TensorMapRef::of(&p, &p.y).cached(CachePolicy::evict_first());
            weight_full.arrive_expect(16);
            bulk::load(weight, p.weights.offset(4 * rank as usize), 4, weight_full);
            let mut producer = pipeline.producer();
            for round in 0..p.rounds {
                let slot = producer.acquire();
                slot.expect(TileX::BYTES + TileY::BYTES);
                let (row, half) = ((round * DEPTH as u32) as i32, DEPTH as u32 / 2 * rank);
                let own = HalfX::at(x.chunk(half, 0));
                x_map.load_tile_multicast(own, row + half as i32, [], slot.full(), Blocks::first(BLOCKS));
                y_map.load_tile(y, row, [rank as i32], slot.full());
                producer.advance();
            }
        }
    } else {
        let mut consumer = pipeline.consumer();
        let mut sum = Accumulator::<1, { HALF / 8 }>::zero();
        for _ in 0..p.rounds {
            let slot = consumer.wait();
            sum = wgmma::add_product(sum, x.columns(0), y.columns(0)).wait::<0>();
            if lane_id() < BLOCKS {
                slot.release_at(lane_id());
            }
            consumer.advance();
        }
        sum.store(c, 16 * warp_in_group());
        fence::proxy_async();
        NamedBarrier::<1, 128>.sync();
        if thread_in_group() == 0 {
            cluster::map(mailbox, 1 - rank).store(0, p.rounds);
            TensorMapRef::of(&p, &p.c).add_tile(c, 0, [rank as i32]);
            Phases::of(weight_full).wait();
            bulk::add(p.sums, weight, 4);
            bulk::commit();
            bulk::wait::<0>();
        }
    }
    warp::sync_warp(ALL);
    cluster::sync();
    if thread_idx_x() == 0 {
        p.seen.store(rank as usize, mailbox.load(0));
    }
}
