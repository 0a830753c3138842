//! The CPU backend against the reference.
use super::*;
use crate::accuracy;
use crate::error::Result;
use crate::options::AttentionOptions;
use crate::session::Session;
use crate::{Backend, DType, Tensor};
use proptest::prelude::*;

/// Numbers that look random, of about unit size.
fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let data = (0..shape.iter().product()).map(|_| next() + next() + next()).collect::<Vec<_>>();
    Tensor::from_vec(data, shape).expect("as many as the shape says").convert(dtype)
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<()> {
    let result = Session::new(Backend::Cpu)?.attention(q, k, v, options)?;
    let accuracy = accuracy::check(q, k, v, options, &result)?;
    assert!(accuracy.passed(), "{}: {accuracy}", result.report.shape);
    Ok(())
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_keeps_the_rule(
        dtype in dtypes(),
        (batch, groups, nheads_k) in (1..3usize, 1..4usize, 1..3usize),
        (seqlen_q, seqlen_k) in (0..150usize, 0..150usize),
        headdim in 1..80usize,
        causal: bool,
        seed: u64,
    ) {
        let q = tensor(dtype, &[batch, seqlen_q, groups * nheads_k, headdim], seed);
        let k = tensor(dtype, &[batch, seqlen_k, nheads_k, headdim], seed ^ 1);
        let v = tensor(dtype, &[batch, seqlen_k, nheads_k, headdim], seed ^ 2);
        check(&q, &k, &v, &AttentionOptions::new().causal(causal)).expect("valid");
    }

    #[test]
    fn nan_and_infinities_go_where_the_definition_sends_them(
        positions in prop::collection::vec((0..3usize, 0..70usize, 0..8usize), 1..6),
        values in prop::collection::vec(prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)], 6),
        causal: bool,
        seed: u64,
    ) {
        let mut tensors = [0, 1, 2].map(|i| tensor(DType::F32, &[1, 70, 1, 8], seed ^ i));
        for (&(which, row, column), &value) in positions.iter().zip(&values) {
            tensors[which].as_mut_slice::<f32>().expect("f32")[row * 8 + column] = value;
        }
        let [q, k, v] = &tensors;
        check(q, k, v, &AttentionOptions::new().causal(causal)).expect("valid");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut q = tensor(DType::F32, &[1, 65, 2, 64], 1);
        q.as_mut_slice::<f32>().expect("f32").iter_mut().for_each(|q| *q *= 50.0);
        let (k, v) = (tensor(dtype, &[1, 130, 1, 64], 2), tensor(dtype, &[1, 130, 1, 64], 3));
        check(&q.convert(dtype), &k, &v, &AttentionOptions::new().softmax_scale(0.01)).expect("valid");
    }
}

#[test]
fn every_instruction_set_gives_the_same() {
    let problem_of = |x: &Tensor| {
        let layout = x.view().layout().clone();
        Problem::new(&layout, &layout, &layout, &AttentionOptions::new().causal(true)).expect("valid")
    };
    let q = tensor(DType::F32, &[1, 100, 2, 40], 7);
    let problem = problem_of(&q);
    let view = q.view();
    let heads = Heads::<f32>::new(view.as_slice().expect("f32"), view.layout());
    let results: Vec<_> = Isa::all()
        .into_iter()
        .map(|isa| {
            let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; problem.rows()]);
            let inputs = Inputs { problem: &problem, q: heads, k: heads, v: heads };
            run(isa, &inputs, &HeadsMut::new(&mut out, view.layout()), &mut lse);
            (out, lse)
        })
        .collect();
    for (out, lse) in &results {
        for (a, b) in out.iter().chain(lse).zip(results[0].0.iter().chain(&results[0].1)) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}
