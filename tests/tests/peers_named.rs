//! Cases that FlashAttention's own tests name, besides those of its grid: on a GPU, where the test else says `skipped:`, and at a
//! small size on the CPU and on the simulated GPU.
use ferroflash::{AttentionOptions, Backend, BackwardInputs, DType, Inputs, Kernel, Session, Tensor, accuracy};
use ferroflash_tests::everywhere;
use ferroflash_tests::inputs::normal;
use ferroflash_tests::passes::Shapes;
use ferroflash_tests::peers::{self, Cell};
use ferroflash_tests::pointers::Machine;
use ferroflash_tests::race;
use rayon::prelude::*;

everywhere!(sequences_of_one_key_and_many_queries);

/// `test_flash_attn_bwd_varlen_overflow`: more queries than keys, and inputs of three times the size.
fn sequences_of_one_key_and_many_queries(backends: &[Backend]) {
    let starts = |starts: [i32; 4]| Tensor::from_vec(starts.to_vec(), &[4]).expect("four");
    let (cu_q, cu_k) = (starts([0, 76, 110, 256]), starts([0, 1, 2, 3]));
    for &backend in backends {
        let any = Session::new(backend).expect("it is there");
        let kernels = if backend == Backend::Cpu { vec![Kernel::Auto] } else { any.kernels() };
        for kernel in kernels.into_iter().filter(|kernel| kernel.has_backward()) {
            let session = any.clone().kernel(kernel);
            for (dtype, headdim) in [(DType::F16, 64), (DType::BF16, 64), (DType::F16, 128), (DType::BF16, 128)] {
                let of = |tokens, deviation, seed| normal(dtype, &[tokens, 5, headdim], deviation, seed);
                let [q, k, v, dout] = [of(256, 3.0, 1), of(3, 3.0, 2), of(3, 3.0, 3), of(256, 1.0, 4)];
                for (causal, deterministic) in [(false, false), (false, true), (true, false), (true, true)] {
                    let case = format!("{backend}, {kernel}, {dtype:?}, {headdim}, {causal}, {deterministic}");
                    let options = AttentionOptions::new().causal(causal).deterministic(deterministic);
                    let inputs = Inputs::new(&q, &k, &v).cu_seqlens(&cu_q, &cu_k);
                    let forward = session.attention_with(&inputs, &options).expect(&case);
                    let kept = accuracy::check_with(&inputs, &options, &forward).expect(&case);
                    assert!(kept.passed(), "{case}: {kept}");
                    let inputs = BackwardInputs::new(inputs, &forward.out, &forward.softmax_lse, &dout);
                    let gradients = session.attention_backward_with(&inputs, &options).expect(&case);
                    for tensor in [&forward.out, &gradients.dq, &gradients.dk, &gradients.dv] {
                        assert!(tensor.to_f32().iter().all(|x| x.is_finite()), "{case}");
                    }
                    let kept = accuracy::check_backward_with(&inputs.forward, &inputs.dout, None, &options, &gradients)
                        .expect(&case);
                    assert!(kept.passed(), "{case}: {kept}");
                }
            }
        }
    }
}

fn check(session: &Session, cells: &[Cell]) {
    let failures: Vec<_> = cells.par_iter().filter_map(|cell| cell.check(session).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Each `step`-th cell of the lengths that are short.
fn sample(step: usize) -> Vec<Cell> {
    peers::named().into_iter().filter(Cell::is_short).step_by(step).collect()
}

#[test]
fn named_lengths_on_the_cpu() {
    check(&Session::new(Backend::Cpu).expect("runs everywhere"), &sample(1));
}

#[test]
fn named_lengths_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    check(&session, &sample(11));
    let plain: Vec<_> = sample(1).into_iter().filter(Cell::is_plain).step_by(5).collect();
    check(&session.kernel(Kernel::Flash3), &plain);
}

#[test]
fn named_lengths_on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session,
        Err(reason) => return println!("skipped: named_lengths_on_the_gpu: {reason}"),
    };
    check(&session, &peers::named());
    check(&session.kernel(Kernel::Flash2), &peers::named());
}

/// The families that have gradients, each with these problems.
fn races(machine: Machine, batch: usize, problems: &[((usize, usize), usize, bool)], times: usize) {
    let kernels = machine.session(Kernel::Auto).kernels();
    for kernel in kernels.into_iter().filter(|kernel| kernel.has_backward()) {
        for (i, &(lengths, headdim, causal)) in problems.iter().enumerate() {
            let dtype = [DType::BF16, DType::F16][i % 2];
            let shapes = Shapes { dtype, batch, lengths, nheads: 4, headdim };
            race::check(machine, kernel, shapes, causal, times).unwrap_or_else(|reason| panic!("{reason}"));
        }
    }
}

/// Their batch, runs and lengths.
#[test]
fn races_on_the_gpu() {
    let machine = match Machine::gpu() {
        Ok(machine) => machine,
        Err(reason) => return println!("skipped: races_on_the_gpu: {reason}"),
    };
    let problems = [
        ((1, 239), 64, true),
        ((3, 799), 128, false),
        ((127, 512), 64, false),
        ((127, 513), 96, true),
        ((113, 203), 128, true),
        ((128, 217), 256, false),
        ((256, 512), 128, false),
        ((1023, 1024), 64, true),
    ];
    races(machine, 60, &problems, 250);
}

#[test]
fn a_race_on_the_simulator() {
    races(Machine::Simulator, 2, &[((70, 203), 64, true), ((40, 150), 128, false)], 2);
}
