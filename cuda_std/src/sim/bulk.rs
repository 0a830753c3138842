//! Copies of the tensor copy engine out of shared memory. They take effect as late as they may: they read shared memory
//! when their thread waits for that, and write global memory when it waits for their end, or exits.
use super::block::{Block, Stop};
use super::boxes::Chunk;
use super::memory::Bits;
use super::report::FindingKind;
use super::shadow::GRANULE;
use super::site::Site;
use super::traffic::Way;
use super::transfers::{Source, pieces};
use super::unit::Use;
use std::collections::VecDeque;

/// A copy on its way to global memory.
struct Store {
    chunks: Vec<Chunk>,
    element: u32,
    way: Way,
    site: Site,
    /// What it has read of shared memory.
    data: Vec<[u8; GRANULE]>,
}

/// The stores of a thread, in the order of their issue.
#[derive(Default)]
pub(super) struct BulkGroups {
    uncommitted: Vec<Store>,
    /// Groups that may not have read shared memory yet, and those that have not written global memory.
    unread: VecDeque<Vec<Store>>,
    unwritten: VecDeque<Vec<Store>>,
}

impl BulkGroups {
    pub fn clear(&mut self) {
        *self = BulkGroups::default();
    }

    pub fn commit(&mut self) {
        let group = std::mem::take(&mut self.uncommitted);
        self.unread.push_back(group);
    }
}

impl Block {
    /// The running thread issues a copy from shared memory.
    pub fn begin_store(&mut self, from: u32, to: Source, way: Way, site: Site) -> Result<(), Stop> {
        self.check_engine_use(from, &to, site)?;
        let is_of_floats = match &to {
            Source::Box { map, .. } => map.dtype == crate::DType::F32,
            Source::Stretch { .. } | Source::Shared { .. } => true,
        };
        if way == Way::Add && !is_of_floats {
            let message = "adds to a tensor that is not of f32".to_owned();
            return Err(self.fault(FindingKind::TensorCopy, site, None, message));
        }
        let mut chunks = to.chunks(from);
        chunks.retain(|chunk| !chunk.inside.is_empty());
        let actor = self.actor(self.current, site);
        for chunk in &chunks {
            self.read_shared_async(self.current, actor, chunk.shared)?;
        }
        let store = Store { chunks, element: to.element(), way, site, data: Vec::new() };
        self.threads[self.current].bulk.uncommitted.push(store);
        Ok(())
    }

    /// All but the last `pending` groups of the running thread read shared memory.
    pub fn read_bulk_groups(&mut self, pending: usize) -> Result<(), Stop> {
        while self.threads[self.current].bulk.unread.len() > pending {
            let mut group = self.threads[self.current].bulk.unread.pop_front().unwrap_or_default();
            for store in &mut group {
                let actor = self.actor(self.current, store.site);
                for chunk in &store.chunks {
                    let data = self.read_shared_async(self.current, actor, chunk.shared)?;
                    // SAFETY: the word before has checked that 16 bytes lie there.
                    store.data.push(unsafe { data.cast::<[u8; GRANULE]>().read_unaligned() });
                }
            }
            self.threads[self.current].bulk.unwritten.push_back(group);
            self.ready.progress();
        }
        Ok(())
    }

    /// All but the last `pending` groups of the running thread end.
    pub fn end_bulk_groups(&mut self, pending: usize) -> Result<(), Stop> {
        self.read_bulk_groups(pending)?;
        let unread = self.threads[self.current].bulk.unread.len();
        while self.threads[self.current].bulk.unwritten.len() + unread > pending {
            for store in self.threads[self.current].bulk.unwritten.pop_front().into_iter().flatten() {
                self.write_store(&store)?;
            }
        }
        Ok(())
    }

    fn write_store(&mut self, store: &Store) -> Result<(), Stop> {
        let thread = self.first_id() + self.current;
        if self.context.race_detector {
            self.clocks.begin_of_copy(thread);
        }
        for (chunk, data) in store.chunks.iter().zip(&store.data) {
            if store.way == Way::Add {
                for offset in chunk.inside.clone().step_by(4) {
                    let x = f32::from_le_bytes(std::array::from_fn(|i| data[offset as usize + i]));
                    let add = |old| (f32::from_bits(old) + x).to_bits();
                    let address = chunk.global + offset as u64;
                    self.check_global_fence(address, u32::BYTES, Use::Atomic, store.site);
                    self.update_global_uncounted(address, add, store.site)?;
                }
                continue;
            }
            for (address, bytes) in pieces(chunk, store.element) {
                let to = self.use_global_async(address, bytes, Use::Write, store.site)?;
                let at = (address - chunk.global) as usize;
                // SAFETY: `use_global` has checked that so many bytes lie there, and that they are aligned.
                unsafe {
                    match bytes {
                        16 => std::mem::transmute::<[u8; 16], [u32; 4]>(*data).store(to),
                        4 => u32::from_le_bytes(std::array::from_fn(|i| data[at + i])).store(to),
                        2 => u16::from_le_bytes(std::array::from_fn(|i| data[at + i])).store(to),
                        _ => data[at].store(to),
                    }
                }
            }
        }
        if self.context.race_detector {
            self.clocks.end_of_copy(thread);
        }
        self.count_chunks(&store.chunks, store.way);
        self.ready.progress();
        Ok(())
    }

    /// The running thread has exited: shared memory, which may be another block's then, must have been read.
    pub fn leave_bulk_groups(&mut self) -> Result<(), Stop> {
        let BulkGroups { uncommitted, unread, .. } = &self.threads[self.current].bulk;
        if let Some(store) = unread.iter().flatten().chain(uncommitted).next() {
            let message = "exits without having waited until its bulk stores have read shared memory".to_owned();
            self.report(FindingKind::UnfinishedCopy, store.site, None, message);
        }
        self.threads[self.current].bulk.commit();
        self.end_bulk_groups(0)
    }
}
