//! Counts accesses by instructions of a warp: which sectors of global memory, which banks of shared memory one touches
//! depends on all its lanes.
//!
//! Lanes run one after the other, from one rendezvous to the next. So each logs its accesses, and at a rendezvous of the
//! whole warp the logs are laid side by side: where the lanes were at the same places, the n-th accesses of all are one
//! instruction; where they were not, the n-th accesses at one place are.
use super::WARP;
use super::banks::{self, Wavefronts};
use super::block::Block;
use super::counters::{Counters, Flops, SharedTraffic, TensorTraffic, worst};
use super::memory::{self, Allocation};
use super::site::Site;
use super::unit::Use;
use std::collections::HashMap;
use std::sync::Arc;

/// What kind of access it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum What {
    GlobalLoad,
    GlobalStore,
    GlobalAtomic,
    SharedLoad,
    SharedStore,
}

/// Which way the tensor copy engine moves something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    Load,
    Store,
    Add,
}

/// An access of a lane.
#[derive(Clone, Copy)]
struct Record {
    address: u64,
    instruction: Instruction,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Instruction {
    site: Site,
    what: What,
    bytes: u8,
}

/// An access of a warp.
struct Access {
    instruction: Instruction,
    addresses: [u64; WARP],
    active: u32,
}

/// The logs of a block's lanes, and what a worker has counted.
pub(super) struct Traffic {
    logs: Vec<Vec<Record>>,
    pub tally: Tally,
}

/// Lanes that meet at no word settle when one has logged so much.
const LONG_LOG: usize = 1 << 13;

impl Traffic {
    pub fn new(threads: usize, allocations: usize) -> Self {
        Traffic { logs: vec![Vec::new(); threads], tally: Tally::new(allocations) }
    }

    /// Notes an access of a thread.
    #[inline(always)]
    pub fn log(&mut self, thread: usize, what: What, address: u64, bytes: u32, site: Site) {
        self.logs[thread].push(Record { address, instruction: Instruction { site, what, bytes: bytes as u8 } });
    }

    /// Whether the warp of `thread` should settle although it does not meet.
    pub fn is_long(&self, thread: usize) -> bool {
        self.logs[thread].len() >= LONG_LOG
    }

    /// The lanes of a warp are all at the same point: counts what they have logged.
    #[inline(always)]
    pub fn settle(&mut self, warp: usize) {
        let lanes = warp * WARP..((warp + 1) * WARP).min(self.logs.len());
        if self.logs[lanes.clone()].iter().any(|log| !log.is_empty()) {
            self.settle_lanes(lanes);
        }
    }

    #[inline(never)]
    fn settle_lanes(&mut self, lanes: std::ops::Range<usize>) {
        let logs = &mut self.logs[lanes];
        let len = logs[0].len();
        let mut done = 0;
        if logs.iter().all(|log| log.len() == len) {
            while done < len {
                let Some(access) = side_by_side(logs, done) else { break };
                self.tally.count(&access);
                done += 1;
            }
        }
        if logs.iter().any(|log| log.len() > done) {
            by_place(logs, done, |access| self.tally.count(access));
        }
        logs.iter_mut().for_each(Vec::clear);
    }
}

/// The accesses `index` of all lanes, if they are one instruction.
#[inline(always)]
fn side_by_side(logs: &[Vec<Record>], index: usize) -> Option<Access> {
    let instruction = logs[0][index].instruction;
    let mut addresses = [0; WARP];
    for (address, log) in addresses.iter_mut().zip(logs) {
        let record = log[index];
        if record.instruction != instruction {
            return None;
        }
        *address = record.address;
    }
    Some(Access { instruction, addresses, active: (u64::MAX >> (64 - logs.len())) as u32 })
}

/// Groups the accesses from `start` on by their place, and by how often their lane had been there before.
fn by_place(logs: &[Vec<Record>], start: usize, mut count: impl FnMut(&Access)) {
    let mut records = Vec::new();
    for (lane, log) in logs.iter().enumerate() {
        let records_of_lane = log[start.min(log.len())..].iter().enumerate();
        records.extend(records_of_lane.map(|(time, record)| (record.instruction, lane, time, record.address)));
    }
    records.sort_unstable();
    // In place of the time: how many accesses of the same instruction the lane made before.
    for i in 0..records.len() {
        let (instruction, lane, ..) = records[i];
        let previous = i.checked_sub(1).map(|i| records[i]).filter(|r| (r.0, r.1) == (instruction, lane));
        records[i].2 = previous.map_or(0, |(_, _, occurrence, _)| occurrence + 1);
    }
    records.sort_unstable_by_key(|&(instruction, lane, occurrence, _)| (instruction, occurrence, lane));
    for group in records.chunk_by(|a, b| (a.0, a.2) == (b.0, b.2)) {
        let mut access = Access { instruction: group[0].0, addresses: [0; WARP], active: 0 };
        for &(_, lane, _, address) in group {
            access.addresses[lane] = address;
            access.active |= 1 << lane;
        }
        count(&access);
    }
}

impl Block {
    /// Counts the access of eight lanes to a matrix of eight rows of 16 bytes.
    #[inline(always)]
    pub fn count_matrix(&mut self, rows: &[u32; 8], usage: Use, site: Site) {
        if self.context.counters {
            let taken = banks::of_group(rows.iter().copied(), 16);
            self.traffic.tally.count_shared(usage, 128, Wavefronts { taken, conflicts: taken - 1 }, site);
        }
    }
}

/// What a worker has counted. Sums, so that the order of the workers does not matter.
#[derive(Default)]
pub(super) struct Tally {
    tensors: Vec<TensorTraffic>,
    shared: SharedTraffic,
    /// By site: accesses and conflicts.
    sites: HashMap<Site, (u64, u64)>,
    pub flops: Flops,
    pub blocks: u64,
    pub switches: u64,
}

impl Tally {
    pub fn new(allocations: usize) -> Self {
        Tally { tensors: vec![TensorTraffic::default(); allocations], ..Tally::default() }
    }

    pub fn merge(&mut self, other: Tally) {
        self.tensors.iter_mut().zip(&other.tensors).for_each(|(ours, theirs)| *ours += theirs);
        self.shared.merge(&other.shared);
        for (site, (accesses, conflicts)) in other.sites {
            let ours = self.sites.entry(site).or_default();
            *ours = (ours.0 + accesses, ours.1 + conflicts);
        }
        self.flops += other.flops;
        self.blocks += other.blocks;
        self.switches += other.switches;
    }

    pub fn into_counters(self, allocations: &[Arc<Allocation>]) -> Counters {
        let mut counters =
            Counters { flops: self.flops, blocks: self.blocks, switches: self.switches, ..Counters::default() };
        for (tensor, allocation) in self.tensors.into_iter().zip(allocations) {
            let tensors = vec![TensorTraffic { name: allocation.name, ..tensor }];
            counters.merge(&Counters { tensors, ..Counters::default() });
        }
        let sites = self.sites.into_iter().map(|(site, (accesses, conflicts))| (site.location(), accesses, conflicts));
        counters.shared = SharedTraffic { worst: worst(sites), ..self.shared };
        counters
    }

    #[inline(always)]
    fn count(&mut self, access: &Access) {
        let Instruction { site, what, bytes } = access.instruction;
        let moved = access.active.count_ones() as u64 * bytes as u64;
        match what {
            What::SharedLoad | What::SharedStore => {
                let usage = if what == What::SharedLoad { Use::Read } else { Use::Write };
                let wavefronts = banks::of_warp(&access.addresses, access.active, bytes as u32);
                self.count_shared(usage, moved, wavefronts, site);
            }
            What::GlobalLoad | What::GlobalStore | What::GlobalAtomic => self.count_global(access),
        }
    }

    fn count_shared(&mut self, usage: Use, bytes: u64, wavefronts: Wavefronts, site: Site) {
        let Wavefronts { taken, conflicts } = wavefronts;
        self.shared.accesses += 1;
        self.shared.wavefronts += taken;
        self.shared.conflicts += conflicts;
        match usage {
            Use::Read => self.shared.loaded_bytes += bytes,
            Use::Write | Use::Atomic => self.shared.stored_bytes += bytes,
        }
        if conflicts > 0 {
            let at = self.sites.entry(site).or_default();
            *at = (at.0 + 1, at.1 + conflicts);
        }
    }

    fn count_global(&mut self, access: &Access) {
        let mut sectors = [0; WARP];
        let mut left = access.active;
        // Nearly always one allocation.
        while left != 0 {
            let (allocation, _) = memory::locate(access.addresses[left.trailing_zeros() as usize]);
            let mut count = 0;
            for lane in 0..WARP {
                let address = access.addresses[lane];
                if left >> lane & 1 == 1 && memory::locate(address).0 == allocation {
                    sectors[count] = address / SECTOR;
                    count += 1;
                    left &= !(1 << lane);
                }
            }
            self.count_tensor(allocation, access.instruction, &mut sectors[..count]);
        }
    }

    /// Counts a stretch of global memory that the tensor copy engine moves.
    pub fn count_stretch(&mut self, stretch: std::ops::Range<u64>, way: Way) {
        if stretch.is_empty() {
            return;
        }
        let tensor = &mut self.tensors[memory::locate(stretch.start).0];
        let (bytes, sectors) = (stretch.end - stretch.start, stretch.end.div_ceil(SECTOR) - stretch.start / SECTOR);
        match way {
            Way::Load => {
                tensor.loaded_bytes += bytes;
                tensor.load_sectors += sectors;
            }
            Way::Store => {
                tensor.stored_bytes += bytes;
                tensor.store_sectors += sectors;
            }
            Way::Add => tensor.atomics += bytes / 4,
        }
    }

    fn count_tensor(&mut self, allocation: usize, instruction: Instruction, sectors: &mut [u64]) {
        let tensor = &mut self.tensors[allocation];
        let lanes = sectors.len() as u64;
        let bytes = lanes * instruction.bytes as u64;
        match instruction.what {
            What::GlobalLoad => {
                tensor.loaded_bytes += bytes;
                tensor.load_sectors += distinct(sectors);
            }
            What::GlobalStore => {
                tensor.stored_bytes += bytes;
                tensor.store_sectors += distinct(sectors);
            }
            _ => tensor.atomics += lanes,
        }
    }
}

/// Bytes that global memory moves at least.
const SECTOR: u64 = 32;

fn distinct(values: &mut [u64]) -> u64 {
    if !values.is_sorted() {
        values.sort_unstable();
    }
    1 + values.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64
}
