//! What a launch moved and computed.
use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::panic::Location;

/// What one launch, or several added up, moved and computed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Between global memory and the blocks, by the name of the allocation, in the order of the allocations.
    pub tensors: Vec<TensorTraffic>,
    /// Between shared memory and registers.
    pub shared: SharedTraffic,
    /// Floating-point operations.
    pub flops: Flops,
    /// Blocks that ran.
    pub blocks: u64,
    /// How often a simulated thread got its turn: what the simulator's time goes with.
    pub switches: u64,
}

/// What moved between an allocation in global memory and the blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorTraffic {
    /// The allocation.
    pub name: &'static str,
    /// Bytes that threads loaded.
    pub loaded_bytes: u64,
    /// Bytes that threads stored.
    pub stored_bytes: u64,
    /// Sectors of 32 bytes that the loads touched, each counted once for each instruction of a warp.
    pub load_sectors: u64,
    /// Sectors that the stores touched, counted alike.
    pub store_sectors: u64,
    /// Atomic updates, of 4 bytes.
    pub atomics: u64,
}

/// What moved between shared memory and registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Instructions of a warp; a matrix of `ldmatrix` or `stmatrix` counts as one.
    pub accesses: u64,
    /// Bytes that threads loaded.
    pub loaded_bytes: u64,
    /// Bytes that threads stored.
    pub stored_bytes: u64,
    /// Cycles that the accesses take: each bank serves one word of 4 bytes a cycle.
    pub wavefronts: u64,
    /// Those of them that bank conflicts cost.
    pub conflicts: u64,
    /// The places with bank conflicts, the worst first.
    pub worst: Vec<ConflictSite>,
}

/// A place in a kernel that meets bank conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConflictSite {
    /// The place.
    pub location: &'static Location<'static>,
    /// Its accesses.
    pub accesses: u64,
    /// The wavefronts that its conflicts cost.
    pub conflicts: u64,
}

/// Floating-point operations by the unit that does them. A multiply-add counts as two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    /// Tensor cores.
    pub tensor: u64,
    /// Fused multiply-adds of single threads.
    pub fma: u64,
    /// The special function unit: `ex2`, `lg2`, `rcp`, each as one.
    pub special: u64,
}

impl Flops {
    /// All units.
    pub fn total(&self) -> u64 {
        self.tensor + self.fma + self.special
    }
}

impl Counters {
    /// Adds another launch's; allocations of the same name are one.
    pub fn merge(&mut self, other: &Counters) {
        for theirs in &other.tensors {
            match self.tensors.iter_mut().find(|ours| ours.name == theirs.name) {
                Some(ours) => *ours += theirs,
                None => self.tensors.push(theirs.clone()),
            }
        }
        self.shared.merge(&other.shared);
        self.flops += other.flops;
        self.blocks += other.blocks;
        self.switches += other.switches;
    }

    /// The traffic of one allocation, if it has this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorTraffic> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Bytes loaded from global memory.
    pub fn total_loaded_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.loaded_bytes).sum()
    }

    /// Bytes stored to global memory.
    pub fn total_stored_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.stored_bytes).sum()
    }

    /// Bytes moved between global memory and the blocks.
    pub fn total_bytes(&self) -> u64 {
        self.total_loaded_bytes() + self.total_stored_bytes()
    }

    /// Sectors of 32 bytes moved between global memory and the blocks.
    pub fn total_sectors(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.load_sectors + tensor.store_sectors).sum()
    }
}

impl SharedTraffic {
    pub(super) fn merge(&mut self, other: &SharedTraffic) {
        self.accesses += other.accesses;
        self.loaded_bytes += other.loaded_bytes;
        self.stored_bytes += other.stored_bytes;
        self.wavefronts += other.wavefronts;
        self.conflicts += other.conflicts;
        let sites = self.worst.iter().chain(&other.worst).map(|s| (s.location, s.accesses, s.conflicts));
        self.worst = worst(sites);
    }
}

/// The places with conflicts, each once, the worst first; among equals the first in the source.
pub(super) fn worst(sites: impl Iterator<Item = (&'static Location<'static>, u64, u64)>) -> Vec<ConflictSite> {
    let mut by_location = BTreeMap::new();
    for (location, accesses, conflicts) in sites {
        let site = by_location.entry(location).or_insert(ConflictSite { location, accesses: 0, conflicts: 0 });
        site.accesses += accesses;
        site.conflicts += conflicts;
    }
    let mut worst: Vec<_> = by_location.into_values().filter(|site| site.conflicts > 0).collect();
    worst.sort_by_key(|site| std::cmp::Reverse(site.conflicts));
    worst
}

impl AddAssign<&TensorTraffic> for TensorTraffic {
    fn add_assign(&mut self, other: &TensorTraffic) {
        self.loaded_bytes += other.loaded_bytes;
        self.stored_bytes += other.stored_bytes;
        self.load_sectors += other.load_sectors;
        self.store_sectors += other.store_sectors;
        self.atomics += other.atomics;
    }
}

impl AddAssign for Flops {
    fn add_assign(&mut self, other: Flops) {
        self.tensor += other.tensor;
        self.fma += other.fma;
        self.special += other.special;
    }
}

impl AddAssign<&Counters> for Counters {
    fn add_assign(&mut self, other: &Counters) {
        self.merge(other);
    }
}

impl Add for Counters {
    type Output = Counters;

    fn add(mut self, other: Counters) -> Counters {
        self.merge(&other);
        self
    }
}

impl Sum for Counters {
    fn sum<I: Iterator<Item = Counters>>(counters: I) -> Counters {
        counters.fold(Counters::default(), Counters::add)
    }
}
