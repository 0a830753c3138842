//! The grid of FlashAttention's own tests, by its own rule, and with means beside maxima: on a GPU, where the test else says
//! `skipped:`, and a sample of it on the CPU.
use ferroflash::{Backend, Session};
use ferroflash_tests::peers::{Cell, grid};

fn check<'a>(session: &Session, cells: impl IntoIterator<Item = &'a Cell>) {
    let failures: Vec<_> = cells.into_iter().filter_map(|cell| cell.check(session).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_sample_on_the_cpu() {
    let session = Session::new(Backend::Cpu).expect("runs everywhere");
    // The first are those of short sequences; a step that no number of draws divides meets all parameters.
    check(&session, grid()[..240].iter().step_by(7));
}

#[test]
fn all_of_it_on_the_gpu() {
    match Session::new(Backend::Cuda) {
        Ok(session) => check(&session, &grid()),
        Err(reason) => println!("skipped: all_of_it_on_the_gpu: {reason}"),
    }
}
