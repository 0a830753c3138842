//! What the backward pass moves.
use kernels::flash2_backward::{KEYS_AND_VALUES, QUERIES};

use super::{Head, Moved, Step, config, for_all_heads, load, query_blocks, store};
use crate::problem::Problem;

pub(super) const ROW_SUMS: &str = "D = rowsum(dO ∘ O)";
pub(super) const KEYS_AND_VALUES_GRADIENTS: &str = "dK, dV";
pub(super) const QUERIES_GRADIENT: &str = "dQ";

/// FlashAttention-2's backward pass: three kernels. Θ(N² d² / M) for an SRAM of M elements, as forward.
///
/// * D = rowsum(dO ∘ O) loads O and dO once and stores 4 bytes a row.
/// * dK and dV: a block of K and V is loaded once for each head of K and V, and its gradients are stored once. Each head of Q
///   loads for it the blocks of Q and dO that see it, all T_r of them or fewer under a causal mask, with 4 bytes of LSE and
///   of D a row.
/// * dQ: a block of Q and dO is loaded once, and dQ is stored once. It loads the blocks of K and V that it sees. The four
///   lanes of a warp that share a row each load its LSE and its D.
///
/// `None` where [`formula`](super::formula) has none.
pub fn backward(problem: &Problem) -> Option<Vec<Step>> {
    const LANES_A_ROW: u64 = 4;
    let (of_keys, of_queries) = (config(KEYS_AND_VALUES, problem)?, config(QUERIES, problem)?);
    let Head { q, k, rows, element, mask, .. } = Head::of(problem);
    let row = element * problem.headdim as u64;

    let rows_met: u64 = (0..mask.seqlen_k)
        .step_by(of_keys.block_n as usize)
        .map(|first_key| mask.query_blocks(first_key, of_keys.block_n, of_keys.block_m).begin * of_keys.block_m)
        .map(|first_row| mask.seqlen_q.saturating_sub(first_row) as u64)
        .sum();
    let keys_met: u64 = query_blocks(mask, of_queries.block_m)
        .map(|(first_row, _)| mask.key_blocks(first_row, of_queries.block_m, of_queries.block_n).end)
        .map(|blocks| (blocks * of_queries.block_n).min(mask.seqlen_k) as u64)
        .sum();

    let mut steps = for_all_heads(
        problem,
        [
            (ROW_SUMS, vec![load("O", q), load("dO", q), store("D", 4 * rows)]),
            (
                KEYS_AND_VALUES_GRADIENTS,
                vec![
                    load("Q", rows_met * row),
                    load("K", k),
                    load("V", k),
                    load("LSE", 4 * rows_met),
                    load("dO", rows_met * row),
                    load("D", 4 * rows_met),
                    store("dK", k),
                    store("dV", k),
                ],
            ),
            (
                QUERIES_GRADIENT,
                vec![
                    load("Q", q),
                    load("K", keys_met * row),
                    load("V", keys_met * row),
                    load("LSE", LANES_A_ROW * 4 * rows),
                    load("dO", q),
                    load("D", LANES_A_ROW * 4 * rows),
                    store("dQ", q),
                ],
            ),
        ],
    );
    // The heads of Q that share one of K and V share its block.
    let group = (problem.nheads / problem.nheads_k) as u64;
    for Moved { tensor, loaded, stored } in &mut steps[1].tensors {
        if ["K", "V", "dK", "dV"].contains(tensor) {
            (*loaded, *stored) = (*loaded / group, *stored / group);
        }
    }
    Some(steps)
}
