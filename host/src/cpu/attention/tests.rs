//! The CPU backend against the definition.
use super::*;
use crate::cpu::testing::naive::Naive;
use crate::cpu::testing::{Case, Tensors, assert_close, cases, features, put};
use crate::element::with_element;
use crate::error::Result;
use crate::options::AttentionOptions;
use crate::{DType, Tensor};
use proptest::prelude::*;

/// O and LSE.
fn compute(isa: Isa, tensors: &Tensors) -> (Vec<f32>, Vec<f32>) {
    fn of<T: Element>(isa: Isa, tensors: &Tensors) -> (Vec<f32>, Vec<f32>) {
        let problem = tensors.problem();
        let mut out = Tensor::zeros(T::STORED, &problem.out_shape()).expect("small");
        let mut lse = vec![f32::NAN; problem.rows()];
        let layout = out.view().layout().clone();
        let heads = HeadsMut::new(out.as_mut_slice::<T>().expect("of this type"), &layout);
        run(isa, &problem, &tensors.operands::<T>(), heads, &mut lse);
        (out.to_f32(), lse)
    }
    let computed = || -> Result<_> { Ok(with_element!("q", tensors.q.dtype(), T => of::<T>(isa, tensors))) };
    computed().expect("an element type")
}

fn check(case: &Case, tensors: &Tensors) {
    let (out, lse) = compute(Isa::detect(), tensors);
    let (expected_out, expected_lse) = Naive::new(case, tensors).forward();
    assert_close("LSE", DType::F32, &lse, &expected_lse);
    assert_close("O", case.dtype, &out, &expected_out);
}

#[test]
fn each_feature_keeps_the_definition() {
    for (name, case) in features() {
        println!("{name}");
        check(&case, &case.tensors());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn all_features_together_keep_the_definition(case in cases()) {
        check(&case, &case.tensors());
    }

    #[test]
    fn nan_and_infinities_go_where_the_definition_sends_them(
        positions in prop::collection::vec((0..3usize, any::<prop::sample::Index>()), 1..6),
        values in prop::collection::vec(prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)], 6),
        case in cases(),
    ) {
        // 0 times an infinity is NaN, and the order of two factors the question.
        let mut case = Case { dtype: DType::F32, ..case };
        case.options.softmax_scale = None;
        let mut tensors = case.tensors();
        for (&(which, index), &value) in positions.iter().zip(&values) {
            let tensor = match which {
                0 => &mut tensors.q,
                1 => &mut tensors.k,
                _ => &mut tensors.v,
            };
            put(tensor, index, value);
        }
        check(&case, &tensors);
    }

    #[test]
    fn a_bias_may_be_infinite(case in cases(), every in 1..4usize, nan: bool, spoiled: Option<(bool, prop::sample::Index)>) {
        let case = Case { dtype: DType::F32, bias: Some([true, false, false]), ..case };
        let mut tensors = case.tensors();
        let bias = tensors.bias.as_mut().and_then(Tensor::as_mut_slice::<f32>).expect("of f32");
        bias.iter_mut().step_by(every).for_each(|x| *x = f32::NEG_INFINITY);
        if let Some(x) = bias.iter_mut().last().filter(|_| nan) {
            *x = f32::NAN;
        }
        // At a key that is hidden, or not.
        if let Some((of_k, index)) = spoiled {
            put(if of_k { &mut tensors.k } else { &mut tensors.v }, index, f32::NAN);
        }
        check(&case, &tensors);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let case = Case { dtype, ..Case::plain(65, 130, AttentionOptions::new().softmax_scale(0.01)) };
        let mut tensors = case.tensors();
        let large = tensors.q.to_f32().iter().map(|q| 50.0 * q).collect();
        tensors.q = Tensor::from_vec::<f32>(large, tensors.q.shape()).expect("as many").convert(dtype);
        check(&case, &tensors);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for (name, case) in features() {
        let tensors = case.tensors();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| compute(Isa::detect(), &tensors))
        };
        assert!(with(1) == with(3), "{name}");
    }
}

#[test]
fn every_instruction_set_gives_the_same() {
    for (name, case) in features().into_iter().filter(|(_, case)| case.dtype == DType::F32) {
        let tensors = case.tensors();
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
        let (out, lse) = compute(Isa::Portable, &tensors);
        let (expected_out, expected_lse) = (wide(out), wide(lse));
        for isa in Isa::all() {
            let (out, lse) = compute(isa, &tensors);
            assert_close(name, DType::F32, &out, &expected_out);
            assert_close(name, DType::F32, &lse, &expected_lse);
        }
    }
}
