//! Tiles in shared memory and matrices in registers on the simulated GPU, against plain Rust.
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{Launch, Memory, Options, Report, launch};
use cuda_std::thread::{sync_threads, thread_idx_x, warp_id};
use cuda_std::{Element, GlobalMatrix, SmemTile, TileStream, copy};

#[track_caller]
fn run(threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    let launch_of = Launch { kernel: "k", grid: [1; 3], block: [threads, 1, 1], shared_bytes: 128 << 10 };
    let report = launch(&launch_of, memory, &Options::default(), kernel);
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    report
}

fn number<T: Element>(row: usize, column: usize) -> T {
    T::from_f32(((row * 37 + column * 11) % 199) as f32)
}

/// Two tiles of a matrix through shared memory and back: what it does not have is 0 there, and stays as it was here.
fn tiles_come_and_go<T: Element, const COLS: usize>(columns: usize, aligned: bool) {
    const ROWS: usize = 32;
    let (rows, stride) = (2 * ROWS - 5, columns + if aligned { 16 } else { 3 });
    let from: Vec<T> = (0..rows * stride).map(|i| number(i / stride, i % stride)).collect();
    let memory = Memory::new();
    let (x, y) = (memory.upload("x", &from), memory.upload("y", &vec![T::from_f32(-1.0); 2 * ROWS * stride]));
    let matrix =
        |data| GlobalMatrix { data, row_stride: stride as u64, rows: rows as u32, columns: columns as u32, aligned };
    let (x_rows, y_data) = (matrix(x.global()), y.global());
    let report = run(128, &memory, || {
        let tile = SmemTile::<T, ROWS, COLS>::at(dynamic_shared());
        let mut stream = TileStream::new(128, x_rows);
        for index in 0..2 {
            stream.copy_async(tile);
            copy::commit();
            copy::wait::<0>();
            assert!(!stream.copied_nonfinite(tile));
            sync_threads();
            for i in (thread_idx_x()..tile_elements::<T, ROWS, COLS>()).step_by(128) {
                let (row, column) = (i / COLS as u32, i % COLS as u32);
                let at = (index * ROWS as u32 + row) as usize;
                let is_there = at < rows && (column as usize) < columns;
                let expected = if is_there { number::<T>(at, column as usize).to_f32() } else { 0.0 };
                assert_eq!(tile.element(row, column).load(0).to_f32(), expected, "{row}, {column}");
            }
            let first_row = index * ROWS as u32;
            let to =
                GlobalMatrix { rows: (rows as u32) - first_row, ..matrix(y_data.offset(first_row as usize * stride)) };
            tile.store_rows(8 * warp_id(), 8, to);
            sync_threads();
        }
    });
    for (i, (x, y)) in from.iter().zip(memory.read(&y)).enumerate() {
        let expected = if i % stride < columns { x.to_f32() } else { -1.0 };
        assert_eq!(y.to_f32(), expected, "row {}, column {}", i / stride, i % stride);
    }
    let copies = report.counters.shared.worst.iter().filter(|site| site.location.file().contains("tile.rs"));
    assert!(!aligned || copies.map(|site| site.conflicts).sum::<u64>() == 0);
}

const fn tile_elements<T: Element, const ROWS: usize, const COLS: usize>() -> u32 {
    SmemTile::<T, ROWS, COLS>::ELEMENTS
}

#[test]
fn tiles_of_all_widths() {
    fn of<T: Element, const COLS: usize>() {
        tiles_come_and_go::<T, COLS>(COLS, true);
        tiles_come_and_go::<T, COLS>(COLS - 8, true);
        tiles_come_and_go::<T, COLS>(8, true);
        tiles_come_and_go::<T, COLS>(COLS - 11, false);
        tiles_come_and_go::<T, COLS>(1, false);
    }
    of::<f16, 32>();
    of::<bf16, 64>();
    of::<f16, 96>();
    of::<bf16, 128>();
    of::<f16, 192>();
    of::<bf16, 256>();
    of::<f32, 32>();
    of::<f32, 64>();
    of::<tf32, 96>();
    of::<f32, 128>();
    of::<f32, 192>();
    of::<f32, 256>();
}

#[test]
fn a_thread_finds_what_is_not_finite() {
    fn of<T: Element>() {
        for (x, expected) in
            [(f32::NAN, true), (f32::INFINITY, true), (f32::NEG_INFINITY, true), (65504.0, false), (-1e-7, false)]
        {
            let mut from = vec![T::from_f32(1.0); 32 * 64];
            from[17 * 64 + 43] = T::from_f32(x);
            let memory = Memory::new();
            let (data, found) = (memory.upload("x", &from), memory.upload("found", &[0u32; 128]));
            let (data, found_at) = (data.global(), found.global());
            run(128, &memory, || {
                let tile = SmemTile::<T, 32, 64>::at(dynamic_shared());
                let matrix = GlobalMatrix { data, row_stride: 64, rows: 32, columns: 64, aligned: true };
                let mut stream = TileStream::new(128, matrix);
                stream.copy_async(tile);
                copy::commit();
                copy::wait::<0>();
                found_at.store(thread_idx_x() as usize, stream.copied_nonfinite(tile) as u32);
            });
            assert_eq!(memory.read(&found).iter().sum::<u32>(), expected as u32, "{x}");
        }
    }
    of::<f16>();
    of::<bf16>();
    of::<f32>();
}

/// The same numbers or infinities, or both NaN.
#[track_caller]
fn assert_alike(x: f32, y: f32, place: impl std::fmt::Debug) {
    assert!(x == y || x.is_nan() && y.is_nan(), "{x} is not {y} at {place:?}");
}

/// D += A B where A is a 32 x 64 matrix in registers, B a 64 x 48 tile that holds what `b` says: without the terms that
/// `keep` leaves out, whatever they are, and like the plain product where there are no others.
fn kept_products<T: MatrixElement>() {
    let keep = |row: u32, k: u32| k <= row + 20 && (row, k) != (5, 9);
    let a = |row: u32, k: u32| match (row, k) {
        (0 | 16, 3) => 0.0,
        (1 | 17, 3) => -2.0,
        (2, 3) => f32::NAN,
        (6, 60) => f32::INFINITY,
        _ => ((row * 7 + k * 3) % 5) as f32 - if row < 16 { 0.0 } else { 2.0 },
    };
    let special = |k: u32, column: u32| match (k, column) {
        (3, 1) => f32::INFINITY,
        (3, 2) | (40, 4) => f32::NEG_INFINITY,
        (9, 9) | (63, 10) => f32::NAN,
        (50, 47) => f32::INFINITY,
        (51, 47) => f32::NEG_INFINITY,
        _ => ((k * 5 + column) % 7) as f32 - 3.0,
    };
    let plain = |k, column| Some(special(k, column)).filter(|b| b.is_finite()).unwrap_or(1.0);
    let value = |is_special, k, column| if is_special { special(k, column) } else { plain(k, column) };
    for is_special in [false, true] {
        run(32, &Memory::new(), || {
            let tile = SmemTile::<T, 64, 64>::at(dynamic_shared());
            for i in (thread_idx_x()..64 * 64).step_by(32) {
                tile.element(i / 64, i % 64).store(0, T::from_f32(value(is_special, i / 64, i % 64)));
            }
            sync_threads();
            let mut weights = Accumulator::<2, 8>::zero();
            weights.map(|row, k, _| if is_special || keep(row, k) { a(row, k) } else { 0.0 });
            if !is_special {
                weights.map(|_, _, a| if a.is_finite() { a } else { 1.0 });
            }
            let mut d = Accumulator::<2, 6>::zero();
            d.map(|row, column, _| (row + column) as f32);
            let mut all = d;
            d.add_kept_product(&weights, keep, tile, 0);
            for step in 0..64 / T::DEPTH {
                all.add_product(&weights.operand::<T>(step), tile, step, 0);
            }
            d.map(|row, column, d| {
                let terms = (0..64).filter(|&k| keep(row, k)).map(|k| a(row, k) * special(k, column));
                let expected = (row + column) as f32 + terms.sum::<f32>();
                if is_special {
                    assert_alike(d, expected, (row, column));
                }
                d
            });
            if !is_special {
                d.zip(&all, |d, all| {
                    assert_eq!(d, all);
                    d
                });
            }
        });
    }
}

#[test]
fn products_without_some_of_their_terms() {
    kept_products::<f16>();
    kept_products::<bf16>();
    kept_products::<f32>();
    kept_products::<tf32>();
}

/// A Bᵀ and then (A Bᵀ) C on small integers, exact in all dtypes.
fn products<T: MatrixElement>() {
    run(32, &Memory::new(), || {
        let a = SmemTile::<T, 32, 32>::at(dynamic_shared());
        let b = SmemTile::<T, 32, 32>::at(a.end());
        let at = |row: u32, column: u32, seed: u32| ((row * 5 + column * 3 + seed + row * column) % 5) as f32 - 2.0;
        for i in (thread_idx_x()..32 * 32).step_by(32) {
            a.element(i / 32, i % 32).store(0, T::from_f32(at(i / 32, i % 32, 1)));
            b.element(i / 32, i % 32).store(0, T::from_f32(at(i / 32, i % 32, 2)));
        }
        sync_threads();
        let mut s = Accumulator::<2, 4>::zero();
        for step in 0..32 / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, 2>::load(a, 0, step), b, 0, step);
        }
        let s_at = |row, column| (0..32).map(|k| at(row, k, 1) * at(column, k, 2)).sum::<f32>();
        let mut o = Accumulator::<2, 4>::zero();
        for step in 0..32 / T::DEPTH {
            o.add_product(&s.operand::<T>(step), b, step, 0);
        }
        s.map(|row, column, s| {
            assert_eq!(s, s_at(row, column));
            s
        });
        o.map(|row, column, o| {
            assert_eq!(o, (0..32).map(|k| s_at(row, k) * at(k, column, 2)).sum::<f32>());
            o
        });
    });
}

#[test]
fn products_of_all_elements() {
    products::<f16>();
    products::<bf16>();
    products::<f32>();
    products::<tf32>();
}
