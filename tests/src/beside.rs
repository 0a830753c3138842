//! Gradients of a sequence alone, and beside others that follow it: the same bits.
use ferroflash::{DType, Gradients, Session, Tensor};

use crate::combination::Combination;
use crate::features::plain;

/// Runs the gradients that are to be the same bits in every batch, of two heads of Q that share K and V, of a sequence of so many
/// queries and keys alone and before each of these `others`; in a session of its own each time. Fails if they differ, break
/// the accuracy rule or come from another entry point than one whose name begins so.
///
/// # Errors
/// Which of these it is.
pub fn check(
    session: impl Fn(u64) -> Session,
    (headdim, causal): (usize, bool),
    lengths: (usize, usize),
    others: &[&[(usize, usize)]],
    entry: &str,
) -> Result<(), String> {
    let run = |others: &[(usize, usize)], seed| {
        let mut combination = Combination { varlen: true, ..plain(DType::BF16, (0, 0), (headdim, headdim)) };
        combination.lengths = [&[lengths], others].concat();
        (combination.options.causal, combination.options.deterministic) = (causal, true);
        combination.nheads_k = 1;
        let (session, tensors) = (session(seed), combination.tensors());
        let forward = combination.forward(&session, &tensors).map_err(|error| error.to_string())?;
        let gradients = combination.backward(&session, &tensors, &forward).map_err(|error| error.to_string())?;
        if !gradients.report.launches.iter().any(|launch| launch.entry.starts_with(entry)) {
            return Err(format!("{combination:?}: {}", gradients.report.reason));
        }
        let accuracy = combination.backward_accuracy(&tensors, &gradients).map_err(|error| error.to_string())?;
        if accuracy.passed() { Ok(of_first(&gradients, lengths)) } else { Err(format!("{combination:?}: {accuracy}")) }
    };
    let alone = run(&[], 0)?;
    for (seed, others) in (1..).zip(others) {
        if run(others, seed)? != alone {
            return Err(format!("headdim {headdim}, causal {causal}, {lengths:?}: other bits beside {others:?}"));
        }
    }
    Ok(())
}

/// dQ, dK and dV of the first sequence.
fn of_first(gradients: &Gradients, (seqlen_q, seqlen_k): (usize, usize)) -> [Vec<u8>; 3] {
    let rows = |tensor: &Tensor, rows: usize| {
        let bytes = tensor.bytes();
        bytes[..bytes.len() / tensor.shape()[0] * rows].to_vec()
    };
    [rows(&gradients.dq, seqlen_q), rows(&gradients.dk, seqlen_k), rows(&gradients.dv, seqlen_k)]
}
