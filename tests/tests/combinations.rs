//! Random combinations of all options, forward and backward, against f64: on the CPU, on the simulated GPU, and on a real one,
//! where the test else says `skipped:`.
use ferroflash::{AttentionOptions, Backend, DType, Kernel, SHARED_BYTES_OF_EVERY_GPU, Session};
use ferroflash_tests::combination::{Combination, Limits, combinations, fused_combinations};
use ferroflash_tests::grid;
use ferroflash_tests::placed::Placement;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rayon::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

const DTYPES: &[DType] = &grid::DTYPES;
/// Those of which flash2 has a kernel that computes all gradients in one pass.
const FUSED_DTYPES: &[DType] = &[DType::F16, DType::BF16];

/// Draws `cases` combinations of all options.
fn check(session: &Session, cases: u32, streams: u8, limits: Limits) {
    check_each(cases, streams, || combinations(limits.clone()), |combination| combination.check(session));
}

/// Draws `cases` combinations, the same ones in every run, and shrinks the first that fails. They are drawn in so many
/// streams, of which each may run beside the others.
fn check_each<S: Strategy<Value = Combination>>(
    cases: u32,
    streams: u8,
    strategy: impl Fn() -> S + Sync,
    check: impl Fn(&Combination) -> Result<(), String> + Sync,
) {
    let done = AtomicU32::new(0);
    let is_kept = |combination: Combination| {
        let checked = check(&combination);
        let done = 1 + done.fetch_add(1, Ordering::Relaxed);
        if done.is_multiple_of(500) {
            eprintln!("{done} of {cases} combinations");
        }
        checked.map_err(TestCaseError::fail)
    };
    let failures: Vec<_> = (0..streams)
        .into_par_iter()
        .filter_map(|stream| {
            let config =
                Config { cases: cases.div_ceil(streams.into()), failure_persistence: None, ..Config::default() };
            let random = TestRng::from_seed(RngAlgorithm::ChaCha, &[stream; 32]);
            TestRunner::new_with_rng(config, random).run(&strategy(), is_kept).err()
        })
        .map(|failure| failure.to_string())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Draws combinations of which flash2 computes all gradients in one pass, which others seldom meet; sees that it does, unless there
/// are no tokens.
fn check_fused(session: &Session, cases: u32, streams: u8, limits: Limits) {
    let session = session.clone().kernel(Kernel::Flash2);
    check_each(
        cases,
        streams,
        || fused_combinations(limits.clone()),
        |combination| {
            let tensors = combination.tensors();
            let forward = combination.forward(&session, &tensors).map_err(|error| error.to_string())?;
            let report = combination.backward(&session, &tensors, &forward).map_err(|error| error.to_string())?.report;
            let is_fused = report.launches.iter().any(|launch| launch.entry.starts_with("flash2_bwd_fused_"));
            let is_empty = combination.lengths.iter().any(|&(seqlen_q, seqlen_k)| seqlen_q.min(seqlen_k) == 0);
            if !is_fused && !is_empty {
                return Err(format!("{combination:?}: {}", report.reason));
            }
            combination.check(&session)
        },
    );
}

#[test]
fn on_the_cpu() {
    let session = Session::new(Backend::Cpu).expect("runs everywhere");
    let headdims = &[8, 32, 40, 59, 64, 96, 128, 192, 256];
    check(&session, 400, 4, Limits { dtypes: DTYPES, seqlen: 0..=150, batch: 1..=3, headdims });
}

#[test]
fn on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    check(
        &session,
        60,
        4,
        Limits { dtypes: DTYPES, seqlen: 0..=100, batch: 1..=2, headdims: &[8, 32, 40, 59, 64, 80] },
    );
}

/// Head dimensions whose tiles are large: few cases, and short.
#[test]
fn wide_heads_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    check(&session, 16, 2, Limits { dtypes: DTYPES, seqlen: 1..=50, batch: 1..=1, headdims: &[96, 128, 192, 256] });
}

/// With the kernels of GPUs that have the least shared memory.
#[test]
fn wide_heads_on_a_small_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere").shared_memory(SHARED_BYTES_OF_EVERY_GPU);
    check(&session, 16, 2, Limits { dtypes: DTYPES, seqlen: 1..=50, batch: 1..=1, headdims: &[96, 128, 192, 256] });
}

/// Of one key dS = P ∘ (dP - D) is a difference of equal sums: so D must be of dO as the product dP takes it, rounded.
#[test]
fn one_key_in_tf32_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    for headdim in [8, 64] {
        for seed in 0..4 {
            let combination = Combination {
                dtype: DType::F32,
                lengths: vec![(1, 1)],
                varlen: false,
                nheads_k: 1,
                group: 1,
                headdim,
                headdim_v: headdim,
                options: AttentionOptions::new().allow_tf32(true),
                bias: None,
                mask: None,
                alibi: None,
                sinks: false,
                dlse: false,
                placement: Placement::Packed,
                seed,
            };
            combination.check(&session).unwrap();
        }
    }
}

#[test]
fn on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session,
        Err(reason) => return println!("skipped: on_the_gpu: {reason}"),
    };
    let headdims = &[8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256];
    check(&session, 2500, 50, Limits { dtypes: DTYPES, seqlen: 0..=300, batch: 1..=3, headdims });
}

/// Of the family that runs on all GPUs: on Hopper the choice is another where that can be.
#[test]
fn of_flash2_on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session.kernel(Kernel::Flash2),
        Err(reason) => return println!("skipped: of_flash2_on_the_gpu: {reason}"),
    };
    let headdims = &[8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256];
    check(&session, 2500, 50, Limits { dtypes: DTYPES, seqlen: 0..=300, batch: 1..=3, headdims });
}

#[test]
fn fused_gradients_on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session,
        Err(reason) => return println!("skipped: fused_gradients_on_the_gpu: {reason}"),
    };
    let headdims = &[8, 32, 40, 64, 80, 96, 128, 160, 192, 256];
    check_fused(&session, 1500, 50, Limits { dtypes: FUSED_DTYPES, seqlen: 0..=300, batch: 1..=3, headdims });
}

#[test]
fn fused_gradients_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    check_fused(
        &session,
        24,
        4,
        Limits { dtypes: FUSED_DTYPES, seqlen: 0..=100, batch: 1..=2, headdims: &[8, 40, 64, 128] },
    );
}

#[test]
fn on_the_gpu_as_on_a_small_one() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session.shared_memory(SHARED_BYTES_OF_EVERY_GPU),
        Err(reason) => return println!("skipped: on_the_gpu_as_on_a_small_one: {reason}"),
    };
    let headdims = &[96, 111, 128, 160, 192, 256];
    check(&session, 500, 50, Limits { dtypes: DTYPES, seqlen: 0..=300, batch: 1..=3, headdims });
}
