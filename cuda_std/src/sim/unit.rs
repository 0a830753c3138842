//! What the race detector knows of a few bytes of memory: FastTrack (Flanagan and Freund, 2009), with warps for readers.
//!
//! Of writes the last is kept. Of reads since then as many as may race with a later write, but the lanes of a warp that
//! read at the same place in the same epoch are one entry: a tile that a whole block reads costs an entry a warp.
//! Atomics are entries among the reads: they do not race with each other.
use super::WARP;
use super::clocks::Clocks;
use super::site::Site;

/// How memory is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    Read,
    Write,
    Atomic,
}

/// A thread and what it is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Actor(u32);

impl Actor {
    const NONE: Actor = Actor(0);

    #[inline(always)]
    pub fn new(thread: usize, site: Site) -> Self {
        Actor((thread as u32) << Site::BITS | site.bits())
    }

    #[inline(always)]
    pub fn thread(self) -> usize {
        (self.0 >> Site::BITS) as usize
    }

    #[inline(always)]
    pub fn site(self) -> Site {
        Site::from_bits(self.0 & ((1 << Site::BITS) - 1))
    }
}

/// An access that the present one is not ordered after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rival {
    pub usage: Use,
    pub actor: Actor,
}

/// Lanes of a warp that read, or changed atomically, at one place in one epoch.
#[derive(Clone, Copy)]
#[repr(C)]
struct Readers {
    epoch: u32,
    lanes: u32,
    /// Site, warp, and whether they are atomics: equal for equal readers.
    key: u32,
}

impl Readers {
    const NONE: Readers = Readers { epoch: 0, lanes: 0, key: 0 };

    #[inline(always)]
    fn key(actor: Actor, usage: Use) -> u32 {
        let warp = (actor.thread() / WARP) as u32;
        ((usage == Use::Atomic) as u32) << 31 | warp << Site::BITS | actor.site().bits()
    }

    #[inline(always)]
    fn usage(self) -> Use {
        if self.key >> 31 == 1 { Use::Atomic } else { Use::Read }
    }

    fn actors(self) -> impl Iterator<Item = Actor> {
        let site = Site::from_bits(self.key & ((1 << Site::BITS) - 1));
        let first = (self.key << 1 >> 1 >> Site::BITS) as usize * WARP;
        (0..WARP).filter(move |lane| self.lanes >> lane & 1 == 1).map(move |lane| Actor::new(first + lane, site))
    }

    /// One of them that `thread` is not ordered after.
    fn rival(self, thread: usize, clocks: &Clocks) -> Option<Rival> {
        if clocks.is_past(self.epoch) {
            return None;
        }
        let mut actors = self.actors();
        let actor = actors.find(|other| !clocks.is_before(other.thread(), self.epoch, thread))?;
        Some(Rival { usage: self.usage(), actor })
    }
}

/// 16 bytes of memory, or a part of them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Unit {
    write_epoch: u32,
    writer: Actor,
    readers: [Readers; 4],
    /// Of a split unit its first part; of one with more readers their list.
    pub link: u32,
    count: u8,
    flags: u8,
    /// Which pairs of bytes have been written: a bit each. Kept by whole granules only.
    pub initialised: u8,
    _reserved: u8,
}

const SPLIT: u8 = 1;
const MORE_READERS: u8 = 2;
const HAS_ATOMICS: u8 = 4;
const IN_FLIGHT: u8 = 8;

/// Lists of readers that units have no room for.
#[derive(Default)]
pub(super) struct MoreReaders {
    lists: Vec<Vec<Readers>>,
    free: Vec<u32>,
}

impl MoreReaders {
    pub fn clear(&mut self) {
        self.free.clear();
        self.free.extend(0..self.lists.len() as u32);
        self.lists.iter_mut().for_each(Vec::clear);
    }

    fn add(&mut self, list: Vec<Readers>) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.lists.push(Vec::new());
            self.lists.len() as u32 - 1
        });
        self.lists[slot as usize] = list;
        slot
    }

    fn remove(&mut self, slot: u32) {
        self.lists[slot as usize].clear();
        self.free.push(slot);
    }
}

impl Unit {
    /// Memory that nobody has used.
    pub const FRESH: Unit = Unit {
        write_epoch: 0,
        writer: Actor::NONE,
        readers: [Readers::NONE; 4],
        link: 0,
        count: 0,
        flags: 0,
        initialised: 0,
        _reserved: 0,
    };

    /// Whether its parts are kept apart, from [`link`](Self::link) on.
    #[inline(always)]
    pub fn is_split(&self) -> bool {
        self.flags & SPLIT != 0
    }

    /// The copy that is still on its way to this unit.
    #[inline(always)]
    pub fn copy_in_flight(&self) -> Option<Actor> {
        if self.flags & IN_FLIGHT != 0 { Some(self.writer) } else { None }
    }

    /// Who wrote it last, and in which epoch; nobody, if it has not been written.
    pub fn last_write(&self) -> Option<(Actor, u32)> {
        (self.write_epoch > 0).then_some((self.writer, self.write_epoch))
    }

    /// Forgets all that was known, as the tensor copy engine has written it.
    pub fn overwrite(&mut self, epoch: u32, actor: Actor, more: &mut MoreReaders) {
        if !self.is_split() {
            self.forget_readers(more);
        }
        self.unite(epoch, actor);
        self.initialised = 0xff;
    }

    pub fn set_in_flight(&mut self, in_flight: bool) {
        self.flags = if in_flight { self.flags | IN_FLIGHT } else { self.flags & !IN_FLIGHT };
    }

    /// Keeps the parts apart from now on, in units that begin at `link`; gives what each part knows.
    pub fn split(&mut self, link: u32) -> Unit {
        let part = *self;
        self.link = link;
        self.flags = SPLIT;
        self.count = 0;
        part
    }

    /// A copy for another part.
    pub fn duplicate(&self, more: &mut MoreReaders) -> Unit {
        let mut copy = *self;
        if copy.flags & MORE_READERS != 0 {
            copy.link = more.add(more.lists[copy.link as usize].clone());
        }
        copy
    }

    /// Makes one of a unit whose parts have all been written by `actor`.
    pub fn unite(&mut self, epoch: u32, actor: Actor) {
        *self = Unit { write_epoch: epoch, writer: actor, initialised: self.initialised, ..Unit::FRESH };
    }

    /// Notes a use of the whole unit, and gives an earlier one that nothing orders it after.
    #[inline(always)]
    pub fn access(&mut self, usage: Use, actor: Actor, clocks: &Clocks, more: &mut MoreReaders) -> Option<Rival> {
        let thread = actor.thread();
        let after_write = clocks.is_before(self.writer.thread(), self.write_epoch, thread);
        let mut rival = if after_write { None } else { Some(Rival { usage: Use::Write, actor: self.writer }) };
        if usage == Use::Write {
            if self.count > 0 {
                rival = rival.or(self.reader_rival(|_| true, thread, clocks, more));
                self.forget_readers(more);
            }
            self.write_epoch = clocks.now(thread);
            self.writer = actor;
        } else {
            if usage == Use::Atomic || self.flags & HAS_ATOMICS != 0 {
                rival = rival.or(self.reader_rival(|other| other != usage, thread, clocks, more));
                self.flags |= if usage == Use::Atomic { HAS_ATOMICS } else { 0 };
            }
            self.add_reader(usage, actor, clocks, more);
        }
        rival
    }

    /// What blocks other than this one may race with: the first of each kind of use.
    pub fn uses(&self, more: &MoreReaders) -> impl Iterator<Item = Rival> {
        let write = (self.write_epoch > 0).then_some(Rival { usage: Use::Write, actor: self.writer });
        let first = |usage| {
            let readers = self.all_readers(more).find(|r| r.usage() == usage)?;
            Some(Rival { usage, actor: readers.actors().next()? })
        };
        [write, first(Use::Read), first(Use::Atomic)].into_iter().flatten()
    }

    /// Who wrote it last and who has used it since, each with the epoch.
    pub fn epochs<'a>(&'a self, more: &'a MoreReaders) -> impl Iterator<Item = (usize, u32)> + 'a {
        let write = self.last_write().map(|(actor, epoch)| (actor.thread(), epoch));
        let reads = self.all_readers(more).flat_map(|r| r.actors().map(move |actor| (actor.thread(), r.epoch)));
        write.into_iter().chain(reads)
    }

    fn all_readers<'a>(&'a self, more: &'a MoreReaders) -> impl Iterator<Item = Readers> + 'a {
        let rest: &[Readers] = if self.flags & MORE_READERS != 0 { &more.lists[self.link as usize] } else { &[] };
        self.readers[..self.count as usize].iter().chain(rest).copied()
    }

    #[inline(never)]
    fn reader_rival(
        &self,
        races: impl Fn(Use) -> bool,
        thread: usize,
        clocks: &Clocks,
        more: &MoreReaders,
    ) -> Option<Rival> {
        self.all_readers(more).filter(|r| races(r.usage())).find_map(|r| r.rival(thread, clocks))
    }

    fn forget_readers(&mut self, more: &mut MoreReaders) {
        if self.flags & MORE_READERS != 0 {
            more.remove(self.link);
        }
        self.count = 0;
        self.flags &= !(MORE_READERS | HAS_ATOMICS);
    }

    #[inline(always)]
    fn add_reader(&mut self, usage: Use, actor: Actor, clocks: &Clocks, more: &mut MoreReaders) {
        let thread = actor.thread();
        let new = Readers { epoch: clocks.now(thread), lanes: 1 << (thread % WARP), key: Readers::key(actor, usage) };
        let mut place = self.count as usize;
        for (i, old) in self.readers[..self.count as usize].iter_mut().enumerate() {
            if old.key == new.key && old.epoch == new.epoch {
                old.lanes |= new.lanes;
                return;
            }
            // What everybody has seen cannot race any more.
            if clocks.is_past(old.epoch) {
                place = i;
            }
        }
        if place < 4 {
            self.readers[place] = new;
            self.count = self.count.max(place as u8 + 1);
        } else {
            self.add_reader_to_full(new, thread, clocks, more);
        }
    }

    #[inline(never)]
    fn add_reader_to_full(&mut self, new: Readers, thread: usize, clocks: &Clocks, more: &mut MoreReaders) {
        // A read that this one is ordered after is not needed: a write that is ordered after this is so after that.
        let is_seen = |old: &Readers| old.usage() == new.usage() && old.rival(thread, clocks).is_none();
        if let Some(old) = self.readers.iter_mut().find(|old| is_seen(old)) {
            *old = new;
            return;
        }
        if self.flags & MORE_READERS == 0 {
            self.link = more.add(Vec::new());
            self.flags |= MORE_READERS;
        }
        let list = &mut more.lists[self.link as usize];
        match list.iter_mut().find(|old| old.key == new.key && old.epoch == new.epoch) {
            Some(old) => old.lanes |= new.lanes,
            None => {
                list.retain(|old| !clocks.is_past(old.epoch));
                list.push(new);
            }
        }
    }
}
