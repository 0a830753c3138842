//! The backward pass against the definition.
use super::*;
use crate::accuracy::largest;
use crate::cpu::testing::naive::Naive;
use crate::cpu::testing::{Case, Tensors, assert_close, assert_close_beside, cases, features, put};
use crate::element::with_element;
use crate::error::Result;
use crate::layout::Layout;
use crate::{DType, Tensor};
use proptest::prelude::*;

const NAMES: [&str; 5] = ["dQ", "dK", "dV", "dbias", "dsinks"];

/// O, of the forward pass; and the gradients, in the order of their names.
fn compute(isa: Isa, tensors: &Tensors) -> (Vec<f32>, [Vec<f32>; 5]) {
    fn of<T: Element>(isa: Isa, tensors: &Tensors) -> (Vec<f32>, [Vec<f32>; 5]) {
        let (problem, forward) = (tensors.problem(), tensors.operands::<T>());
        let layout = |shape: &[usize]| Layout::contiguous(T::STORED, shape).expect("small");
        let (q, k, v) = (layout(&problem.q_shape()), layout(&problem.k_shape()), layout(&problem.v_shape()));
        let o = layout(&problem.out_shape());
        let (mut out, mut softmax_lse) = (vec![T::default(); o.len()], vec![f32::NAN; problem.rows()]);
        crate::cpu::attention(&problem, &forward, HeadsMut::new(&mut out, &o), &mut softmax_lse);

        let operands = BackwardOperands {
            forward: &forward,
            out: Heads::new(&out, &o),
            dout: Heads::of(&tensors.dout.view()),
            softmax_lse: &softmax_lse,
            dlse: tensors.dlse.as_slice(),
        };
        // Whatever is not written shows.
        let nan = |len| vec![T::from_f32(f32::NAN); len];
        let (mut dq, mut dk, mut dv) = (nan(q.len()), nan(k.len()), nan(v.len()));
        let mut dbias = problem.bias.map(|shape| nan(shape.iter().product()));
        let mut dsinks = problem.sinks.then(|| vec![f32::NAN; problem.nheads]);
        let mut gradients = GradientHeads {
            dq: HeadsMut::new(&mut dq, &q),
            dk: HeadsMut::new(&mut dk, &k),
            dv: HeadsMut::new(&mut dv, &v),
            dbias: dbias.as_deref_mut(),
            dsinks: dsinks.as_deref_mut(),
        };
        run(isa, &problem, &operands, &mut gradients);
        let wide = |x: &[T]| {
            let mut wide = vec![0.0; x.len()];
            T::widen(x, &mut wide);
            wide
        };
        let dbias = dbias.unwrap_or_default();
        (wide(&out), [wide(&dq), wide(&dk), wide(&dv), wide(&dbias), dsinks.unwrap_or_default()])
    }
    let computed = || -> Result<_> { Ok(with_element!("q", tensors.q.dtype(), T => of::<T>(isa, tensors))) };
    computed().expect("an element type")
}

fn check(case: &Case, tensors: &Tensors) {
    check_beside(case, tensors, [0.0; 5]);
}

/// `others` are the largest of gradients that have lost theirs to NaN.
fn check_beside(case: &Case, tensors: &Tensors, others: [f64; 5]) {
    let (out, gradients) = compute(Isa::detect(), tensors);
    let expected = Naive::new(case, tensors).backward(&out);
    for (((name, found), expected), other) in NAMES.iter().zip(&gradients).zip(&expected).zip(others) {
        let dtype = if *name == "dsinks" { DType::F32 } else { case.dtype };
        assert_close_beside(name, dtype, found, expected, largest(expected).max(other));
    }
}

/// The largest of each gradient.
fn largest_gradients(case: &Case, tensors: &Tensors) -> [f64; 5] {
    let (out, _) = compute(Isa::detect(), tensors);
    Naive::new(case, tensors).backward(&out).map(|gradient| largest(&gradient))
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
    fn nan_goes_where_the_definition_sends_it(
        positions in prop::collection::vec((0..5usize, any::<prop::sample::Index>()), 1..4),
        case in cases(),
    ) {
        let case = Case { dtype: DType::F32, ..case };
        let mut tensors = case.tensors();
        let others = largest_gradients(&case, &tensors);
        for (which, index) in positions {
            let Tensors { q, k, v, dout, dlse, .. } = &mut tensors;
            let tensor = [q, k, v, dout, dlse].into_iter().nth(which).expect("five");
            put(tensor, index, f32::NAN);
        }
        check_beside(&case, &tensors, others);
    }

    #[test]
    fn a_bias_may_be_infinite(
        case in cases(),
        every in 1..4usize,
        one: [bool; 3],
        spoiled: Option<(bool, prop::sample::Index)>,
    ) {
        let case = Case { dtype: DType::F32, bias: Some(one), ..case };
        let mut tensors = case.tensors();
        let bias = tensors.bias.as_mut().and_then(Tensor::as_mut_slice::<f32>).expect("of f32");
        bias.iter_mut().step_by(every).for_each(|x| *x = f32::NEG_INFINITY);
        let others = largest_gradients(&case, &tensors);
        // At a key that is hidden, or not.
        if let Some((of_k, index)) = spoiled {
            put(if of_k { &mut tensors.k } else { &mut tensors.v }, index, f32::NAN);
        }
        check_beside(&case, &tensors, others);
    }
}

#[test]
fn gradients_are_the_same_bits_for_any_number_of_threads() {
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
    for (_, case) in features().into_iter().filter(|(_, case)| case.dtype == DType::F32) {
        let tensors = case.tensors();
        let (_, portable) = compute(Isa::Portable, &tensors);
        let portable = portable.map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
        for isa in Isa::all() {
            let (_, gradients) = compute(isa, &tensors);
            for ((name, found), expected) in NAMES.iter().zip(&gradients).zip(&portable) {
                assert_close(name, DType::F32, found, expected);
            }
        }
    }
}
