//! The CPU backend: FlashAttention-2's tiles on the cores of this machine.
//!
//! Each task owns a block of query rows of one head, and walks over the blocks of K and V once, with online softmax; S,
//! P and O stay in the core's caches. All tiles are transposed, queries running fastest: one vector lane is one query
//! row, so that the softmax needs no horizontal sums, and K and V are read as they lie, an element broadcast to all
//! lanes.

#![expect(clippy::needless_range_loop, reason = "LLVM vectorises loops over a constant number of lanes")]

mod attention;
mod backward;
mod blocks;
mod dropout;
mod isa;
mod math;
mod rows;
mod scores;
mod seen;
mod softmax;
#[cfg(test)]
mod testing;
mod tile;

pub(crate) use attention::{attention, extra_bytes};
pub(crate) use backward::{BackwardOperands, GradientHeads, attention_backward, backward_extra_bytes};
pub(crate) use softmax::softmax;

/// The cores and the vector instructions that this backend uses.
pub(crate) fn device_name() -> String {
    format!("{} CPU threads, {}", rayon::current_num_threads(), isa::Isa::detect().name())
}
