//! What must come out the same: sequences in a batch or one after the other, in any order, with K and V shared or repeated, in
//! any place in memory, and in every run.
use ferroflash::{
    Attention, AttentionOptions, Backend, BackwardInputs, DType, Gradients, Inputs, Kernel, Session, SimulatorOptions,
    Tensor, TensorRef,
};
use ferroflash_tests::inputs::normal;
use ferroflash_tests::placed::{Placed, Placement};

const SEQLEN: usize = 83;
const HEADDIM: usize = 64;

/// The backends that are here. Without a GPU this is said, and counts as skipped.
fn sessions(test: &str) -> Vec<Session> {
    let mut sessions: Vec<_> =
        [Backend::Cpu, Backend::Simulator].map(|backend| Session::new(backend).expect("runs everywhere")).into();
    match Session::new(Backend::Cuda) {
        Ok(gpu) => sessions.push(gpu),
        Err(reason) => println!("skipped: {test} on the GPU: {reason}"),
    }
    sessions
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

#[test]
fn sequences_one_after_the_other_are_a_batch() {
    for session in sessions("sequences_one_after_the_other_are_a_batch") {
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

#[test]
fn no_sequence_depends_on_the_others() {
    for session in sessions("no_sequence_depends_on_the_others") {
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

#[test]
fn shared_heads_are_repeated_heads() {
    for session in sessions("shared_heads_are_repeated_heads") {
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
        for (shared, apart) in [(&shared.gradients.dk, &apart.gradients.dk), (&shared.gradients.dv, &apart.gradients.dv)] {
            let apart = apart.to_f32();
            let pairs = apart.chunks(2 * HEADDIM).flat_map(|pair| (0..HEADDIM).map(|i| pair[i] + pair[HEADDIM + i]));
            for (shared, apart) in shared.to_f32().into_iter().zip(pairs) {
                assert!((shared - apart).abs() <= 4e-3 * (1.0 + apart.abs()), "{}: {shared}, {apart}", session.backend());
            }
        }
    }
}

#[test]
fn it_does_not_matter_where_tensors_lie() {
    for session in sessions("it_does_not_matter_where_tensors_lie") {
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
    let run = |seed| {
        let mut order = SimulatorOptions::default();
        order.seed = seed;
        let session = Session::new(Backend::Simulator).expect("runs everywhere").simulator_options(order);
        run(&session, &inputs_of(&q, &k, &v), &dout.view(), &options())
    };
    let first = run(0);
    for seed in [1, 2, 3] {
        assert_eq!(first.bytes(), run(seed).bytes());
    }
}

#[test]
fn a_thousand_runs_on_the_gpu_give_the_same_bits() {
    let session = match Session::new(Backend::Cuda) {
        Ok(session) => session.kernel(Kernel::Auto),
        Err(reason) => return println!("skipped: a_thousand_runs_on_the_gpu_give_the_same_bits: {reason}"),
    };
    let of = |nheads, seed| normal(DType::BF16, &[4, 300, nheads, HEADDIM], 1.0, seed);
    let [q, k, v, dout] = [of(8, 1), of(2, 2), of(2, 3), of(8, 4)];
    let inputs = inputs_of(&q, &k, &v);
    let first = run(&session, &inputs, &dout.view(), &options());
    for _ in 0..1000 {
        assert_eq!(first.bytes(), run(&session, &inputs, &dout.view(), &options()).bytes());
    }
}
