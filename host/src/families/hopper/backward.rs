//! The launch of FlashAttention-3's backward pass: its tensor maps, which heads take turns, and at what.
use cuda_std::{Global, Kernel};
use kernels::Config;
use kernels::flash2_backward;
use kernels::flash3_backward::{Order, Params, Ring, Shares, can_finish_in_order};

use super::MULTIPROCESSORS;
use super::maps::{Extents, map};
use crate::error::Result;
use crate::launch::Launch;
use crate::problem::Problem;
use crate::target::Resources;

/// How blocks of keys meet at the sums of dQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// Each adds when it can, or has them to itself.
    AsTheyCome,
    /// Heads take turns at them.
    InRing(Turns),
    /// They add in their order.
    InOrder {
        /// [`Order::finishes`].
        finishes: bool,
    },
}

/// What blocks of threads do together.
#[derive(Clone, Copy, Debug)]
pub struct Together {
    /// How they meet at the sums of dQ.
    pub sums: Sums,
    /// Of a [`ring`] or of [who has added](counters_of_order).
    pub counters: Global<u32>,
    /// Which of them share keys.
    pub shares: Shares,
}

/// The launch, in so many blocks of threads, for a problem with rows and keys.
pub fn launch(
    kernel: &'static Kernel<Params, Config>,
    blocks: u64,
    problem: &Problem,
    backward: flash2_backward::Params,
    together: Together,
    machine: &Resources,
) -> Result<Launch> {
    let Together { sums, counters, shares } = together;
    let Config { dtype, headdim, headdim_v, block_m, block_n, .. } = kernel.config;
    let of_queries = |columns| Extents::of_queries(problem, columns);
    let of_keys = |columns| Extents::of_keys(problem, columns);
    let attention = &backward.attention;
    let q = map("q", &attention.q, dtype, (block_m, headdim), of_queries(problem.headdim))?;
    let k = map("k", &attention.k, dtype, (block_n, headdim), of_keys(problem.headdim))?;
    let v = map("v", &attention.v, dtype, (block_n, headdim_v), of_keys(problem.headdim_v))?;
    let d_o = map("dout", &backward.d_o, dtype, (block_m, headdim_v), of_queries(problem.headdim_v))?;
    let in_turn = match sums {
        Sums::AsTheyCome => heads_in_turn(problem, &kernel.config),
        Sums::InOrder { .. } => heads_in_turn_in_order(problem, &kernel.config),
        Sums::InRing(turns) => turns.in_turn,
    };
    let parameters = Params {
        q: (machine.tensor_map)(&q)?,
        k: (machine.tensor_map)(&k)?,
        v: (machine.tensor_map)(&v)?,
        d_o: (machine.tensor_map)(&d_o)?,
        backward,
        heads_in_turn: in_turn,
        ring: match sums {
            Sums::InRing(Turns { heads, lag, .. }) => Ring { counters, heads, lag },
            _ => Ring::NONE,
        },
        order: match sums {
            Sums::InOrder { finishes } => Order { counters, finishes: finishes.into() },
            _ => Order::NONE,
        },
        shares,
    };
    Launch::new(kernel, blocks, parameters)
}

/// What the heads that take turns may have of Q, dO and the sums of dQ, in bytes: it stays in the L2 cache.
const CACHED: u64 = 32 << 20;

/// How many heads of K take turns under a causal mask: as many as have theirs in the cache, at least one.
fn heads_in_turn(problem: &Problem, config: &Config) -> u32 {
    heads_within(CACHED, problem, config).max(1)
}

/// The same where blocks of keys add in their order, with or without a mask. With more, what a block of keys has added has left
/// the cache when the next one adds; with fewer, keys of a head begin at the same time, and wait. On an H100, in TFLOP/s with 32,
/// 16 and 8 MiB: headdim 128, causal, 512 and 1024 tokens 218, 317; 236, 345; 239, 354; headdim 64, no mask 291, 395; 319, 427;
/// 320, 419; headdim 256, no mask, 1024 and 2048 tokens 406, 494; 435, 517; 442, 505. One head and two, where the cache holds none:
/// headdim 256, causal, 16384 tokens 577 and 479; without a mask headdim 128 617 and 645, headdim 256 599 and 595, with 8192 tokens
/// 582 and 593.
fn heads_in_turn_in_order(problem: &Problem, config: &Config) -> u32 {
    let is_causal = problem.is_causal();
    let cached = if config.block_m <= 64 && (is_causal || problem.seqlen_k <= 1024) { 8 << 20 } else { 16 << 20 };
    let least = if is_causal { 1 } else { 2 };
    heads_within(cached, problem, config).max(least)
}

/// How many heads of K have their Q, dO and sums of dQ in so many bytes.
fn heads_within(bytes: u64, problem: &Problem, config: &Config) -> u32 {
    let heads = heads_of_k(problem);
    (bytes / of_head(problem, config).max(1)).min(heads) as u32
}

/// Whether the first keys finish dQ where blocks of keys add in their order. On an H100 without and with, causal, headdim 128, in
/// TFLOP/s: 185 and 218 at 512 tokens, 577 and 557 at 8k, 615 and 581 at 16k. A sum of less than 2^-126 is 0 where it is added to
/// memory, and is not where it is added in registers: so sequences of a batch that are not equally long are all finished in the
/// same way.
pub fn finishes_in_order(problem: &Problem, config: &Config) -> bool {
    let is_short = problem.seqlen_k <= 2048 && problem.varlen.is_none();
    is_short && can_finish_in_order(config.headdim, config.block_m)
}

/// Whether an order is the fastest way, as well: where there are waves of blocks of threads enough that what the first ones wait
/// does not count, blocks of keys of a head are few, and each has queries enough to fall behind the next without a wait. On an H100, in TFLOP/s, in order and else: headdim 256, 512 tokens 348
/// and 296, causal 226 and 167, 1024 tokens 442 and 424, causal 333 and 286, 2048 tokens 517 and 528, causal 430 and 419; headdim
/// 128, 512 tokens 379 and 358, causal 239 and 210, 1024 tokens 486 and 500, causal 354 and 327, 2048 tokens, causal, 454 and 467;
/// headdim 64, 512 tokens 322 and 317, causal 197 and 213.
pub fn is_fast_in_order(problem: &Problem, config: &Config) -> bool {
    let key_blocks = key_blocks(problem, Order::BLOCK_N);
    let heads = heads_of_k(problem);
    // Of a cluster each block of threads has a part of the keys.
    let wave = MULTIPROCESSORS * u64::from(config.block_n) / u64::from(Order::BLOCK_N);
    // Blocks of keys that several heads of Q share are longer, so fewer waves are enough. 32 heads on 4, causal, 512 tokens, in
    // TFLOP/s, in order and else: headdim 64 224 and 187, headdim 128 238 and 174; headdim 256, 16 on 4, 239 and 205.
    let is_grouped = problem.is_causal() && problem.nheads / problem.nheads_k >= 4 && (3..=4).contains(&key_blocks);
    let least = if is_grouped { 7 * wave / 2 } else { 12 * wave };
    let are_enough = heads.saturating_mul(key_blocks) >= least;
    let are_few = match (config.headdim, problem.is_causal()) {
        (256, true) => (3..=16).contains(&key_blocks),
        (256, false) => (3..=8).contains(&key_blocks),
        (128, true) => (4..=8).contains(&key_blocks),
        (128, false) => (2..=4).contains(&key_blocks),
        (64, false) => (3..=4).contains(&key_blocks),
        (64, true) => is_grouped,
        _ => false,
    };
    are_enough && are_few && problem.seqlen_q >= problem.seqlen_k && problem.varlen.is_none()
}

/// How many counters there are where blocks of keys add to dQ in their order.
pub fn counters_of_order(problem: &Problem) -> u64 {
    let heads = heads_of_k(problem);
    heads.saturating_mul(key_blocks(problem, Order::BLOCK_N)).saturating_mul(Order::COUNTERS.into())
}

/// Heads of K of all sequences.
pub fn heads_of_k(problem: &Problem) -> u64 {
    (problem.nheads_k as u64).saturating_mul(problem.batch as u64)
}

/// Blocks of so many keys of the longest sequence.
pub(super) fn key_blocks(problem: &Problem, block_n: u32) -> u64 {
    (problem.seqlen_k as u64).div_ceil(block_n.max(1).into())
}

/// What of the heads that run at the same time may be used again and again, in bytes: it stays in the L2 cache, beside
/// what only passes through.
const USED_AGAIN: u64 = 40 << 20;

/// Whether it pays that a block of threads takes all keys of a head: where there are heads for all multiprocessors, and
/// Q, dO and the sums of dQ of those that run stay in the cache, where each block of keys finds them. Under a causal mask
/// a block of keys meets half of them on average. On an H100, at 128 heads and more, 16384 tokens, as a part of the speed
/// of [`whole`](kernels::flash3_backward::whole()): headdim 64, 512 tokens 1.06, causal 1.38, 1024 tokens 0.65, causal
/// 1.00; headdim 128, 512 tokens 0.81, causal 1.19, 1024 tokens 0.58, causal 0.78.
pub fn takes_whole_heads(problem: &Problem, config: &Config) -> bool {
    let heads = heads_of_k(problem);
    // Each multiprocessor has a head for five sixths of the time, or more.
    let waves = heads.div_ceil(MULTIPROCESSORS);
    let are_enough = heads.saturating_mul(6) >= waves.saturating_mul(MULTIPROCESSORS).saturating_mul(5);
    let met = of_head(problem, config) / if problem.is_causal() { 2 } else { 1 };
    heads > 0 && are_enough && met.saturating_mul(MULTIPROCESSORS) <= USED_AGAIN
}

/// Up to so many keys whole heads, where they pay, are faster than heads that take turns at sums. On an H100, headdim 64, causal,
/// in TFLOP/s, whole and in turn: 512 tokens 211 and 189, 1024 tokens 250 and 303.
pub const HEADS_RATHER_THAN_RINGS_UP_TO: usize = 512;

/// The most that the sums of dQ of a ring take, in bytes, or under a causal mask twice as much, as a block of keys meets half of
/// the queries: with the Q and dO of the heads that run at the same time they stay in the L2 cache. At 16k tokens they do not,
/// at headdim 128 without a mask nor at 8k (662 TFLOP/s for 670).
const RING_BYTES: u64 = 24 << 20;

/// How heads of K take turns at sums of dQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    /// [`Params::heads_in_turn`].
    pub in_turn: u32,
    /// [`Ring::heads`].
    pub heads: u32,
    /// [`Ring::lag`].
    pub lag: u32,
    /// Elements of the sums.
    pub sums: u64,
    /// Blocks of queries of the last heads, which the pass does not finish.
    pub left: u64,
}

/// How the heads of a problem take turns at sums of dQ, where that pays: where they fit the cache, and there are more heads
/// than have a place. A head is finished a wave of blocks of threads and a fifth after its last keys, and its place taken over
/// another wave less a fifth later: fewer places would let blocks wait, and more would not stay in the cache. Under a causal mask
/// a quarter of a wave's heads take turns, and at least two: then waves mix long blocks and short ones. Measured on an H100.
pub fn ring(problem: &Problem, config: &Config) -> Option<Turns> {
    let rows = (problem.seqlen_q as u64).next_multiple_of(config.block_m.max(1).into());
    let group = (problem.nheads / problem.nheads_k) as u64;
    let of_head = rows.saturating_mul(group).saturating_mul(config.headdim.into());
    let wave = MULTIPROCESSORS.div_ceil(key_blocks(problem, config.block_n).max(1));
    let in_turn = if problem.is_causal() { wave.div_ceil(4).max(2) } else { 1 };
    let lag = in_turn + (6 * wave).div_ceil(5);
    let (heads, all) = (2 * (in_turn + wave), heads_of_k(problem));
    let sums = of_head.saturating_mul(heads);
    let met = sums.saturating_mul(4) / if problem.is_causal() { 2 } else { 1 };
    let pays = problem.varlen.is_none() && heads < all && met <= RING_BYTES;
    let left = lag * group * (rows / u64::from(config.block_m.max(1)));
    pays.then_some(Turns { in_turn: in_turn as u32, heads: heads as u32, lag: lag as u32, sums, left })
}

/// What the queries of a head of K have of Q, dO and the sums of dQ, in bytes.
fn of_head(problem: &Problem, config: &Config) -> u64 {
    // Two bytes each of Q and dO, four of the sums.
    let row = 8 * u64::from(config.headdim);
    let group = (problem.nheads / problem.nheads_k) as u64;
    (problem.seqlen_q as u64).saturating_mul(row).saturating_mul(group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;
    use kernels::flash3_backward::{RING, WHOLE};

    #[test]
    fn whole_heads_where_they_fill_the_machine_and_fit_the_cache() {
        let takes = |batch, seqlen, nheads, headdim, causal| {
            let of = Layout::contiguous(DType::BF16, &[batch, seqlen, nheads, headdim]).expect("small");
            let problem = Problem::new(&of, &of, &of, &AttentionOptions::new().causal(causal)).expect("valid");
            takes_whole_heads(&problem, &Config { headdim: headdim as u32, ..WHOLE[0].config })
        };
        assert!(takes(32, 512, 32, 64, false) && takes(32, 512, 16, 128, true));
        assert!(!takes(32, 512, 16, 128, false) && !takes(16, 1024, 16, 128, true));
        // A machine's worth of heads, and a few too many.
        assert!(takes(1, 256, 132, 64, false) && !takes(1, 256, 140, 64, false) && !takes(1, 256, 16, 64, false));
    }

    #[test]
    fn heads_take_turns_at_sums_that_fit_the_cache() {
        let turns = |batch, seqlen, nheads, causal| {
            let of = Layout::contiguous(DType::BF16, &[batch, seqlen, nheads, 128]).expect("small");
            let problem = Problem::new(&of, &of, &of, &AttentionOptions::new().causal(causal)).expect("valid");
            let of_table =
                |kernel: &&Kernel<Params, Config>| kernel.config.headdim == 128 && kernel.config.block_m == 64;
            ring(&problem, &RING.iter().find(of_table).expect("a kernel").config)
        };
        // Eight blocks of keys a head: a wave takes 17 heads.
        let full = Turns { in_turn: 1, heads: 36, lag: 22, sums: 36 * 1024 * 128, left: 22 * 16 };
        assert_eq!(turns(16, 1024, 16, false), Some(full));
        let causal = Turns { in_turn: 5, heads: 44, lag: 26, sums: 44 * 1024 * 128, left: 26 * 16 };
        assert_eq!(turns(16, 1024, 16, true), Some(causal));
        // As many places as heads; sums of 32 MB, which are too many without a mask.
        assert_eq!((turns(1, 1024, 36, false), turns(8, 8192, 16, false)), (None, None));
        assert!(turns(8, 8192, 16, true).is_some());
    }

    #[test]
    fn four_counters_a_block_of_keys_say_who_has_added() {
        let counters = |batch, seqlen, nheads| {
            let of = Layout::contiguous(DType::BF16, &[batch, seqlen, nheads, 128]).expect("small");
            let problem = Problem::new(&of, &of, &of, &AttentionOptions::new()).expect("valid");
            counters_of_order(&problem)
        };
        assert_eq!((counters(32, 512, 16), counters(1, 300, 16)), (32 * 16 * 4 * 4, 16 * 3 * 4));
    }

    #[test]
    fn as_many_heads_take_turns_as_the_cache_holds() {
        let in_turn = |batch, seqlen, nheads, nheads_k| {
            let of = |heads| Layout::contiguous(DType::BF16, &[batch, seqlen, heads, 128]).expect("small");
            let problem = Problem::new(&of(nheads), &of(nheads_k), &of(nheads_k), &AttentionOptions::new());
            heads_in_turn(&problem.expect("valid"), &Config { headdim: 128, ..WHOLE[0].config })
        };
        assert_eq!(in_turn(4, 8192, 16, 16), 4);
        assert_eq!(in_turn(4, 8192, 16, 8), 2);
        // One where the cache holds none, and no more than there are.
        assert_eq!((in_turn(1, 65536, 8, 8), in_turn(2, 100, 4, 2)), (1, 4));
    }

    /// (batch, seqlen, nheads, headdim), with the kernel's `block_m`.
    fn of_order(shape: [usize; 4], block_m: u32, causal: bool) -> (Problem, Config) {
        let of = Layout::contiguous(DType::BF16, &shape).expect("small");
        let problem = Problem::new(&of, &of, &of, &AttentionOptions::new().causal(causal)).expect("valid");
        let (headdim, block_n) = (shape[3] as u32, if shape[3] > 128 { 64 } else { 128 });
        (problem, Config { headdim, block_m, block_n, ..WHOLE[0].config })
    }

    #[test]
    fn fewer_heads_take_turns_in_order() {
        let in_turn = |shape, block_m, causal| {
            let (problem, config) = of_order(shape, block_m, causal);
            heads_in_turn_in_order(&problem, &config)
        };
        assert_eq!((in_turn([32, 512, 16, 128], 64, true), in_turn([32, 512, 32, 64], 128, true)), (16, 64));
        assert_eq!((in_turn([1, 16384, 16, 128], 64, true), in_turn([1, 16384, 16, 128], 80, false)), (1, 2));
        assert_eq!((in_turn([16, 1024, 8, 256], 64, false), in_turn([8, 2048, 8, 256], 64, false)), (4, 4));
    }

    #[test]
    fn an_order_is_fast_where_many_heads_are_short() {
        let is_fast = |shape, causal| {
            let (problem, config) = of_order(shape, 64, causal);
            is_fast_in_order(&problem, &config)
        };
        assert!(is_fast([32, 512, 16, 128], false) && is_fast([16, 1024, 16, 128], true));
        assert!(!is_fast([16, 1024, 16, 128], false) && !is_fast([8, 2048, 16, 128], true));
        assert!(is_fast([16, 1024, 8, 256], false) && is_fast([8, 2048, 8, 256], true));
        assert!(is_fast([32, 512, 32, 64], false) && !is_fast([32, 512, 32, 64], true));
        // Of heads that share K and V fewer waves are enough, under a causal mask alone.
        let shares = |nheads_k, headdim, causal| {
            let of = |nheads| Layout::contiguous(DType::BF16, &[32, 512, nheads, headdim]).expect("small");
            let (q, k) = (of(32), of(nheads_k));
            let problem = Problem::new(&q, &k, &k, &AttentionOptions::new().causal(causal)).expect("valid");
            is_fast_in_order(&problem, &of_order([32, 512, 32, headdim], 64, causal).1)
        };
        assert!(shares(4, 128, true) && shares(4, 64, true) && shares(4, 256, true));
        assert!(!shares(4, 128, false) && !shares(2, 128, true));
        // Few waves: the first blocks wait, and nothing comes after them. And few queries.
        assert!(!is_fast([2, 512, 16, 128], true));
        let of = |seqlen| Layout::contiguous(DType::BF16, &[64, seqlen, 16, 128]).expect("small");
        let (_, config) = of_order([64, 512, 16, 128], 64, false);
        let few = Problem::new(&of(64), &of(512), &of(512), &AttentionOptions::new()).expect("valid");
        assert!(!is_fast_in_order(&few, &config));
    }

    #[test]
    fn short_sequences_are_finished_where_they_are_summed() {
        let finishes = |shape, block_m| {
            let (problem, config) = of_order(shape, block_m, true);
            finishes_in_order(&problem, &config)
        };
        assert!(finishes([1, 2048, 16, 128], 64) && finishes([1, 2048, 8, 256], 64) && finishes([1, 512, 32, 64], 128));
        assert!(!finishes([1, 4096, 16, 128], 64) && !finishes([1, 2048, 16, 128], 80));
    }
}
