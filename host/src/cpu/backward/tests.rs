//! The backward pass against the reference.
use super::*;
use crate::options::AttentionOptions;
use crate::session::Session;
use crate::{Backend, DType, Tensor, accuracy};
use proptest::prelude::*;

/// Numbers that look random, between -3 and 3.
fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let data = (0..shape.iter().product()).map(|_| next() + next() + next()).collect::<Vec<_>>();
    Tensor::from_vec(data, shape).expect("as many as the shape says").convert(dtype)
}

fn check([q, k, v, dout]: &[Tensor; 4], options: &AttentionOptions) {
    let session = Session::new(Backend::Cpu).expect("always there");
    let forward = session.attention(q, k, v, options).expect("valid");
    let gradients =
        session.attention_backward(q, k, v, &forward.out, &forward.softmax_lse, dout, options).expect("valid");
    let accuracy = accuracy::check_backward(q, k, v, dout, options, &gradients).expect("of these inputs");
    assert!(accuracy.passed(), "{}, {}: {accuracy}", gradients.report.shape, q.dtype().name());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    // The bound of 16 bits is twice the error of another computation, which may by luck be small for one row of one column.
    #[test]
    fn any_shape_keeps_the_rule_in_f32(
        (batch, groups, nheads_k) in (1..3usize, 1..4usize, 1..3usize),
        (seqlen_q, seqlen_k) in (0..150usize, 0..150usize),
        headdim in 1..80usize,
        causal: bool,
        seed: u64,
    ) {
        let of_queries = |seed| tensor(DType::F32, &[batch, seqlen_q, groups * nheads_k, headdim], seed);
        let of_keys = |seed| tensor(DType::F32, &[batch, seqlen_k, nheads_k, headdim], seed);
        let inputs = [of_queries(seed), of_keys(seed ^ 1), of_keys(seed ^ 2), of_queries(seed ^ 3)];
        check(&inputs, &AttentionOptions::new().causal(causal));
    }

    #[test]
    fn nan_goes_where_the_definition_sends_it(
        positions in prop::collection::vec((0..4usize, 0..70usize, 0..8usize), 1..4),
        causal: bool,
        seed: u64,
    ) {
        let mut inputs = [0, 1, 2, 3].map(|i| tensor(DType::F32, &[1, 70, 1, 8], seed ^ i));
        for (which, row, column) in positions {
            inputs[which].as_mut_slice::<f32>().expect("f32")[row * 8 + column] = f32::NAN;
        }
        check(&inputs, &AttentionOptions::new().causal(causal));
    }
}

#[test]
fn every_instruction_set_gives_the_same() {
    let inputs = [1, 2, 3, 4].map(|seed| tensor(DType::F32, &[1, 100, 2, 40], seed));
    let options = AttentionOptions::new().causal(true);
    let [q, k, v, dout] = &inputs;
    let forward = Session::new(Backend::Cpu).and_then(|cpu| cpu.attention(q, k, v, &options)).expect("valid");
    let layout = q.view().layout().clone();
    let problem = Problem::new(&layout, &layout, &layout, &options).expect("valid");
    let heads = |tensor| Heads::new(Tensor::as_slice::<f32>(tensor).expect("f32"), &layout);
    let softmax_lse = forward.softmax_lse.as_slice().expect("f32");
    let inputs = BackwardInputs {
        q: heads(q),
        k: heads(k),
        v: heads(v),
        out: heads(&forward.out),
        dout: heads(dout),
        softmax_lse,
    };
    let gradients = |isa| {
        let mut gradients = [0, 1, 2].map(|_| vec![f32::NAN; q.len()]);
        let [dq, dk, dv] = gradients.each_mut().map(|gradient| HeadsMut::new(gradient, &layout));
        run(isa, &problem, inputs, &GradientHeads { dq, dk, dv });
        gradients.concat()
    };
    let portable = gradients(Isa::Portable);
    for isa in Isa::all() {
        for (a, b) in gradients(isa).into_iter().zip(&portable) {
            assert!((a - b).abs() < 1e-5, "{isa:?}: {a} {b}");
        }
    }
}
