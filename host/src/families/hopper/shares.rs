//! Which blocks of keys of the backward pass several blocks of threads share: where blocks of keys do not fill the machine.
use cuda_std::{DType, Global, Kernel};
use kernels::Config;
use kernels::attention::Untyped;
use kernels::flash3_backward::{Params, Shares};

use super::MULTIPROCESSORS;
use super::backward::{heads_of_k, key_blocks};
use crate::launch::Workspace;
use crate::problem::Problem;

/// What the begin and the end of a block of keys take, in steps of a block of queries: K and V come, dK and dV go. Measured on an
/// H100: 6 to 10 µs, where a step takes 2.
const ENDS: u64 = 4;

/// What it takes that one leaves its share and another adds it to its own, in such steps.
const HAND_OVER: u64 = 1;

/// The most that share a block of keys: who adds the shares up takes them one after the other.
const MOST: u64 = 16;

/// The most bytes that they leave: not much more than the L2 cache holds.
const MOST_LEFT: u64 = 64 << 20;

/// The steps that sharing has to save at the least, by what is said here, of all blocks of keys or of the last ones. What is not
/// shared takes 1 to 2 % longer in such a kernel at headdim 64 and 256. On an H100, all of them, in TFLOP/s without and with: one
/// sequence of 2048 tokens, 4 heads of 128, 281 and 372, causal 142 and 215; 8 heads 216 and 300, causal; 32 heads that share 4, 4096
/// tokens, causal, 316 and 525. The last ones, of 16384 tokens: headdim 128, 2k, 4k, 8k and 16k tokens 589 and 593, 639 and 648, 675
/// and 683, 674 and 690; headdim 256, 2k and 4k tokens 522 and 520, 584 and 587; headdim 64 590 and 583 at 4k.
fn least_gain(headdim: u32, are_all: bool) -> Option<u64> {
    match headdim {
        _ if are_all => Some(ENDS / 2),
        128 => Some(ENDS / 2),
        256 => Some(2 * ENDS),
        _ => None,
    }
}

/// The names of what they leave, and of who counts them.
pub const LEFT: &str = "shares of dK and dV";
pub const COUNTERS: &str = "counters of shares";

/// Blocks of keys that are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// [`Shares::first`].
    pub first: u32,
    /// [`Shares::count`].
    pub count: u32,
    /// [`Shares::parts`].
    pub parts: u32,
    /// f32 that blocks of threads leave.
    left: u64,
}

impl Sharing {
    /// Where it takes less time that blocks of keys are shared: all of them under a causal mask, else those after the last full turn
    /// of the multiprocessors.
    pub fn of(problem: &Problem, kernel: &Kernel<Params, Config>) -> Option<Self> {
        let Config { block_m, block_n, headdim, headdim_v, .. } = kernel.config;
        if problem.varlen.is_some() {
            return None;
        }
        let cluster = u64::from(kernel.cluster.max(1));
        let machine = MULTIPROCESSORS / cluster;
        let all = heads_of_k(problem).saturating_mul(key_blocks(problem, block_n * cluster as u32));
        let query_blocks = (problem.seqlen_q as u64).div_ceil(block_m.max(1).into());
        let steps = query_blocks.saturating_mul((problem.nheads / problem.nheads_k) as u64);
        let count = if problem.is_causal() { all } else { all % machine };
        let time = |parts: u64| {
            let longest = steps.div_ceil(parts).saturating_add(ENDS);
            let blocks = if problem.is_causal() {
                // Half the queries see a key, and most of what the long ones leave the short ones fill, which come last.
                let sum = all.saturating_mul((steps / 2).saturating_add(ENDS * parts));
                longest.max((sum / machine).saturating_add(longest / 4))
            } else {
                (count * parts).div_ceil(machine).saturating_mul(longest)
            };
            blocks.saturating_add(if parts > 1 { HAND_OVER * parts } else { 0 })
        };
        let of_block = cluster * u64::from(block_n * (headdim + headdim_v));
        let left = |parts: u64| count.saturating_mul((parts - 1) * of_block);
        let few_enough = |&parts: &u64| parts <= query_blocks && left(parts) <= MOST_LEFT / 4;
        let parts = (1..=MOST).filter(few_enough).min_by_key(|&parts| time(parts))?;
        if count == 0 || time(1) - time(parts) < least_gain(headdim, count == all)? {
            return None;
        }
        let left = left(parts);
        let [first, count, parts] = [all - count, count, parts].map(|n| u32::try_from(n).ok());
        Some(Sharing { first: first?, count: count?, parts: parts?, left })
    }

    /// Blocks of threads of a grid of clusters of so many: those of the blocks of keys that are not shared, and the shares.
    pub fn blocks(self, cluster: u32) -> u64 {
        let shares = u64::from(self.count) * u64::from(self.parts);
        (u64::from(self.first) + shares) * u64::from(cluster)
    }

    /// The memory that they take.
    pub fn workspace(self) -> [Workspace; 2] {
        let counters = u64::from(self.count * Shares::COUNTERS);
        [
            Workspace { name: LEFT, dtype: DType::F32, len: self.left },
            Workspace { name: COUNTERS, dtype: DType::I32, len: counters },
        ]
    }

    /// What the kernels are told, with the addresses of that memory.
    pub fn shares(self, left: Global<Untyped>, counters: Global<Untyped>) -> Shares {
        let Sharing { first, count, parts, .. } = self;
        Shares { left: left.cast(), counters: counters.cast(), first, count, parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use kernels::flash3_backward::{SHARED, SHARED_SPLIT};

    /// Of (batch, seqlen, nheads, headdim) with so many heads of K: (first, count, parts).
    fn shared([batch, seqlen, nheads, headdim]: [usize; 4], nheads_k: usize, causal: bool) -> Option<(u32, u32, u32)> {
        let of = |heads| Layout::contiguous(DType::BF16, &[batch, seqlen, heads, headdim]).expect("small");
        let problem = Problem::new(&of(nheads), &of(nheads_k), &of(nheads_k), &AttentionOptions::new().causal(causal));
        let is_it = |kernel: &&Kernel<Params, Config>| {
            let Config { headdim: tile, block_m, .. } = kernel.config;
            tile as usize == headdim && block_m != 80 && kernel.config.causal == Some(causal)
        };
        let kernel = [SHARED, SHARED_SPLIT].into_iter().flatten().find(is_it).expect("a kernel");
        Sharing::of(&problem.expect("valid"), kernel).map(|sharing| (sharing.first, sharing.count, sharing.parts))
    }

    #[test]
    fn few_blocks_of_keys_are_all_shared() {
        assert_eq!(shared([1, 2048, 4, 128], 4, false), Some((0, 64, 2)));
        assert_eq!(shared([1, 2048, 4, 128], 4, true), Some((0, 64, 3)));
        assert_eq!(shared([1, 2048, 4, 256], 4, true), Some((0, 64, 2)));
        // A head of K for 32 of Q.
        assert_eq!(shared([1, 4096, 32, 128], 1, false), Some((0, 32, 4)));
        // As many as there are multiprocessors, or hardly fewer; and too few steps.
        assert_eq!(shared([1, 4096, 4, 128], 4, false), None);
        assert_eq!((shared([1, 4096, 8, 128], 8, true), shared([1, 256, 8, 64], 8, false)), (None, None));
        assert_eq!((shared([1, 0, 8, 128], 8, true), shared([0, 256, 8, 64], 8, false)), (None, None));
    }

    #[test]
    fn the_last_blocks_of_keys_are_shared_where_they_leave_half_the_machine_idle() {
        // 15 turns of 132, and 68; of 66 clusters, and 34.
        assert_eq!(shared([4, 4096, 16, 128], 16, false), Some((1980, 68, 3)));
        assert_eq!(shared([4, 4096, 8, 256], 8, false), Some((990, 34, 3)));
        assert_eq!(shared([8, 2048, 8, 256], 8, false), None);
        assert_eq!((shared([4, 4096, 32, 64], 32, false), shared([4, 4096, 16, 128], 16, true)), (None, None));
    }

    /// A head of K for eight of Q would best have six share each block of keys.
    #[test]
    fn shares_take_little_memory() {
        assert_eq!(shared([1, 4096, 32, 128], 4, true), Some((0, 128, 5)));
        assert_eq!(128 * 4 * (2 * 128 * 128 * 4), MOST_LEFT);
        assert_eq!(shared([1, 2048, 16, 128], 2, true), Some((0, 32, 6)));
    }
}
