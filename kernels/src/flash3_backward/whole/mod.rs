//! The pass for narrow heads: each warpgroup sums dK and dV of 64 keys.
//!
//! The second group starts late, so that one's exponentials fall under the other's products. dQ leaves through shared
//! memory: one more thread has the copy engine add it to its sums.
mod hand_over;
mod memory;

use super::finisher::{FINISHERS, Finisher};
use super::general::Probabilities;
use super::order::{key_block_in_order, sum_in_order};
use super::producer::{add_queries, load};
use super::shares::{of_two_passes, own_work};
use super::{
    CLAIMED, GROUP_ROWS, GROUPS, Params, config_of, is_tight, key_block_at, mask_of, next_keys, release, walk,
};
use crate::attention::{Attention, Tensor, Untyped};
use crate::config::Config;
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use crate::scores::Scores;
use cuda_std::barrier::NamedBarriers;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, ex2, fma, unknown, unknown_before};
use cuda_std::matrix::PackedElement;
use cuda_std::thread::{block_idx_x, pause, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::{ALL, shuffle};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, InFlight, Registers, TransposedRows};
use cuda_std::{SmemTile, fence, grid, kernel};
use hand_over::hand_over;
use memory::Memory;

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    assert!(16 * STEPS == BLOCK_M && 8 * S_COLUMNS == BLOCK_M && 8 * D_COLUMNS == HEADDIM);
    assert!(BLOCK_N == (GROUPS * GROUP_ROWS) as usize && Q_COLUMNS * 8 * BLOCK_N == BLOCK_M * HEADDIM);
    Config {
        from_keys: FROM_KEYS,
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        claimed_registers: if is_tight(HEADDIM, BLOCK_M) { CLAIMED[0] } else { CLAIMED[1] },
        // S and dP, dK and dV.
        accumulators: 2 * (Accumulator::<1, S_COLUMNS>::REGISTERS + Accumulator::<1, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: Memory::<T, HEADDIM, BLOCK_M, BLOCK_N>::BYTES,
        barriers: 5,
        ..config_of(T::DTYPE, HEADDIM, Some(CAUSAL))
    }
}

/// With what the warps have that finish dQ.
const fn ring_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    let whole =
        config::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS>();
    Config { shared_bytes: whole.shared_bytes.next_multiple_of(16) + Finisher::<T, HEADDIM>::BYTES, ..whole }
}

const fn general_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
>() -> Config {
    let whole = config::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, false, 0>();
    Config { causal: None, general: true, claimed_registers: CLAIMED[0], ..whole }
}

const fn shared_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    of_two_passes(config::<
        T,
        HEADDIM,
        BLOCK_M,
        BLOCK_N,
        STEPS,
        S_COLUMNS,
        D_COLUMNS,
        Q_COLUMNS,
        TRANSPOSED,
        CAUSAL,
        FROM_KEYS,
    >())
}

const fn ring_shared_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    of_two_passes(ring_config::<
        T,
        HEADDIM,
        BLOCK_M,
        BLOCK_N,
        STEPS,
        S_COLUMNS,
        D_COLUMNS,
        Q_COLUMNS,
        TRANSPOSED,
        CAUSAL,
        FROM_KEYS,
    >())
}

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ. Grid:
/// `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`.
///
/// Sᵀ is `S_COLUMNS`, dK `D_COLUMNS` and a warpgroup's part of dQ `Q_COLUMNS` blocks of eight columns wide, Pᵀ `STEPS`
/// of sixteen. dQ is `TRANSPOSED` where its part has 64 columns of the head and all queries, rather than 64 queries.
/// Tensors may have fewer columns than `HEADDIM`. `FROM_KEYS`: [`Config::from_keys`].
#[kernel(
    name = "flash3_bwd_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            // On an H100, TFLOP/s at 512, 2k, 8k and 16k tokens, with what goes before and after; in brackets cuDNN's.
            // 278, 509, 605, 602 (249, 421, 469, 480)
            (64, 128, 128, 8, 16, 8, 8, false, false, 0),
            // 149, 375, 545, 606 (149, 315, 425, 455)
            (64, 128, 128, 8, 16, 8, 8, false, true, 0),
            // 315, 553, 655, 642 (296, 507, 592, 594)
            (128, 64, 128, 4, 8, 16, 8, true, false, 0),
            // 171, 437, 607, 670 (171, 394, 532, 585)
            (128, 64, 128, 4, 8, 16, 8, true, true, 0),
            // 295, 558, 683, 708 (296, 507, 592, 594)
            (128, 80, 128, 5, 10, 16, 10, true, false, 2048),
            // 155, 422, 618, 688 (171, 394, 532, 585)
            (128, 80, 128, 5, 10, 16, 10, true, true, 8192),
        ],
    config = config,
    table = WHOLE,
)]
pub fn whole<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let block = key_block_at::<T, CAUSAL>(&a, BLOCK_N as u32, p.heads_in_turn, block_idx_x());
    pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::ONE }>(
        &p,
        &a,
        || block,
    );
}

/// [`whole()`], with what its arguments ask for of a window, a cap, ALiBi, and any scale. Grid: as for [`whole()`].
#[kernel(
    name = "flash3_bwd_general_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED) in [
            (64, 128, 128, 8, 16, 8, 8, false),
            (128, 64, 128, 4, 8, 16, 8, true),
        ],
    config = general_config,
    table = GENERAL,
)]
pub fn general<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let block = schedule::key_block_at(&a, BLOCK_N as u32, block_idx_x());
    pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, false, { walk::GENERAL }>(
        &p,
        &a,
        || block,
    );
}

/// [`whole()`], with sums of dQ in a [`Ring`](super::Ring) of heads, which it also finishes: all but those of the last heads.
/// All sequences are equally long. Grid: as for [`whole()`].
#[kernel(
    name = "flash3_bwd_ring_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            (64, 128, 128, 8, 16, 8, 8, false, false, 0),
            (64, 128, 128, 8, 16, 8, 8, false, true, 0),
            (128, 64, 128, 4, 8, 16, 8, true, false, 0),
            (128, 64, 128, 4, 8, 16, 8, true, true, 0),
        ],
    config = ring_config,
    table = RING,
)]
pub fn ring<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let block = key_block_at::<T, CAUSAL>(&a, BLOCK_N as u32, p.heads_in_turn, block_idx_x());
    pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::RING }>(
        &p,
        &a,
        || block,
    );
}

/// [`whole()`], where several blocks of threads [share](super::Shares) the queries of a block of keys: of the last ones, or of all. Grid: a block
/// of threads for each block of keys that is not shared, and [`Shares::parts`](super::Shares::parts) for each that is.
///
/// An entry point of its own, as the compiler orders the steps of a pass less well beside another pass.
#[kernel(
    name = "flash3_bwd_shared_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            (64, 128, 128, 8, 16, 8, 8, false, false, 0),
            (64, 128, 128, 8, 16, 8, 8, false, true, 0),
            (128, 64, 128, 4, 8, 16, 8, true, false, 0),
            (128, 64, 128, 4, 8, 16, 8, true, true, 0),
            (128, 80, 128, 5, 10, 16, 10, true, false, 2048),
            (128, 80, 128, 5, 10, 16, 10, true, true, 8192),
        ],
    config = shared_config,
    table = SHARED,
)]
pub fn shared<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let keys = |number| key_block_at::<T, CAUSAL>(&a, BLOCK_N as u32, p.heads_in_turn, number);
    if block_idx_x() < p.shares.first {
        let block = keys(block_idx_x());
        pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::ONE }>(
            &p,
            &a,
            || block,
        );
    } else {
        let block = keys(p.shares.own(1).number);
        pass::<
            T,
            HEADDIM,
            BLOCK_M,
            BLOCK_N,
            STEPS,
            S_COLUMNS,
            D_COLUMNS,
            Q_COLUMNS,
            TRANSPOSED,
            CAUSAL,
            { walk::SHARED },
        >(&p, &a, || block);
    }
}

/// [`ring()`], where several blocks of threads [share](super::Shares) the queries of a block of keys: of the last ones. Grid: a block
/// of threads for each block of keys that is not shared, and [`Shares::parts`](super::Shares::parts) for each that is.
#[kernel(
    name = "flash3_bwd_ring_shared_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            (128, 64, 128, 4, 8, 16, 8, true, false, 0),
        ],
    config = ring_shared_config,
    table = SHARED_RING,
)]
pub fn ring_shared<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let keys = |number| key_block_at::<T, CAUSAL>(&a, BLOCK_N as u32, p.heads_in_turn, number);
    if block_idx_x() < p.shares.first {
        let block = keys(block_idx_x());
        pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::RING }>(
            &p,
            &a,
            || block,
        );
    } else {
        let block = keys(p.shares.own(1).number);
        pass::<
            T,
            HEADDIM,
            BLOCK_M,
            BLOCK_N,
            STEPS,
            S_COLUMNS,
            D_COLUMNS,
            Q_COLUMNS,
            TRANSPOSED,
            CAUSAL,
            { walk::SHARED_RING },
        >(&p, &a, || block);
    }
}

/// [`whole()`], whose blocks of keys add to dQ in their order ([`Order`](super::Order)): all gradients of a sequence are the same
/// bits in every run and in every batch. It finishes dQ, too. Grid: as for [`whole()`].
#[kernel(
    name = "flash3_bwd_ordered_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            // On an H100, TFLOP/s at 512, 1k, 4k and 16k tokens, with what goes before and after; in brackets cuDNN's, whose
            // gradients are not deterministic. 322, 432, 552, 576 (247, 341, 450, 454)
            (64, 128, 128, 8, 16, 8, 8, false, false, 0),
            // 197, 300, 484, 575 (149, 232, 376, 442)
            (64, 128, 128, 8, 16, 8, 8, false, true, 0),
            // 381, 485, -, - (297, 417, 549, 558)
            (128, 64, 128, 4, 8, 16, 8, true, false, 0),
            // 236, 352, 533, 618 (171, 286, 465, 549)
            (128, 64, 128, 4, 8, 16, 8, true, true, 0),
            // -, -, 613, 653
            (128, 80, 128, 5, 10, 16, 10, true, false, 2048),
        ],
    config = config,
    table = ORDERED,
)]
pub fn ordered<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    let block = key_block_in_order(&a, p.heads_in_turn, block_idx_x());
    pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::ORDERED }>(
        &p,
        &a,
        || block,
    );
}

/// dK and dV of one head of K and V, and dQ of the heads of Q that share it: [`ordered()`], `BLOCK_N` keys after the other.
/// Nobody else adds to dQ, so nobody waits. All gradients are the same bits as there. Pays where there are enough heads for all
/// multiprocessors. Grid: `nheads_k * batch`.
#[kernel(
    name = "flash3_bwd_heads_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, FROM_KEYS) in [
            // On an H100, TFLOP/s at 512, 1k and 2k tokens, with what goes before; in brackets those of `ordered`.
            // 306, 263, 260 (322, 432, 508)
            (64, 128, 128, 8, 16, 8, 8, false, false, 0),
            // 207, 247, 251 (197, 300, 409)
            (64, 128, 128, 8, 16, 8, 8, false, true, 0),
        ],
    config = config,
    table = HEADS,
)]
pub fn heads<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let a = p.backward.attention.of::<T>();
    pass::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, { walk::HEAD }>(
        &p,
        &a,
        || schedule::last_keys_of_head(&a, BLOCK_N as u32),
    );
}

/// The blocks of keys of a `WALK` ([`walk`]), from the first on.
#[inline(always)]
#[track_caller]
fn pass<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const WALK: u32,
>(
    p: &Params,
    a: &Attention<T>,
    first_block: impl Fn() -> KeyBlock,
) {
    // The threads of each kind ask for their keys, so that none keeps what others ask for.
    if WALK != walk::HEAD && first_block().rows() == 0 {
        // Who waits for this kernel relies on it that those before it have ended.
        grid::wait_for_prerequisites();
        return;
    }
    let memory = Memory::<T, HEADDIM, BLOCK_M, BLOCK_N>::of_block();
    if thread_idx_x() == 0 {
        memory.inputs.init_barriers(1);
        memory.outgoing.init();
        if walk::is_ring(WALK) {
            for warp in 0..FINISHERS {
                memory.finisher(warp).init();
            }
        }
        fence::mbarrier_init();
    }
    sync_threads();
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    match warpgroup_id() {
        0 => {
            if const { is_tight(HEADDIM, BLOCK_M) || WALK == walk::GENERAL } {
                release_registers::<24>();
            } else {
                release_registers::<40>();
            }
            let block = first_block();
            let work = own_work::<T, CAUSAL, WALK>(p, a, block, BLOCK_M as u32, BLOCK_N as u32, 1);
            if block.rows() > 0 && work.steps() > 0 {
                match thread_idx_x() {
                    0 => load::<_, HEADDIM, BLOCK_M, BLOCK_N, 1, CAUSAL, WALK>(p, a, memory.inputs, block),
                    thread @ (32 | 64) if const { walk::is_in_order(WALK) } => {
                        let group = thread / 32 - 1;
                        sum_in_order::<T, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, WALK>(p, a, memory.outgoing, block, group);
                    }
                    32 => add_queries::<T, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, WALK>(p, a, memory.outgoing, block),
                    thread @ 64.. if walk::is_ring(WALK) && (WALK == walk::RING || p.shares.own(1).is_first()) => {
                        let finisher = shuffle(ALL, thread / 32 - 2, 0);
                        memory
                            .finisher(finisher)
                            .finish_share::<BLOCK_M, BLOCK_N, TRANSPOSED, CAUSAL>(p, a, block, finisher);
                    }
                    _ => {}
                }
            }
        }
        group => {
            if const { is_tight(HEADDIM, BLOCK_M) || WALK == walk::GENERAL } {
                claim_registers::<{ CLAIMED[0] }>();
            } else {
                claim_registers::<{ CLAIMED[1] }>();
            }
            let block = first_block();
            if block.rows() == 0 {
                return;
            }
            consume::<T, HEADDIM, BLOCK_M, BLOCK_N, STEPS, S_COLUMNS, D_COLUMNS, Q_COLUMNS, TRANSPOSED, CAUSAL, WALK>(
                p,
                a,
                memory,
                block,
                group - 1,
            );
        }
    }
}

/// Where the two warpgroups meet: a barrier for each of the two tiles of dS and each group that waits. The other group
/// has written its keys of that tile, and has read the other tile.
const D_S: NamedBarriers<1, { 2 * GROUPS }, { GROUPS * WARPGROUP }> = NamedBarriers;

/// The second warpgroup starts so many clock cycles after the first.
const LATE: u32 = 1500;

/// dK and dV of the 64 keys of warpgroup `group`, and a part of dQ.
#[inline(always)]
#[track_caller]
fn consume<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
    const CAUSAL: bool,
    const WALK: u32,
>(
    params: &Params,
    a: &Attention<T>,
    memory: Memory<T, HEADDIM, BLOCK_M, BLOCK_N>,
    mut keys: KeyBlock,
    group: u32,
) {
    let scale = a.softmax_scale * LOG2_E;
    let mut keys_in = memory.inputs.keys.consumer();
    let mut queries = memory.inputs.queries.consumer();
    let mut d_q_part = memory.outgoing.parts.producer_at(group);
    loop {
        // What can be found anew for each block of keys is: kept, it would take the registers of the sums.
        let is_anew = const { WALK == walk::HEAD };
        let is_general = const { WALK == walk::GENERAL };
        let group = if is_anew { unknown_before(group, keys.first_key) } else { group };
        let found_anew = |keys: KeyBlock| if is_anew { schedule::keys_of_head(a, keys.first_key) } else { keys };
        let (own_key, other) = (GROUP_ROWS * group + 16 * warp_in_group(), GROUPS - 1 - group);
        let own_key_anew = |x| 16 * (warp_id() - unknown_before(4, x));
        let own_d_s = TransposedRows::of(memory.d_s, own_key);
        let work = own_work::<T, CAUSAL, WALK>(params, a, found_anew(keys), BLOCK_M as u32, BLOCK_N as u32, 1);
        let blocks = work.blocks;
        let mut d_k = Accumulator::<1, D_COLUMNS>::zero();
        let mut d_v = Accumulator::<1, D_COLUMNS>::zero();
        if work.steps() > 0 {
            // The stage of the step before the first.
            let before = if is_anew { 1 - queries.slot().index } else { 1 };
            let d_q_of = |d_s: SmemTile<T, BLOCK_M, BLOCK_N>, group: u32| -> InFlight<Q_COLUMNS> {
                if TRANSPOSED {
                    wgmma::product(memory.inputs.k.columns(GROUP_ROWS * group), d_s.rows(0))
                } else {
                    wgmma::product(d_s.rows(GROUP_ROWS * group), memory.inputs.k.columns(0))
                }
            };
            // The first queries come once both groups have released the keys before these, and read their last dS.
            if is_anew {
                queries.wait();
            }
            // The step before the first has a dS of zeros.
            Registers::<T, STEPS>::of(&Accumulator::<1, S_COLUMNS>::zero()).store_transposed(own_d_s.stage(before));
            fence::proxy_async();
            D_S.arrive(GROUPS * before + other);
            if group > 0 && (!is_anew || keys.rows() <= BLOCK_N as u32) {
                queries.wait();
                queries.beside(memory.inputs.d_outputs).wait();
                pause(LATE);
            }
            let mut block = blocks.begin;
            // For ALiBi, in a general pass alone.
            let mut head = keys.head_k * work.group;
            // Counted down: up would take a register more.
            let mut left = work.steps();
            while left > 0 {
                left -= 1;
                // Descriptors are found anew in each step: kept, they would take the registers of the sums.
                let group = unknown(group);
                let first_key = GROUP_ROWS * group;
                let q_slot = queries.wait();
                let stage = q_slot.index;
                let s = wgmma::product(memory.inputs.k.rows(first_key), memory.inputs.q.stage(stage).rows(0));
                let d_o_slot = queries.beside(memory.inputs.d_outputs).wait();
                let d_p = wgmma::product(memory.inputs.v.rows(first_key), memory.inputs.d_o.stage(stage).rows(0));

                // Pᵀ = 2^(scale · K Qᵀ - LSE)
                let mut p: Accumulator<1, S_COLUMNS> = s.wait::<1>();
                if !is_general && work.is_masked::<WALK>(block) {
                    // Found here: kept, what follows from the first key would take a register more.
                    let own_key = if is_anew { own_key_anew(block) } else { own_key };
                    let first_key =
                        if is_anew { unknown_before(keys.first_key, block) } else { keys.first_key } + own_key;
                    let mut sequence = keys.sequence;
                    if is_anew {
                        [sequence.seqlen_q, sequence.seqlen_k] = memory.inputs.lengths.load_vector(0);
                    }
                    let mask = Mask::of::<T, CAUSAL, false>(a, &sequence);
                    mask.apply_transposed(&mut p, first_key, block * BLOCK_M as u32);
                }
                let (p_rounded, d_s_rounded): (Registers<T, STEPS>, Registers<T, STEPS>);
                if is_general {
                    // Found in each step: kept, the keys would take registers of the sums.
                    let keys = schedule::key_block_anew(a, BLOCK_N as u32, block);
                    let mask = mask_of::<T, CAUSAL, WALK>(a, &keys.sequence);
                    let scores = Scores::new(a, &keys.sequence, head, mask);
                    scores.cap(&mut p);
                    wgmma::pin(&mut p);
                    let d_p: Accumulator<1, S_COLUMNS> = d_p.wait::<0>();
                    wgmma::pin(&mut p);
                    let probabilities = Probabilities {
                        scores: &scores,
                        first_key: keys.first_key + own_key_anew(block),
                        first_row: block * BLOCK_M as u32,
                        is_partial: work.is_masked::<WALK>(block),
                        bases: memory.inputs.bases(stage),
                    };
                    [p_rounded, d_s_rounded] = probabilities.with_gradients(&p, &d_p, memory.inputs.sums(stage));
                } else {
                    p.zip_shared_columns(memory.inputs.bases(stage), |s, base| ex2(fma(s, scale, -base)));
                    p_rounded = Registers::<T, STEPS>::of(&p);

                    // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
                    wgmma::pin(&mut p);
                    let mut d_s: Accumulator<1, S_COLUMNS> = d_p.wait::<0>();
                    wgmma::pin(&mut p);
                    d_s.zip_shared_columns(memory.inputs.sums(stage), |d_p, sum| d_p - sum);
                    d_s.zip(&p, |d_p, p| d_p * p);
                    d_s_rounded = Registers::<T, STEPS>::of(&d_s);
                }

                let d_v_in_flight = wgmma::add_product(d_v, p_rounded, memory.inputs.d_o.stage(stage).columns(0));
                D_S.sync(GROUPS * (1 - stage) + group);
                d_s_rounded.store_transposed(own_d_s.stage(stage));
                fence::proxy_async();
                let d_q = d_q_of(memory.d_s.stage(1 - stage), group);
                d_v = d_v_in_flight.wait::<1>();
                release(d_o_slot);
                let d_k_in_flight = wgmma::add_product(d_k, d_s_rounded, memory.inputs.q.stage(stage).columns(0));
                let d_q = d_q.wait::<1>();
                D_S.arrive(GROUPS * stage + GROUPS - 1 - group);
                hand_over::<T, HEADDIM, BLOCK_M, Q_COLUMNS, TRANSPOSED, WALK>(
                    params,
                    a,
                    d_q,
                    memory.outgoing,
                    &mut d_q_part,
                );
                d_k = d_k_in_flight.wait::<0>();
                release(q_slot);

                queries.advance();
                block += 1;
                if block == blocks.end {
                    block = blocks.begin;
                    head += 1;
                }
            }
            let found_after = is_anew || is_general || walk::is_shared(WALK);
            let last = if found_after { 1 - queries.slot().index } else { (work.steps() % 2) ^ 1 };
            D_S.sync(GROUPS * last + group);
            let d_q = d_q_of(memory.d_s.stage(last), group).wait::<0>();
            if is_anew {
                release(keys_in.slot());
                keys_in.advance();
            }
            hand_over::<T, HEADDIM, BLOCK_M, Q_COLUMNS, TRANSPOSED, WALK>(
                params,
                a,
                d_q,
                memory.outgoing,
                &mut d_q_part,
            );
        }
        if walk::is_shared(WALK) {
            // Under a causal mask registers are scarcer: it is found anew.
            let share = if CAUSAL { params.shares.own_anew(1, queries.slot().index) } else { params.shares.own(1) };
            if !params.shares.sum(share, 1, [&mut d_v, &mut d_k]) {
                return;
            }
        }
        if is_general {
            keys = schedule::key_block_anew(a, BLOCK_N as u32, queries.slot().index);
        }
        let own_key = if is_anew || is_general { own_key_anew(keys.first_key) } else { own_key };
        let first_key = keys.first_key + own_key;
        keys = found_anew(keys);
        let of_keys = |tensor: Tensor<Untyped>, columns| {
            keys.sequence.key_matrix(&tensor.cast::<T>(), keys.head_k, first_key, columns, true)
        };
        d_v.store_rows(of_keys(params.backward.d_v, a.headdim_v));
        d_k.map(|_, _, d_k| d_k * a.softmax_scale);
        d_k.store_rows(of_keys(params.backward.d_k, a.headdim));
        let Some(next) = next_keys::<T, WALK>(a, keys, BLOCK_N as u32) else { break };
        keys = next;
    }
}
