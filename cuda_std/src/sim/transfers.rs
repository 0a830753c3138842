//! Copies of the tensor copy engine into shared memory, which mbarriers are told of. They take effect as late as they
//! may: when their barrier's phase ends.
use super::block::{Block, Stop};
use super::boxes::{self, Chunk};
use super::memory::{self, Bits};
use super::report::FindingKind;
use super::shadow::GRANULE;
use super::site::Site;
use super::traffic::Way;
use super::unit::{Actor, Use};
use crate::tensor::{MOST_RANK, TensorMapDescription};

/// A copy on its way to the shared memory of a block.
#[derive(Clone)]
pub(super) struct Transfer {
    pub to: u32,
    pub from: Source,
    /// Who issued it.
    issuer: Actor,
}

/// What is copied.
#[derive(Clone)]
pub(super) enum Source {
    /// A box of a tensor.
    Box { map: TensorMapDescription, at: [i32; MOST_RANK] },
    /// So many bytes from an address on.
    Stretch { address: u64, bytes: u32 },
    /// The same in the shared memory of block `rank`, which issues the copy.
    Shared { rank: u32, address: u32, bytes: u32 },
}

impl Source {
    pub fn bytes(&self) -> u32 {
        match self {
            Source::Box { map, .. } => map.tile_bytes(),
            Source::Stretch { bytes, .. } | Source::Shared { bytes, .. } => *bytes,
        }
    }

    /// What it is 16 bytes by 16, with its places in shared memory from `base` on.
    pub fn chunks(&self, base: u32) -> Vec<Chunk> {
        match self {
            Source::Box { map, at } => boxes::chunks(map, *at, base).collect(),
            Source::Stretch { address, bytes } => {
                let chunk = |offset| Chunk { shared: base + offset, global: address + offset as u64, inside: 0..16 };
                (0..*bytes).step_by(GRANULE).map(chunk).collect()
            }
            // Nothing of it is in global memory.
            Source::Shared { bytes, .. } => {
                let chunk = |offset| Chunk { shared: base + offset, global: 0, inside: 0..0 };
                (0..*bytes).step_by(GRANULE).map(chunk).collect()
            }
        }
    }

    /// The size of what is read and written at once where a chunk lies partly outside.
    pub fn element(&self) -> u32 {
        match self {
            Source::Box { map, .. } => map.dtype.bytes() as u32,
            Source::Stretch { .. } | Source::Shared { .. } => 4,
        }
    }
}

impl Transfer {
    pub fn bytes(&self) -> u32 {
        self.from.bytes()
    }
}

impl Block {
    /// The running thread issues a copy to the same place in each of `blocks` of the cluster: a bit a rank.
    pub fn begin_transfer(&mut self, to: u32, from: Source, barrier: u32, blocks: u16, site: Site) -> Result<(), Stop> {
        self.check_engine_use(to, &from, site)?;
        let chunks = from.chunks(to);
        self.read_globally(&chunks, &from, site)?;
        self.count_chunks(&chunks, Way::Load);
        let issuer = self.actor(self.current, site);
        if let Source::Shared { address, bytes, .. } = from {
            for offset in (0..bytes).step_by(GRANULE) {
                self.read_shared_async(self.current, issuer, address + offset)?;
            }
        }
        for rank in (0..16).filter(|rank| blocks >> rank & 1 == 1) {
            self.check_rank(rank, site)?;
            let index = self.find_visible_mbarrier(rank, barrier, site)?;
            self.begin_at(rank, &chunks, issuer, site)?;
            let transfer = Transfer { to, from: from.clone(), issuer };
            let added = match self.peer(rank) {
                Some(peer) => peer.add_transfer(index, transfer),
                None => self.add_transfer(index, transfer),
            };
            added.map_err(|message| self.fault(FindingKind::Barrier, site, None, message))?;
        }
        Ok(())
    }

    /// A copy to block `rank` begins: until it has ended nobody may use where it goes.
    fn begin_at(&mut self, rank: u32, chunks: &[Chunk], issuer: Actor, site: Site) -> Result<(), Stop> {
        for chunk in chunks {
            let granule = self.shared_granule(chunk.shared, GRANULE as u32, Use::Write, site)?;
            if !self.context.race_detector {
                continue;
            }
            let wrong = match self.peer(rank).map(|peer| &raw mut *peer) {
                // SAFETY: another block than this one, whose clocks are used.
                Some(peer) => unsafe { &mut *peer }.shared.shadow.begin_transfer(granule, issuer, &self.clocks),
                None => self.shared.shadow.begin_transfer(granule, issuer, &self.clocks),
            };
            if let Some(wrong) = wrong {
                self.wrong_shared(self.current, chunk.shared, GRANULE as u32, Use::Write, site, wrong);
            }
        }
        Ok(())
    }

    /// The data of a copy have come.
    pub fn end_transfer(&mut self, transfer: &Transfer, agent: usize) -> Result<(), Stop> {
        let Transfer { to, from, issuer } = transfer;
        let actor = Actor::new(agent, issuer.site());
        if self.context.race_detector {
            self.clocks.employ(agent, issuer.thread());
        }
        for (i, chunk) in from.chunks(*to).into_iter().enumerate() {
            let data = match *from {
                Source::Shared { rank, address, .. } => self.read_sent(rank, address + (i * GRANULE) as u32, actor),
                _ => self.read_chunk(&chunk, from.element()),
            };
            let Some(granule) = self.shared.granule(chunk.shared, GRANULE as u32) else { continue };
            if self.context.race_detector {
                self.shared.shadow.deliver(granule, actor, &self.clocks);
            }
            // SAFETY: the granule lies in shared memory.
            unsafe { self.shared.data(chunk.shared).cast::<[u8; GRANULE]>().write_unaligned(data) };
        }
        Ok(())
    }

    /// Whether the engine can copy between shared memory at `shared` and global memory at all.
    pub fn check_engine_use(&mut self, shared: u32, global: &Source, site: Site) -> Result<(), Stop> {
        let why = match global {
            Source::Box { map, .. } => {
                let alignment = boxes::alignment(map.swizzle);
                (!shared.is_multiple_of(alignment)).then(|| {
                    format!("a box with swizzle {:?} at shared {shared:#x}, no multiple of {alignment}", map.swizzle)
                })
            }
            Source::Stretch { address, bytes } => {
                let all = [shared as u64, *address, *bytes as u64];
                let is_odd = all.iter().any(|number| !number.is_multiple_of(16));
                let what = || format!("{bytes} bytes between shared {shared:#x} and global {address:#x}");
                is_odd.then(|| format!("a bulk copy of {}: all three are to be multiples of 16", what()))
            }
            Source::Shared { address, bytes, .. } => {
                let is_odd = [shared, *address, *bytes].iter().any(|number| !number.is_multiple_of(16));
                let what = || format!("{bytes} bytes from shared {address:#x} to shared {shared:#x}");
                is_odd.then(|| format!("a bulk copy of {}: all three are to be multiples of 16", what()))
            }
        };
        match why {
            Some(message) => Err(self.fault(FindingKind::TensorCopy, site, None, message)),
            None => Ok(()),
        }
    }

    pub fn check_rank(&mut self, rank: u32, site: Site) -> Result<(), Stop> {
        let size = self.cluster.len();
        if (rank as usize) < size {
            return Ok(());
        }
        let message = format!("block {rank} of the cluster, which has {size}");
        Err(self.fault(FindingKind::OutOfBounds, site, None, message))
    }

    /// The running thread's copy reads global memory.
    fn read_globally(&mut self, chunks: &[Chunk], from: &Source, site: Site) -> Result<(), Stop> {
        for chunk in chunks {
            for (address, bytes) in pieces(chunk, from.element()) {
                self.use_global_async(address, bytes, Use::Read, site)?;
            }
        }
        Ok(())
    }

    /// What a chunk holds in global memory; zeros where it lies outside of the tensor. It has been checked before.
    fn read_chunk(&self, chunk: &Chunk, element: u32) -> [u8; GRANULE] {
        let mut data = [0; GRANULE];
        for (address, bytes) in pieces(chunk, element) {
            let (number, offset) = memory::locate(address);
            let from = self.context.allocations[number].data().wrapping_add(offset as usize);
            let at = (address - chunk.global) as usize;
            // SAFETY: so many bytes lie there, and are aligned: `use_global` has been asked.
            unsafe {
                match bytes {
                    16 => data = std::mem::transmute::<[u32; 4], [u8; 16]>(<[u32; 4]>::load(from)),
                    4 => data[at..at + 4].copy_from_slice(&u32::load(from).to_le_bytes()),
                    2 => data[at..at + 2].copy_from_slice(&u16::load(from).to_le_bytes()),
                    _ => data[at] = u8::load(from),
                }
            }
        }
        data
    }

    /// 16 bytes of the shared memory of block `rank`, whose copy ends: read for the second time, as they may not have
    /// been written since it began.
    fn read_sent(&mut self, rank: u32, address: u32, actor: Actor) -> [u8; GRANULE] {
        let detects = self.context.race_detector;
        let block: *mut Block = self.cluster[rank as usize];
        // SAFETY: a block of the cluster that runs (`Block::peer`), this one or another; its clocks are not used.
        let shared = unsafe { &mut (*block).shared };
        let Some(granule) = shared.granule(address, GRANULE as u32) else { return [0; GRANULE] };
        let wrong = if detects { shared.shadow.read_async(granule, actor, &self.clocks) } else { None };
        // SAFETY: the granule lies in shared memory.
        let data = unsafe { shared.data(address).cast::<[u8; GRANULE]>().read_unaligned() };
        if let Some(wrong) = wrong {
            self.wrong_shared(self.current, address, GRANULE as u32, Use::Read, actor.site(), wrong);
        }
        data
    }

    /// Counts what chunks move from or to global memory: neighbours are one stretch.
    pub fn count_chunks(&mut self, chunks: &[Chunk], way: Way) {
        if !self.context.counters {
            return;
        }
        let mut stretch = 0..0;
        for chunk in chunks.iter().filter(|chunk| !chunk.inside.is_empty()) {
            let (start, end) = (chunk.global + chunk.inside.start as u64, chunk.global + chunk.inside.end as u64);
            if start != stretch.end {
                self.traffic.tally.count_stretch(stretch, way);
                stretch = start..end;
            } else {
                stretch.end = end;
            }
        }
        self.traffic.tally.count_stretch(stretch, way);
    }
}

/// The accesses of global memory that a chunk is made of: one, or one for each element if it lies partly outside, or
/// not at a multiple of 16.
pub(super) fn pieces(chunk: &Chunk, element: u32) -> impl Iterator<Item = (u64, u32)> + use<> {
    let (global, inside) = (chunk.global, chunk.inside.clone());
    let is_whole = inside.len() == GRANULE && global.is_multiple_of(GRANULE as u64);
    let step = if is_whole { GRANULE as u32 } else { element };
    inside.step_by(step as usize).map(move |offset| (global + offset as u64, step))
}
