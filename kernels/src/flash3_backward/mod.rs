//! FlashAttention-3, backward, for Hopper.
//!
//! Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", section 3
//! and appendix B.1. The mathematics is that of [`flash2_backward`], in five products:
//!
//! ```text
//! Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dV += Pᵀ dO,   dK += dSᵀ Q,   dQ += dS K.
//! ```
//!
//! A block of threads owns `block_n` keys of a head of K and V, and walks over the queries of all heads of Q that share
//! it, `block_m` at a time. S and dP are transposed, so that Pᵀ and dSᵀ come out in registers as left factors of the
//! products that dV and dK are the sums of. dS of all keys meets in shared memory. What the block adds to dQ goes to
//! sums in f32 in global memory; these additions are atomic, so the last bits of dQ differ from run to run. Those of dK
//! and dV do not.
//!
//! [`prepare()`] finds what the exponents subtract and D, and clears the sums. [`whole()`] or [`split()`] is the pass
//! itself, for narrow and for wide heads. [`finish()`] scales and rounds dQ.
//!
//! Where dQ must be the same bits in every run, blocks of keys add in their order: [`prepare_ordered()`], [`ordered()`] or
//! [`split_ordered()`], and [`finish()`], if the pass does not finish dQ itself ([`Order`]). Many short heads are faster so in any
//! case: nothing is cleared, and dQ is finished while the L2 cache has its sums.
//!
//! [`prepare_heads()`] and [`heads()`] give the same bits: a block of threads takes one block of keys of its head after the other,
//! and has dQ to itself.
//!
//! [`prepare_ring()`], [`ring()`] and [`finish_ring()`] are another way to keep the sums of dQ in the L2 cache, for longer heads:
//! they take turns at them, and the pass finishes dQ of heads that it is done with ([`Ring`]).
//!
//! Where blocks of keys do not fill the machine, several blocks of threads share one of them: [`shared()`],
//! [`split_shared()`] and [`ring_shared()`] ([`Shares`]).
//!
//! For a window, a cap, ALiBi, or a scale that is not positive there are [`general()`] and [`split_general()`].
//!
//! Where heads are wide, two blocks of threads are a cluster, which has twice the keys: [`split()`].
//!
//! Warps are specialised: a thread keeps copies of Q and dO in flight, and two warpgroups multiply. dQ of a step is
//! multiplied in the next one, so that no group waits for the other's dS. By the count of bytes it is the bandwidth of
//! shared memory, where most products read both factors, that bounds the pass.
//!
//! HBM traffic: Q and dO once for each block of keys, less what the L2 cache keeps; K, V, dK and dV once; the sums of
//! dQ are cleared, added to, and read. Blocks of keys of a head that run side by side find each other's Q, dO and sums in
//! the cache. Where one block of threads takes a whole head, so many heads run at once that the cache holds what they meet
//! again only if they are short: longer ones are bound by HBM, at half the speed.
//!
//! A weight of 0 hides nothing from a product, as 0 · NaN is NaN: what is not finite in a block of queries or of keys
//! may reach the gradients of all queries and keys that are multiplied with it, as in
//! [`flash2_backward::fused`]. Where sequences follow each other, the last block of one
//! reaches into the next: then that counts as part of it.
mod finish;
mod finisher;
mod general;
mod memory;
mod order;
mod prepare;
mod producer;
mod ring;
mod shares;
mod split;
mod whole;

pub use finish::{FINISH, FINISH_RING, finish, finish_ring};
pub use order::{Order, PREPARE_ORDERED, prepare_ordered};
pub use prepare::{PREPARE, PREPARE_HEADS, PREPARE_RING, prepare, prepare_heads, prepare_ring};
pub use ring::Ring;
pub use shares::Shares;
pub use split::{GENERAL_SPLIT, ORDERED_SPLIT, SHARED_SPLIT, SPLIT, split, split_general, split_ordered, split_shared};
pub use whole::{
    GENERAL, HEADS, ORDERED, RING, SHARED, SHARED_RING, WHOLE, general, heads, ordered, ring, ring_shared, shared,
    whole,
};

use crate::attention::{Attention, Sequence, divisor};
use crate::config::Config;
use crate::flash2_backward::{self, fused::first_place};
use crate::mask::{Blocks, Mask};
use crate::schedule::{self, KeyBlock};
use cuda_std::math::unknown;
use cuda_std::pipeline::Slot;
use cuda_std::tensor::TensorMap;
use cuda_std::thread::lane_id;
use cuda_std::{DType, wgmma};

/// Rows of a product: keys, queries or columns of a head.
const GROUP_ROWS: u32 = wgmma::ROWS;

/// Warpgroups that multiply.
const GROUPS: u32 = 2;

/// Stages of Q and dO: one is computed on while the next comes in.
const STAGES: u32 = 2;

/// Arguments of the kernels; [`prepare_heads()`] and [`finish()`] take those of [`flash2_backward`], which are the field
/// `backward`.
///
/// The kernels are launched one after the other: [`prepare()`], the pass, [`finish()`], all three of the same dtype,
/// `headdim` and `block_m`, where the pass is [`whole()`], [`split()`], [`shared()`] or [`split_shared()`]; or [`prepare_heads()`]
/// and [`heads()`]; or [`prepare_ring()`], [`ring()`] or [`ring_shared()`], and [`finish_ring()`]; or [`prepare_ordered()`],
/// [`ordered()`] and [`finish()`]. Each may be launched before the one before it has ended ([`cuda_std::grid`]).
///
/// With the places of [`places_in_blocks`](flash2_backward::fused::places_in_blocks)`(block_m, ..)`, times `nheads`,
/// `backward.statistics` has two f32 a place, and `backward.d_q_sums` `headdim` of the configuration; [`prepare()`]
/// fills both. It also writes `backward.row_sums`, unless that is null. In a ring the sums have the whole blocks of `block_m`
/// queries of [`Ring::heads`] heads of K alone.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Params {
    /// Q: tiles of `block_m` rows and `headdim` columns of the configuration; heads and batches are its outer
    /// dimensions.
    pub q: TensorMap,
    /// K: tiles of `block_n` rows and `headdim` columns.
    pub k: TensorMap,
    /// V: tiles of `block_n` rows and `headdim_v` columns.
    pub v: TensorMap,
    /// dO: tiles of `block_m` rows and `headdim_v` columns.
    pub d_o: TensorMap,
    /// The problem and the gradients.
    pub backward: flash2_backward::Params,
    /// Heads of K whose blocks take turns under a causal mask, and in [`ordered()`] ([`schedule::key_block_in_turn`]); not 0.
    /// Measured with as many as have their Q, dO and sums of dQ, 8 bytes an element, in 32 MB, at least one.
    pub heads_in_turn: u32,
    /// For [`prepare_ring()`], [`ring()`] and [`finish_ring()`] alone: where the sums of dQ are.
    pub ring: Ring,
    /// For [`prepare_ordered()`] and [`ordered()`] alone: whose turn it is to add to dQ.
    pub order: Order,
    /// For [`shared()`], [`split_shared()`], [`ring_shared()`] and what is launched before them alone: which keys several blocks of
    /// threads share.
    pub shares: Shares,
}

const fn config_of(dtype: DType, headdim: usize, causal: Option<bool>) -> Config {
    Config {
        family: "flash3.backward",
        dtype,
        tf32: false,
        headdim: headdim as u32,
        headdim_v: headdim as u32,
        causal,
        general: false,
        from_keys: 0,
        few: false,
        sequences: 0,
        block_m: 0,
        block_n: 0,
        threads: 0,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: 0,
        barriers: 0,
    }
}

/// Registers that a thread which multiplies claims: where the others give up all that they can, and else.
const CLAIMED: [u32; 2] = [240, 232];

/// Whether S, dP, dK and dV leave so few registers that the threads that copy have to give all up that they can.
const fn is_tight(headdim: usize, block_m: usize) -> bool {
    headdim + block_m > 192
}

/// Which blocks of keys a block of threads takes, as a constant.
mod walk {
    /// One.
    pub const ONE: u32 = 0;
    /// All of a head of K.
    pub const HEAD: u32 = 1;
    /// One, with sums of dQ in a [ring](super::Ring).
    pub const RING: u32 = 2;
    /// One, which adds to dQ in its [turn](super::Order).
    pub const ORDERED: u32 = 3;
    /// One that others [share](super::Shares).
    pub const SHARED: u32 = 4;
    /// The same in a ring.
    pub const SHARED_RING: u32 = 5;
    /// One, for a window, a cap, ALiBi, or any scale: what the arguments ask for.
    pub const GENERAL: u32 = 6;

    /// Whether heads take turns at the sums of dQ.
    pub const fn is_ring(walk: u32) -> bool {
        walk == RING || walk == SHARED_RING
    }

    /// Whether keys add to dQ in their order.
    pub const fn is_in_order(walk: u32) -> bool {
        walk == HEAD || walk == ORDERED
    }

    /// Whether a block of threads has a share of the queries of its keys.
    pub const fn is_shared(walk: u32) -> bool {
        walk == SHARED || walk == SHARED_RING
    }
}

/// Whether the first keys can finish dQ where keys add to it in their order: where there are registers for it.
pub const fn can_finish_in_order(headdim: u32, block_m: u32) -> bool {
    headdim > 128 || !is_tight(headdim as usize, block_m as usize)
}

/// Block `number` of keys: under a causal mask heads take turns.
#[inline(always)]
#[track_caller]
fn key_block_at<T, const CAUSAL: bool>(a: &Attention<T>, block_n: u32, heads_in_turn: u32, number: u32) -> KeyBlock {
    if CAUSAL {
        schedule::key_block_in_turn_at(a, block_n, heads_in_turn, number)
    } else {
        schedule::key_block_at(a, block_n, number)
    }
}

/// The next keys of a walk, if there are any: of a head those before these.
#[inline(always)]
#[track_caller]
fn next_keys<T, const WALK: u32>(a: &Attention<T>, block: KeyBlock, block_n: u32) -> Option<KeyBlock> {
    let goes_on = WALK == walk::HEAD && block.first_key > 0;
    goes_on.then(|| schedule::keys_of_head(a, block.first_key - block_n))
}

/// Which keys the queries of a `WALK` see.
#[inline(always)]
fn mask_of<T, const CAUSAL: bool, const WALK: u32>(a: &Attention<T>, sequence: &Sequence) -> Mask {
    if WALK == walk::GENERAL {
        Mask::of::<T, CAUSAL, true>(a, sequence)
    } else {
        Mask::of::<T, CAUSAL, false>(a, sequence)
    }
}

/// What a block of threads does: its keys, and the blocks of queries that they need, of each of its heads.
#[derive(Clone, Copy)]
struct Work {
    block: KeyBlock,
    blocks: Blocks,
    /// Before which of them a mask hides something. Where keys are missing that is all: what their P would be is not
    /// bounded, and 0 times infinity is no part of dQ.
    masked: u32,
    /// Heads of Q that share the head of K.
    group: u32,
}

impl Work {
    /// What these keys need.
    #[inline(always)]
    fn of<T, const CAUSAL: bool, const WALK: u32>(
        a: &Attention<T>,
        block: KeyBlock,
        block_m: u32,
        block_n: u32,
    ) -> Self {
        let mask = mask_of::<T, CAUSAL, WALK>(a, &block.sequence);
        let blocks = mask.query_blocks(block.first_key, block_n, block_m);
        let masked = if block.rows() < block_n { u32::MAX } else { blocks.full_begin };
        Work { block, blocks, masked, group: a.nheads / divisor(a.nheads_k) }
    }

    /// Whether a mask hides something of one of the blocks. Behind the queries that see all of these keys only a window does.
    #[inline(always)]
    fn is_masked<const WALK: u32>(&self, block: u32) -> bool {
        block < self.masked || WALK == walk::GENERAL && block >= self.blocks.full_end
    }

    /// Before which row of a head no query needs the keys behind these.
    #[inline(always)]
    fn alone_before<T, const CAUSAL: bool>(&self, a: &Attention<T>, block_m: u32, block_n: u32) -> u32 {
        let behind = self.block.first_key + block_n;
        if behind >= self.block.sequence.seqlen_k {
            return u32::MAX;
        }
        let mask = Mask::of::<T, CAUSAL, false>(a, &self.block.sequence);
        mask.query_blocks(behind, block_n, block_m).begin * block_m
    }

    /// Blocks of queries of all heads.
    #[inline(always)]
    fn steps(&self) -> u32 {
        self.blocks.count() * self.group
    }

    /// All of them, in the order in which they are taken.
    #[inline(always)]
    fn walk<T>(&self, a: &Attention<T>, block_m: u32) -> Walk {
        let first_place = |head| first_place(a, &self.block.sequence, head, block_m);
        self.walk_from(first_place(self.block.head_k * self.group), first_place(1) - first_place(0), block_m)
    }

    /// The same where the first head begins in `first_place`, and each has so many places.
    #[inline(always)]
    #[track_caller]
    fn walk_from(&self, first_place: u32, places_of_head: u32, block_m: u32) -> Walk {
        let head = self.block.head_k * self.group;
        let (first_row, rows) = (self.blocks.begin * block_m, self.blocks.count() * block_m);
        Walk {
            next: Step { head, first_row, place: first_place + first_row },
            left: self.steps(),
            block_m,
            rows,
            end_row: first_row + rows,
            to_next_head: places_of_head - rows,
        }
    }
}

/// A block of queries of one head.
#[derive(Clone, Copy)]
struct Step {
    head: u32,
    /// Its first row in its head.
    first_row: u32,
    /// The same among the places of statistics and sums of dQ.
    place: u32,
}

/// A walk over the blocks of queries that a block of keys needs: those of one head after the other.
struct Walk {
    next: Step,
    left: u32,
    block_m: u32,
    /// Rows of a head that are walked over.
    rows: u32,
    /// Where they end.
    end_row: u32,
    /// From there to the first of the next head, in places.
    to_next_head: u32,
}

impl Walk {
    #[inline(always)]
    fn next(&mut self) -> Option<Step> {
        if self.left == 0 {
            return None;
        }
        // The loop stays one: unrolled it would take more registers than a thread that copies has.
        self.left = unknown(self.left - 1);
        let step = self.next;
        self.next.first_row += self.block_m;
        self.next.place += self.block_m;
        if self.next.first_row == self.end_row {
            self.next.head += 1;
            self.next.first_row -= self.rows;
            self.next.place += self.to_next_head;
        }
        Some(step)
    }
}

/// This warp needs a stage no more. One lane says so for all: they have read what it holds, and have met in a product since.
#[inline(always)]
#[track_caller]
fn release<const STAGES: u32>(slot: Slot<STAGES>) {
    if lane_id() == 0 {
        slot.release();
    }
}
