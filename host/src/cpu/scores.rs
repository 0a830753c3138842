//! What becomes of a score on its way from Q Kᵀ into the softmax: cap, ALiBi and bias.
//!
//! Score of query i and key j, with s = softmax_scale · q kᵀ: softcap · tanh(s / softcap), plus
//! -slope · |i + seqlen_k - seqlen_q - j|, plus the bias. What is hidden, `seen` says.
use std::f32::consts::LOG2_E;

use super::blocks::Place;
use super::isa::Vector;
use super::math::tanh;
use super::tile::{BLOCK, Lanes, QUERIES};
use crate::element::Element;
use crate::operands::Operands;
use crate::problem::Problem;

/// What Q is multiplied with before its product with K: the product is then a score in log2 units, or what a score's
/// tanh is taken of.
pub fn scale(problem: &Problem) -> f32 {
    match problem.softcap {
        None => problem.softmax_scale * LOG2_E,
        Some(softcap) => problem.softmax_scale / softcap,
    }
}

/// The product of Q, multiplied with [`scale`], and Kᵀ becomes scores in log2 units. With a cap, `cap_gradient` gets
/// the derivative of the capped score by the one that was not.
#[inline(always)]
pub fn finish<T: Element, V: Vector, const LANES: bool>(
    problem: &Problem,
    operands: &Operands<T>,
    place: &Place,
    scores: &mut [Lanes],
    cap_gradient: Option<&mut [Lanes]>,
) {
    if let Some(softcap) = problem.softcap {
        cap::<V>(softcap, scores, cap_gradient);
    }
    if let Some(slope) = operands.slope(&place.sequence, place.head) {
        add_alibi::<LANES>(slope, place, scores);
    }
    if problem.bias.is_some() {
        add_bias::<T, LANES>(operands, place, scores);
    }
}

#[inline(always)]
fn cap<V: Vector>(softcap: f32, scores: &mut [Lanes], mut cap_gradient: Option<&mut [Lanes]>) {
    let softcap = softcap * LOG2_E;
    for (i, scores) in scores.iter_mut().enumerate() {
        for lane in 0..BLOCK {
            scores[lane] = tanh::<V>(scores[lane]);
        }
        if let Some(gradient) = &mut cap_gradient {
            for lane in 0..BLOCK {
                gradient[i][lane] = 1.0 - scores[lane] * scores[lane];
            }
        }
        for lane in 0..BLOCK {
            scores[lane] *= softcap;
        }
    }
}

#[inline(always)]
fn add_alibi<const LANES: bool>(slope: f32, place: &Place, scores: &mut [Lanes]) {
    let slope = slope * LOG2_E;
    // From the first key of the tile to the place of its first query among the keys. Lengths fit in an i32, and so does
    // every distance within a sequence; beyond its end they may wrap around.
    let offset = (place.first_q + place.sequence.seqlen_k) as i32;
    let offset = offset.wrapping_sub((place.sequence.seqlen_q + place.first_k) as i32);
    for (i, scores) in scores.iter_mut().enumerate() {
        for lane in 0..BLOCK {
            let (query, key) = if LANES == QUERIES { (lane, i) } else { (i, lane) };
            let distance = offset.wrapping_add(query as i32 - key as i32);
            scores[lane] -= slope * distance.wrapping_abs() as f32;
        }
    }
}

#[inline(always)]
fn add_bias<T: Element, const LANES: bool>(operands: &Operands<T>, place: &Place, scores: &mut [Lanes]) {
    let mut row = [0.0; BLOCK];
    for i in 0..place.queries {
        let Some(bias) = operands.bias(&place.sequence, place.head, place.first_q + i) else { return };
        T::widen(&bias[place.first_k..place.first_k + place.keys], &mut row);
        if LANES == QUERIES {
            for (scores, bias) in scores.iter_mut().zip(row) {
                scores[i] += bias * LOG2_E;
            }
        } else {
            for lane in 0..BLOCK {
                scores[i][lane] += row[lane] * LOG2_E;
            }
        }
    }
}
