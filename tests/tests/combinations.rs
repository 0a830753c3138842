//! Random combinations of all options, forward and backward, against f64: on the CPU, on the simulated GPU, and on a real one,
//! where the test else says `skipped:`.
use ferroflash::{Backend, DType, SHARED_BYTES_OF_EVERY_GPU, Session};
use ferroflash_tests::combination::{Combination, Limits, combinations};
use ferroflash_tests::grid;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rayon::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

const DTYPES: &[DType] = &grid::DTYPES;

/// Draws `cases` combinations, the same ones in every run, and shrinks the first that fails. They are drawn in so many
/// streams, of which each may run beside the others.
fn check(session: &Session, cases: u32, streams: u8, limits: Limits) {
    let done = AtomicU32::new(0);
    let is_kept = |combination: Combination| {
        let checked = combination.check(session);
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
            TestRunner::new_with_rng(config, random).run(&combinations(limits.clone()), is_kept).err()
        })
        .map(|failure| failure.to_string())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
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

#[test]
fn on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session,
        Err(reason) => return println!("skipped: on_the_gpu: {reason}"),
    };
    let headdims = &[8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256];
    check(&session, 2500, 50, Limits { dtypes: DTYPES, seqlen: 0..=300, batch: 1..=3, headdims });
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
