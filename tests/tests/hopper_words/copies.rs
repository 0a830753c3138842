//! The tensor copy engine: boxes, swizzles, edges, stretches, groups.
use crate::{numbers, run_block, tiles};
use cuda_std::element::{bf16, f16};
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::Phases;
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::Memory;
use cuda_std::tensor::{Swizzle, TensorMap, TensorMapDescription, TensorMapError, TensorMapRef};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::{DType, Element, Global, Shared, SmemTile, bulk, fence};

/// Loads by one thread, on a barrier at `at`, what `load` says, of so many bytes; all threads wait.
fn load_and_wait(at: Shared<u64>, bytes: u32, load: impl Fn(Mbarrier)) {
    let full = Mbarrier::at(at);
    if thread_idx_x() == 0 {
        full.init(1);
        fence::mbarrier_init();
        full.arrive_expect(bytes);
        load(full);
    }
    sync_threads();
    Phases::of(full).wait();
}

/// A tile from the middle of a tensor of 3 matrices of 21 rows, over the edge of the last.
fn a_tile_is_what_the_words_for_tiles_say<T: Element, const C: usize>() {
    const R: usize = 16;
    let (rows, stride) = (21, C + 8);
    let x = numbers::<T>(3 * rows * stride, 5);
    let memory = Memory::new();
    let x_at = memory.upload("x", &x).global().address();
    let y_at = memory.upload("y", &vec![T::from_f32(9.0); x.len()]);
    let outer = [(3, (rows * stride) as u64)];
    let maps = [x_at, y_at.global().address()].map(|at| tiles::<T, R, C>(at, rows, stride, &outer));
    run_block(32, &memory, || {
        let tile = SmemTile::<T, R, C>::at(dynamic_shared());
        let map = TensorMapRef::of(&maps, &maps[0]);
        load_and_wait(tile.end(), SmemTile::<T, R, C>::BYTES, |full| map.load_tile(tile, 12, [1], full));
        for i in (thread_idx_x()..(R * C) as u32).step_by(32) {
            let (row, column) = (i as usize / C, i as usize % C);
            let expected = if 12 + row < rows { x[(rows + 12 + row) * stride + column].to_f32() } else { 0.0 };
            assert_eq!(tile.element(row as u32, column as u32).load(0).to_f32(), expected);
        }
        if thread_idx_x() == 0 {
            TensorMapRef::of(&maps, &maps[1]).store_tile(tile, 12, [2]);
            bulk::commit();
            bulk::wait_read::<0>();
        }
    });
    for (i, y) in memory.read(&y_at).iter().enumerate() {
        let (matrix, row, column) = (i / (rows * stride), i / stride % rows, i % stride);
        let is_stored = matrix == 2 && row >= 12 && column < C;
        let expected = if is_stored { x[i - rows * stride].to_f32() } else { 9.0 };
        assert_eq!(y.to_f32(), expected, "{matrix}, {row}, {column}");
    }
}

#[test]
fn tiles_of_all_widths() {
    a_tile_is_what_the_words_for_tiles_say::<f16, 16>();
    a_tile_is_what_the_words_for_tiles_say::<bf16, 32>();
    a_tile_is_what_the_words_for_tiles_say::<f16, 64>();
    a_tile_is_what_the_words_for_tiles_say::<bf16, 128>();
    a_tile_is_what_the_words_for_tiles_say::<f32, 64>();
}

#[test]
fn boxes_without_a_swizzle_and_off_the_edges() {
    let x: Vec<f32> = (0..12 * 5).map(|i| i as f32).collect();
    let memory = Memory::new();
    let map = TensorMapDescription {
        address: memory.upload("x", &x).global().address(),
        dtype: DType::F32,
        rank: 2,
        dimensions: [10, 5, 1, 1, 1],
        strides: [48, 0, 0, 0],
        tile: [8, 4, 1, 1, 1],
        swizzle: Swizzle::None,
    };
    let parameters = map.simulated().unwrap();
    for (column, row) in [(0, 0), (-3, -1), (5, 3), (-9, 0), (20, 9)] {
        run_block(32, &memory, || {
            let to = dynamic_shared::<f32>();
            let map = TensorMapRef::of(&parameters, &parameters);
            load_and_wait(to.offset(64).cast(), 128, |full| map.load(to, [column, row], full));
            let (r, c) = (row + thread_idx_x() as i32 / 8, column + thread_idx_x() as i32 % 8);
            let is_inside = (0..5).contains(&r) && (0..10).contains(&c);
            let expected = if is_inside { x[(r * 12 + c) as usize] } else { 0.0 };
            assert_eq!(to.load(thread_idx_x()), expected, "({r}, {c})");
        });
    }
}

#[test]
fn stretches() {
    let memory = Memory::new();
    let (x, y) = (memory.upload("x", &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), memory.allocate::<f32>("y", 8));
    let sum = memory.upload("sum", &[10f32; 4]);
    let (from, to, at): (Global<f32>, Global<f32>, Global<f32>) = (x.global(), y.global(), sum.global());
    let report = run_block(32, &memory, || {
        let shared = dynamic_shared::<f32>();
        load_and_wait(shared.offset(64).cast(), 32, |full| bulk::load(shared, from, 8, full));
        if thread_idx_x() == 0 {
            bulk::store(to, shared, 8);
            bulk::commit();
            bulk::add(at, shared, 4);
            bulk::add(at, shared.offset(4), 4);
            bulk::commit();
            bulk::wait::<1>();
            bulk::wait_read::<0>();
        }
    });
    assert_eq!(memory.read(&y), memory.read(&x));
    assert_eq!(memory.read(&sum), [16.0, 18.0, 20.0, 22.0]);
    assert_eq!(report.counters.tensor("x").unwrap().load_sectors, 1);
    assert_eq!(report.counters.tensor("sum").unwrap().atomics, 8);
}

#[test]
fn maps_that_cannot_be() {
    let good = TensorMapDescription::of_tiles::<f16, 64, 128>(0x100, (500, 100), 128, &[(7, 64_000)]).unwrap();
    assert_eq!((good.rank, good.tile, good.tile_bytes()), (3, [64, 64, 1, 1, 1], 8 << 10));
    let error = |change: fn(&mut TensorMapDescription)| {
        let mut map = good;
        change(&mut map);
        map.check().unwrap_err()
    };
    assert_eq!(error(|map| map.rank = 6), TensorMapError::Rank(6));
    assert_eq!(error(|map| map.address += 8), TensorMapError::Address(0x108));
    assert_eq!(error(|map| map.dimensions[1] = 0), TensorMapError::Dimension(1));
    assert_eq!(error(|map| map.strides[1] = 8), TensorMapError::Stride(1));
    assert_eq!(error(|map| map.tile[1] = 257), TensorMapError::Tile(1));
    let row = TensorMapError::TileRow { bytes: 64, swizzle: Swizzle::Bytes128 };
    assert_eq!(error(|map| map.tile[0] = 32), row);
    assert_eq!(size_of::<TensorMap>(), 128);
}
