//! Sums of dQ that never leave the L2 cache: a ring of places for those of a few heads of K, which take them one after
//! the other.
//!
//! Blocks of threads start in their order. So by the number of one it is known which heads are far enough behind for
//! all their keys to be done. Each finishes a share of dQ of such a head, by warps that have nothing to multiply: it
//! scales and rounds the sums, stores them, and clears them for the next head in their place. Two counters a head say
//! how far it is: the one is waited for before its dQ is finished, the other before the next head in its place adds to its
//! sums. Blocks wait for blocks before them alone; and where heads are finished a wave of blocks after their last keys,
//! and taken over another wave later, they find what they wait for.
//!
//! HBM traffic: dQ once. The last heads, which nobody comes after, are left to [`finish_ring`](super::finish_ring()).
use super::finisher::FINISHERS;
use crate::attention::{Attention, Sequence, divisor};
use cuda_std::Global;
use cuda_std::arrivals::Arrivals;

/// Where the sums of dQ are, and who finishes them.
///
/// All sequences are equally long, so some query sees each key: every block of keys has something to add, and counts.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Two for each head of K of each sequence; [`prepare_ring`](super::prepare_ring()) clears them. Null: there is no ring.
    pub counters: Global<u32>,
    /// Heads of K that have sums at a time: `lag` and one more, or under a causal mask as many more as take turns.
    pub heads: u32,
    /// How many heads of K lie between that whose keys a block of threads takes and that which it finishes: one, or under a
    /// causal mask as many as take turns, and better those of a wave of blocks more.
    pub lag: u32,
}

impl Ring {
    /// For kernels that have the sums of all heads.
    pub const NONE: Ring = Ring { counters: Global::NULL, heads: 0, lag: 0 };

    /// Counts the blocks of keys of a head of K that have added all they have to its sums.
    #[inline(always)]
    fn added(&self, pair: u32) -> Arrivals {
        Arrivals::at(self.counters.offset(2 * pair as usize))
    }

    /// Counts the warps that have finished their share of a head of K, and cleared its sums.
    #[inline(always)]
    fn finished(&self, pair: u32) -> Arrivals {
        Arrivals::at(self.counters.offset(2 * pair as usize + 1))
    }

    /// The place of the first row of a head of Q among those of the sums.
    #[inline(always)]
    pub fn first_place<T>(&self, a: &Attention<T>, sequence: &Sequence, head: u32, block_m: u32) -> u32 {
        let group = divisor(a.nheads / divisor(a.nheads_k));
        self.place_of_pair(a, pair(a, sequence, head / group), block_m) + head % group * places_of_head(a, block_m)
    }

    /// That of the first head of Q of a head of K.
    #[inline(always)]
    pub fn place_of_pair<T>(&self, a: &Attention<T>, pair: u32, block_m: u32) -> u32 {
        let group = a.nheads / divisor(a.nheads_k);
        pair % divisor(self.heads) * group * places_of_head(a, block_m)
    }

    /// Waits until the sums of a head of K are those of the head before in its place no more.
    #[inline(always)]
    #[track_caller]
    pub fn take_over<T>(&self, a: &Attention<T>, pair: u32, block_n: u32) {
        if pair >= self.heads {
            self.finished(pair - self.heads).wait(FINISHERS * key_blocks(a, block_n));
        }
    }

    /// A block of keys of a head of K has added all it has. Said by the thread that did, when its additions have ended.
    #[inline(always)]
    #[track_caller]
    pub fn add(&self, pair: u32) {
        self.added(pair).arrive();
    }

    /// Waits until all blocks of keys of a head of K, so many, have.
    #[inline(always)]
    #[track_caller]
    pub fn wait_until_added(&self, pair: u32, key_blocks: u32) {
        self.added(pair).wait(key_blocks);
    }

    /// A warp has finished its share of a head of K, and cleared its sums. Said by a thread of it, when its copies have ended.
    #[inline(always)]
    #[track_caller]
    pub fn finish(&self, pair: u32) {
        self.finished(pair).arrive();
    }

    /// Before the launch: no head is further than this.
    #[inline(always)]
    #[track_caller]
    pub fn clear(&self, pair: u32) {
        self.added(pair).clear();
        self.finished(pair).clear();
    }

    /// The first heads find their sums cleared.
    #[inline(always)]
    pub fn is_first(&self, pair: u32) -> bool {
        pair < self.heads
    }
}

/// The number of a head of K of a sequence.
#[inline(always)]
pub(super) fn pair<T>(a: &Attention<T>, sequence: &Sequence, head_k: u32) -> u32 {
    sequence.batch * a.nheads_k + head_k
}

/// Places that the sums of a head of Q take: whole blocks of queries.
#[inline(always)]
pub(super) fn places_of_head<T>(a: &Attention<T>, block_m: u32) -> u32 {
    a.seqlen_q.div_ceil(block_m) * block_m
}

/// Blocks of keys of a head of K; not 0.
#[inline(always)]
pub(super) fn key_blocks<T>(a: &Attention<T>, block_n: u32) -> u32 {
    divisor(a.seqlen_k.div_ceil(block_n))
}
