//! Where the rows of Q have their statistics and their sums of dQ.
//!
//! Each sequence takes whole blocks of places, so that no block of queries reaches into the places of another sequence.
//! Heads follow each other. A block is of [`ROWS`], or of as many as a kernel takes at a time.
use super::Params;
use crate::attention::{Attention, Sequence};
use cuda_std::Global;
use cuda_std::fragment::Accumulator;
use cuda_std::math::unknown_before;
use cuda_std::thread::warp_id;

/// Rows of Q whose statistics belong together.
pub const ROWS: u32 = 64;

/// Places of one head, for all sequences. `tokens`: of all sequences that follow each other, if they do.
pub const fn places(batch: u64, seqlen_q: u64, tokens: Option<u64>) -> u64 {
    places_in_blocks(ROWS, batch, seqlen_q, tokens)
}

/// As [`places`], in blocks of so many `rows`.
pub const fn places_in_blocks(rows: u32, batch: u64, seqlen_q: u64, tokens: Option<u64>) -> u64 {
    let rows = rows as u64;
    match tokens {
        None => batch * seqlen_q.div_ceil(rows) * rows,
        Some(tokens) => (tokens / rows + batch) * rows,
    }
}

/// The place of the first row of a head, in blocks of so many `rows`. 32 bits: the sums of more would take 512 GB.
#[inline(always)]
pub(crate) fn first_place<T>(a: &Attention<T>, sequence: &Sequence, head: u32, rows: u32) -> u32 {
    let (batch, seqlen_q) = (a.batch as u64, a.seqlen_q as u64);
    // Said once for both cases, that of a head would take a register in the loops of the callers.
    if a.cu_seqlens_q.is_null() {
        head * places_in_blocks(rows, batch, seqlen_q, None) as u32 + sequence.batch * a.seqlen_q.div_ceil(rows) * rows
    } else {
        // A sequence that is not a multiple of a block long leaves less than one unused, which its number makes up for.
        let of_head = places_in_blocks(rows, batch, seqlen_q, Some(a.lse_head_stride)) as u32;
        head * of_head + (sequence.first_q / rows + sequence.batch) * rows
    }
}

/// From a place of one head to the same of the next.
#[inline(always)]
pub(super) fn places_of_head<T>(a: &Attention<T>, rows: u32) -> u32 {
    let tokens = if a.cu_seqlens_q.is_null() { None } else { Some(a.lse_head_stride) };
    places_in_blocks(rows, a.batch as u64, a.seqlen_q as u64, tokens) as u32
}

/// Where the statistics of the row in `place` are: of each block of `rows` first part 0, what the exponents subtract,
/// then part 1, D.
#[inline(always)]
pub(super) fn statistic_at(place: u32, part: u32, rows: u32) -> usize {
    (place / rows * 2 + part) as usize * rows as usize + (place % rows) as usize
}

/// Where the sums of this warp's part of dQ are, for the block of queries whose first row is in `place`.
#[inline(always)]
pub(super) fn d_q_sums<const HEADDIM: usize, const Q_ROWS: usize, const Q_COLUMNS: usize>(
    p: &Params,
    place: u32,
) -> Global<f32> {
    // Found anew for each block: from one to the next it takes no registers.
    let own = unknown_before(warp_id(), place) as usize * Accumulator::<Q_ROWS, Q_COLUMNS>::ELEMENTS;
    p.d_q_sums.offset(place as usize * HEADDIM + own)
}
