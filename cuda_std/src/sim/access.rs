//! Every access to memory, checked: bounds, alignment, races, initialisation.
use super::block::{Block, Stop};
use super::memory::{self, Bits};
use super::report::FindingKind;
use super::shadow::{GRANULE, Span, Wrong};
use super::site::Site;
use super::traffic::What;
use super::uninitialised::FirstRead;
use super::unit::{Actor, Rival, Use};

impl Block {
    /// The running thread loads from shared memory.
    #[inline(always)]
    pub fn load_shared<T: Bits>(&mut self, address: u32, site: Site) -> Result<T, Stop> {
        let data = self.use_shared(self.current, address, T::BYTES, Use::Read, site)?;
        self.count(What::SharedLoad, address as u64, T::BYTES, site);
        // SAFETY: `use_shared` has checked that so many bytes lie there; they are integers.
        Ok(unsafe { data.cast::<T>().read_unaligned() })
    }

    /// The running thread stores to shared memory.
    #[inline(always)]
    pub fn store_shared<T: Bits>(&mut self, address: u32, value: T, site: Site) -> Result<(), Stop> {
        let data = self.use_shared(self.current, address, T::BYTES, Use::Write, site)?;
        self.count(What::SharedStore, address as u64, T::BYTES, site);
        // SAFETY: as in `load_shared`.
        unsafe { data.cast::<T>().write_unaligned(value) };
        Ok(())
    }

    /// The running thread loads from global memory.
    #[inline(always)]
    pub fn load_global<T: Bits>(&mut self, address: u64, site: Site) -> Result<T, Stop> {
        let data = self.use_global(address, T::BYTES, Use::Read, site)?;
        self.count(What::GlobalLoad, address, T::BYTES, site);
        // SAFETY: `use_global` has checked that so many bytes lie there, and that they are aligned.
        Ok(unsafe { T::load(data) })
    }

    /// The running thread stores to global memory.
    #[inline(always)]
    pub fn store_global<T: Bits>(&mut self, address: u64, value: T, site: Site) -> Result<(), Stop> {
        let data = self.use_global(address, T::BYTES, Use::Write, site)?;
        self.count(What::GlobalStore, address, T::BYTES, site);
        // SAFETY: as in `load_global`.
        unsafe { value.store(data) };
        Ok(())
    }

    /// The running thread replaces a word in shared memory by `update` of it. Gives the old one, and whether they differ.
    #[inline(always)]
    pub fn update_shared(
        &mut self,
        address: u32,
        update: impl FnOnce(u32) -> u32,
        site: Site,
    ) -> Result<(u32, bool), Stop> {
        let data = self.use_shared(self.current, address, u32::BYTES, Use::Atomic, site)?.cast::<u32>();
        self.count(What::SharedStore, address as u64, u32::BYTES, site);
        // SAFETY: as in `load_shared`.
        let old = unsafe { data.read_unaligned() };
        let new = update(old);
        // SAFETY: as in `load_shared`.
        unsafe { data.write_unaligned(new) };
        Ok((old, self.changes(old, new)))
    }

    /// The running thread replaces a word in global memory by `update` of it. Gives the old one, and whether they differ.
    ///
    /// Blocks take turns: the first atomic of a block waits until all blocks before it have ended.
    #[inline(always)]
    pub fn update_global(
        &mut self,
        address: u64,
        update: impl FnOnce(u32) -> u32,
        site: Site,
    ) -> Result<(u32, bool), Stop> {
        let (old, new) = self.update_global_uncounted(address, update, site)?;
        self.count(What::GlobalAtomic, address, u32::BYTES, site);
        Ok((old, self.changes(old, new)))
    }

    /// As [`update_global`](Self::update_global); gives the old one and the new one.
    #[inline(always)]
    pub fn update_global_uncounted(
        &mut self,
        address: u64,
        update: impl FnOnce(u32) -> u32,
        site: Site,
    ) -> Result<(u32, u32), Stop> {
        if !self.is_first {
            // The blocks of a cluster take their turn together.
            self.context.order.wait_for_turn(self.number - self.rank);
            self.is_first = true;
        }
        let data = self.use_global(address, u32::BYTES, Use::Atomic, site)?;
        // SAFETY: as in `load_global`. No other cluster updates anything before this one has ended.
        let old = unsafe { u32::load(data) };
        let new = update(old);
        // SAFETY: as above.
        unsafe { new.store(data) };
        Ok((old, new))
    }

    /// Whether an atomic update changes anything: what other threads may wait for.
    #[inline(always)]
    fn changes(&mut self, old: u32, new: u32) -> bool {
        if old != new {
            self.ready.progress();
        }
        old != new
    }

    /// The running thread reads the source of a copy that it issues.
    #[inline(always)]
    pub fn copy_source(&mut self, from: u64, site: Site) -> Result<(), Stop> {
        self.use_global(from, GRANULE as u32, Use::Read, site)?;
        self.count(What::GlobalLoad, from, GRANULE as u32, site);
        Ok(())
    }

    /// The data of a copy, which may have been read at any time up to now.
    pub fn read_copy_source(&mut self, from: u64, site: Site) -> Result<[u32; 4], Stop> {
        let data = self.use_global(from, GRANULE as u32, Use::Read, site)?;
        // SAFETY: as in `load_global`.
        Ok(unsafe { <[u32; 4]>::load(data) })
    }

    /// A copy of the running thread is on its way to shared memory.
    #[inline(always)]
    pub fn copy_destination(&mut self, to: u32, site: Site) -> Result<(), Stop> {
        let bytes = GRANULE as u32;
        let granule = self.shared_granule(to, bytes, Use::Write, site)?;
        self.count(What::SharedStore, to as u64, bytes, site);
        if self.context.race_detector {
            let actor = self.actor(self.current, site);
            if let Some(wrong) = self.shared.shadow.begin_copy(granule, actor, &self.clocks) {
                self.wrong_shared(self.current, to, bytes, Use::Write, site, wrong);
            }
        }
        Ok(())
    }

    /// The data of a copy have come to shared memory.
    pub fn end_copy(&mut self, to: u32, data: [u32; 4], site: Site) {
        let Some(granule) = self.shared.granule(to, GRANULE as u32) else { return };
        if self.context.race_detector {
            self.shared.shadow.end_copy(granule, self.actor(self.current, site), &self.clocks);
        }
        // SAFETY: the granule lies in shared memory.
        unsafe { self.shared.data(to).cast::<[u32; 4]>().write_unaligned(data) };
    }

    /// A thread, the running one or one of its warp, uses shared memory: where the data lie.
    #[inline(always)]
    pub fn use_shared(
        &mut self,
        thread: usize,
        address: u32,
        bytes: u32,
        usage: Use,
        site: Site,
    ) -> Result<*mut u8, Stop> {
        let granule = self.shared_granule(address, bytes, usage, site)?;
        if self.context.race_detector {
            let span = Span { offset: address % GRANULE as u32, bytes };
            let actor = self.actor(thread, site);
            if let Some(wrong) = self.shared.shadow.access(granule, span, usage, actor, &self.clocks) {
                self.wrong_shared(thread, address, bytes, usage, site, wrong);
            }
        }
        if usage == Use::Write {
            self.ready.progress();
        }
        Ok(self.shared.data(address))
    }

    /// The running thread uses four bytes of the shared memory of block `rank` of the cluster: where they lie.
    pub fn use_shared_of(&mut self, rank: u32, address: u32, usage: Use, site: Site) -> Result<*mut u8, Stop> {
        if rank == self.rank {
            return self.use_shared(self.current, address, u32::BYTES, usage, site);
        }
        self.check_rank(rank, site)?;
        let granule = self.shared_granule(address, u32::BYTES, usage, site)?;
        let actor = self.actor(self.current, site);
        let detects = self.context.race_detector;
        let peer: *mut Block = self.cluster[rank as usize];
        // SAFETY: another block than this one, of the cluster that runs (`Block::peer`); its clocks are not used.
        let shared = unsafe { &mut (*peer).shared };
        if detects {
            let span = Span { offset: address % GRANULE as u32, bytes: u32::BYTES };
            if let Some(wrong) = shared.shadow.access(granule, span, usage, actor, &self.clocks) {
                self.wrong_shared(self.current, address, u32::BYTES, usage, site, wrong);
            }
        }
        Ok(shared.data(address))
    }

    /// The async proxy reads 16 bytes of shared memory for a thread, by `actor`: where the data lie.
    pub fn read_shared_async(&mut self, thread: usize, actor: Actor, address: u32) -> Result<*mut u8, Stop> {
        let (bytes, site) = (GRANULE as u32, actor.site());
        let granule = self.shared_granule(address, bytes, Use::Read, site)?;
        if self.context.race_detector
            && let Some(wrong) = self.shared.shadow.read_async(granule, actor, &self.clocks)
        {
            self.wrong_shared(thread, address, bytes, Use::Read, site, wrong);
        }
        Ok(self.shared.data(address))
    }

    #[inline(always)]
    pub fn shared_granule(&mut self, address: u32, bytes: u32, usage: Use, site: Site) -> Result<usize, Stop> {
        match self.shared.granule(address, bytes) {
            Some(granule) if address.is_multiple_of(bytes) => Ok(granule),
            granule => Err(self.bad_shared_address(address, bytes, usage, site, granule.is_some())),
        }
    }

    /// The running thread uses global memory: where the data lie.
    #[inline(always)]
    pub fn use_global(&mut self, address: u64, bytes: u32, usage: Use, site: Site) -> Result<*mut u8, Stop> {
        let (number, offset) = memory::locate(address);
        let allocation = match self.context.allocations.get(number) {
            Some(a) if (offset as usize) < a.bytes && a.bytes - offset as usize >= bytes as usize => a,
            _ => return Err(self.bad_global_address(address, bytes, usage, site, false)),
        };
        let data = allocation.data().wrapping_add(offset as usize);
        if !offset.is_multiple_of(bytes as u64) {
            return Err(self.bad_global_address(address, bytes, usage, site, true));
        }
        if self.context.race_detector {
            let granule = self.global.granule(address, allocation);
            let span = Span { offset: address as u32 % GRANULE as u32, bytes };
            let actor = self.actor(self.current, site);
            self.news.note(address / GRANULE as u64, span.mask(), usage, actor, &self.clocks);
            if let Some(wrong) = self.global.shadow.access(granule, span, usage, actor, &self.clocks) {
                self.wrong_global(address, bytes, usage, site, wrong);
            }
        }
        if usage == Use::Write {
            self.ready.progress();
        }
        Ok(data)
    }

    /// As [`use_global`](Self::use_global), by the tensor copy engine for the running thread.
    pub fn use_global_async(&mut self, address: u64, bytes: u32, usage: Use, site: Site) -> Result<*mut u8, Stop> {
        self.check_global_fence(address, bytes, usage, site);
        self.use_global(address, bytes, usage, site)
    }

    /// Says if the tensor copy engine, which is about to use global memory for the running thread, need not see what was written
    /// there.
    pub fn check_global_fence(&mut self, address: u64, bytes: u32, usage: Use, site: Site) {
        if self.context.race_detector
            && let Some(granule) = self.global.used_granule(address)
        {
            let span = Span { offset: address as u32 % GRANULE as u32, bytes };
            let user = self.first_id() + self.current;
            if let Some(writer) = self.global.shadow.unfenced_write(granule, span, user, &self.clocks) {
                self.wrong_global(address, bytes, usage, site, Wrong::Unfenced(writer));
            }
        }
    }

    /// Counts an access of the running thread.
    #[inline(always)]
    pub fn count(&mut self, what: What, address: u64, bytes: u32, site: Site) {
        if self.context.counters {
            self.traffic.log(self.current, what, address, bytes, site);
        }
    }

    #[cold]
    #[inline(never)]
    fn bad_shared_address(&mut self, address: u32, bytes: u32, usage: Use, site: Site, is_inside: bool) -> Stop {
        let what = format!("{} {bytes} bytes of shared memory at {address:#x}", verb(usage));
        if is_inside {
            let message = format!("{what}, which is no multiple of {bytes}");
            return self.fault(FindingKind::Misaligned, site, None, message);
        }
        let message = format!("{what}; the block has {} bytes", self.shared.bytes());
        self.fault(FindingKind::OutOfBounds, site, None, message)
    }

    #[cold]
    #[inline(never)]
    fn bad_global_address(&mut self, address: u64, bytes: u32, usage: Use, site: Site, is_inside: bool) -> Stop {
        let place = memory::describe(address, &self.context.allocations);
        let what = format!("{} {bytes} bytes at {place}", verb(usage));
        if is_inside {
            let message = format!("{what}: not aligned to {bytes} bytes");
            return self.fault(FindingKind::Misaligned, site, None, message);
        }
        self.fault(FindingKind::OutOfBounds, site, None, what)
    }

    #[cold]
    #[inline(never)]
    pub fn wrong_shared(&mut self, thread: usize, address: u32, bytes: u32, usage: Use, site: Site, wrong: Wrong) {
        let place = |_: &Block| format!("{bytes} bytes of shared memory at {address:#x}");
        self.wrong(thread, place, usage, site, wrong);
    }

    #[cold]
    #[inline(never)]
    fn wrong_global(&mut self, address: u64, bytes: u32, usage: Use, site: Site, wrong: Wrong) {
        if wrong == Wrong::Uninitialised {
            // Another block may have written it: that is known when the blocks before this one have ended.
            let span = Span { offset: address as u32 % GRANULE as u32, bytes };
            let actor = self.actor(self.current, site);
            self.first_reads.push(FirstRead { address, mask: span.mask(), usage, actor });
            return;
        }
        let place = |block: &Block| memory::describe(address, &block.context.allocations);
        self.wrong(self.current, place, usage, site, wrong);
    }

    fn wrong(&mut self, thread: usize, place: impl FnOnce(&Block) -> String, usage: Use, site: Site, wrong: Wrong) {
        let (kind, other) = match wrong {
            Wrong::Race(Rival { actor, .. }) => (FindingKind::Race, Some(actor)),
            Wrong::Uninitialised => (FindingKind::Uninitialised, None),
            Wrong::UnfinishedCopy(actor) => (FindingKind::UnfinishedCopy, Some(actor)),
            Wrong::Invisible(actor) | Wrong::Unfenced(actor) => (FindingKind::ProxyFence, Some(actor)),
        };
        let why = match wrong {
            Wrong::Race(rival) => format!("and nothing orders it after the {} by the other", noun(rival.usage)),
            Wrong::Uninitialised => "which nobody has written".to_owned(),
            Wrong::UnfinishedCopy(_) => "to which the other's asynchronous copy is on its way".to_owned(),
            Wrong::Invisible(_) => "which the other has written without a fence::proxy_async afterwards".to_owned(),
            Wrong::Unfenced(_) => "which the other has written, with no Arrivals::wait in between".to_owned(),
        };
        let other = other.map(|actor| self.party_of(actor));
        let message = |block: &Block| format!("{} {}, {why}", verb(usage), place(block));
        self.report_lazily(thread, kind, site, other, message);
    }
}

/// What a thread does that uses memory.
pub(super) fn verb(usage: Use) -> &'static str {
    match usage {
        Use::Read => "reads",
        Use::Write => "writes",
        Use::Atomic => "atomically updates",
    }
}

/// A use of memory.
pub(super) fn noun(usage: Use) -> &'static str {
    match usage {
        Use::Read => "read",
        Use::Write => "write",
        Use::Atomic => "atomic update",
    }
}
