//! What the simulator counts, against what can be counted by hand.
use cuda_std::atomic::global_add_u32;
use cuda_std::element::f16;
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{Counters, Launch, Memory, Options, TensorTraffic, launch};
use cuda_std::thread::{block_idx_x, lane_id, sync_threads, thread_idx_x};
use cuda_std::{Global, Shared, SmemTile, copy, math, matrix};

/// The counters of a correct kernel.
#[track_caller]
fn count(blocks: u32, threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Counters {
    let launch_of = Launch { kernel: "k", grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 128 << 10 };
    let report = launch(&launch_of, memory, &Options::default(), kernel);
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    report.counters
}

/// The counters of one warp.
#[track_caller]
fn count_warp(kernel: impl Fn() + Sync) -> Counters {
    count(1, 32, &Memory::new(), kernel)
}

/// The sectors that a warp loads of a tensor, by `load(tensor, lane)`.
#[track_caller]
fn load_sectors<R>(load: impl Fn(Global<u32>, usize) -> R + Sync) -> u64 {
    let memory = Memory::new();
    let x = memory.upload("x", &[0u32; 2048]).global();
    let kernel = || {
        load(x, lane_id() as usize);
    };
    count(1, 32, &memory, kernel).tensors[0].load_sectors
}

#[test]
fn sectors_of_a_warp() {
    assert_eq!(load_sectors(|x, lane| x.load(lane)), 4, "neighbours");
    assert_eq!(load_sectors(|x, lane| x.load(31 - lane)), 4, "in any order");
    assert_eq!(load_sectors(|x, lane| x.load(lane + 1)), 5, "not aligned to a sector");
    assert_eq!(load_sectors(|x, lane| x.load(lane * 2)), 8, "every other");
    assert_eq!(load_sectors(|x, lane| x.load(lane * 64)), 32, "a column");
    assert_eq!(load_sectors(|x, _| x.load(7)), 1, "the same for all");
    assert_eq!(load_sectors(|x, lane| x.load_vector::<4>(4 * lane)), 16, "sixteen bytes each");
    assert_eq!(load_sectors(|x, lane| (lane % 8 == 0).then(|| x.load(lane))), 4, "some lanes");
}

#[test]
fn each_instruction_counts_its_own_sectors() {
    let rows = |x: Global<u32>, lane: usize| (0..8).map(|row| x.load(32 * row + lane)).sum::<u32>();
    assert_eq!(load_sectors(rows), 8 * 4);
    let columns = |x: Global<u32>, lane: usize| (0..8).map(|column| x.load(64 * lane + column)).sum::<u32>();
    assert_eq!(load_sectors(columns), 8 * 32, "although eight loads touch the same sectors");
}

#[test]
#[expect(clippy::if_same_then_else, reason = "two places are what this is about")]
fn lanes_of_different_lengths() {
    // Lane l loads l % 4 + 1 times: the n-th loads of all lanes are one instruction.
    let ragged = |x: Global<u32>, lane: usize| (0..lane % 4 + 1).map(|row| x.load(32 * row + lane)).sum::<u32>();
    assert_eq!(load_sectors(ragged), 4 * 4);
    let branches = |x: Global<u32>, lane: usize| if lane < 16 { x.load(lane) } else { x.load(lane) };
    assert_eq!(load_sectors(branches), 2 + 2);
}

#[test]
fn bytes_of_each_tensor() {
    let memory = Memory::new();
    let (x, y) = (memory.upload("x", &[0f32; 256]), memory.allocate::<f16>("y", 256));
    let sum = memory.upload("sum", &[0u32]);
    let (from, to, at) = (x.global(), y.global(), sum.global());
    let counters = count(4, 64, &memory, || {
        let i = (block_idx_x() * 64 + thread_idx_x()) as usize;
        to.store(i, f16::from_f32(from.load(i)));
        if thread_idx_x() == 0 {
            global_add_u32(at, 1);
        }
    });
    let none = TensorTraffic::default();
    assert_eq!(
        counters.tensors,
        [
            TensorTraffic { name: "x", loaded_bytes: 1024, load_sectors: 32, ..none.clone() },
            TensorTraffic { name: "y", stored_bytes: 512, store_sectors: 16, ..none.clone() },
            TensorTraffic { name: "sum", atomics: 4, ..none },
        ]
    );
    assert_eq!((counters.total_loaded_bytes(), counters.total_stored_bytes()), (1024, 512));
    assert_eq!((counters.total_bytes(), counters.total_sectors(), counters.blocks), (1536, 48, 4));
}

#[test]
fn launches_add_up() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0f32; 32]).global();
    let one = count(1, 32, &memory, || {
        x.load(thread_idx_x() as usize);
    });
    let sum: Counters = (0..3).map(|_| one.clone()).sum();
    assert_eq!(sum.tensor("x").unwrap().loaded_bytes, 3 * 128);
    assert_eq!(sum, one.clone() + one.clone() + one);
}

/// Wavefronts and conflicts of the loads that each lane of a warp makes by `load(words, lane)`.
#[track_caller]
fn conflicts<R>(load: impl Fn(Shared<u32>, u32) -> R + Sync) -> (u64, u64) {
    let fill = || (0..128).for_each(|i| dynamic_shared::<u32>().store(32 * i + lane_id(), 0));
    let before = count_warp(|| {
        fill();
        sync_threads();
    });
    let after = count_warp(|| {
        fill();
        sync_threads();
        load(dynamic_shared(), lane_id());
    });
    (after.shared.wavefronts - before.shared.wavefronts, after.shared.conflicts - before.shared.conflicts)
}

#[test]
fn bank_conflicts() {
    assert_eq!(conflicts(|x, lane| x.load(lane)), (1, 0), "a row");
    assert_eq!(conflicts(|x, lane| x.load(32 * lane)), (32, 31), "a column");
    assert_eq!(conflicts(|x, lane| x.load(33 * lane)), (1, 0), "a column, padded");
    assert_eq!(conflicts(|x, lane| x.load(32 * lane + (lane ^ 5))), (1, 0), "a column, swizzled");
    assert_eq!(conflicts(|x, lane| x.load(2 * lane)), (2, 1), "every other");
    assert_eq!(conflicts(|x, lane| x.load(lane / 2)), (1, 0), "two lanes a word");
    assert_eq!(conflicts(|x, lane| x.load_vector::<2>(2 * lane)), (2, 0), "eight bytes each");
    assert_eq!(conflicts(|x, lane| x.load_vector::<4>(4 * lane)), (4, 0), "sixteen bytes each");
    assert_eq!(conflicts(|x, lane| x.load_vector::<4>(32 * lane)), (32, 28), "a column of sixteen bytes");
    assert_eq!(conflicts(|x, lane| x.cast::<u16>().load(lane)), (1, 0), "two bytes each");
}

#[test]
fn the_worst_places_come_first() {
    let counters = count_warp(|| {
        let (words, lane) = (dynamic_shared::<u32>(), lane_id());
        words.store(64 * lane, 0);
        words.store(64 * lane + 32, 0);
        words.store(2 * lane + 1, 0);
    });
    let worst: Vec<(u64, u64)> = counters.shared.worst.iter().map(|site| (site.accesses, site.conflicts)).collect();
    assert_eq!(worst, [(1, 31), (1, 31), (1, 1)]);
    assert!(counters.shared.worst[0].location < counters.shared.worst[1].location);
    assert_eq!(counters.shared.worst[2].location.file(), file!());
}

#[test]
fn a_matrix_is_eight_rows() {
    let of_rows = |bytes: u32| {
        let counters = count_warp(|| {
            let row = lane_id() * bytes;
            dynamic_shared::<u32>().offset(row / 4).store_vector(0, [0; 4]);
            sync_threads();
            matrix::ldmatrix([row]);
        });
        let stores = count_warp(|| dynamic_shared::<u32>().store_vector(lane_id() * bytes / 4, [0; 4]));
        (counters.shared.wavefronts - stores.shared.wavefronts, counters.shared.conflicts - stores.shared.conflicts)
    };
    assert_eq!(of_rows(16), (4, 0));
    assert_eq!(of_rows(128), (32, 28));
    assert_eq!(of_rows(144), (4, 0));
}

/// A warp fills a tile by rows with asynchronous copies, and multiplies it with itself in both ways.
#[track_caller]
fn tile_has_no_conflicts<T: MatrixElement, const COLS: usize, const N: usize>() {
    let memory = Memory::new();
    let x = memory.upload("x", &[T::from_f32(0.0); 64 * 128][..64 * COLS]).global();
    let counters = count(1, 128, &memory, || {
        let tile = SmemTile::<T, 64, COLS>::at(dynamic_shared());
        let chunks_a_row = COLS as u32 / SmemTile::<T, 64, COLS>::CHUNK;
        let mut chunk = thread_idx_x();
        while chunk < 64 * chunks_a_row {
            let (row, column) = (chunk / chunks_a_row, chunk % chunks_a_row);
            let from = x.offset((chunk * SmemTile::<T, 64, COLS>::CHUNK) as usize);
            copy::copy_async(tile.chunk(row, column), from, true);
            chunk += 128;
        }
        copy::commit();
        copy::wait::<0>();
        sync_threads();
        let mut s = Accumulator::<1, 8>::zero();
        for step in 0..COLS / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, 1>::load(tile, thread_idx_x() / 32 * 16, step), tile, 0, step);
        }
        let mut o = Accumulator::<1, N>::zero();
        for step in 0..64 / T::DEPTH {
            o.add_product(&s.operand::<T>(step), tile, step, 0);
        }
        std::hint::black_box(o);
    });
    assert!(counters.shared.accesses > 0);
    assert_eq!(counters.shared.conflicts, 0, "{:#?}", counters.shared);
    assert_eq!(counters.tensors[0].loaded_bytes, (64 * COLS * size_of::<T>()) as u64);
    assert_eq!(counters.tensors[0].load_sectors * 32, counters.tensors[0].loaded_bytes);
}

#[test]
fn tiles_have_no_conflicts() {
    tile_has_no_conflicts::<f16, 32, 4>();
    tile_has_no_conflicts::<f16, 64, 8>();
    tile_has_no_conflicts::<f16, 128, 16>();
    tile_has_no_conflicts::<f32, 32, 4>();
    tile_has_no_conflicts::<f32, 64, 8>();
    tile_has_no_conflicts::<f32, 128, 16>();
}

#[test]
fn an_accumulator_is_stored_without_conflicts() {
    let counters = count_warp(|| {
        let tile = SmemTile::<f16, 16, 64>::at(dynamic_shared());
        Accumulator::<1, 8>::zero().store(tile, 0);
    });
    assert_eq!((counters.shared.stored_bytes, counters.shared.conflicts), (16 * 64 * 2, 0));
}

#[test]
fn flops_by_unit() {
    let counters = count(2, 64, &Memory::new(), || {
        let mut d = [[[0.0; 4]; 2]; 3];
        matrix::mma::<f16, 3, 2>(&mut d, &[[0; 4]; 3], &[[0; 2]; 2]);
        math::fma(1.0, 2.0, 3.0);
        math::ex2(math::lg2(math::rcp(2.0)));
    });
    let (warps, threads) = (4, 128);
    assert_eq!(counters.flops.tensor, warps * 2 * (3 * 16) * (2 * 8) * 16);
    assert_eq!(counters.flops.fma, threads * 2);
    assert_eq!(counters.flops.special, threads * 3);
}

#[test]
fn counters_can_be_off() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0f32; 32]).global();
    let options = Options { counters: false, ..Options::default() };
    let launch_of = Launch { kernel: "k", grid: [1; 3], block: [32, 1, 1], shared_bytes: 0 };
    let report = launch(&launch_of, &memory, &options, || {
        x.load(thread_idx_x() as usize);
    });
    assert_eq!(report.counters.total_bytes(), 0);
}
