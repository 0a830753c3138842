//! The grid of FlashAttention's own tests, by its own rule, and with means beside maxima: on a GPU, where the test else
//! says `skipped:`, and samples of it on the CPU and on the simulated GPU.
use ferroflash::{Backend, Session};
use ferroflash_tests::peers::{Cell, grid};
use rayon::prelude::*;

fn check(session: &Session, cells: &[Cell]) {
    let failures: Vec<_> = cells.par_iter().filter_map(|cell| cell.check(session).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Each `step`-th cell of short sequences. A step that is prime meets all dtypes and draws.
fn sample(step: usize) -> Vec<Cell> {
    grid().into_iter().filter(Cell::is_short).step_by(step).collect()
}

#[test]
fn a_sample_on_the_cpu() {
    check(&Session::new(Backend::Cpu).expect("runs everywhere"), &sample(11));
}

#[test]
fn a_sample_on_the_simulator() {
    check(&Session::new(Backend::Simulator).expect("runs everywhere"), &sample(67));
}

#[test]
fn all_of_it_on_the_gpu() {
    match Session::new(Backend::Cuda) {
        Ok(session) => check(&session, &grid()),
        Err(reason) => println!("skipped: all_of_it_on_the_gpu: {reason}"),
    }
}
