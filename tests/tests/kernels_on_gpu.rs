//! The same grid as on the simulated GPU, on a real one. Without one each test says `skipped:` and tests nothing.
use ferroflash::{Backend, Kernel, Session};
use ferroflash_tests::grid::{Case, DTYPES, batches, cases};

/// A session on the GPU; `None`, said aloud, where there is none.
fn session(test: &str, kernel: Kernel) -> Option<Session> {
    match Session::new(Backend::Cuda) {
        Ok(session) => Some(session.kernel(kernel)),
        Err(reason) => {
            println!("skipped: {test}: {reason}");
            None
        }
    }
}

fn check_all(test: &str, kernel: Kernel) {
    let Some(session) = session(test, kernel) else { return };
    cases().chain(batches()).for_each(|case| case.check(&session));
}

#[test]
fn standard() {
    check_all("standard", Kernel::Standard);
}

#[test]
fn flash1() {
    check_all("flash1", Kernel::Flash1);
}

#[test]
fn flash2() {
    check_all("flash2", Kernel::Flash2);
}

#[test]
fn long_sequences() {
    for kernel in [Kernel::Standard, Kernel::Flash1, Kernel::Flash2] {
        let Some(session) = session("long_sequences", kernel) else { return };
        for dtype in DTYPES {
            for causal in [false, true] {
                Case { nheads: 2, ..Case::single(dtype, (2048, 2500), 128, causal) }.check(&session);
            }
        }
    }
}

#[test]
fn reruns_are_bitwise_equal() {
    for kernel in [Kernel::Standard, Kernel::Flash1, Kernel::Flash2] {
        let Some(session) = session("reruns_are_bitwise_equal", kernel) else { return };
        for dtype in DTYPES {
            let case = Case { batch: 2, nheads: 4, nheads_k: 2, ..Case::single(dtype, (513, 700), 64, true) };
            let (first, _) = case.run(&session);
            for _ in 0..20 {
                let (again, _) = case.run(&session);
                assert_eq!(first.out.bytes(), again.out.bytes(), "{kernel}");
                assert_eq!(first.softmax_lse.bytes(), again.softmax_lse.bytes(), "{kernel}");
            }
        }
    }
}

/// Both machines run one source: what differs is the order of sums inside a matrix product, and the last bits of 2^x.
#[test]
fn gpu_and_simulator_agree() {
    for kernel in [Kernel::Standard, Kernel::Flash1, Kernel::Flash2] {
        let Some(gpu) = session("gpu_and_simulator_agree", kernel) else { return };
        let simulator = Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(kernel);
        for case in batches() {
            let (gpu, _) = case.run(&gpu);
            let (simulated, _) = case.run(&simulator);
            let largest = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let (gpu, simulated) = (gpu.out.to_f32(), simulated.out.to_f32());
            let difference: Vec<f32> = gpu.iter().zip(&simulated).map(|(a, b)| a - b).collect();
            // Two roundings of the dtype, at the scale of the largest element.
            let bound = largest(&simulated) * if case.dtype == ferroflash::DType::F32 { 1e-5 } else { 2f32.powi(-7) };
            assert!(largest(&difference) <= bound, "{kernel}, {case:?}: {} > {bound}", largest(&difference));
        }
    }
}
