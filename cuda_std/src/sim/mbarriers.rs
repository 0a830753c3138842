//! Barriers in shared memory, which count arrivals and bytes.
//!
//! A phase that copies bring bytes to ends as late as it may: when the first thread that waits for it could go on. Then
//! the data of its copies come.
use super::block::{Block, Stop, suspend, unless_stopped, with};
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;
use super::transfers::Transfer;
use super::unit::{Actor, Use};

/// One barrier, in its present phase.
pub(super) struct Mbarrier {
    pub address: u32,
    /// Arrivals that a phase takes.
    count: u32,
    /// Those that are to come in this one.
    missing: u32,
    /// Bytes that its arrivals have announced.
    expected: u64,
    /// Bytes that its copies bring.
    arriving: u64,
    transfers: Vec<Transfer>,
    phase: u32,
    /// What happened before the arrivals so far, and before those of the phases that are complete.
    gathered: Vec<u32>,
    released: Vec<u32>,
    initialiser: Actor,
    /// Whether copies, and other blocks, know of it.
    is_visible: bool,
    /// Who writes what copies bring to it.
    agent: usize,
}

impl Mbarrier {
    /// Whether the phase can end.
    fn is_complete(&self) -> bool {
        self.missing == 0 && self.expected == self.arriving
    }

    /// Its state, for a report.
    pub fn state(&self) -> String {
        let Mbarrier { count, missing, expected, arriving, phase, .. } = self;
        let bytes = match (expected, arriving) {
            (0, 0) => String::new(),
            _ => format!(", and {arriving} of {expected} bytes are under way"),
        };
        format!("in its phase {phase} {} of {count} arrivals have come{bytes}", count - missing)
    }

    fn next_phase(&mut self) {
        self.phase += 1;
        self.missing = self.count;
        (self.expected, self.arriving) = (0, 0);
        self.released.clone_from(&self.gathered);
    }
}

/// The running thread waits until the phase of a parity is complete.
pub(super) fn wait(address: u32, parity: u32, site: Site) {
    while !unless_stopped(with(|block| block.poll_mbarrier(address, parity, site))) {
        suspend();
    }
}

const BYTES: u32 = 8;

/// The most that a barrier counts.
const MOST_ARRIVALS: u32 = (1 << 20) - 1;

impl Block {
    /// The running thread initialises a barrier.
    pub fn init_mbarrier(&mut self, address: u32, count: u32, site: Site) -> Result<(), Stop> {
        self.use_shared(self.current, address, BYTES, Use::Write, site)?;
        if count == 0 || count > MOST_ARRIVALS {
            let message = format!("an mbarrier of {count} arrivals; 1 to {MOST_ARRIVALS} are allowed");
            return Err(self.fault(FindingKind::Barrier, site, None, message));
        }
        let known = self.mbarriers.iter().position(|barrier| barrier.address == address);
        let agent = match known {
            Some(known) => self.mbarriers.swap_remove(known).agent,
            None if self.context.race_detector => self.clocks.add_agent(),
            None => 0,
        };
        self.mbarriers.push(Mbarrier {
            address,
            count,
            missing: count,
            expected: 0,
            arriving: 0,
            transfers: Vec::new(),
            phase: 0,
            gathered: Vec::new(),
            released: Vec::new(),
            initialiser: self.actor(self.current, site),
            is_visible: false,
            agent,
        });
        Ok(())
    }

    /// The running thread makes the barriers that it has initialised known to copies and to other blocks.
    pub fn show_mbarriers(&mut self) {
        let thread = self.first_id() + self.current;
        for barrier in self.mbarriers.iter_mut().filter(|barrier| barrier.initialiser.thread() == thread) {
            barrier.is_visible = true;
        }
    }

    fn find_mbarrier(&mut self, address: u32, site: Site) -> Result<usize, Stop> {
        match self.mbarriers.iter().position(|barrier| barrier.address == address) {
            Some(index) => Ok(index),
            None => {
                let message = format!("no mbarrier has been initialised at shared {address:#x}");
                Err(self.fault(FindingKind::Barrier, site, None, message))
            }
        }
    }

    /// The barrier of block `rank` at an address, which copies and other blocks must know of; else a fault of the
    /// running thread.
    pub fn find_visible_mbarrier(&mut self, rank: u32, address: u32, site: Site) -> Result<usize, Stop> {
        let find = |block: &Block| block.mbarriers.iter().position(|barrier| barrier.address == address);
        let block = self.peer(rank).map(|peer| &*peer);
        let found = match block {
            Some(peer) => {
                find(peer).map(|index| (index, peer.mbarriers[index].is_visible, peer.mbarriers[index].initialiser))
            }
            None => {
                find(self).map(|index| (index, self.mbarriers[index].is_visible, self.mbarriers[index].initialiser))
            }
        };
        match found {
            Some((index, true, _)) => Ok(index),
            Some((_, false, initialiser)) => {
                let message = format!(
                    "uses the mbarrier at shared {address:#x}, which the other has initialised without a \
                     fence::mbarrier_init afterwards"
                );
                let other = self.party_of(initialiser);
                Err(self.fault(FindingKind::ProxyFence, site, Some(other), message))
            }
            None => {
                let message = format!("no mbarrier has been initialised at shared {address:#x} of block {rank}");
                Err(self.fault(FindingKind::Barrier, site, None, message))
            }
        }
    }

    /// The running thread arrives, and announces `bytes`.
    pub fn arrive_at_mbarrier(&mut self, address: u32, bytes: u32, site: Site) -> Result<(), Stop> {
        let index = self.find_mbarrier(address, site)?;
        self.use_shared(self.current, address, BYTES, Use::Atomic, site)?;
        self.threads[self.current].site = Some(site);
        self.release_to(self.rank, index);
        let counted = self.count_arrival(index, bytes);
        counted.map_err(|message| self.fault(FindingKind::Barrier, site, None, message))
    }

    /// The running thread arrives at a barrier of block `rank`.
    pub fn arrive_at_mbarrier_of(&mut self, rank: u32, address: u32, site: Site) -> Result<(), Stop> {
        if rank == self.rank {
            return self.arrive_at_mbarrier(address, 0, site);
        }
        self.check_rank(rank, site)?;
        let index = self.find_visible_mbarrier(rank, address, site)?;
        self.threads[self.current].site = Some(site);
        self.release_to(rank, index);
        let counted = self.peer(rank).map_or(Ok(()), |peer| peer.count_arrival(index, 0));
        counted.map_err(|message| self.fault(FindingKind::Barrier, site, None, message))
    }

    /// What the running thread did so far is released to those that wait at a barrier of block `rank`.
    fn release_to(&mut self, rank: u32, index: usize) {
        if self.context.race_detector {
            let thread = self.first_id() + self.current;
            let barriers = |block: &mut Block| &raw mut block.mbarriers[index].gathered;
            let gathered = match self.peer(rank) {
                Some(peer) => barriers(peer),
                None => barriers(self),
            };
            // SAFETY: the barrier is another part of this block than its clocks, or of another block.
            self.clocks.release(thread, unsafe { &mut *gathered });
        }
    }

    fn count_arrival(&mut self, index: usize, bytes: u32) -> Result<(), String> {
        let barrier = &mut self.mbarriers[index];
        if barrier.missing == 0 {
            return Err(format!(
                "arrives at the mbarrier at shared {:#x}, whose phase takes only {} arrivals, and is not known to be \
                 complete",
                barrier.address, barrier.count
            ));
        }
        barrier.missing -= 1;
        barrier.expected += bytes as u64;
        self.advance_mbarrier(index)
    }

    /// A copy to this block has been issued, which tells the barrier.
    pub fn add_transfer(&mut self, index: usize, transfer: Transfer) -> Result<(), String> {
        let barrier = &mut self.mbarriers[index];
        barrier.arriving += transfer.bytes() as u64;
        barrier.transfers.push(transfer);
        self.advance_mbarrier(index)
    }

    /// Ends a phase without copies; lets those that wait for one with copies look again.
    fn advance_mbarrier(&mut self, index: usize) -> Result<(), String> {
        let barrier = &mut self.mbarriers[index];
        if barrier.missing == 0 && barrier.arriving > barrier.expected {
            return Err(format!(
                "copies bring {} bytes to the mbarrier at shared {:#x}, which expects {}",
                barrier.arriving, barrier.address, barrier.expected
            ));
        }
        if barrier.is_complete() {
            if barrier.transfers.is_empty() {
                barrier.next_phase();
            }
            self.wake_those_at_mbarrier(index);
        }
        self.ready.progress();
        Ok(())
    }

    fn wake_those_at_mbarrier(&mut self, index: usize) {
        let at = self.mbarriers[index].address;
        for thread in 0..self.threads.len() {
            if matches!(self.threads[thread].waiting, Waiting::Mbarrier { address, .. } if address == at) {
                self.wake(thread);
            }
        }
    }

    /// Whether the running thread has waited for the phase; else it waits on.
    fn poll_mbarrier(&mut self, address: u32, parity: u32, site: Site) -> Result<bool, Stop> {
        let index = self.find_mbarrier(address, site)?;
        self.use_shared(self.current, address, BYTES, Use::Atomic, site)?;
        let is_this = |barrier: &Mbarrier| barrier.phase & 1 == parity;
        if is_this(&self.mbarriers[index]) && self.mbarriers[index].is_complete() {
            self.end_transfers(index)?;
        }
        if is_this(&self.mbarriers[index]) {
            self.wait(Waiting::Mbarrier { address, parity }, site);
            return Ok(false);
        }
        if self.context.race_detector {
            let thread = self.first_id() + self.current;
            self.clocks.acquire(thread, &self.mbarriers[index].released);
        }
        Ok(true)
    }

    /// The data of all copies of a phase come, and the next one begins.
    fn end_transfers(&mut self, index: usize) -> Result<(), Stop> {
        let agent = self.mbarriers[index].agent;
        for transfer in std::mem::take(&mut self.mbarriers[index].transfers) {
            self.end_transfer(&transfer, agent)?;
        }
        let barrier = &mut self.mbarriers[index];
        if self.context.race_detector {
            self.clocks.release_agent(agent, &mut barrier.gathered);
        }
        barrier.next_phase();
        self.wake_those_at_mbarrier(index);
        self.ready.progress();
        Ok(())
    }
}
