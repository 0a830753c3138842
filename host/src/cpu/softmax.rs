//! Softmax over rows, in parallel.
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

use super::isa::{Isa, Vector, multiversion};
use super::math::{exp2, max};
use crate::element::Element;
use crate::options::SoftmaxMethod;

/// Differences of elements are scaled, not elements, which may be large.
type OnlineSoftmax = kernels::OnlineSoftmax<true>;

/// Elements of a row that are taken at once: online softmax has a state for each of so many lanes.
const LANES: usize = 16;

/// y = softmax(x), where rows have `columns` elements.
pub fn softmax<T: Element>(x: &[T], y: &mut [T], columns: usize, method: SoftmaxMethod) {
    let isa = Isa::detect();
    let rows = x.par_chunks(columns).zip(y.par_chunks_mut(columns));
    rows.for_each_init(|| vec![0.0; columns], |wide, (x, y)| row(isa, x, y, wide, method));
}

multiversion! {
    /// One row; `wide` is as long, and what it works in.
    fn row<T>(x: &[T], y: &mut [T], wide: &mut [f32], method: SoftmaxMethod) = row_with
}

/// # Safety
/// Only `multiversion` asks for it: V is no more here than leave for LLVM to fuse a·b + c.
#[inline(always)]
unsafe fn row_with<T: Element, V: Vector, const ROWS: usize>(
    x: &[T],
    y: &mut [T],
    wide: &mut [f32],
    method: SoftmaxMethod,
) {
    T::widen(x, wide);
    let state = match method {
        SoftmaxMethod::TwoPass => two_pass::<V>(wide),
        SoftmaxMethod::Online => online::<V>(wide),
    };
    let (base, inverse) = (state.base(), state.inverse());
    wide.iter_mut().for_each(|x| *x = exp::<V>(*x - base) * inverse);
    T::narrow(wide, y);
}

/// e^x for x <= 0.
#[inline(always)]
fn exp<V: Vector>(x: f32) -> f32 {
    exp2::<V>(x * LOG2_E)
}

/// m in a first pass, l in a second.
#[inline(always)]
fn two_pass<V: Vector>(x: &[f32]) -> OnlineSoftmax {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x.chunks(LANES) {
        for (m, &x) in lanes.iter_mut().zip(x) {
            *m = max(*m, x);
        }
    }
    let mut state = OnlineSoftmax { m: lanes.into_iter().fold(f32::NEG_INFINITY, max), l: 0.0 };
    let base = state.base();
    let mut sums = [0.0; LANES];
    for x in x.chunks(LANES) {
        for (l, &x) in sums.iter_mut().zip(x) {
            *l += exp::<V>(x - base);
        }
    }
    state.l = sums.iter().sum();
    state
}

/// m and l in one pass, a state a lane.
#[inline(always)]
fn online<V: Vector>(x: &[f32]) -> OnlineSoftmax {
    let mut m = [f32::NEG_INFINITY; LANES];
    let mut l = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for lane in 0..LANES {
            let raised = max(m[lane], x[lane]);
            let base = if raised == f32::NEG_INFINITY { 0.0 } else { raised };
            l[lane] = l[lane] * exp::<V>(m[lane] - base) + exp::<V>(x[lane] - base);
            m[lane] = raised;
        }
    }
    let mut state = OnlineSoftmax::EMPTY;
    rest.iter().for_each(|&x| state.push(x));
    (0..LANES).fold(state, |state, lane| state.merge(OnlineSoftmax { m: m[lane], l: l[lane] }))
}

#[cfg(test)]
mod tests {
    use crate::accuracy;
    use crate::session::Session;
    use crate::{Backend, DType, SoftmaxMethod, Tensor};
    use proptest::prelude::*;

    fn element() -> impl Strategy<Value = f32> {
        prop_oneof![20 => -10.0f32..10.0, 4 => Just(f32::NEG_INFINITY), 2 => -1e30f32..1e30, 1 => Just(f32::NAN)]
    }

    /// Elements that differ by little, far from 0.
    fn large() -> impl Strategy<Value = Vec<f32>> {
        (
            prop_oneof![Just(6e4f32), Just(-6e4), Just(f32::MAX), Just(f32::MIN)],
            prop::collection::vec(-10f32..10.0, 1..200),
        )
            .prop_map(|(far, near)| near.iter().map(|near| (far + near).clamp(f32::MIN, f32::MAX)).collect())
    }

    proptest! {
        #[test]
        fn any_row_keeps_the_rule(x in prop_oneof![4 => prop::collection::vec(element(), 1..200), 1 => large()], rows in 1..4usize) {
            let rows = if x.len().is_multiple_of(rows) { rows } else { 1 };
            let x = Tensor::from_vec(x.clone(), &[rows, x.len() / rows]).expect("as many");
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let x = x.convert(dtype);
                for &method in SoftmaxMethod::ALL {
                    let softmax = Session::new(Backend::Cpu).expect("always there").softmax(&x, method).expect("valid");
                    let accuracy = accuracy::check_softmax(&x, &softmax).expect("of this x");
                    prop_assert!(accuracy.passed(), "{method} {}: {accuracy}", dtype.name());
                }
            }
        }
    }
}
