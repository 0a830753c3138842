//! The parts of a row's keys, combined.
//!
//! Source: "Flash-Decoding", as [`splits`](super::splits).
//!
//! A part s of the keys has left O_s = softmax(S_s) V_s and its LSE. In the softmax over all keys it has the weight
//! w_s = e^(LSE_s - LSE), with LSE = log Σ e^LSE_s: a softmax whose scores are the LSE of the parts. So O = Σ w_s O_s. A sink is
//! one more score of that softmax, without an O.
//!
//! HBM traffic: of each row O_s once and LSE_s twice, O and LSE.
use super::packing::Packing;
use super::schedule::key_blocks;
use super::splits::{Parts, Splits};
use crate::attention::{Attention, divisor};
use crate::config::Config;
use crate::mask::{Mask, UNBOUNDED};
use crate::online_softmax::OnlineSoftmax;
use crate::schedule::{QueryBlock, query_block};
use crate::scores::Scores;
use crate::spoiled_rows::{Elements, attend_spoiled_rows, column, each, groups, load};
use cuda_std::element::{Element, bf16, f16};
use cuda_std::math::{LOG2_E, fma, max};
use cuda_std::thread::{WARP, lane_id, warp_id};
use cuda_std::warp::{ALL, any, reduce, shuffle};
use cuda_std::{grid, kernel};

/// Rows of a block of threads, one a warp.
const ROWS: u32 = 4;

/// Parts that are loaded together, so that a row does not wait for each.
const PARTS: usize = 8;

/// The most columns of a row of O.
const MOST_COLUMNS: usize = 256;

/// Arguments of [`combine`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// The problem.
    pub attention: Attention,
    /// What the parts have left behind.
    pub parts: Parts,
    /// How many there are.
    pub splits: Splits,
    /// How heads lie in the tiles of the kernel that has computed the parts.
    pub packing: Packing,
    /// Rows of these tiles.
    pub block_m: u32,
    /// Keys of a block.
    pub block_n: u32,
}

const fn config<T: Element, const GENERAL: bool>() -> Config {
    Config {
        family: "flash3.combine",
        dtype: T::DTYPE,
        tf32: false,
        headdim: 0,
        headdim_v: 0,
        causal: None,
        general: GENERAL,
        block_m: ROWS,
        block_n: 0,
        from_keys: 0,
        few: true,
        sequences: 0,
        threads: ROWS * WARP,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: 0,
        barriers: 0,
    }
}

/// O and LSE from those of the parts.
///
/// Grid: as [`query_block`] says, of as many rows as a block has warps. `GENERAL`: [`Config::general`], of parts that such a kernel
/// has left.
#[kernel(
    name = "flash3_combine_{T}{GENERAL?_general}",
    arch = sm_90a,
    for T in [f16, bf16], GENERAL in [false, true],
    config = config,
    table = COMBINE,
)]
pub fn combine<T: Element, const GENERAL: bool>(p: Params) {
    grid::wait_for_prerequisites();
    let (a, parts) = (p.attention.of::<T>(), p.parts);
    let QueryBlock { first_row, head, sequence } = query_block(&a, ROWS);
    let query = first_row + warp_id();
    if query >= sequence.seqlen_q {
        return;
    }
    let mask = Mask::of::<T, false, true>(&a, &sequence);
    let (block_m, block_n) = (divisor(p.block_m), divisor(p.block_n));
    let tile = p.packing.row(head, query) / block_m * block_m;
    let count = p.splits.of(key_blocks(mask, p.packing, tile, block_m, block_n));
    let row = a.first_row(&sequence, head) + query as usize;
    let lse = |part: u32| parts.lse_of(part).load(row);

    let mut softmax = OnlineSoftmax::<true>::EMPTY;
    let mut part = lane_id();
    while part < count {
        softmax.push(lse(part));
        part += WARP;
    }
    softmax.rebase(reduce::<32, f32>(softmax.m, max));
    softmax.l = reduce::<32, f32>(softmax.l, |x, y| x + y);
    if GENERAL && !a.sinks.is_null() {
        softmax.push(a.sinks.load(head as usize));
    }

    let mut o = Elements::default();
    let mut first = 0;
    while first < count {
        let own = first + lane_id();
        let own_score = if own < count { lse(own) } else { f32::NEG_INFINITY };
        let mut part = first;
        while part < count.min(first + WARP) {
            let mut scores = [0.0; PARTS];
            let mut o_parts = [Elements::default(); PARTS];
            for n in 0..PARTS {
                scores[n] = shuffle(ALL, own_score, part - first + n as u32);
                // What a row has of keys that it does not see has no weight, be it NaN.
                if scores[n] != f32::NEG_INFINITY {
                    let o = parts.o_of(part + n as u32, a.headdim_v).offset(row * a.headdim_v as usize);
                    o_parts[n] = load::<f32, MOST_COLUMNS>(o, a.headdim_v, true);
                }
            }
            for n in 0..PARTS {
                let weight = softmax.weight(scores[n]);
                each::<MOST_COLUMNS>(|group, i| o[group][i] = fma(weight, o_parts[n][group][i], o[group][i]));
            }
            part += PARTS as u32;
        }
        first += WARP;
    }

    let inverse = softmax.inverse();
    each::<MOST_COLUMNS>(|group, i| o[group][i] *= inverse);
    let to = sequence.queries(&a.o, head, query);
    for group in 0..groups(MOST_COLUMNS) {
        if column(group) < a.headdim_v {
            to.store_vector(column(group) as usize, o[group].map(T::from_f32));
        }
    }
    if lane_id() == 0 {
        a.softmax_lse.store(row, softmax.lse());
    }

    let mut is_finite = true;
    each::<MOST_COLUMNS>(|group, i| is_finite &= o[group][i].is_finite());
    // Where all keys are seen nothing spoils a row.
    let hides = GENERAL && mask.left != UNBOUNDED || mask.right != UNBOUNDED || !a.cu_seqlens_k.is_null();
    if hides && any(ALL, !is_finite) {
        let block = QueryBlock { first_row: query, head, sequence };
        let o_row = sequence.query_matrix(&a.o, head, query, a.headdim_v, true);
        let scale = a.softmax_scale * LOG2_E;
        let scores = if GENERAL { Some(Scores::new(&a, &sequence, head, mask)) } else { None };
        let weight = |row, key, q_k: f32, softmax: OnlineSoftmax| match &scores {
            Some(scores) => Some(softmax.weight(scores.score(row, key, q_k))),
            None => Some(softmax.weight(q_k * scale)),
        };
        attend_spoiled_rows::<T, MOST_COLUMNS, MOST_COLUMNS>(&a, &block, mask, true, o_row, 0..1, weight);
    }
}
