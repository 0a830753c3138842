//! The gradient of the sinks: of a row its sink's part of P times dLSE - D, as the sink has no value.
use rayon::prelude::*;

use super::Task;
use crate::element::Element;

/// Computes dsinks, a head a task: a sum over all rows in order, in f64.
pub fn run<T: Element>(task: &Task<T>, dsinks: &mut [f32]) {
    let Task { problem, operands, row_sums } = task;
    let sequences = &problem.sequences();
    dsinks.par_iter_mut().enumerate().for_each(|(head, dsink)| {
        let sink = operands.forward.sink(head).unwrap_or(f32::NEG_INFINITY);
        let rows = sequences.iter().flat_map(|sequence| {
            let first = problem.lse_index(sequence, head, 0);
            first..first + sequence.seqlen_q
        });
        let sum: f64 = rows
            .filter(|&i| operands.softmax_lse[i] != f32::NEG_INFINITY)
            .map(|i| -f64::from(sink - operands.softmax_lse[i]).exp() * f64::from(row_sums[i]))
            .sum();
        *dsink = sum as f32;
    });
}
