//! More heads than a dimension of a grid but the first may count, and tensors of which 32 bits do not count the elements: on a
//! GPU, where the tests else say `skipped:`; and the same code at a small size on the CPU and on the simulated GPU.
use ferroflash::{AttentionOptions, Backend, BackwardInputs, DType, Inputs, Kernel, Session, Tensor};
use ferroflash_tests::combination::Combination;
use ferroflash_tests::far::Spread;
use ferroflash_tests::features::plain;
use ferroflash_tests::inputs::normal;
use ferroflash_tests::pointers::Machine;
use ferroflash_tests::reruns::results;
use ferroflash_tests::vast::Vast;

/// Tokens of each of many sequences.
const SEQLEN: usize = 2;
const HEADDIM: usize = 64;

/// Sequences and heads, together more than 65535, and how many sequences a call has that they are compared with.
const MANY: [(usize, usize, usize); 3] = [(70_000, 1, 10_000), (2, 35_000, 1), (300, 300, 100)];

/// The bytes from one head, token or sequence to the next with which the last of `extent` begins 2^32 elements of 16 bits after
/// the first.
const fn far(extent: usize) -> usize {
    (1usize << 33).div_ceil(extent - 1).next_multiple_of(1 << 20) + (1 << 20)
}

/// Compares many sequences with the same in several calls, bit by bit: of two tokens no sum has an order.
fn check_many(session: &Session, has_backward: bool, (batch, nheads, at_a_time): (usize, usize, usize)) {
    let tensors = [1, 2, 3, 4].map(|seed| normal(DType::F16, &[batch, SEQLEN, nheads, HEADDIM], 1.0, seed));
    for deterministic in [true, false] {
        let options = AttentionOptions::new().causal(true).deterministic(deterministic);
        let run = |[q, k, v, dout]: &[Tensor; 4], starts: Option<&Tensor>| {
            let mut inputs = Inputs::new(q, k, v);
            if let Some(starts) = starts {
                inputs = inputs.cu_seqlens(starts, starts);
            }
            let forward = session.attention_with(&inputs, &options).expect("valid");
            let backward = BackwardInputs::new(inputs, &forward.out, &forward.softmax_lse, dout);
            let gradients = has_backward.then(|| session.attention_backward_with(&backward, &options).expect("valid"));
            match &gradients {
                Some(gradients) => results(&forward, gradients).into_iter().map(|(_, x)| x.clone()).collect(),
                None => vec![forward.out, forward.softmax_lse],
            }
        };
        let all = run(&tensors, None);
        for first in (0..batch).step_by(at_a_time) {
            let some = tensors.each_ref().map(|tensor| sequences(tensor, first, at_a_time));
            for (i, (all, some)) in all.iter().zip(run(&some, None)).enumerate() {
                let all = sequences(all, first, at_a_time);
                assert!(all.bytes() == some.bytes(), "{batch}, {nheads}, {deterministic}: result {i} from {first} on");
            }
        }
        if !has_backward {
            // The elders know no sequences of different lengths.
            continue;
        }
        let starts: Vec<_> = (0..=batch).map(|i| (i * SEQLEN) as i32).collect();
        let starts = Tensor::from_vec(starts, &[batch + 1]).expect("one more");
        let flat = tensors.each_ref().map(|tensor| {
            Tensor::from_bytes(tensor.dtype(), tensor.bytes(), &[batch * SEQLEN, nheads, HEADDIM]).expect("as many")
        });
        for (i, (all, varlen)) in all.iter().zip(run(&flat, Some(&starts))).enumerate() {
            // Their LSE has heads before sequences.
            assert!(i == 1 || all.bytes() == varlen.bytes(), "{batch}, {nheads}, {deterministic}: result {i}, varlen");
        }
    }
}

/// Some of the sequences of a tensor.
fn sequences(tensor: &Tensor, first: usize, count: usize) -> Tensor {
    let bytes = tensor.bytes().len() / tensor.shape()[0];
    let shape = [&[count], &tensor.shape()[1..]].concat();
    Tensor::from_bytes(tensor.dtype(), &tensor.bytes()[first * bytes..][..count * bytes], &shape).expect("as many")
}

#[test]
fn many_heads_on_the_gpu() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session,
        Err(reason) => return println!("skipped: many_heads_on_the_gpu: {reason}"),
    };
    for kernel in session.kernels() {
        let session = session.clone().kernel(kernel);
        MANY.into_iter().for_each(|many| check_many(&session, kernel.has_backward(), many));
    }
}

#[test]
fn some_heads_on_the_cpu() {
    let session = Session::new(Backend::Cpu).expect("runs everywhere");
    [(7000, 1, 1000), (2, 3500, 1), (30, 30, 10)].into_iter().for_each(|many| check_many(&session, true, many));
}

#[test]
fn some_heads_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    for kernel in session.kernels() {
        let session = session.clone().kernel(kernel);
        [(6, 1, 2), (2, 5, 1)].into_iter().for_each(|many| check_many(&session, kernel.has_backward(), many));
    }
}

/// Problems for each kernel of a family that goes its own way through memory.
fn problems(kernel: Kernel, lengths: (usize, usize), headdims: &[usize]) -> Vec<Combination> {
    let mut problems = Vec::new();
    // Standard attention and flash1 are built for up to 128.
    let longest = if kernel.has_backward() { usize::MAX } else { 128 };
    for &headdim in headdims.iter().filter(|&&headdim| headdim <= longest) {
        for deterministic in [false, true] {
            let mut problem = plain(DType::BF16, lengths, (headdim, headdim));
            problem.options = problem.options.causal(true).deterministic(deterministic);
            problems.push(problem);
        }
    }
    if matches!(kernel, Kernel::Flash2 | Kernel::Flash3) {
        let mut general = plain(DType::F16, lengths, (64, 64));
        general.options = general.options.window_size(40, 30).softcap(5.0);
        (general.alibi, general.sinks) = (Some(true), true);
        let mut varlen = plain(DType::F16, lengths, (128, 128));
        varlen.varlen = true;
        problems.extend([general, varlen]);
    }
    if kernel == Kernel::Flash2 {
        let mut scores = plain(DType::F16, lengths, (64, 64));
        (scores.bias, scores.mask) = (Some([false; 3]), Some([false; 3]));
        scores.options = scores.options.dropout(0.17, 7, 3).deterministic(true);
        let exact = Combination { dtype: DType::F32, ..scores.clone() };
        problems.extend([scores, exact]);
    }
    problems
}

/// Three sequences with three heads each of Q and K, far from each other in each way.
fn check_far(machine: Machine, lengths: (usize, usize), headdims: &[usize], stride: impl Fn(usize) -> usize) {
    for kernel in machine.session(Kernel::Auto).kernels() {
        for problem in problems(kernel, lengths, headdims) {
            let problem = Combination { lengths: vec![lengths; 3], nheads_k: 3, group: 1, ..problem };
            let tokens = if problem.varlen { 3 * lengths.0 } else { lengths.0 };
            for (spread, extent) in [(Spread::Batches, 3), (Spread::Heads, 3), (Spread::Tokens, tokens)] {
                if spread == Spread::Batches && problem.varlen {
                    continue;
                }
                problem.check_spread(machine, kernel, (spread, stride(extent))).unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }
}

#[test]
fn far_elements_on_the_gpu() {
    match Machine::gpu() {
        Ok(machine) => check_far(machine, (129, 131), &[64, 128, 256], far),
        Err(reason) => println!("skipped: far_elements_on_the_gpu: {reason}"),
    }
}

#[test]
fn elements_apart_on_the_simulator() {
    check_far(Machine::Simulator, (35, 40), &[64], |_| 1 << 19);
}

/// Gradients of many queries, and of many keys.
fn check_vast(machine: Machine, (many, few): (usize, usize), nheads: usize, (headdim, period): (usize, usize)) {
    for kernel in [Kernel::Flash2, Kernel::Flash3] {
        if !machine.session(Kernel::Auto).kernels().contains(&kernel) {
            continue;
        }
        for lengths in [(many, few), (few, many)] {
            for deterministic in [false, true] {
                let vast = Vast { lengths, nheads, headdim, period, deterministic };
                vast.check(machine, kernel).unwrap_or_else(|reason| panic!("{reason}"));
            }
        }
    }
}

/// Of 2.3 · 10^9 elements each: 30 GB of the GPU's memory.
#[test]
fn vast_tensors_on_the_gpu() {
    match Machine::gpu() {
        Ok(machine) => check_vast(machine, ((1 << 20) + 77, 100), 17, (128, 10_000_019)),
        Err(reason) => println!("skipped: vast_tensors_on_the_gpu: {reason}"),
    }
}

#[test]
fn small_tensors_on_the_simulator() {
    check_vast(Machine::Simulator, (350, 50), 3, (64, 10_007));
}
