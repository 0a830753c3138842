//! What Hopper's words do on the simulated GPU, against plain Rust.
mod product;

use cuda_std::element::bf16;
use cuda_std::sim::{Launch, Memory, Options, Report, launch};
use cuda_std::tensor::TensorMapDescription;
use product::{Params, SHARED_BYTES, THREADS, TILE_K, TILE_M, TILE_N, WIDTH};

/// Small numbers, the same in each run.
fn numbers(count: usize, seed: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(((i * 31 + seed * 17 + i / 7) % 29) as f32 / 16.0 - 0.875)).collect()
}

#[test]
fn a_product_through_a_pipeline() {
    let (rows, depth) = (2 * TILE_M - 10, 5 * TILE_K);
    let (a, b, v) = (numbers(rows * depth, 1), numbers(TILE_N * depth, 2), numbers(TILE_N * WIDTH, 3));
    let memory = Memory::new();
    let [a_at, b_at, v_at] = [("a", &a), ("b", &b), ("v", &v)].map(|(name, x)| memory.upload(name, x));
    let c_at = memory.allocate::<bf16>("c", rows * WIDTH);
    let map = |address: u64, of: Result<TensorMapDescription, _>| {
        let _ = address;
        of.expect("a tensor").simulated().expect("a map")
    };
    let along_k = |address, rows: usize, tile: usize| {
        Ok::<_, cuda_std::tensor::TensorMapError>(TensorMapDescription {
            address,
            dtype: cuda_std::DType::BF16,
            rank: 2,
            dimensions: [depth as u64, rows as u64, 1, 1, 1],
            strides: [2 * depth as u64, 0, 0, 0],
            tile: [TILE_K as u32, tile as u32, 1, 1, 1],
            swizzle: cuda_std::tensor::Swizzle::Bytes128,
        })
    };
    let p = Params {
        a: map(0, along_k(a_at.global().address(), rows, TILE_M)),
        b: map(0, along_k(b_at.global().address(), TILE_N, TILE_N)),
        v: map(
            0,
            TensorMapDescription::of_tiles::<bf16, TILE_N, WIDTH>(
                v_at.global().address(),
                TILE_N as u64,
                WIDTH as u64,
                &[],
            ),
        ),
        c: map(
            0,
            TensorMapDescription::of_tiles::<bf16, TILE_M, WIDTH>(
                c_at.global().address(),
                rows as u64,
                WIDTH as u64,
                &[],
            ),
        ),
        steps: (depth / TILE_K) as u32,
    };
    let launch_of = Launch {
        kernel: "product",
        grid: [rows.div_ceil(TILE_M) as u32, 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: SHARED_BYTES,
    };
    let report = launch(&launch_of, &memory, &Options::default(), || product::hopper_product(p));
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    assert!(report.findings.is_empty());
    let c = memory.read(&c_at);
    for row in 0..rows {
        let s: Vec<f64> = (0..TILE_N)
            .map(|n| (0..depth).map(|k| a[row * depth + k].to_f64() * b[n * depth + k].to_f64()).sum())
            .collect();
        for d in 0..WIDTH {
            let exact: f64 = (0..TILE_N)
                .map(|n| bf16::from_f64(s[n]).to_f64() * v[n * WIDTH + d].to_f64())
                .sum();
            let found = c[row * WIDTH + d].to_f64();
            assert!((found - exact).abs() <= 0.01 * exact.abs() + 0.5, "({row}, {d}): {found} for {exact}");
        }
    }
}
