//! The shadow of a memory: for each granule of 16 bytes, who used it. A granule that is used in parts is split, into
//! units of 4 bytes, and these into units of 2: tiles that move by 16 bytes cost a check an access.
use super::clocks::Clocks;
use super::unit::{Actor, MoreReaders, Rival, Unit, Use};

/// What is wrong with an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wrong {
    Race(Rival),
    Uninitialised,
    /// A copy is on its way here, issued by this actor.
    UnfinishedCopy(Actor),
    /// The async proxy need not see what this actor has written to shared memory.
    Invisible(Actor),
    /// Nor to global memory.
    Unfenced(Actor),
}

/// Bytes of a granule.
pub(super) const GRANULE: usize = 16;

/// Granules, and parts of granules.
#[derive(Default)]
pub(super) struct Shadow {
    units: Vec<Unit>,
    free_parts: Vec<u32>,
    more: MoreReaders,
}

/// A stretch of a granule.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub offset: u32,
    pub bytes: u32,
}

impl Span {
    const WHOLE: Span = Span { offset: 0, bytes: GRANULE as u32 };

    /// A bit a pair of bytes. One byte counts as its pair.
    #[inline(always)]
    pub fn mask(self) -> u8 {
        (((1u32 << self.bytes.div_ceil(2)) - 1) << (self.offset / 2)) as u8
    }
}

impl Shadow {
    /// Begins a block.
    pub fn clear(&mut self) {
        self.units.clear();
        self.free_parts.clear();
        self.more.clear();
    }

    /// Adds `count` granules that nobody has used, and gives the first.
    pub fn add(&mut self, count: usize) -> usize {
        let first = self.units.len();
        self.units.resize(first + count, Unit::FRESH);
        first
    }

    pub fn set_initialised(&mut self, granule: usize, mask: u8) {
        self.units[granule].initialised = mask;
    }

    /// Notes a use of a part of a granule, and says what is wrong with it.
    #[inline(always)]
    pub fn access(&mut self, granule: usize, span: Span, usage: Use, actor: Actor, clocks: &Clocks) -> Option<Wrong> {
        let unit = &mut self.units[granule];
        if let Some(copy) = unit.copy_in_flight() {
            return Some(Wrong::UnfinishedCopy(copy));
        }
        let mask = span.mask();
        let initialised = unit.initialised & mask == mask || usage == Use::Write;
        // Also after a read: once said is enough.
        unit.initialised |= mask;
        // The usual cases first: a whole granule, and one of the four parts of one that is split.
        let part = if unit.is_split() && span.bytes == 4 { (unit.link + span.offset / 4) as usize } else { granule };
        let unit = &mut self.units[part];
        let rival = if !unit.is_split() && (part != granule || span.bytes as usize == GRANULE) {
            unit.access(usage, actor, clocks, &mut self.more)
        } else {
            self.access_parts(granule, GRANULE as u32, span, usage, actor, clocks)
        };
        match rival {
            Some(rival) => Some(Wrong::Race(rival)),
            None if !initialised => Some(Wrong::Uninitialised),
            None => None,
        }
    }

    /// A copy to this granule begins: its data may come at any time, and nobody may use it before they have.
    pub fn begin_copy(&mut self, granule: usize, actor: Actor, clocks: &Clocks) -> Option<Wrong> {
        let wrong = self.access(granule, Span::WHOLE, Use::Write, actor, clocks);
        self.units[granule].initialised = 0;
        self.units[granule].set_in_flight(true);
        wrong
    }

    /// As [`begin_copy`](Self::begin_copy), of the tensor copy engine: what was written here before must be visible to the async
    /// proxy, lest it comes after the data of the copy.
    pub fn begin_transfer(&mut self, granule: usize, actor: Actor, clocks: &Clocks) -> Option<Wrong> {
        let invisible = self.invisible_write(granule, actor.thread(), clocks);
        let wrong = self.begin_copy(granule, actor, clocks);
        wrong.or(invisible.map(Wrong::Invisible))
    }

    /// The issuer of a copy has waited for it.
    pub fn end_copy(&mut self, granule: usize, actor: Actor, clocks: &Clocks) {
        self.units[granule].set_in_flight(false);
        self.access(granule, Span::WHOLE, Use::Write, actor, clocks);
    }

    /// The tensor copy engine, an agent, has brought the data of a copy.
    pub fn deliver(&mut self, granule: usize, agent: Actor, clocks: &Clocks) {
        if self.units[granule].is_split() {
            self.free_parts.push(self.units[granule].link);
        }
        self.units[granule].overwrite(clocks.now(agent.thread()), agent, &mut self.more);
    }

    /// Notes a read of a whole granule by the async proxy, for a thread.
    pub fn read_async(&mut self, granule: usize, actor: Actor, clocks: &Clocks) -> Option<Wrong> {
        let wrong = self.access(granule, Span::WHOLE, Use::Read, actor, clocks);
        wrong.or_else(|| self.invisible_write(granule, actor.thread(), clocks).map(Wrong::Invisible))
    }

    /// Who has written to a granule of shared memory what the async proxy need not see on behalf of `user`.
    fn invisible_write(&self, granule: usize, user: usize, clocks: &Clocks) -> Option<Actor> {
        self.find_write(granule, Span::WHOLE, Span::WHOLE, &|writer, epoch| !clocks.is_visible(writer, epoch, user))
    }

    /// Who has written to a part of a granule of global memory, before the present of `user`, what the async proxy need not see
    /// on its behalf.
    pub fn unfenced_write(&self, granule: usize, span: Span, user: usize, clocks: &Clocks) -> Option<Actor> {
        self.find_write(granule, Span::WHOLE, span, &|writer, epoch| {
            clocks.is_before(writer, epoch, user) && !clocks.is_fenced_globally(writer, epoch, user)
        })
    }

    /// The writer of one of the last writes to `wanted`, of a unit that is at `of`, that `is_it` says yes to.
    fn find_write(&self, unit: usize, of: Span, wanted: Span, is_it: &impl Fn(usize, u32) -> bool) -> Option<Actor> {
        let known = &self.units[unit];
        if known.is_split() {
            let mut wanted_parts = parts(of).filter(|(_, part)| part.mask() & wanted.mask() != 0);
            return wanted_parts.find_map(|(i, part)| self.find_write(known.link as usize + i, part, wanted, is_it));
        }
        let (writer, epoch) = known.last_write()?;
        is_it(writer.thread(), epoch).then_some(writer)
    }

    /// Calls `found` for all threads that have used a granule since its last write, and for those that wrote it, with the epoch
    /// and the pairs of bytes.
    pub fn epochs(&self, granule: usize, found: &mut impl FnMut(usize, u32, u8)) {
        self.epochs_of_part(granule, Span::WHOLE, found);
    }

    fn epochs_of_part(&self, unit: usize, span: Span, found: &mut impl FnMut(usize, u32, u8)) {
        let unit = &self.units[unit];
        if unit.is_split() {
            for (part, span) in parts(span) {
                self.epochs_of_part(unit.link as usize + part, span, found);
            }
        } else {
            unit.epochs(&self.more).for_each(|(thread, epoch)| found(thread, epoch, span.mask()));
        }
    }

    /// Calls `found` for the uses of a granule that may race with other blocks', each with its pairs of bytes.
    pub fn uses(&self, granule: usize, found: &mut impl FnMut(Rival, u8)) {
        self.uses_of_part(granule, Span::WHOLE, found);
    }

    fn uses_of_part(&self, unit: usize, span: Span, found: &mut impl FnMut(Rival, u8)) {
        let unit = &self.units[unit];
        if unit.is_split() {
            for (part, span) in parts(span) {
                self.uses_of_part(unit.link as usize + part, span, found);
            }
        } else {
            unit.uses(&self.more).for_each(|rival| found(rival, span.mask()));
        }
    }

    /// An access to a unit of `size` bytes, or to parts of it.
    #[inline(never)]
    fn access_parts(
        &mut self,
        unit: usize,
        size: u32,
        span: Span,
        usage: Use,
        actor: Actor,
        clocks: &Clocks,
    ) -> Option<Rival> {
        // A pair of bytes is the smallest unit: one byte counts as its pair.
        let whole = span.bytes == size || size == 2;
        if !self.units[unit].is_split() {
            if whole {
                return self.units[unit].access(usage, actor, clocks, &mut self.more);
            }
            self.split(unit, size);
        }
        let first = self.units[unit].link as usize;
        let mut rival = None;
        let (part_bytes, end) = (bytes_of_parts(size), span.offset + span.bytes);
        for part in span.offset / part_bytes..end.div_ceil(part_bytes) {
            let (from, to) = (span.offset.max(part * part_bytes), end.min((part + 1) * part_bytes));
            let span = Span { offset: from - part * part_bytes, bytes: to - from };
            let found = self.access_parts(first + part as usize, part_bytes, span, usage, actor, clocks);
            rival = rival.or(found);
        }
        if whole && usage == Use::Write {
            self.free_parts.push(first as u32);
            self.units[unit].unite(clocks.now(actor.thread()), actor);
        }
        rival
    }

    fn split(&mut self, unit: usize, size: u32) {
        let first = self.free_parts.pop().map_or_else(|| self.add(MOST_PARTS), |first| first as usize);
        let known = self.units[unit].split(first as u32);
        for (part, _) in parts(Span { offset: 0, bytes: size }).skip(1) {
            self.units[first + part] = known.duplicate(&mut self.more);
        }
        self.units[first] = known;
    }
}

const MOST_PARTS: usize = 4;

/// The parts that a unit is split into.
fn parts(unit: Span) -> impl Iterator<Item = (usize, Span)> {
    let bytes = bytes_of_parts(unit.bytes);
    (0..unit.bytes / bytes).map(move |part| (part as usize, Span { offset: unit.offset + part * bytes, bytes }))
}

fn bytes_of_parts(unit: u32) -> u32 {
    if unit == GRANULE as u32 { 4 } else { 2 }
}
