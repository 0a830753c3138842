//! Blocks of keys whose queries several blocks of threads share.
//!
//! Each finds dK and dV over its share of the queries. All but the last leave theirs in global memory, in f32 and in the order of
//! their registers; the last adds them to its own, in their order, and stores the gradients: the same bits in every run. It waits
//! for blocks of threads before it alone. The sums of dQ need nothing of this: each adds to those of its own queries.
//!
//! It pays where blocks of keys do not fill the machine: where they are fewer than the multiprocessors, in all or after the last
//! full turn of these.
//!
//! HBM traffic: none, as the L2 cache keeps what is left so shortly.
use super::{GROUPS, Params, Work, walk};
use crate::attention::{Attention, divisor};
use crate::config::Config;
use crate::schedule::KeyBlock;
use cuda_std::Global;
use cuda_std::arrivals::Arrivals;
use cuda_std::fragment::Accumulator;
use cuda_std::math::unknown_before;
use cuda_std::thread::{block_idx_x, lane_id, thread_idx_x};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::warpgroup::{warp_in_group, warpgroup_id};

/// Warps that multiply.
const WARPS: u32 = 4 * GROUPS;

/// That of a kernel which has a pass beside the one with shares.
pub(super) const fn of_two_passes(pass: Config) -> Config {
    Config { barriers: 2 * pass.barriers, ..pass }
}

/// Which blocks of keys are shared, and where blocks of threads leave what the last ones add up.
///
/// In a grid of blocks of threads, or of clusters, a shared block of keys takes [`parts`](Self::parts) of them, one after the other.
/// All sequences are equally long.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// `2 block_n headdim` of the configuration, for each block of threads of a share but the last.
    pub left: Global<f32>,
    /// [`COUNTERS`](Self::COUNTERS) for each shared block of keys; what is launched before the pass clears them.
    pub counters: Global<u32>,
    /// The number of the first block of keys that is shared: those before it have a block of threads each. In a
    /// [ring](super::Ring) no head that a block of threads finishes has shared ones.
    pub first: u32,
    /// How many are, from that on.
    pub count: u32,
    /// How many share one; not 0. In a ring no more than it has blocks of queries.
    pub parts: u32,
}

impl Shares {
    /// No block of keys is shared.
    pub const NONE: Shares = Shares { left: Global::NULL, counters: Global::NULL, first: u32::MAX, count: 0, parts: 1 };

    /// Counters of a block of keys: one for each block of threads of a cluster. A block of threads that is none has half of them.
    pub const COUNTERS: u32 = 2;

    /// What this block of threads takes, of a cluster of so many: one of those that share.
    #[inline(always)]
    pub(super) fn own(&self, cluster: u32) -> Share {
        self.share(block_idx_x() / cluster)
    }

    /// The same, to be said after a loop: it is found anew once `x` is known, and takes no registers in the loop.
    #[inline(always)]
    pub(super) fn own_anew(&self, cluster: u32, x: u32) -> Share {
        self.share(unknown_before(block_idx_x(), x) / cluster)
    }

    /// What block of threads, or cluster, `x` takes.
    #[inline(always)]
    fn share(&self, x: u32) -> Share {
        let (x, parts) = (x - self.first, divisor(self.parts));
        Share { number: self.first + x / parts, part: x % parts, parts }
    }

    /// Before the launch nothing is left. Said by all threads of a block.
    #[inline(always)]
    #[track_caller]
    pub(super) fn clear(&self, threads: u32) {
        let mut counter = thread_idx_x();
        while counter < Self::COUNTERS * self.count {
            Arrivals::at(self.counters.offset(counter as usize)).clear();
            counter += threads;
        }
    }

    /// Sums what the blocks of threads of a `share` have, each of `MATRICES` in this warp. Whether this one has the sums now, and
    /// stores the gradients: the last one does.
    #[inline(always)]
    #[track_caller]
    pub(super) fn sum<const COLUMNS: usize, const MATRICES: usize>(
        &self,
        share: Share,
        cluster: u32,
        matrices: [&mut Accumulator<1, COLUMNS>; MATRICES],
    ) -> bool {
        let of_matrix = Accumulator::<1, COLUMNS>::ELEMENTS;
        let warp = 4 * (warpgroup_id() - 1) + warp_in_group();
        let block = (share.number - self.first) * cluster + block_idx_x() % cluster;
        let others = share.parts - 1;
        let left = |part| {
            let warps = (block * others + part) * WARPS + warp;
            self.left.offset(warps as usize * (MATRICES * of_matrix))
        };
        let counter = Arrivals::at(self.counters.offset(block as usize));
        if share.part < others {
            for i in 0..MATRICES {
                matrices[i].store_to(left(share.part).offset(i * of_matrix));
            }
            sync_warp(ALL);
            if lane_id() == 0 {
                counter.arrive();
            }
            return false;
        }
        counter.wait(WARPS * others);
        for part in 0..others {
            for i in 0..MATRICES {
                matrices[i].zip_sums(left(part).offset(i * of_matrix), |own, left| own + left);
            }
        }
        true
    }
}

/// What a block of threads takes of a block of keys.
#[derive(Clone, Copy)]
pub(super) struct Share {
    /// The number of the block of keys.
    pub number: u32,
    /// Which part of its queries.
    part: u32,
    /// Of how many.
    parts: u32,
}

impl Share {
    /// Whether it is the first part.
    #[inline(always)]
    pub fn is_first(self) -> bool {
        self.part == 0
    }

    /// So much of the work.
    #[inline(always)]
    fn of(self, work: Work) -> Work {
        let Work { mut blocks, .. } = work;
        let (first, count, parts) = (blocks.begin, blocks.count(), divisor(self.parts));
        blocks.begin = first + count * self.part / parts;
        blocks.end = first + count * (self.part + 1) / parts;
        Work { blocks, ..work }
    }
}

/// What this block of threads, of a cluster of so many, does with its keys in a `WALK`.
#[inline(always)]
#[track_caller]
pub(super) fn own_work<T, const CAUSAL: bool, const WALK: u32>(
    p: &Params,
    a: &Attention<T>,
    block: KeyBlock,
    block_m: u32,
    block_n: u32,
    cluster: u32,
) -> Work {
    let work = Work::of::<T, CAUSAL, WALK>(a, block, block_m, cluster * block_n);
    if walk::is_shared(WALK) { p.shares.own(cluster).of(work) } else { work }
}
