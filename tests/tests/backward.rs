//! Gradients against f64: on the CPU, on the simulated GPU, and on a real one, where the tests else say `skipped:`.
use ferroflash::{AttentionOptions, Backend, DType, Gradients, Kernel, Session, SimulatorOptions, Tensor};
use ferroflash_tests::grid::{Case, DTYPES, HEAD_DIMS, LENGTHS, batches, cases, of_kernel};
use ferroflash_tests::inputs::{normal, tensor};

const BACKENDS: [Backend; 2] = [Backend::Cpu, Backend::Simulator];

fn session(backend: Backend) -> Session {
    Session::new(backend).expect("runs everywhere")
}

/// A session on the GPU; `None`, said aloud, where there is none.
fn gpu(test: &str) -> Option<Session> {
    Session::new(Backend::Cuda).inspect_err(|reason| println!("skipped: {test}: {reason}")).ok()
}

fn tensors(gradients: &Gradients) -> [&Tensor; 3] {
    [&gradients.dq, &gradients.dk, &gradients.dv]
}

/// The gradients of a case that are the same bits in every run.
fn deterministic(case: &Case, session: &Session) -> Gradients {
    let ([q, k, v], options) = (case.inputs(), case.options().deterministic(true));
    let forward = session.attention(&q, &k, &v, &options).expect("valid");
    session.attention_backward(&q, &k, &v, &forward.out, &forward.softmax_lse, &case.dout(), &options).expect("valid")
}

fn assert_same_bits(a: &Gradients, b: &Gradients) {
    for (a, b) in tensors(a).into_iter().zip(tensors(b)) {
        assert_eq!(a.bytes(), b.bytes());
    }
}

#[test]
fn on_the_simulator() {
    let session = session(Backend::Simulator);
    cases().chain(batches()).for_each(|case| case.check_backward(&session));
}

/// On GPUs with as much shared memory a block as an H100, an A100, and the smallest: other kernels each.
#[test]
fn wide_heads_in_the_shared_memory_of_every_gpu() {
    for kibibytes in [227, 163, 99] {
        let session = session(Backend::Simulator).shared_memory(kibibytes << 10);
        for causal in [false, true] {
            Case::single(DType::BF16, (65, 100), 256, causal).check_backward(&session);
        }
    }
}

#[test]
fn on_the_cpu() {
    let session = session(Backend::Cpu);
    for dtype in DTYPES {
        for headdim in HEAD_DIMS.into_iter().chain([40, 256]) {
            for causal in [false, true] {
                for lengths in LENGTHS {
                    Case::single(dtype, lengths, headdim, causal).check_backward(&session);
                }
            }
        }
    }
    batches().for_each(|case| case.check_backward(&session));
}

#[test]
fn on_the_gpu() {
    let Some(session) = gpu("on_the_gpu") else { return };
    for kernel in session.kernels().into_iter().filter(|kernel| kernel.has_backward()) {
        let session = session.clone().kernel(kernel);
        of_kernel(cases().chain(batches()), kernel).for_each(|case| case.check_backward(&session));
        for headdim in HEAD_DIMS {
            for causal in [false, true] {
                Case { nheads: 2, ..Case::single(DType::BF16, (2048, 2500), headdim, causal) }.check_backward(&session);
            }
        }
    }
}

#[test]
fn reruns_on_the_gpu_are_bitwise_equal() {
    let Some(session) = gpu("reruns_on_the_gpu_are_bitwise_equal") else { return };
    let check = |case: Case, times| {
        let first = deterministic(&case, &session);
        (0..times).for_each(|_| assert_same_bits(&first, &deterministic(&case, &session)));
    };
    for causal in [false, true] {
        for headdim in HEAD_DIMS {
            let lengths = (513, 700);
            let case = Case { batch: 2, nheads: 4, nheads_k: 2, ..Case::single(DType::BF16, lengths, headdim, causal) };
            check(case, 20);
        }
        // More blocks of threads than multiprocessors.
        for headdim in [64, 128] {
            for (batch, lengths, nheads, nheads_k) in [(6, (1000, 1200), 6, 3), (1, (2100, 2500), 8, 8)] {
                let case = Case::single(DType::BF16, lengths, headdim, causal);
                check(Case { batch, nheads, nheads_k, ..case }, 8);
            }
        }
    }
}

/// The order in which threads run must not matter.
#[test]
fn any_order_of_threads_gives_the_same_bits() {
    for case in batches().step_by(2) {
        let run = |seed| {
            let mut options = SimulatorOptions::default();
            options.seed = seed;
            deterministic(&case, &session(Backend::Simulator).simulator_options(options))
        };
        let natural = run(0);
        for seed in [1, 2] {
            assert_same_bits(&natural, &run(seed));
        }
    }
}

/// dK and dV of a head that several heads of Q read are the sums over what each would give a head of its own.
#[test]
fn grouped_heads_sum_over_repeated_ones() {
    let (seqlen, nheads, nheads_k, headdim) = (70, 4, 2, 32);
    let of_queries = |seed| normal(DType::F16, &[1, seqlen, nheads, headdim], 1.0, seed);
    let of_keys = |seed| normal(DType::F16, &[1, seqlen, nheads_k, headdim], 1.0, seed);
    let (q, dout, k, v) = (of_queries(1), of_queries(2), of_keys(3), of_keys(4));
    let repeated = |x: &Tensor| {
        let heads = x.to_f32().chunks(headdim).flat_map(|head| head.repeat(nheads / nheads_k)).collect();
        tensor(DType::F16, heads, &[1, seqlen, nheads, headdim])
    };
    let options = AttentionOptions::new().causal(true).deterministic(true);
    for backend in BACKENDS {
        let session = session(backend);
        let gradients = |k: &Tensor, v: &Tensor| {
            let forward = session.attention(&q, k, v, &options).expect("valid");
            session.attention_backward(&q, k, v, &forward.out, &forward.softmax_lse, &dout, &options).expect("valid")
        };
        let (grouped, apart) = (gradients(&k, &v), gradients(&repeated(&k), &repeated(&v)));
        assert_eq!(grouped.dq.bytes(), apart.dq.bytes(), "{backend}: the same products for each head of Q");
        for (grouped, apart) in [(&grouped.dk, &apart.dk), (&grouped.dv, &apart.dv)] {
            let apart = apart.to_f32();
            let group = headdim * nheads / nheads_k;
            for (i, found) in grouped.to_f32().into_iter().enumerate() {
                let (head, column) = (i / headdim, i % headdim);
                let parts = apart[head * group..][..group].iter().skip(column).step_by(headdim);
                let (sum, scale) = parts.fold((0.0, 1.0), |(sum, scale): (f32, f32), x| (sum + x, scale + x.abs()));
                // Each part was rounded to f16.
                assert!((found - sum).abs() <= scale * 2f32.powi(-10), "{backend}: {found} {sum}");
            }
        }
    }
}

#[test]
fn the_extra_memory_is_a_number_for_each_row_or_dq_too() {
    for seqlen in [64, 128, 512] {
        let case = Case { nheads: 2, ..Case::single(DType::F16, (seqlen, seqlen), 64, true) };
        let report = case.gradients(&session(Backend::Simulator)).report;
        assert_eq!(report.extra_bytes, 2 * seqlen as u64 * (64 + 2) * 4);
        assert!(report.reason.contains("atomic additions"), "{}", report.reason);
        let report = deterministic(&case, &session(Backend::Simulator)).report;
        assert_eq!(report.extra_bytes, 2 * seqlen as u64 * 4);
        // 2.5 times those of the forward pass, half of it under the mask.
        assert_eq!(report.flops, 10 * 2 * (seqlen * seqlen * 64) as u64 / 2);
        assert_eq!(report.launches.len(), 3);
    }
}

#[test]
fn no_tokens_are_no_error() {
    for backend in BACKENDS {
        for (seqlen_q, seqlen_k) in [(0, 3), (3, 0), (0, 0)] {
            let gradients = Case::single(DType::F16, (seqlen_q, seqlen_k), 32, true).gradients(&session(backend));
            assert_eq!((gradients.dq.shape()[1], gradients.dk.shape()[1]), (seqlen_q, seqlen_k));
            for gradient in tensors(&gradients) {
                assert!(gradient.to_f32().iter().all(|&x| x == 0.0), "{backend}");
            }
            assert!(seqlen_q + seqlen_k > 0 || gradients.report.launches.is_empty());
        }
    }
}

/// The first rows see no key under a causal mask.
#[test]
fn rows_without_keys_have_no_gradient() {
    for backend in BACKENDS {
        let gradients = Case::single(DType::BF16, (70, 30), 32, true).gradients(&session(backend));
        let dq = gradients.dq.to_f32();
        assert!(dq[..40 * 32].iter().all(|&x| x == 0.0), "{backend}");
        // Row 40 sees one key, whose P is 1 whatever Q is; row 41 sees two.
        assert!(dq[41 * 32..].iter().all(|&x| x != 0.0), "{backend}");
    }
}

#[test]
fn each_bad_argument_is_named() {
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).expect("small");
    let (q, k) = (zeros(DType::F16, &[2, 4, 4, 32]), zeros(DType::F16, &[2, 6, 2, 32]));
    let lse = zeros(DType::F32, &[2, 4, 4]);
    let refused = |out: &Tensor, lse: &Tensor, dout: &Tensor| {
        let errors = BACKENDS.map(|backend| {
            let result = session(backend).attention_backward(&q, &k, &k, out, lse, dout, &AttentionOptions::new());
            result.expect_err("bad").to_string()
        });
        assert_eq!(errors[0], errors[1]);
        errors[0].clone()
    };
    assert_eq!(refused(&k, &lse, &q), "out: seqlen is 6; allowed: 4, as of q");
    assert_eq!(refused(&q, &lse, &q.convert(DType::BF16)), "dout: dtype bf16; allowed: f16, as of q");
    assert_eq!(
        refused(&q, &lse, &lse.convert(DType::F16)),
        "dout: 3 dimensions; allowed: 4: (batch, seqlen, nheads, headdim)"
    );
    assert_eq!(refused(&q, &lse.convert(DType::F16), &q), "softmax_lse: dtype f16; allowed: f32, as of an LSE");
    assert_eq!(
        refused(&q, &q.convert(DType::F32), &q),
        "softmax_lse: 4 dimensions; allowed: 3: (batch, nheads, seqlen_q)"
    );
    let short = zeros(DType::F32, &[2, 4, 3]);
    assert_eq!(refused(&q, &short, &q), "softmax_lse: seqlen is 3; allowed: 4, as of q");

    let backward = |session: Session, x: &Tensor, lse: &Tensor| {
        session.attention_backward(x, x, x, x, lse, x, &AttentionOptions::new()).expect_err("unsupported").to_string()
    };
    let wide = zeros(DType::F16, &[2, 4, 4, 264]);
    assert!(backward(session(Backend::Simulator), &wide, &lse).contains("headdim 264; allowed: up to 256"));
    let flash1 = session(Backend::Simulator).kernel(Kernel::Flash1);
    assert!(backward(flash1, &q, &lse).contains("flash1 has no backward pass; allowed: auto, flash2, flash3"));
}
