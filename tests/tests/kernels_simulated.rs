//! Every attention kernel on the simulated GPU, against f64. The simulator fails a run for any race, uninitialised read,
//! access out of bounds or divergent barrier, so these tests check the kernels' code as well as their results.
use ferroflash::{Backend, Kernel, Session, SimulatorOptions};
use ferroflash_tests::grid::{batches, cases, of_kernel};

fn session(kernel: Kernel) -> Session {
    Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(kernel)
}

fn check_all(kernel: Kernel) {
    let session = session(kernel);
    of_kernel(cases().chain(batches()), kernel).for_each(|case| case.check(&session));
}

#[test]
fn standard() {
    check_all(Kernel::Standard);
}

#[test]
fn flash1() {
    check_all(Kernel::Flash1);
}

#[test]
fn flash2() {
    check_all(Kernel::Flash2);
}

#[test]
fn flash3() {
    check_all(Kernel::Flash3);
}

/// The order in which threads run must not matter.
#[test]
fn any_order_of_threads_gives_the_same_bits() {
    for kernel in [Kernel::Standard, Kernel::Flash1, Kernel::Flash2, Kernel::Flash3] {
        for case in of_kernel(batches().step_by(2), kernel) {
            let [q, k, v] = case.inputs();
            let run = |seed| {
                let mut options = SimulatorOptions::default();
                options.seed = seed;
                let session = session(kernel).simulator_options(options);
                session.attention(&q, &k, &v, &case.options()).unwrap_or_else(|e| panic!("{kernel}, seed {seed}: {e}"))
            };
            let natural = run(0);
            for seed in [1, 2] {
                let permuted = run(seed);
                assert_eq!(natural.out.bytes(), permuted.out.bytes(), "{kernel}, seed {seed}");
                assert_eq!(natural.softmax_lse.bytes(), permuted.softmax_lse.bytes(), "{kernel}, seed {seed}");
            }
        }
    }
}
