//! The pass for wide heads: of each block of queries one warpgroup computes P and sums dV, the other computes dS and
//! sums dK. One runs ahead of the other, so that one multiplies while the other computes.
//!
//! A block of threads has so few keys that what it adds to dQ would take longer than all its products, at the rate at
//! which the L2 cache adds. So two blocks of threads are a cluster: each has keys of its own, and sends its dS to the other.
//! Of dQ each finds half of the columns, over the keys of both, which halves the additions; of Q and dO each fetches half,
//! for both.
mod consumer;
mod memory;
mod queries;
mod turns;

use super::memory::Destinations;
use super::order::key_block_in_order;
use super::producer::load;
use super::shares::{of_two_passes, own_work};
use super::{CLAIMED, GROUP_ROWS, GROUPS, Params, config_of, key_block_at, walk};
use crate::attention::Attention;
use crate::config::Config;
use crate::schedule::{self, KeyBlock};
use consumer::SplitConsumer;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::matrix::PackedElement;
use cuda_std::thread::{block_idx_x, lane_id, thread_idx_x};
use cuda_std::warp::{ALL, shuffle};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warpgroup_id};
use cuda_std::{cluster, fence, grid, kernel};
use memory::Memory;

/// Blocks of threads that have the same queries.
const CLUSTER: u32 = 2;

/// Warps that multiply.
const WARPS: u32 = GROUPS * WARPGROUP / 32;

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(
        16 * STEPS == BLOCK_M && 8 * S_COLUMNS == BLOCK_M && 8 * D_COLUMNS == HEADDIM && 4 * Q_COLUMNS == D_COLUMNS
    );
    assert!(BLOCK_N == GROUP_ROWS as usize && BLOCK_M == GROUP_ROWS as usize && 2 * HALF == HEADDIM);
    Config {
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        claimed_registers: CLAIMED[1],
        // P and dP of those that sum dK, and dK.
        accumulators: (2 * Accumulator::<1, S_COLUMNS>::REGISTERS + Accumulator::<1, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: Memory::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>::BYTES,
        barriers: 10,
        ..config_of(T::DTYPE, HEADDIM, Some(CAUSAL))
    }
}

const fn general_config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
>() -> Config {
    let split = config::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, false>();
    Config { causal: None, general: true, ..split }
}

const fn shared_config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    of_two_passes(config::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL>())
}

/// With the destinations.
const fn ordered_config<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    let split = config::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL>();
    let shared_bytes = split.shared_bytes.next_multiple_of(16) + Destinations::BYTES;
    // A turn and its end: at both places where each warpgroup adds, and where a warp sees to it.
    Config { shared_bytes, barriers: split.barriers + 2 * (2 * GROUPS + 1), ..split }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ: for heads so wide that a warpgroup can
/// have the sums of only one of them. Grid: `2 ceil(seqlen_k / 2 BLOCK_N) * nheads_k * batch`.
///
/// Sᵀ is `S_COLUMNS`, and dK and dV are `D_COLUMNS` blocks of eight columns wide, Pᵀ `STEPS` of sixteen. A block of threads
/// finds dQ of `HALF` columns, each warpgroup `Q_COLUMNS` blocks of eight of them, which it adds from its registers: shared
/// memory has no room for them. Tensors may have fewer columns than `HEADDIM`.
#[kernel(
    name = "flash3_bwd_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            // As in the table of narrow heads: 294, 525, 627, 642 (218, 348, 368, 367); causal 167, 404, 607, 650
            // (155, 312, 416, 406).
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
        CAUSAL in [false, true],
    config = config,
    table = SPLIT,
)]
pub fn split<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::ONE }>(
        &p,
        &a,
        |a| key_block_at::<T, CAUSAL>(a, CLUSTER * BLOCK_N as u32, p.heads_in_turn, block_idx_x() / CLUSTER),
    );
}

/// [`split()`], with what its arguments ask for of a window, a cap, ALiBi, and any scale, as in [`general()`](super::general()).
/// Grid: as for [`split()`].
#[kernel(
    name = "flash3_bwd_general_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
    config = general_config,
    table = GENERAL_SPLIT,
)]
pub fn split_general<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, false, { walk::GENERAL }>(
        &p,
        &a,
        |a| schedule::key_block_at(a, CLUSTER * BLOCK_N as u32, block_idx_x() / CLUSTER),
    );
}

/// [`split()`], where several clusters [share](super::Shares) the queries of a block of keys, as in [`shared()`](super::shared()).
/// Grid: of clusters, as the blocks of threads there.
#[kernel(
    name = "flash3_bwd_shared_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
        CAUSAL in [false, true],
    config = shared_config,
    table = SHARED_SPLIT,
)]
pub fn split_shared<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let number = block_idx_x() / CLUSTER;
    let keys =
        |a: &Attention<T>, number| key_block_at::<T, CAUSAL>(a, CLUSTER * BLOCK_N as u32, p.heads_in_turn, number);
    if number < p.shares.first {
        pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::ONE }>(
            &p,
            &a,
            |a| keys(a, number),
        );
    } else {
        pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::SHARED }>(
            &p,
            &a,
            |a| keys(a, p.shares.own(CLUSTER).number),
        );
    }
}

/// [`split()`], whose blocks of keys add to dQ in their order, as those of [`ordered()`](super::ordered()). Grid: as for
/// [`split()`].
#[kernel(
    name = "flash3_bwd_ordered_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    cluster = CLUSTER,
    for T in [f16, bf16],
        (HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS) in [
            // 348, 442, 554, 575 (216, 290, 383, 360); causal 226, 333, 503, 577 (156, 239, 366, 395), whose gradients are not
            // deterministic.
            (256, 128, 64, 64, 4, 8, 32, 8),
        ],
        CAUSAL in [false, true],
    config = ordered_config,
    table = ORDERED_SPLIT,
)]
pub fn split_ordered<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, { walk::ORDERED }>(
        &p,
        &a,
        |a| key_block_in_order(a, p.heads_in_turn, block_idx_x() / CLUSTER),
    );
}

/// The keys of a cluster, with dQ as a `WALK` has it ([`walk`]).
#[inline(always)]
#[track_caller]
fn pass<
    T: PackedElement,
    const HEADDIM: usize,
    const HALF: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
    const WALK: u32,
>(
    p: &Params,
    a: &Attention<T>,
    keys_of: impl Fn(&Attention<T>) -> KeyBlock,
) {
    let work = own_work::<T, CAUSAL, WALK>(p, a, keys_of(a), BLOCK_M as u32, BLOCK_N as u32, CLUSTER);
    if work.block.rows() == 0 {
        // As in `whole`.
        grid::wait_for_prerequisites();
        return;
    }
    let memory = Memory::<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>::of_block();
    if thread_idx_x() == 0 {
        memory.init_barriers();
        fence::mbarrier_init();
    }
    cluster::sync();
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let consumer = SplitConsumer { p, a, memory, work };
    let consumer = if WALK == walk::ORDERED { consumer.anew::<CAUSAL>(warpgroup_id()) } else { consumer };
    match warpgroup_id() {
        0 => {
            release_registers::<40>();
            if consumer.work.steps() > 0 {
                match thread_idx_x() {
                    0 => load::<_, HEADDIM, BLOCK_M, BLOCK_N, CLUSTER, CAUSAL, WALK>(
                        p,
                        a,
                        memory.inputs,
                        consumer.work.block,
                    ),
                    32 => consumer.load_other_keys(),
                    thread @ 64.. if WALK == walk::ORDERED => {
                        consumer.give_turns::<CAUSAL>(shuffle(ALL, thread / 32 - 2, 0))
                    }
                    _ => {}
                }
            }
        }
        1 => {
            claim_registers::<{ CLAIMED[1] }>();
            let consumer = if WALK == walk::ORDERED { consumer.anew::<CAUSAL>(lane_id()) } else { consumer };
            let mut d_v = consumer.values::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, CAUSAL, WALK>();
            // What the blocks tell each other finds them until both have ended.
            cluster::arrive();
            if !walk::is_shared(WALK) || p.shares.sum(p.shares.own(CLUSTER), CLUSTER, [&mut d_v]) {
                d_v.store_rows(consumer.own_rows(
                    consumer.keys_once_known::<D_COLUMNS, WALK>(&d_v),
                    p.backward.d_v,
                    a.headdim_v,
                ));
            }
            cluster::wait();
        }
        _ => {
            claim_registers::<{ CLAIMED[1] }>();
            let mut d_k = consumer.keys::<STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, WALK>();
            cluster::arrive();
            if !walk::is_shared(WALK) || p.shares.sum(p.shares.own(CLUSTER), CLUSTER, [&mut d_k]) {
                d_k.map(|_, _, d_k| d_k * a.softmax_scale);
                d_k.store_rows(consumer.own_rows(
                    consumer.keys_once_known::<D_COLUMNS, WALK>(&d_k),
                    p.backward.d_k,
                    a.headdim,
                ));
            }
            cluster::wait();
        }
    }
}
