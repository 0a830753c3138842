//! The comparison in words.
use super::measure::{Comparison, Run};
use super::table;
use crate::cli::units::{bytes, three_digits};

/// Explains what was measured.
pub fn explanation(comparison: &Comparison) -> String {
    let [standard, flash1, flash2] = &comparison.detail;
    let (n, d) = (standard.problem.seqlen_q, standard.problem.headdim);
    format!(
        "\
One head of attention on the simulated GPU: N = {n} tokens, head dimension d = {d}, f16.

A GPU's memory (HBM) is large and slow, the SRAM next to its arithmetic small and fast. What attention
costs is mostly the bytes that move between the two. Here the simulator has counted each of them.

{moved}

standard  writes S and P, {n} x {n} elements each, to HBM and reads them back: {matrices} of its
          {standard_bytes}.
flash1    keeps S and P in SRAM, a block at a time. For each block of K and V it goes over all of Q,
          and carries O, l and m along through HBM: {state} of its {flash1_bytes}.
flash2    turns the loops around. For each block of Q it goes over K and V, while O, l and m stay in
          registers: {flash2_bytes} in all, {times} times less than standard.

How the bytes grow with N, and their ratio to what the paper says they grow like:

{growth}

The paper: standard attention moves Θ(N d + N²) elements, FlashAttention Θ(N² d² / M), where M is the
SRAM that a block takes: {m1} elements for flash1, {m2} for flash2. That a ratio settles is what Θ
means. The larger M is, the longer are the blocks, and the fewer times the rest is read again.

Memory that each takes besides Q, K, V and O:

{memory}

S and P grow with N². What FlashAttention keeps, a few numbers for each row, grows with N.
",
        moved = table::moved(&comparison.detail),
        matrices = bytes(bytes_of(standard, &["S", "P"])),
        standard_bytes = bytes(standard.bytes()),
        state = bytes(bytes_of(flash1, &["O", "l", "m"])),
        flash1_bytes = bytes(flash1.bytes()),
        flash2_bytes = bytes(flash2.bytes()),
        times = three_digits(standard.bytes() as f64 / flash2.bytes() as f64),
        growth = table::growth(&comparison.growth),
        m1 = flash1.sram_elements,
        m2 = flash2.sram_elements,
        memory = table::memory(&comparison.growth),
    )
}

/// What a run moved of some tensors.
fn bytes_of(run: &Run, tensors: &[&str]) -> u64 {
    let all = run.steps.iter().flat_map(|step| &step.tensors);
    all.filter(|moved| tensors.contains(&moved.tensor)).map(|moved| moved.loaded + moved.stored).sum()
}
