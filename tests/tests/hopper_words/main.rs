//! What Hopper's words do on the simulated GPU, against plain Rust.
// Arrays are registers: only loops over constant indices are sure to be unrolled, iterators are not.
#[allow(clippy::needless_range_loop)]
mod attention;
mod cluster;
mod copies;
mod product;
mod products;

use cuda_std::Element;
use cuda_std::sim::{Launch, Memory, Options, Report, launch_clusters};
use cuda_std::tensor::{TensorMap, TensorMapDescription};

/// Small numbers, exact in 16 bits: the same in each run.
fn numbers<T: Element>(count: usize, seed: usize) -> Vec<T> {
    (0..count).map(|i| T::from_f32(((i * 31 + seed * 17 + i / 7) % 13) as f32 / 4.0 - 1.5)).collect()
}

/// The map of a tensor's tiles of `R` rows and `C` columns.
fn tiles<T: Element, const R: usize, const C: usize>(
    address: u64,
    rows: usize,
    row_stride: usize,
    outer: &[(u64, u64)],
) -> TensorMap {
    let map = TensorMapDescription::of_tiles::<T, R, C>(address, (rows as u64, C as u64), row_stride as u64, outer);
    map.and_then(|map| map.simulated()).expect("a tensor map")
}

/// Runs a correct kernel, in each order of its threads that a few seeds make.
#[track_caller]
fn run(grid: u32, cluster: u32, threads: u32, shared_bytes: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    let launch_of = Launch { kernel: "k", grid: [grid, 1, 1], block: [threads, 1, 1], shared_bytes };
    let report = launch_clusters(&launch_of, cluster, memory, &Options::default(), kernel);
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    report
}

/// Runs one block.
#[track_caller]
fn run_block(threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    run(1, 1, threads, 64 << 10, memory, kernel)
}

mod whole_kernels {
    use super::*;
    use crate::{attention, cluster, product};
    use cuda_std::element::{bf16, f16};
    use cuda_std::tensor::Swizzle;
    use cuda_std::{DType, Scalar};

    fn dot(length: usize, product: impl Fn(usize) -> f64) -> f64 {
        (0..length).map(product).sum()
    }

    fn f64_of<T: Element>(x: &[T]) -> impl Fn(usize) -> f64 + '_ {
        |i| x[i].to_f32() as f64
    }

    #[test]
    fn a_product_through_a_pipeline() {
        use product::*;
        let (rows, depth) = (2 * TILE_M - 10, 5 * TILE_K);
        let (a, b, v) = (numbers(rows * depth, 1), numbers(TILE_N * depth, 2), numbers(TILE_N * WIDTH, 3));
        let memory = Memory::new();
        let upload = |name, x: &[bf16]| memory.upload(name, x).global().address();
        let c_at = memory.allocate::<bf16>("c", rows * WIDTH);
        let along_k = |address, rows, tile_rows| TensorMapDescription {
            address,
            dtype: DType::BF16,
            rank: 2,
            dimensions: [depth as u64, rows, 1, 1, 1],
            strides: [2 * depth as u64, 0, 0, 0],
            tile: [TILE_K as u32, tile_rows, 1, 1, 1],
            swizzle: Swizzle::Bytes128,
        };
        let p = Params {
            a: along_k(upload("a", &a), rows as u64, TILE_M as u32).simulated().unwrap(),
            b: along_k(upload("b", &b), TILE_N as u64, TILE_N as u32).simulated().unwrap(),
            v: tiles::<bf16, TILE_N, WIDTH>(upload("v", &v), TILE_N, WIDTH, &[]),
            c: tiles::<bf16, TILE_M, WIDTH>(c_at.global().address(), rows, WIDTH, &[]),
            steps: (depth / TILE_K) as u32,
        };
        let blocks = rows.div_ceil(TILE_M) as u32;
        let report = run(blocks, 1, THREADS, SHARED_BYTES, &memory, || hopper_product(p));

        let (a, b, v) = (f64_of(&a), f64_of(&b), f64_of(&v));
        let c = memory.read(&c_at);
        for row in 0..rows {
            let s = |n| dot(depth, |k| a(row * depth + k) * b(n * depth + k));
            let s: Vec<f64> = (0..TILE_N).map(|n| bf16::from_f64(s(n)).to_f64()).collect();
            for column in 0..WIDTH {
                let exact = dot(TILE_N, |n| s[n] * v(n * WIDTH + column));
                assert_eq!(c[row * WIDTH + column].to_bits(), bf16::from_f64(exact).to_bits(), "({row}, {column})");
            }
        }
        // Each block loads its rows of A, and all of B and V; rows outside of A and C do not move.
        let bytes =
            |name| report.counters.tensor(name).map(|tensor| (tensor.loaded_bytes, tensor.load_sectors)).unwrap();
        let (a_bytes, b_bytes) = ((rows * depth * 2) as u64, (TILE_N * depth * 2) as u64 * blocks as u64);
        assert_eq!(bytes("a"), (a_bytes, a_bytes / 32));
        assert_eq!(bytes("b"), (b_bytes, b_bytes / 32));
        assert_eq!(bytes("v").0, (TILE_N * WIDTH * 2) as u64 * blocks as u64);
        assert_eq!(report.counters.tensor("c").unwrap().stored_bytes, (rows * WIDTH * 2) as u64);
        let flops = 2 * TILE_M * TILE_N * (depth + WIDTH) * blocks as usize;
        assert_eq!(report.counters.flops.tensor, flops as u64);
    }

    #[test]
    fn attention_with_two_products_in_flight() {
        use attention::*;
        let length = TILE_M * TILE_N / 16;
        let [q, k, v] = [1, 2, 3].map(|seed| numbers::<bf16>(length * WIDTH, seed));
        let memory = Memory::new();
        let upload = |name, x: &[bf16]| memory.upload(name, x).global().address();
        let o_at = memory.allocate::<bf16>("o", length * WIDTH);
        let heads = [(1, (length * WIDTH) as u64)];
        let factor = 0.02;
        let p = Params {
            q: tiles::<bf16, TILE_M, WIDTH>(upload("q", &q), length, WIDTH, &heads),
            k: tiles::<bf16, TILE_N, WIDTH>(upload("k", &k), length, WIDTH, &heads),
            v: tiles::<bf16, TILE_N, WIDTH>(upload("v", &v), length, WIDTH, &heads),
            o: tiles::<bf16, { TILE_M / 2 }, WIDTH>(o_at.global().address(), length, WIDTH, &heads),
            blocks: (length / TILE_N) as u32,
            scale: factor as f32 * cuda_std::math::LOG2_E,
        };
        // Two tiles of queries are enough.
        run(2, 1, THREADS, SHARED_BYTES, &memory, || hopper_attention(p));
        let (q, k, v) = (f64_of(&q), f64_of(&k), f64_of(&v));
        let o = memory.read(&o_at);
        for row in (0..2 * TILE_M).step_by(7) {
            let score = |n: usize| factor * dot(WIDTH, |d| q(row * WIDTH + d) * k(n * WIDTH + d));
            let scores: Vec<f64> = (0..length).map(score).collect();
            let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - m).exp()).collect();
            let l: f64 = p.iter().sum();
            for column in 0..WIDTH {
                let exact = dot(length, |n| p[n] * v(n * WIDTH + column)) / l;
                let found = o[row * WIDTH + column].to_f64();
                assert!((found - exact).abs() <= 0.01, "({row}, {column}): {found} for {exact}");
            }
        }
    }

    #[test]
    fn a_cluster_shares_what_it_loads() {
        use cluster::*;
        let rounds = 3;
        let (x, y) = (numbers::<f16>(rounds * DEPTH * SIZE, 1), numbers::<f16>(rounds * DEPTH * SIZE, 2));
        let memory = Memory::new();
        let upload = |name, x: &[f16]| memory.upload(name, x).global().address();
        let c_at = memory.upload("c", &vec![1f32; SIZE * SIZE]);
        let sums = memory.upload("sums", &[0f32; 4]);
        let seen = memory.allocate::<u32>("seen", 2);
        let halves = [(BLOCKS as u64, HALF as u64)];
        let p = Params {
            x: tiles::<f16, { DEPTH / 2 }, SIZE>(upload("x", &x), rounds * DEPTH, SIZE, &[]),
            y: tiles::<f16, DEPTH, HALF>(upload("y", &y), rounds * DEPTH, SIZE, &halves),
            c: tiles::<f32, SIZE, HALF>(c_at.global().address(), SIZE, SIZE, &halves),
            weights: memory.upload("weights", &[1f32, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]).global(),
            sums: sums.global(),
            seen: seen.global(),
            rounds: rounds as u32,
        };
        let report = run(BLOCKS, BLOCKS, THREADS, SHARED_BYTES, &memory, || hopper_cluster(p));
        let (xs, ys) = (f64_of(&x), f64_of(&y));
        for (i, &c) in memory.read(&c_at).iter().enumerate() {
            let exact = 1.0 + dot(rounds * DEPTH, |k| xs(k * SIZE + i / SIZE) * ys(k * SIZE + i % SIZE));
            assert_eq!(c as f64, exact, "{i}");
        }
        assert_eq!(memory.read(&sums), [11.0, 22.0, 33.0, 44.0]);
        assert_eq!(memory.read(&seen), [rounds as u32; 2]);
        let x_bytes = report.counters.tensor("x").unwrap().loaded_bytes;
        assert_eq!(x_bytes, (size_of::<<f16 as Scalar>::Bits>() * x.len()) as u64, "once for both blocks");
        assert_eq!(report.counters.tensor("c").unwrap().atomics, (SIZE * SIZE) as u64);
    }
}
