//! Asynchronous copies take effect as late as they may: at the wait of the thread that issued them.
use super::block::{Block, Stop};
use super::memory::Bits;
use super::report::FindingKind;
use super::site::Site;
use std::collections::VecDeque;

/// A copy of 16 bytes on its way to shared memory.
#[derive(Clone, Copy)]
struct PendingCopy {
    to: u32,
    /// Nothing for zeros.
    from: Option<u64>,
    site: Site,
}

/// The copies of a thread, in the order of their issue.
#[derive(Default)]
pub(super) struct Copies {
    pending: VecDeque<PendingCopy>,
    /// How many copies each group has that is not waited for.
    groups: VecDeque<usize>,
    /// Copies of no group yet.
    uncommitted: usize,
}

type Chunk = [u32; 4];

impl Copies {
    pub fn clear(&mut self) {
        *self = Copies::default();
    }

    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.uncommitted));
    }
}

impl Block {
    /// Issues a copy.
    #[inline(always)]
    pub fn begin_copy(&mut self, to: u32, from: Option<u64>, site: Site) -> Result<(), Stop> {
        if let Some(from) = from {
            self.copy_source(from, site)?;
        }
        self.copy_destination(to, site)?;
        let copies = &mut self.threads[self.current].copies;
        copies.pending.push_back(PendingCopy { to, from, site });
        copies.uncommitted += 1;
        Ok(())
    }

    /// Waits until at most `groups` groups of the running thread are pending.
    pub fn wait_for_copies(&mut self, groups: usize) -> Result<(), Stop> {
        while self.threads[self.current].copies.groups.len() > groups {
            let count = self.threads[self.current].copies.groups.pop_front().unwrap_or(0);
            for _ in 0..count {
                self.end_first_copy()?;
            }
        }
        Ok(())
    }

    fn end_first_copy(&mut self) -> Result<(), Stop> {
        let Some(PendingCopy { to, from, site }) = self.threads[self.current].copies.pending.pop_front() else {
            return Ok(());
        };
        let data = match from {
            Some(from) => self.read_copy_source(from, site)?,
            None => Chunk::default(),
        };
        self.end_copy(to, data, site);
        self.ready.progress();
        Ok(())
    }

    /// The running thread has exited: its copies must have ended.
    pub fn leave_copies(&mut self) {
        let pending = &self.threads[self.current].copies.pending;
        if let Some(&PendingCopy { to, site, .. }) = pending.front() {
            let count = pending.len();
            let message = format!("exits with {count} asynchronous copies not waited for; the first to shared {to:#x}");
            self.report(FindingKind::UnfinishedCopy, site, None, message);
        }
    }
}

const _: () = assert!(Chunk::BYTES == 16);
