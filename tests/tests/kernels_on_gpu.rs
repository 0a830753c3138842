//! The same grid as on the simulated GPU, on a real one. Without one each test says `skipped:` and tests nothing.
use ferroflash::{AttentionOptions, Backend, DType, Kernel, Session};
use ferroflash_tests::beside;
use ferroflash_tests::combination::Combination;
use ferroflash_tests::features::plain;
use ferroflash_tests::grid::{Case, DTYPES, batches, cases, of_kernel};

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

/// All kernel families that the GPU runs, each with a session.
fn sessions(test: &str) -> Vec<(Kernel, Session)> {
    let Some(any) = session(test, Kernel::Auto) else { return Vec::new() };
    any.kernels().into_iter().map(|kernel| (kernel, any.clone().kernel(kernel))).collect()
}

fn check_all(test: &str, kernel: Kernel) {
    let Some(session) = session(test, kernel) else { return };
    of_kernel(cases().chain(batches()), kernel).for_each(|case| case.check(&session));
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

/// On Hopper; other GPUs refuse it.
#[test]
fn flash3() {
    let Some(session) = session("flash3", Kernel::Flash3) else { return };
    if session.kernels().contains(&Kernel::Flash3) {
        return check_all("flash3", Kernel::Flash3);
    }
    let [q, k, v] = Case::single(DType::BF16, (17, 17), 64, false).inputs();
    let refused = session.attention(&q, &k, &v, &AttentionOptions::new()).expect_err("no Hopper").to_string();
    assert!(refused.contains("flash3: runs on sm_90, not on sm_"), "{refused}");
}

#[test]
fn long_sequences() {
    for (kernel, session) in sessions("long_sequences") {
        let problems = DTYPES.into_iter().flat_map(|dtype| {
            [false, true].map(|causal| Case { nheads: 2, ..Case::single(dtype, (2048, 2500), 128, causal) })
        });
        of_kernel(problems, kernel).for_each(|case| case.check(&session));
    }
}

/// A session with FlashAttention-3, which is skipped, and that said, where it does not run.
fn hopper(test: &str) -> Option<Session> {
    let session = session(test, Kernel::Flash3)?;
    let runs = session.kernels().contains(&Kernel::Flash3);
    if !runs {
        println!("skipped: {test}: this GPU is older than Hopper");
    }
    runs.then_some(session)
}

/// Steps of decoding, whose keys are divided among multiprocessors, and the same bits again.
#[test]
fn divided_keys() {
    let Some(session) = hopper("divided_keys") else { return };
    for (dtype, headdim) in [(DType::BF16, 64), (DType::F16, 96), (DType::BF16, 128), (DType::BF16, 256)] {
        for (seqlen_q, seqlen_k, causal) in [(1, 5000, false), (7, 3001, true)] {
            let lengths = (seqlen_q, seqlen_k);
            let case = Case { batch: 2, nheads: 8, nheads_k: 2, ..Case::single(dtype, lengths, headdim, causal) };
            let (first, accuracy) = case.run(&session);
            assert!(accuracy.passed(), "{case:?}: {accuracy}");
            assert_eq!(first.report.launches.len(), 2, "{case:?}: {}", first.report.reason);
            let (again, _) = case.run(&session);
            assert_eq!((first.out.bytes(), first.softmax_lse.bytes()), (again.out.bytes(), again.softmax_lse.bytes()));
        }
    }
}

/// The same with windows, caps, ALiBi and sinks, which general kernels ask their arguments for.
#[test]
fn general_divided_keys() {
    let Some(session) = hopper("general_divided_keys") else { return };
    for (dtype, headdim) in
        [(DType::BF16, 64), (DType::F16, 96), (DType::BF16, 128), (DType::F16, 192), (DType::BF16, 256)]
    {
        for lengths in [(1, 5000), (7, 3001)] {
            for (i, window) in [None, Some(2500)].into_iter().enumerate() {
                let mut combination =
                    Combination { lengths: vec![lengths; 2], group: 4, ..plain(dtype, lengths, (headdim, headdim)) };
                (combination.sinks, combination.alibi) = (i == 0, (i == 1).then_some(true));
                combination.options = combination.options.causal(true).window_size(window, None).softcap(4.0);
                let tensors = combination.tensors();
                let run = || combination.forward(&session, &tensors).unwrap_or_else(|error| panic!("{error}"));
                let (first, again) = (run(), run());
                let accuracy = combination.accuracy(&tensors, &first).expect("of these tensors");
                assert!(accuracy.passed(), "{combination:?}: {accuracy}");
                let entries: Vec<_> = first.report.launches.iter().map(|launch| launch.entry).collect();
                assert_eq!(entries.len(), 2, "{combination:?}: {}", first.report.reason);
                assert!(entries.iter().all(|entry| entry.ends_with("_general")), "{entries:?}");
                assert_eq!(
                    (first.out.bytes(), first.softmax_lse.bytes()),
                    (again.out.bytes(), again.softmax_lse.bytes())
                );
            }
        }
    }
}

/// Gradients of so many heads that these take turns at the sums of dQ, and so few that a block of threads does not take a head:
/// that is done from five sixths of two for each multiprocessor on.
#[test]
fn gradients_of_many_heads() {
    let Some(session) = hopper("gradients_of_many_heads") else { return };
    for (dtype, headdim) in
        [(DType::BF16, 64), (DType::F16, 64), (DType::BF16, 96), (DType::BF16, 128), (DType::F16, 128)]
    {
        for causal in [false, true] {
            for (lengths, nheads, nheads_k) in [((150, 150), 4, 4), ((100, 225), 6, 3)] {
                let case =
                    Case { batch: 189 / nheads_k, nheads, nheads_k, ..Case::single(dtype, lengths, headdim, causal) };
                let (gradients, accuracy) = case.run_backward(&session);
                assert!(accuracy.passed(), "{case:?}: {accuracy}");
                let pass = gradients.report.launches[1].entry;
                assert!(pass.starts_with("flash3_bwd_ring_"), "{case:?}: {pass}");
            }
        }
    }
}

/// Gradients of blocks of keys that several blocks of threads share: of few heads all of them, of many the last.
#[test]
fn gradients_of_shared_keys() {
    let Some(session) = hopper("gradients_of_shared_keys") else { return };
    let check = |case: Case, pass: &str| {
        let (gradients, accuracy) = case.run_backward(&session);
        assert!(accuracy.passed(), "{case:?}: {accuracy}");
        let entry = gradients.report.launches[1].entry;
        assert!(entry.starts_with(pass), "{case:?}: {entry}");
    };
    for (dtype, headdim) in [(DType::BF16, 64), (DType::BF16, 96), (DType::F16, 128), (DType::BF16, 256)] {
        for causal in [false, true] {
            for (lengths, nheads, nheads_k) in [((1100, 1100), 2, 2), ((1500, 700), 6, 2), ((2100, 2900), 1, 1)] {
                let case = Case { nheads, nheads_k, ..Case::single(dtype, lengths, headdim, causal) };
                check(case, "flash3_bwd_shared_");
            }
        }
    }
    // Four turns of all multiprocessors, and eight blocks of keys.
    check(Case { batch: 67, ..Case::single(DType::BF16, (1024, 1024), 128, false) }, "flash3_bwd_ring_shared_");
}

/// Gradients that are the same bits in every batch: alone, and beside sequences that are shorter and longer.
#[test]
fn deterministic_gradients_do_not_depend_on_what_else_runs() {
    let many = [(700, 500); 40];
    let others: [&[_]; 4] = [&[], &[(70, 0)], &[(0, 9), (3000, 4000), (90, 20)], &many];
    for (kernel, session) in sessions("deterministic_gradients_do_not_depend_on_what_else_runs") {
        let entry = match kernel {
            Kernel::Flash2 => "flash2_bwd_dq_",
            Kernel::Flash3 => "flash3_bwd_ordered_",
            _ => continue,
        };
        for headdim in [64, 128, 256] {
            for causal in [false, true] {
                for lengths in [(200, 290), (1300, 1100)] {
                    beside::check(|_| session.clone(), (headdim, causal), lengths, &others, entry)
                        .unwrap_or_else(|reason| panic!("{kernel}: {reason}"));
                }
            }
        }
    }
}

#[test]
fn reruns_are_bitwise_equal() {
    for (kernel, session) in sessions("reruns_are_bitwise_equal") {
        let problems =
            DTYPES.map(|dtype| Case { batch: 2, nheads: 4, nheads_k: 2, ..Case::single(dtype, (513, 700), 64, true) });
        for case in of_kernel(problems.into_iter(), kernel) {
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
    for (kernel, gpu) in sessions("gpu_and_simulator_agree") {
        let simulator = Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(kernel);
        for case in of_kernel(batches(), kernel) {
            let (gpu, _) = case.run(&gpu);
            let (simulated, _) = case.run(&simulator);
            let largest = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let (gpu, simulated) = (gpu.out.to_f32(), simulated.out.to_f32());
            let difference: Vec<f32> = gpu.iter().zip(&simulated).map(|(a, b)| a - b).collect();
            // Two roundings of the dtype, at the scale of the largest element.
            let bound = largest(&simulated) * if case.dtype == DType::F32 { 1e-5 } else { 2f32.powi(-7) };
            assert!(largest(&difference) <= bound, "{kernel}, {case:?}: {} > {bound}", largest(&difference));
        }
    }
}
