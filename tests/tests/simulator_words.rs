//! What the words of the device do on the simulated GPU, against plain Rust.
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::math::{round_to_tf32, tanh, tanh_of_quarters, tanh_of_small_quarter};
use cuda_std::matrix::{self, PackedElement};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{Launch, Memory, Options, launch};
use cuda_std::thread::*;
use cuda_std::warp::{self, ALL};
use cuda_std::{Element, Global, Scalar, Shared, atomic, shared_array};
use proptest::prelude::*;

/// Runs a correct kernel.
#[track_caller]
fn run(grid: [u32; 3], block: [u32; 3], memory: &Memory, kernel: impl Fn() + Sync) {
    let launch_of = Launch { kernel: "k", grid, block, shared_bytes: 16 << 10 };
    let report = launch(&launch_of, memory, &Options::default(), kernel);
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
}

/// What each lane of a warp computes.
#[track_caller]
fn each_lane<T: Scalar>(kernel: impl Fn(u32) -> T + Sync) -> Vec<T> {
    let memory = Memory::new();
    let results = memory.allocate::<T>("results", 32);
    let at = results.global();
    run([1; 3], [32, 1, 1], &memory, || at.store(lane_id() as usize, kernel(lane_id())));
    memory.read(&results)
}

fn of_lanes<T>(expected: impl Fn(u32) -> T) -> Vec<T> {
    (0..32).map(expected).collect()
}

#[test]
fn tanh_of_small_numbers() {
    for n in -512..=512 {
        let x = n as f32 / 1024.0;
        let [exact, error] = [f64::from(x).tanh(), 2f64.powi(-23)];
        let found = each_lane(move |_| tanh_of_small_quarter(4.0 * x))[0];
        assert!((f64::from(found) - exact).abs() <= exact.abs() * error, "{x}: {found}, {exact}");
    }
}

/// Of pairs that share a reciprocal, whatever the other one is; and of what is not finite.
#[test]
fn tanh_of_pairs() {
    let of = |x: [f32; 2]| each_lane(move |lane| tanh_of_quarters(x.map(|x| 4.0 * x))[lane as usize % 2]);
    for n in -400..=400 {
        let x = n as f32 / 37.0;
        let exact = f64::from(x).tanh();
        for other in [x, -x, 0.0, 1e-3, 0.5, -2.0, 30.0, -1e9, 1e30, f32::INFINITY] {
            let found = of([x, other]);
            for (found, exact) in [(found[0], exact), (found[1], f64::from(other).tanh())] {
                let error = (f64::from(found) - exact).abs();
                let allowed = 2f64.powi(-21).min(exact.abs() * 2f64.powi(-20));
                assert!(error <= allowed, "{x}, {other}: {found}, {exact}");
            }
        }
        // As exact as one by one, within a few units in the last place.
        let alone = each_lane(move |_| tanh(x))[0];
        assert!((of([x, 1.0])[0] - alone).abs() <= 9.0 * 2f32.powi(-24), "{x}");
    }
    for x in [f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(of([x, 0.5])[0], x.signum());
    }
    assert!(of([f32::NAN, 1.0])[..2].iter().all(|x| x.is_nan()) && of([f32::INFINITY, f32::NAN])[1].is_nan());
}

#[test]
fn indices() {
    let (grid, block) = ([2, 3, 4], [5, 6, 7]);
    let memory = Memory::new();
    let seen = memory.upload("seen", &[0u32; 24 * 210]);
    let at = seen.global();
    run(grid, block, &memory, || {
        assert_eq!([grid_dim_x(), grid_dim_y(), grid_dim_z()], [2, 3, 4]);
        assert_eq!([block_dim_x(), block_dim_y(), block_dim_z()], [5, 6, 7]);
        let block = block_idx_x() + 2 * (block_idx_y() + 3 * block_idx_z());
        let thread = thread_idx_x() + 5 * (thread_idx_y() + 6 * thread_idx_z());
        assert_eq!(lane_id(), thread % 32);
        at.store((block * 210 + thread) as usize, 1);
    });
    assert!(memory.read(&seen).iter().all(|&seen| seen == 1));
}

#[test]
fn accesses_of_all_sizes() {
    let memory = Memory::new();
    let (x, y) = (memory.upload("x", &(0..64).collect::<Vec<u32>>()), memory.allocate::<u32>("y", 64));
    let (from, to) = (x.global(), y.global());
    run([1; 3], [1; 3], &memory, || {
        let shared = dynamic_shared::<u32>();
        fn copy<T: Scalar, const N: usize>(from: Global<u32>, shared: Shared<u32>, to: Global<u32>, word: usize) {
            let bytes = word * 4 / size_of::<T>();
            shared.cast::<T>().store_vector::<N>(bytes as u32, from.cast::<T>().load_vector(bytes));
            to.cast::<T>().store_vector::<N>(bytes, shared.cast::<T>().load_vector(bytes as u32));
        }
        copy::<u16, 1>(from, shared, to, 0);
        to.cast::<u16>().store(1, from.cast::<u16>().load(1));
        copy::<u16, 2>(from, shared, to, 1);
        copy::<f32, 2>(from, shared, to, 2);
        copy::<u64, 1>(from, shared, to, 4);
        copy::<f64, 2>(from, shared, to, 8);
        copy::<bf16, 8>(from, shared, to, 12);
        copy::<i32, 4>(from, shared, to, 16);
    });
    let written = memory.read(&y);
    for word in [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19] {
        assert_eq!(written[word], word as u32);
    }
    assert_eq!(written[6], u32::MAX, "what nobody has written is all ones");
}

#[test]
fn static_arrays_are_one_for_a_block() {
    let memory = Memory::new();
    run([3, 1, 1], [64, 1, 1], &memory, || {
        let (a, b) = (shared_array![u32; 64], shared_array![u64; 64]);
        a.store(thread_idx_x(), thread_idx_x());
        b.store(thread_idx_x(), block_idx_x() as u64);
        sync_threads();
        assert_eq!(a.load(63 - thread_idx_x()), 63 - thread_idx_x());
        assert_eq!(b.load(0), block_idx_x() as u64);
        assert_eq!(a.as_shared().address() % 1024, 0);
    });
}

#[test]
fn shuffles() {
    for distance in [0, 1, 5, 16, 31] {
        let x = |lane: u32| 100 + lane;
        let up = |lane: u32| lane.checked_sub(distance).unwrap_or(lane);
        let down = |lane: u32| if lane + distance < 32 { lane + distance } else { lane };
        assert_eq!(each_lane(|l| warp::shuffle_xor(ALL, x(l), distance)), of_lanes(|l| x(l ^ distance)));
        assert_eq!(each_lane(|l| warp::shuffle(ALL, x(l), distance)), of_lanes(|_| x(distance)));
        assert_eq!(each_lane(|l| warp::shuffle(ALL, x(l), l / 4 * 4)), of_lanes(|l| x(l / 4 * 4)));
        assert_eq!(each_lane(|l| warp::shuffle_quad(ALL, x(l), l % 3)), of_lanes(|l| x(l / 4 * 4 + l % 3)));
        assert_eq!(each_lane(|l| warp::shuffle_up(ALL, x(l), distance)), of_lanes(|l| x(up(l))));
        assert_eq!(each_lane(|l| warp::shuffle_down(ALL, x(l), distance)), of_lanes(|l| x(down(l))));
    }
    assert_eq!(each_lane(|l| warp::shuffle_xor(ALL, l as f32, 1)), of_lanes(|l| (l ^ 1) as f32));
}

#[test]
fn votes() {
    assert_eq!(each_lane(|l| warp::ballot(ALL, l % 3 == 0)), of_lanes(|_| 0x4924_9249));
    let members = |lane: u32| if lane < 8 { 0xff } else { !0xff };
    assert_eq!(each_lane(|l| warp::ballot(members(l), true)), of_lanes(members));
    assert_eq!(each_lane(|l| warp::any(members(l), l == 3) as u32), of_lanes(|l| (l < 8) as u32));
    assert_eq!(each_lane(|l| warp::all(members(l), l != 3) as u32), of_lanes(|l| (l >= 8) as u32));
}

#[test]
fn reductions() {
    let sum = |lane: u32, width: u32| (lane / width * width..(lane / width + 1) * width).sum();
    assert_eq!(each_lane(|l| warp::reduce::<2, u32>(l, |a, b| a + b)), of_lanes(|l| sum(l, 2)));
    assert_eq!(each_lane(|l| warp::reduce::<8, u32>(l, |a, b| a + b)), of_lanes(|l| sum(l, 8)));
    assert_eq!(each_lane(|l| warp::reduce::<32, u32>(l, |a, b| a + b)), of_lanes(|l| sum(l, 32)));
    assert_eq!(each_lane(|l| warp::reduce::<32, f32>(l as f32, f32::max)), of_lanes(|_| 31.0));
}

#[test]
fn atomics() {
    let memory = Memory::new();
    let results = memory.upload("results", &[0u32, 7, 5, 0, 0, 100]);
    let global = results.global();
    run([4, 1, 1], [64, 1, 1], &memory, || {
        let (t, shared) = (thread_idx_x(), dynamic_shared::<u32>());
        if t < 6 {
            shared.store(t, if t == 1 { 7 } else { 0 });
        }
        sync_threads();
        atomic::global_add_u32(global, t);
        atomic::shared_add_u32(shared, t);
        atomic::global_max_u32(global.offset(1), t);
        atomic::shared_max_u32(shared.offset(1), t);
        atomic::global_inc_u32(global.offset(2), 9);
        atomic::shared_inc_u32(shared.offset(2), 9);
        atomic::global_add_f32(global.offset(3).cast(), 0.5);
        atomic::shared_add_f32(shared.offset(3).cast(), 0.5);
        assert_eq!(atomic::global_cas_u32(global.offset(5), 99, 1), 100);
        atomic::shared_cas_u32(shared.offset(4), 0, t + 1);
        sync_threads();
        let [sum, maximum, increments, halves, winner] = [0, 1, 2, 3, 4].map(|i| shared.load(i));
        assert_eq!((sum, maximum, increments, halves), (2016, 63, 64 % 10, 32f32.to_bits()));
        assert!((1..=64).contains(&winner));
    });
    // From 5 up to 9, then from 0: 256 increments.
    let increments = (5 + 256) % 10;
    assert_eq!(memory.read(&results), [4 * 2016, 63, increments, 128f32.to_bits(), 0, 100]);
}

/// A matrix of small integers: their products are exact in any order.
fn matrix_of<const R: usize, const C: usize>(seed: usize) -> [[f32; C]; R] {
    std::array::from_fn(|r| std::array::from_fn(|c| ((r * 31 + c * 17 + seed * 7 + r * c) % 13) as f32 - 6.0))
}

/// A warp multiplies A (16 M x 16) by B (16 x 8 N), in each way in which B can come to its registers.
fn product_is_right<T: PackedElement, const M: usize, const N: usize, const ROWS: usize, const COLUMNS: usize>() {
    assert!(ROWS == 16 * M && COLUMNS == 8 * N);
    let (a, b) = (matrix_of::<ROWS, 16>(1), matrix_of::<16, COLUMNS>(2));
    run([1; 3], [32, 1, 1], &Memory::new(), || {
        let (lane, g, q) = (lane_id(), lane_id() as usize / 4, lane_id() as usize % 4);
        // A by rows, then B by rows, then B by columns: rows of 16 and 8 N and 16 elements.
        let shared = dynamic_shared::<T>();
        let (b_at, b_columns_at) =
            (shared.offset((16 * ROWS) as u32), shared.offset((16 * ROWS + 16 * COLUMNS) as u32));
        if lane == 0 {
            for k in 0..16 {
                (0..ROWS).for_each(|row| shared.store((16 * row + k) as u32, T::from_f32(a[row][k])));
                (0..COLUMNS).for_each(|c| b_at.store((COLUMNS * k + c) as u32, T::from_f32(b[k][c])));
                (0..COLUMNS).for_each(|c| b_columns_at.store((16 * c + k) as u32, T::from_f32(b[k][c])));
            }
        }
        sync_threads();

        let rows = std::array::from_fn(|m| shared.offset((16 * m as u32 + lane % 16) * 16 + lane / 16 * 8).address());
        let a_fragments = matrix::ldmatrix::<M>(rows);
        for (m, fragment) in a_fragments.iter().enumerate() {
            let (row, k) = (16 * m + g, 2 * q);
            let pair = |row: usize, k: usize| T::pack(a[row][k], a[row][k + 1]);
            assert_eq!(*fragment, [pair(row, k), pair(row + 8, k), pair(row, k + 8), pair(row + 8, k + 8)]);
        }

        let by_rows = |i: u32| b_at.offset((lane % 16) * COLUMNS as u32 + 16 * i + lane / 16 * 8).address();
        let by_columns =
            |i: u32| b_columns_at.offset((16 * i + lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8).address();
        let b_fragments: [[u32; 2]; N] = std::array::from_fn(|n| {
            let column = 8 * n + g;
            [0, 8].map(|k| T::pack(b[2 * q + k][column], b[2 * q + k + 1][column]))
        });
        let mut d = [[[[1.0; 4]; N]; M]; 3];
        matrix::mma::<T, M, N>(&mut d[0], &a_fragments, &b_fragments);
        matrix::mma_shared::<T, M, N, true>(&mut d[1], &a_fragments, by_rows);
        matrix::mma_shared::<T, M, N, false>(&mut d[2], &a_fragments, by_columns);

        for (m, n, i) in (0..M).flat_map(|m| (0..N).flat_map(move |n| (0..4).map(move |i| (m, n, i)))) {
            let (row, column) = (16 * m + g + i / 2 * 8, 8 * n + 2 * q + i % 2);
            let expected = 1.0 + (0..16).map(|k| a[row][k] * b[k][column]).sum::<f32>();
            assert_eq!(d.map(|d| d[m][n][i]), [expected; 3], "row {row}, column {column}");
        }
    });
}

#[test]
fn products() {
    product_is_right::<f16, 1, 2, 16, 16>();
    product_is_right::<bf16, 1, 8, 16, 64>();
    product_is_right::<f16, 2, 4, 32, 32>();
    product_is_right::<bf16, 4, 2, 64, 16>();
}

#[test]
fn products_of_tf32_are_rounded() {
    // 11 bits of mantissa are one too many: to even and away from 0 differ here.
    let (x, y) = (1.0 + 2f32.powi(-11), 3.0);
    let rounded = 1.0 + 2f32.powi(-10);
    run([1; 3], [32, 1, 1], &Memory::new(), || {
        assert_eq!(round_to_tf32(x), rounded);
        assert_eq!(round_to_tf32(-f32::MAX), f32::NEG_INFINITY);
        assert_eq!(round_to_tf32(f32::INFINITY), f32::INFINITY);
        assert!(round_to_tf32(f32::from_bits(0x7fff_ffff)).is_nan());

        let shared = dynamic_shared::<tf32>();
        for i in 0..4 {
            shared.store(4 * lane_id() + i, tf32::from_f32(x));
        }
        warp::sync_warp(ALL);
        let row = shared.offset(4 * lane_id()).address();
        // Registers are cut, operands from shared memory rounded.
        for (of_a, a) in [(x, 1.0), (rounded, rounded)] {
            let mut d = [[[0.0; 4]; 2]];
            matrix::mma_shared::<tf32, 1, 2, false>(&mut d, &[[of_a.to_bits(); 4]], |_| row);
            assert_eq!(d, [[[8.0 * a * rounded; 4]; 2]]);
            matrix::mma::<tf32, 1, 2>(&mut d, &[[of_a.to_bits(); 4]], &[[y.to_bits(); 2]; 2]);
            assert_eq!(d, [[[8.0 * a * (rounded + y); 4]; 2]]);
        }
    });
}

#[test]
fn a_block_votes() {
    let memory = Memory::new();
    let outcomes = memory.upload("outcomes", &[0u32; 96]);
    let at = outcomes.global();
    run([1; 3], [96, 1, 1], &memory, || {
        let thread = thread_idx_x();
        let votes = [sync_threads_or(thread == 70), sync_threads_or(false), sync_threads_or(thread != 70)];
        at.store(thread as usize, votes.iter().fold(0, |bits, &vote| bits << 1 | vote as u32));
    });
    assert_eq!(memory.read(&outcomes), [0b101; 96]);
}

#[test]
fn matrices_stored_and_loaded() {
    fn kernel(transposed: bool) {
        let (lane, shared) = (lane_id(), dynamic_shared::<u16>());
        let row = shared.offset(8 * lane).address();
        let pair = |matrix: u32| (64 * matrix + 2 * lane) | (64 * matrix + 2 * lane + 1) << 16;
        let fragment = [pair(0), pair(1), pair(2), pair(3)];
        if transposed {
            matrix::stmatrix_trans([row], [fragment]);
        } else {
            matrix::stmatrix([row], [fragment]);
        }
        warp::sync_warp(ALL);
        for column in 0..8 {
            let (matrix, row) = (lane / 8, lane % 8);
            let element = if transposed { 8 * column + row } else { 8 * row + column };
            assert_eq!(shared.load(8 * lane + column) as u32, 64 * matrix + element);
        }
        let loaded = if transposed { matrix::ldmatrix_trans([row]) } else { matrix::ldmatrix([row]) };
        assert_eq!(loaded, [fragment]);
    }
    run([1; 3], [32, 1, 1], &Memory::new(), || kernel(false));
    run([1; 3], [32, 1, 1], &Memory::new(), || kernel(true));
}

#[test]
fn every_f16_and_bf16_is_exact_in_f32() {
    for bits in 0..=u16::MAX {
        let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
        let (x, y) = (Element::to_f32(half), Element::to_f32(brain));
        if half.is_nan() {
            assert!(x.is_nan());
            assert_eq!(<f16 as Element>::from_f32(x).to_bits(), 0x7fff);
        } else {
            assert_eq!(x.to_bits(), half::f16::to_f32(half).to_bits());
            assert_eq!(<f16 as Element>::from_f32(x), half);
        }
        assert!(if brain.is_nan() { y.is_nan() } else { <bf16 as Element>::from_f32(y) == brain });
    }
}

#[test]
fn rounding_to_sixteen_bits() {
    let round = |x: f32| Element::to_f32(<f16 as Element>::from_f32(x));
    assert_eq!(round(2049.0), 2048.0, "ties to even");
    assert_eq!(round(2051.0), 2052.0, "ties to even");
    assert_eq!(round(65519.0), 65504.0, "the largest");
    assert_eq!(round(65520.0), f32::INFINITY, "overflow");
    assert_eq!(round(2f32.powi(-24)), 2f32.powi(-24), "the smallest");
    assert_eq!(round(2f32.powi(-25)), 0.0, "underflow, a tie");
    assert_eq!(round(-2f32.powi(-25) * 1.001), -2f32.powi(-24));
    let round = |x: f32| Element::to_f32(<bf16 as Element>::from_f32(x));
    assert_eq!(round(257.0), 256.0, "ties to even");
    assert_eq!(round(259.0), 260.0, "ties to even");
    assert_eq!(round(f32::MAX), f32::INFINITY, "overflow");
    assert!(round(f32::from_bits(0x7f80_0001)).is_nan());
}

proptest! {
    #[test]
    fn rounding_is_that_of_half(bits: u32) {
        let x = f32::from_bits(bits);
        prop_assume!(!x.is_nan());
        prop_assert_eq!(<f16 as Element>::from_f32(x).to_bits(), half::f16::from_f32(x).to_bits());
        prop_assert_eq!(<bf16 as Element>::from_f32(x).to_bits(), half::bf16::from_f32(x).to_bits());
        let pair = <f16 as Element>::from_f32_pair([x, 1.0]);
        prop_assert_eq!(pair.map(|x| x.to_bits()), [half::f16::from_f32(x).to_bits(), 0x3c00]);
    }
}

#[test]
fn arithmetic_flushes_subnormal_numbers() {
    use cuda_std::math::{ex2, fma, lg2, max, rcp};
    let subnormal = f32::MIN_POSITIVE / 2.0;
    assert_eq!((ex2(3.0), ex2(f32::NEG_INFINITY), ex2(subnormal)), (8.0, 0.0, 1.0));
    assert_eq!((ex2(-126.0), ex2(-127.0)), (f32::MIN_POSITIVE, 0.0));
    assert_eq!((lg2(8.0), lg2(0.0), lg2(subnormal)), (3.0, f32::NEG_INFINITY, f32::NEG_INFINITY));
    assert!(lg2(-1.0).is_nan());
    assert_eq!((rcp(4.0), rcp(0.0), rcp(-subnormal)), (0.25, f32::INFINITY, f32::NEG_INFINITY));
    assert_eq!(rcp(f32::MAX), 0.0);
    assert_eq!(fma(1.0 + f32::EPSILON, 1.0 - f32::EPSILON, -1.0), -f32::EPSILON * f32::EPSILON, "rounded once");
    assert_eq!((fma(subnormal, 1e30, 1.0), fma(f32::MIN_POSITIVE, 0.5, 0.0)), (1.0, 0.0));
    assert_eq!((max(f32::NAN, 1.0), max(1.0, f32::NAN), max(-1.0, -2.0)), (1.0, 1.0, -1.0));
    assert!(max(f32::NAN, f32::NAN).is_nan());
}
