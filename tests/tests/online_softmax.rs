//! Online softmax against two-pass softmax: the state itself, and the kernels on the simulated GPU.
use cuda_std::element::{bf16, f16};
use cuda_std::{DType, Element, Global, Kernel, sim};
use kernels::softmax::{Params, ROW_A_BLOCK, ROW_A_WARP};
use kernels::{Config, OnlineSoftmax};
use proptest::collection::vec;
use proptest::prelude::*;

/// m and log2 Σ 2^x in f64, in two passes.
fn two_pass(x: &[f32]) -> (f64, f64) {
    let m = x.iter().map(|&x| x as f64).fold(f64::NEG_INFINITY, f64::max);
    if m == f64::NEG_INFINITY {
        return (m, m);
    }
    (m, m + x.iter().map(|&x| (x as f64 - m).exp2()).sum::<f64>().log2())
}

fn online(x: &[f32]) -> OnlineSoftmax {
    x.iter().fold(OnlineSoftmax::EMPTY, |mut state, &x| {
        state.push(x);
        state
    })
}

/// Elements in log2 units: moderate, extreme, and masked.
fn elements() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -20f32..20.0, 2 => -1e30f32..1e30, 1 => Just(f32::NEG_INFINITY), 1 => Just(0.0)]
}

fn agrees(state: OnlineSoftmax, x: &[f32]) -> Result<(), TestCaseError> {
    let (m, log_sum) = two_pass(x);
    prop_assert_eq!(state.m as f64, m);
    if m == f64::NEG_INFINITY {
        prop_assert_eq!(state.l, 0.0);
        prop_assert_eq!(state.inverse(), 0.0);
        prop_assert_eq!(state.lse(), f32::NEG_INFINITY);
        return Ok(());
    }
    let relative = (state.l as f64 / (log_sum - m).exp2() - 1.0).abs();
    prop_assert!(relative < 1e-5, "l = {} is off by {relative}", state.l);
    let lse = log_sum * std::f64::consts::LN_2;
    prop_assert!((state.lse() as f64 - lse).abs() <= 1e-5 * lse.abs().max(1.0), "LSE {} is not {lse}", state.lse());
    Ok(())
}

proptest! {
    #[test]
    fn one_pass_finds_what_two_passes_find(x in vec(elements(), 0..200)) {
        agrees(online(&x), &x)?;
    }

    #[test]
    fn any_split_merges_to_the_whole(x in vec(elements(), 0..200), cuts in vec(0usize..200, 0..6)) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(x.len())).chain([0, x.len()]).collect();
        cuts.sort_unstable();
        let merged = cuts.windows(2).map(|part| online(&x[part[0]..part[1]])).fold(OnlineSoftmax::EMPTY, OnlineSoftmax::merge);
        agrees(merged, &x)?;
    }

    #[test]
    fn merges_in_any_order_and_grouping(x in vec(elements(), 3..90), order in Just(vec![0usize, 1, 2]).prop_shuffle()) {
        let third = x.len() / 3;
        let parts = [&x[..third], &x[third..2 * third], &x[2 * third..]].map(online);
        let [a, b, c] = [parts[order[0]], parts[order[1]], parts[order[2]]];
        agrees(a.merge(b).merge(c), &x)?;
        agrees(a.merge(b.merge(c)), &x)?;
    }

    #[test]
    fn raising_by_blocks_rescales_what_was_weighted(x in vec(-50f32..50.0, 1..100), block in 1usize..20) {
        // Σ weight · value, kept as a kernel keeps O, against the sum with the final weights.
        let mut state = OnlineSoftmax::EMPTY;
        let mut o = 0.0;
        for (i, block_elements) in x.chunks(block).enumerate() {
            o *= state.raise(block_elements.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            for &x in block_elements {
                state.l += state.weight(x);
                o += state.weight(x) * (i as f32 + 1.0);
            }
        }
        let (_, log_sum) = two_pass(&x);
        let expected: f64 =
            x.chunks(block).enumerate().flat_map(|(i, b)| b.iter().map(move |&x| (x as f64 - log_sum).exp2() * (i as f64 + 1.0))).sum();
        prop_assert!(((o * state.inverse()) as f64 - expected).abs() <= 1e-5 * expected.abs());
        agrees(state, &x)?;
    }

    #[test]
    fn following_blocks_up_and_down_keeps_the_sum_and_its_range(
        x in vec(prop_oneof![3 => -20f32..20.0, 1 => -5000f32..5000.0, 1 => Just(f32::NEG_INFINITY)], 1..200),
        block in 1usize..20,
    ) {
        let mut state = OnlineSoftmax::EMPTY;
        for block_elements in x.chunks(block) {
            let block_max = block_elements.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let alpha = state.rebase(block_max.max(state.lowest()));
            // m, of up to 5000, is rounded to 2^-11, which is 2^-11 ln 2 of l.
            prop_assert!(alpha.is_finite() && state.l <= 16384.0 * (1.0 + 0.5f32.powi(11)), "l = {}", state.l);
            for &x in block_elements {
                prop_assert!(state.weight(x) <= 1.0);
                state.l += state.weight(x);
            }
        }
        let (_, log_sum) = two_pass(&x);
        let lse = log_sum * std::f64::consts::LN_2;
        let close = state.lse() as f64 == lse || (state.lse() as f64 - lse).abs() <= 1e-5 * lse.abs().max(1.0);
        prop_assert!(close, "LSE {} is not {lse}", state.lse());
    }
}

#[test]
fn a_single_element_has_weight_one() {
    for x in [0.0, -1e30, 1e30, 3.5] {
        let state = online(&[x]);
        assert_eq!((state.m, state.l, state.inverse()), (x, 1.0, 1.0));
    }
}

#[test]
fn nan_and_infinity_spoil_their_row() {
    assert!(online(&[1.0, f32::NAN, 2.0]).l.is_nan());
    assert!(online(&[f32::INFINITY, 1.0]).l.is_nan());
    assert!(online(&[1.0]).merge(online(&[f32::NAN])).l.is_nan());
}

/// Runs one softmax kernel on the simulated GPU. The output begins uninitialised: an element left out would be reported.
fn simulate<T: Element>(kernel: &Kernel<Params, Config>, x: &[T], columns: usize) -> Vec<T> {
    let rows = (x.len() / columns) as u32;
    let memory = sim::Memory::new();
    let input = memory.upload("x", x);
    let output = memory.allocate::<T>("y", x.len());
    let params = Params {
        x: Global::cast(input.global()),
        y: Global::cast(output.global()),
        rows,
        columns: columns as u32,
        row_stride: columns as u64,
    };
    let launch = sim::Launch {
        kernel: kernel.name,
        grid: [rows.div_ceil(kernel.config.block_m), 1, 1],
        block: [kernel.config.threads, 1, 1],
        shared_bytes: kernel.config.shared_bytes,
    };
    let report = sim::launch(&launch, &memory, &sim::Options::default(), || (kernel.run)(params));
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    memory.read(&output)
}

fn softmax_f64(row: &[f64]) -> Vec<f64> {
    let m = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = row.iter().map(|x| if m == f64::NEG_INFINITY { 0.0 } else { (x - m).exp() }).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| if sum == 0.0 { 0.0 } else { w / sum }).collect()
}

fn check_kernels<T: Element>(x: &[f32], columns: usize) -> Result<(), TestCaseError> {
    let x: Vec<T> = x.iter().map(|&x| T::from_f32(x)).collect();
    // Half a unit in the last place of the dtype at 1, and the rounding of f32 arithmetic.
    let bound = match T::DTYPE {
        DType::F32 => 2e-6,
        DType::F16 => 2f64.powi(-12) + 2e-6,
        DType::BF16 => 2f64.powi(-9) + 2e-6,
        other => panic!("no softmax of {}", other.name()),
    };
    let tables = [ROW_A_WARP, ROW_A_BLOCK];
    for kernel in tables.iter().copied().flatten().filter(|kernel| kernel.config.dtype == T::DTYPE) {
        let y = simulate(kernel, &x, columns);
        for (x, y) in x.chunks(columns).zip(y.chunks(columns)) {
            let row: Vec<f64> = x.iter().map(|x| x.to_f32() as f64).collect();
            for (y, expected) in y.iter().zip(softmax_f64(&row)) {
                let error = (y.to_f32() as f64 - expected).abs();
                prop_assert!(error <= bound, "{}: {} is not {expected}", kernel.name, y.to_f32());
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_softmax_kernel_agrees_with_f64(
        columns in prop_oneof![Just(1usize), Just(31), Just(32), Just(33), 1usize..600],
        rows in 1usize..7,
        seed in vec(prop_oneof![6 => -8f32..8.0, 1 => Just(f32::NEG_INFINITY), 1 => -6e4f32..6e4], 4200),
        // Where the elements lie: what they differ by is what counts.
        far in prop_oneof![4 => Just(0f32), 1 => Just(5e3f32), 1 => Just(-5e3f32)],
    ) {
        let x: Vec<f32> = seed[..rows * columns].iter().map(|x| x + far).collect();
        check_kernels::<f32>(&x, columns)?;
        check_kernels::<f16>(&x, columns)?;
        check_kernels::<bf16>(&x, columns)?;
    }
}

#[test]
fn the_largest_numbers_have_a_softmax() -> Result<(), TestCaseError> {
    for rows in [[f32::MAX, f32::MAX, 0.0, f32::MIN], [f32::MIN; 4], [f32::MIN, f32::MIN, f32::NEG_INFINITY, f32::MIN]]
    {
        check_kernels::<f32>(&rows, 4)?;
    }
    let largest = bf16::MAX.to_f32();
    check_kernels::<bf16>(&[largest, -largest, largest, 0.0, -largest, -largest, -largest, -largest], 4)
}
