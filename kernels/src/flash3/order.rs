//! In which order sequences of different lengths come.
//!
//! Tiles of longer sequences cost more. The units of the sequences that cost the most come first, so that what is dealt out
//! last, and makes one block of threads end after another, is small. Where sequences end only the GPU knows: each block of
//! threads finds the order for itself, in shared memory, before it begins.
use super::schedule::Schedule;
use super::units::tiles_of_pack;
use crate::attention::{Attention, Sequence};
use crate::mask::Mask;
use cuda_std::fence;
use cuda_std::shared::Shared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};

/// How many sequences can be put into order where Q has so many stages.
pub const fn room(headdim: u32, queries: u32) -> u32 {
    // Tiles of so many columns leave no room for more.
    if headdim > 192 && queries > 2 { 256 } else { 1024 }
}

/// Sequences by their cost.
#[derive(Clone, Copy)]
pub struct Order {
    /// Of each sequence the cost of a unit, in keys, and how many units there are: what the order is found from.
    costs: Shared<u32>,
    /// Of each sequence, in their order, the first unit and which sequence it is; behind the last how many units there are.
    begins: Shared<u32>,
}

impl Order {
    /// What it takes of shared memory for good, in bytes, for so many sequences.
    pub const fn bytes(sequences: u32) -> u32 {
        2 * (sequences + 1) * size_of::<u32>() as u32
    }

    /// At this place, aligned to 8 bytes. `scratch` has as much memory, which tiles take once the order is found.
    #[inline(always)]
    pub fn at(place: Shared<u32>, scratch: Shared<u32>) -> Self {
        Order { costs: scratch, begins: place }
    }

    /// Finds it. Said by all threads of the block, before a barrier.
    #[inline(always)]
    #[track_caller]
    pub fn find<T, const CAUSAL: bool, const FEW: bool, const GENERAL: bool>(
        self,
        a: &Attention<T>,
        schedule: Schedule<FEW>,
        block_m: u32,
    ) {
        let Schedule { packing, .. } = schedule;
        let own = || Own { next: thread_idx_x(), end: a.batch };
        for i in own() {
            let sequence = a.sequence(i);
            let Sequence { seqlen_q, seqlen_k, .. } = sequence;
            let tiles = tiles_of_pack(packing.rows(seqlen_q), block_m);
            let units = packing.packs(a.nheads) * schedule.units_of_pack::<CAUSAL, GENERAL>(tiles);
            // The last rows of a sequence see all keys, under a causal mask the first rows `seqlen_q` less,
            // in another window as many as it has there.
            let cost = if GENERAL {
                let mask = Mask::of::<T, CAUSAL, GENERAL>(a, &sequence);
                let seen = |row| mask.end(row).saturating_sub(mask.begin(row));
                seen(0) + seen(seqlen_q.saturating_sub(1))
            } else if CAUSAL {
                (2 * seqlen_k).saturating_sub(seqlen_q)
            } else {
                seqlen_k
            };
            self.costs.store_vector(2 * i, [cost, units]);
        }
        sync_threads();
        for i in own() {
            let [cost, units] = self.costs.load_vector(2 * i);
            let (mut rank, mut begin) = (0, 0);
            for j in 0..a.batch {
                let [other, units] = self.costs.load_vector(2 * j);
                if other > cost || other == cost && j < i {
                    rank += 1;
                    begin += units;
                }
            }
            self.begins.store_vector(2 * rank, [begin, i]);
            if rank + 1 == a.batch {
                self.begins.store_vector(2 * a.batch, [begin + units, 0]);
            }
        }
        // Tiles are copied to where the costs were.
        fence::proxy_async();
    }

    /// The sequence that a unit is of, and its first unit; `None` behind the last. It is looked for from place `rank` in the
    /// order on, which becomes its own.
    #[inline(always)]
    #[track_caller]
    pub fn sequence_of(self, unit: u32, sequences: u32, rank: &mut u32) -> Option<(u32, u32)> {
        if unit >= self.begins.load(2 * sequences) {
            return None;
        }
        while self.begins.load(2 * (*rank + 1)) <= unit {
            *rank += 1;
        }
        let [begin, sequence] = self.begins.load_vector(2 * *rank);
        Some((sequence, begin))
    }
}

/// The sequences that fall to a thread.
struct Own {
    next: u32,
    end: u32,
}

impl Iterator for Own {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        let own = self.next;
        self.next += block_dim_x();
        (own < self.end).then_some(own)
    }
}
