//! Products of warpgroups, of factors in each layout.
use crate::{numbers, run_block};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::matrix::PackedElement;
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::Memory;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warpgroup::warp_in_group;
use cuda_std::wgmma::{self, InFlight, Registers};
use cuda_std::{Element, SmemTile, fence};

/// Fills a tile, by all threads.
fn fill<T: Element, const R: usize, const C: usize>(tile: SmemTile<T, R, C>, values: &[T]) {
    for i in (thread_idx_x()..(R * C) as u32).step_by(128) {
        tile.element(i / C as u32, i % C as u32).store(0, values[i as usize]);
    }
}

/// Checks this thread's part of a product of 64 rows.
fn check<const N: usize>(found: &mut Accumulator<1, N>, exact: impl Fn(usize, usize) -> f32) {
    found.map(|row, column, x| {
        let row = 16 * warp_in_group() + row;
        assert_eq!(x, exact(row as usize, column as usize), "row {row}, column {column}");
        x
    });
}

/// Both factors in shared memory, by rows and by columns, with all in `K` and `N8` blocks of 8 columns.
fn all_layouts<T: PackedElement, const K: usize, const N: usize, const N8: usize>() {
    assert!(N == 8 * N8);
    let (a, b) = (numbers::<T>(64 * K, 1), numbers::<T>(N * K, 2));
    let (a_columns, b_columns) = (transposed(&a, 64, K), transposed(&b, N, K));
    let element = |x: &[T], i: usize| x[i].to_f32();
    let exact = |m: usize, n: usize| (0..K).map(|k| element(&a, m * K + k) * element(&b, n * K + k)).sum::<f32>();
    run_block(128, &Memory::new(), || {
        let a_tile = SmemTile::<T, 64, K>::at(dynamic_shared());
        let at_tile = SmemTile::<T, K, 64>::at(a_tile.end());
        let b_tile = SmemTile::<T, N, K>::at(at_tile.end());
        let bt_tile = SmemTile::<T, K, N>::at(b_tile.end());
        fill(a_tile, &a);
        fill(at_tile, &a_columns);
        fill(b_tile, &b);
        fill(bt_tile, &b_columns);
        fence::proxy_async();
        sync_threads();
        let rows: InFlight<N8> = wgmma::product(a_tile.rows(0), b_tile.rows(0));
        let columns: InFlight<N8> = wgmma::product(at_tile.columns(0), bt_tile.columns(0));
        let mixed: InFlight<N8> = wgmma::product(a_tile.rows(0), bt_tile.columns(0));
        check(&mut rows.wait::<2>(), exact);
        check(&mut columns.wait::<1>(), exact);
        let mut twice = mixed.add_product(at_tile.columns(0), b_tile.rows(0)).wait::<0>();
        check(&mut twice, |m, n| 2.0 * exact(m, n));
    });
}

fn transposed<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
}

#[test]
fn factors_by_rows_and_by_columns() {
    all_layouts::<f16, 64, 64, 8>();
    all_layouts::<bf16, 64, 128, 16>();
    all_layouts::<f16, 32, 32, 4>();
    all_layouts::<bf16, 16, 16, 2>();
}

#[test]
fn parts_of_tiles_and_factors_in_registers() {
    const KEYS: usize = 128;
    let (q, k, v) = (numbers::<bf16>(128 * 64, 1), numbers::<bf16>(KEYS * 64, 2), numbers::<bf16>(KEYS * 128, 3));
    let element = |x: &[bf16], i: usize| x[i].to_f32();
    // The second half of the queries.
    let s = |m: usize, n: usize| {
        let sum: f32 = (0..64).map(|d| element(&q, (64 + m) * 64 + d) * element(&k, n * 64 + d)).sum();
        bf16::from_f32(sum).to_f32()
    };
    // The second half of the columns of V.
    let o = |m: usize, d: usize| (0..KEYS).map(|n| s(m, n) * element(&v, n * 128 + 64 + d)).sum::<f32>();
    run_block(128, &Memory::new(), || {
        let q_tile = SmemTile::<bf16, 128, 64>::at(dynamic_shared());
        let k_tile = SmemTile::<bf16, KEYS, 64>::at(q_tile.end());
        fill(q_tile, &q);
        fill(k_tile, &k);
        fence::proxy_async();
        sync_threads();
        let s_found: Accumulator<1, 16> = wgmma::product(q_tile.rows(64), k_tile.rows(0)).wait::<0>();
        let p = Registers::<bf16, 8>::of(&s_found);
        sync_threads();
        let v_tile = SmemTile::<bf16, KEYS, 128>::at(dynamic_shared());
        fill(v_tile, &v);
        fence::proxy_async();
        sync_threads();
        let o_found: InFlight<8> = wgmma::product(p, v_tile.columns(64));
        check(&mut o_found.wait::<0>(), o);
    });
}
