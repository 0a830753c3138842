//! Products of warpgroups, of factors in each layout.
use crate::{numbers, run_block};
use cuda_std::barrier::NamedBarriers;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::matrix::PackedElement;
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::Memory;
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::warpgroup::warp_in_group;
use cuda_std::wgmma::{self, InFlight, Registers, TransposedRows};
use cuda_std::{Element, SmemTile, bulk, fence};

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

/// A product goes to shared memory transposed, rounded, and is a factor of the next there.
#[test]
fn products_are_stored_transposed() {
    const ROWS: usize = 32;
    let (a, b, c) = (numbers::<f16>(64 * 64, 1), numbers::<f16>(ROWS * 64, 2), numbers::<f16>(64 * 32, 3));
    let element = |x: &[f16], i: usize| x[i].to_f32();
    let dot = |m: usize, n: usize| (0..64).map(|k| element(&a, m * 64 + k) * element(&b, n * 64 + k)).sum::<f32>();
    let stored = |m, n| f16::from_f32(dot(m, n)).to_f32();
    let exact = |m: usize, n: usize| (0..64).map(|k| stored(k, m % ROWS) * element(&c, k * 32 + n)).sum::<f32>();
    run_block(128, &Memory::new(), || {
        let a_tile = SmemTile::<f16, 64, 64>::at(dynamic_shared());
        let b_tile = SmemTile::<f16, ROWS, 64>::at(a_tile.end());
        let c_tile = SmemTile::<f16, 64, 32>::at(b_tile.end());
        // Two tiles of the transpose, one below the other: a left factor has 64 rows.
        let transposed = SmemTile::<f16, ROWS, 64>::at(c_tile.end());
        fill(a_tile, &a);
        fill(b_tile, &b);
        fill(c_tile, &c);
        fence::proxy_async();
        sync_threads();
        let s: Accumulator<1, { ROWS / 8 }> = wgmma::product(a_tile.rows(0), b_tile.rows(0)).wait::<0>();
        let own = TransposedRows::of(transposed, 16 * warp_in_group());
        for stage in 0..2 {
            Registers::<f16, { ROWS / 16 }>::of(&s).store_transposed(own.stage(stage));
        }
        fence::proxy_async();
        sync_threads();
        let both = SmemTile::<f16, { 2 * ROWS }, 64>::at(transposed.start());
        let product: InFlight<4> = wgmma::product(both.rows(0), c_tile.columns(0));
        check(&mut product.wait::<0>(), exact);
    });
}

/// Column by column with values in shared memory; and as the registers lie, by way of global memory.
#[test]
fn columns_and_registers() {
    let (a, b) = (numbers::<bf16>(64 * 32, 1), numbers::<bf16>(32 * 32, 2));
    let factors = numbers::<f32>(32, 3);
    let element = |x: &[bf16], i: usize| x[i].to_f32();
    let exact = |m: usize, n: usize| {
        factors[n] * (0..32).map(|k| element(&a, m * 32 + k) * element(&b, n * 32 + k)).sum::<f32>()
    };
    let memory = Memory::new();
    let sums = memory.upload("sums", &[0f32; 64 * 32]).global();
    run_block(128, &memory, || {
        let a_tile = SmemTile::<bf16, 64, 32>::at(dynamic_shared());
        let b_tile = SmemTile::<bf16, 32, 32>::at(a_tile.end());
        let (columns, registers) = (b_tile.end::<f32>(), b_tile.end::<f32>().offset(32));
        fill(a_tile, &a);
        fill(b_tile, &b);
        if thread_idx_x() < 32 {
            columns.store(thread_idx_x(), factors[thread_idx_x() as usize]);
        }
        fence::proxy_async();
        sync_threads();
        let mut x: Accumulator<1, 4> = wgmma::product(a_tile.rows(0), b_tile.rows(0)).wait::<0>();
        x.zip_shared_columns(columns, |x, factor| x * factor);
        let own = Accumulator::<1, 4>::ELEMENTS as u32 * warp_in_group();
        x.store_registers(registers.offset(own));
        fence::proxy_async();
        sync_threads();
        if thread_idx_x() == 0 {
            bulk::add(sums, registers, 64 * 32);
            bulk::commit();
            bulk::wait::<0>();
        }
        sync_threads();
        check(&mut Accumulator::<1, 4>::load_registers(sums.offset(own as usize)), exact);
    });
}

/// Two warps in turn at two barriers: each finds what the other wrote in the step before.
#[test]
fn barriers_of_a_number() {
    const MEETING: NamedBarriers<3, 4, 64> = NamedBarriers;
    run_block(64, &Memory::new(), || {
        let (written, own) = (dynamic_shared::<u32>(), warp_id());
        for step in 0..5 {
            if step > 0 {
                MEETING.sync(2 * ((step + 1) % 2) + own);
                assert_eq!(written.load(2 * ((step + 1) % 2) + 1 - own), step - 1);
            }
            if lane_id() == 0 {
                written.store(2 * (step % 2) + own, step);
            }
            sync_warp(ALL);
            if step < 4 {
                MEETING.arrive(2 * (step % 2) + 1 - own);
            }
        }
    });
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
