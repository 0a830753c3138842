//! What must come out the same: sequences in a batch or one after the other, in any order, with K and V shared or repeated, in
//! any place in memory, and in every run.
use ferroflash::{
    Attention, AttentionOptions, Backend, BackwardInputs, DType, Gradients, Inputs, Kernel, Session, SimulatorOptions,
    Tensor, TensorRef,
};
use ferroflash_tests::combination::Combination;
use ferroflash_tests::everywhere::has_gpu;
use ferroflash_tests::inputs::normal;
use ferroflash_tests::placed::{Placed, Placement};
use ferroflash_tests::{beside, everywhere, reruns};
use rayon::prelude::*;

const SEQLEN: usize = 83;
const HEADDIM: usize = 64;
/// Those of reruns: of each a family has other kernels.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];

everywhere!(
    sequences_one_after_the_other_are_a_batch,
    no_sequence_depends_on_the_others,
    shared_heads_are_repeated_heads,
    it_does_not_matter_where_tensors_lie,
);

fn sessions(backends: &[Backend]) -> impl Iterator<Item = Session> {
    backends.iter().map(|&backend| Session::new(backend).expect("it is there"))
}

/// Gradients in one order of additions.
fn options() -> AttentionOptions {
    AttentionOptions::new().causal(true).deterministic(true)
}

fn run(session: &Session, inputs: &Inputs<TensorRef>, dout: &TensorRef, options: &AttentionOptions) -> Results {
    let forward = session.attention_with(inputs, options).expect("valid");
    let backward = BackwardInputs::new(inputs.clone(), &forward.out, &forward.softmax_lse, dout);
    let gradients = session.attention_backward_with(&backward, options).expect("valid");
    Results { forward, gradients }
}

struct Results {
    forward: Attention,
    gradients: Gradients,
}

impl Results {
    /// O, dQ, dK and dV.
    fn tensors(&self) -> [&Tensor; 4] {
        [&self.forward.out, &self.gradients.dq, &self.gradients.dk, &self.gradients.dv]
    }

    fn bytes(&self) -> [&[u8]; 4] {
        self.tensors().map(Tensor::bytes)
    }
}

/// The tensor of the same elements with another shape.
fn reshaped(tensor: &Tensor, shape: &[usize]) -> Tensor {
    Tensor::from_bytes(tensor.dtype(), tensor.bytes(), shape).expect("as many elements")
}

/// The tensor whose batches are those that `order` names.
fn batches(tensor: &Tensor, order: &[usize]) -> Tensor {
    let bytes = tensor.bytes().len() / tensor.shape()[0];
    let picked: Vec<u8> = order.iter().flat_map(|&b| tensor.bytes()[b * bytes..(b + 1) * bytes].to_vec()).collect();
    let shape = [&[order.len()], &tensor.shape()[1..]].concat();
    Tensor::from_bytes(tensor.dtype(), &picked, &shape).expect("as many elements")
}

fn inputs_of(q: &Tensor, k: &Tensor, v: &Tensor) -> Inputs<TensorRef<'static>> {
    // Tests end with the process: what they borrow may live as long.
    let keep = |tensor: &Tensor| Box::leak(Box::new(tensor.clone())).view();
    Inputs::new(keep(q), keep(k), keep(v))
}

fn tensors(dtype: DType, batch: usize, nheads: usize, nheads_k: usize) -> [Tensor; 4] {
    let of = |nheads, seed| normal(dtype, &[batch, SEQLEN, nheads, HEADDIM], 1.0, seed);
    [of(nheads, 1), of(nheads_k, 2), of(nheads_k, 3), of(nheads, 4)]
}

fn sequences_one_after_the_other_are_a_batch(backends: &[Backend]) {
    for session in sessions(backends) {
        let [q, k, v, dout] = tensors(DType::F16, 3, 2, 1);
        let batch = run(&session, &inputs_of(&q, &k, &v), &dout.view(), &options());
        let flat = |tensor: &Tensor| reshaped(tensor, &[3 * SEQLEN, tensor.shape()[2], HEADDIM]);
        let starts = Tensor::from_vec((0..4).map(|i| i * SEQLEN as i32).collect(), &[4]).expect("four");
        let [q, k, v, dout] = [&q, &k, &v, &dout].map(flat);
        let inputs = Inputs::new(&q, &k, &v).cu_seqlens(&starts, &starts);
        let varlen = run(&session, &inputs, &dout.view(), &options());
        assert_eq!(batch.bytes(), varlen.bytes(), "{}", session.backend());
    }
}

fn no_sequence_depends_on_the_others(backends: &[Backend]) {
    for session in sessions(backends) {
        let [q, k, v, dout] = tensors(DType::BF16, 3, 2, 2);
        let all = run(&session, &inputs_of(&q, &k, &v), &dout.view(), &options());
        for order in [&[2, 0, 1][..], &[1]] {
            let picked = |tensor: &Tensor| batches(tensor, order);
            let [q, k, v, dout] = [&q, &k, &v, &dout].map(picked);
            let some = run(&session, &inputs_of(&q, &k, &v), &dout.view(), &options());
            for (all, some) in all.tensors().into_iter().zip(some.tensors()) {
                assert_eq!(picked(all).bytes(), some.bytes(), "{}, {order:?}", session.backend());
            }
        }
    }
}

fn shared_heads_are_repeated_heads(backends: &[Backend]) {
    for session in sessions(backends) {
        let [q, k, v, dout] = tensors(DType::F16, 2, 4, 2);
        let shared = run(&session, &inputs_of(&q, &k, &v), &dout.view(), &options());
        // Each head of K and V twice, side by side.
        let repeated = |tensor: &Tensor| {
            let row = HEADDIM * 2;
            let bytes: Vec<u8> = tensor.bytes().chunks(row).flat_map(|head| [head, head].concat()).collect();
            Tensor::from_bytes(tensor.dtype(), &bytes, &[2, SEQLEN, 4, HEADDIM]).expect("twice as many")
        };
        let apart = run(&session, &inputs_of(&q, &repeated(&k), &repeated(&v)), &dout.view(), &options());
        assert_eq!(shared.forward.out.bytes(), apart.forward.out.bytes(), "{}", session.backend());
        assert_eq!(shared.gradients.dq.bytes(), apart.gradients.dq.bytes(), "{}", session.backend());
        // The gradients of both copies add up to that of the one head, but for the rounding of each.
        for (shared, apart) in
            [(&shared.gradients.dk, &apart.gradients.dk), (&shared.gradients.dv, &apart.gradients.dv)]
        {
            let apart = apart.to_f32();
            let pairs = apart.chunks(2 * HEADDIM).flat_map(|pair| (0..HEADDIM).map(|i| pair[i] + pair[HEADDIM + i]));
            for (shared, apart) in shared.to_f32().into_iter().zip(pairs) {
                assert!(
                    (shared - apart).abs() <= 4e-3 * (1.0 + apart.abs()),
                    "{}: {shared}, {apart}",
                    session.backend()
                );
            }
        }
    }
}

fn it_does_not_matter_where_tensors_lie(backends: &[Backend]) {
    for session in sessions(backends) {
        let all @ [q, k, v, dout] = &tensors(DType::BF16, 2, 2, 2);
        let packed = run(&session, &inputs_of(q, k, v), &dout.view(), &options());
        for placement in [Placement::HeadsFirst, Placement::Gaps, Placement::Unaligned] {
            let [q, k, v, dout] = all.each_ref().map(|tensor| Placed::new(tensor, placement));
            let placed = run(&session, &Inputs::new(q.view(), k.view(), v.view()), &dout.view(), &options());
            // Rows that begin anywhere are another kernel's, whose blocks may be other ones.
            if placement != Placement::Unaligned {
                assert_eq!(packed.bytes(), placed.bytes(), "{}, {placement:?}", session.backend());
            }
            for (packed, placed) in packed.tensors().into_iter().zip(placed.tensors()) {
                for (packed, placed) in packed.to_f32().into_iter().zip(placed.to_f32()) {
                    let difference = (packed - placed).abs();
                    assert!(difference <= 2e-2 * (1.0 + packed.abs()), "{}, {placement:?}", session.backend());
                }
            }
        }
    }
}

/// The order in which threads run must not matter, and does where a race is.
#[test]
fn any_order_of_threads_gives_the_same_bits() {
    let [q, k, v, dout] = tensors(DType::F16, 1, 2, 1);
    let run = |seed| run(&simulator(seed), &inputs_of(&q, &k, &v), &dout.view(), &options());
    let first = run(0);
    for seed in [1, 2, 3] {
        assert_eq!(first.bytes(), run(seed).bytes());
    }
}

/// Of each family that has gradients, as many as the GPU runs; the problems beside each other, so that blocks of threads of
/// several share the multiprocessors and meet in other orders.
#[test]
fn a_thousand_runs_on_the_gpu_give_the_same_bits() {
    if !has_gpu("a_thousand_runs_on_the_gpu_give_the_same_bits") {
        return;
    }
    let session = Session::new(Backend::Cuda).expect("it is there");
    for kernel in session.kernels().into_iter().filter(|kernel| kernel.has_backward()) {
        let problems: Vec<_> = HEAD_DIMS.into_iter().flat_map(|d| reruns::problems(kernel, 4, (300, 300), d)).collect();
        rerun(&problems, kernel, 1000, |_| session.clone());
    }
}

/// A few runs, each with another order of threads.
#[test]
fn runs_of_each_family_on_the_simulator_give_the_same_bits() {
    for kernel in [Kernel::Flash2, Kernel::Flash3] {
        for headdim in HEAD_DIMS {
            rerun(&reruns::problems(kernel, 1, (70, 90), headdim), kernel, 2, simulator);
        }
    }
}

/// Gradients of a sequence alone and beside others, of both ways in which flash2 has them: with the same bits in every run.
#[test]
fn gradients_of_flash2_do_not_depend_on_other_sequences() {
    let session = |seed| simulator(seed).kernel(Kernel::Flash2);
    for (headdim, causal) in [(64, true), (128, false)] {
        let others: [&[_]; 3] = [&[], &[(70, 0)], &[(0, 9), (150, 180), (30, 20)]];
        beside::check(session, (headdim, causal), (90, 100), &others, "flash2_bwd_dq_")
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

fn rerun(problems: &[Combination], kernel: Kernel, times: u64, session: impl Fn(u64) -> Session + Sync) {
    let check = |problem: &Combination| problem.check_reruns(|run| session(run).kernel(kernel), times, kernel.name());
    let failures: Vec<_> = problems.par_iter().filter_map(|problem| check(problem).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// One whose threads run in the order that this number draws.
fn simulator(seed: u64) -> Session {
    let mut order = SimulatorOptions::default();
    order.seed = seed;
    Session::new(Backend::Simulator).expect("runs everywhere").simulator_options(order)
}
