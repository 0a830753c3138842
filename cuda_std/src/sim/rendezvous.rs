//! Words that the lanes of a warp say together: the last to come does the work for all.
use super::WARP;
use super::block::{Block, Stop, suspend, unless_stopped, with};
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;
use crate::matrix::Format;
use std::fmt;

/// A word that lanes say together, with all that must be equal for them to meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    SyncWarp,
    ShuffleXor,
    Shuffle,
    ShuffleQuad,
    ShuffleUp,
    ShuffleDown,
    Ballot,
    Any,
    All,
    Elect,
    Ldmatrix { count: u8, trans: bool },
    Stmatrix { count: u8, trans: bool },
    Mma { m: u8, n: u8, format: Format },
    MmaShared { m: u8, n: u8, format: Format, trans: bool },
    WaitForProducts { pending: u8 },
}

impl Word {
    /// Whether all lanes must say it at the same place: `.aligned` in PTX.
    fn is_aligned(self) -> bool {
        match self {
            Word::Ldmatrix { .. } | Word::Stmatrix { .. } | Word::Mma { .. } | Word::MmaShared { .. } => true,
            Word::WaitForProducts { .. } => true,
            Word::SyncWarp
            | Word::ShuffleXor
            | Word::Shuffle
            | Word::ShuffleQuad
            | Word::ShuffleUp
            | Word::ShuffleDown => false,
            Word::Ballot | Word::Any | Word::All | Word::Elect => false,
        }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Word::SyncWarp => "sync_warp",
            Word::ShuffleXor => "shuffle_xor",
            Word::ShuffleQuad => "shuffle_quad",
            Word::Shuffle => "shuffle",
            Word::ShuffleUp => "shuffle_up",
            Word::ShuffleDown => "shuffle_down",
            Word::Ballot => "ballot",
            Word::Any => "any",
            Word::All => "all",
            Word::Elect => "elect",
            Word::Ldmatrix { .. } => "ldmatrix",
            Word::Stmatrix { .. } => "stmatrix",
            Word::Mma { .. } => "mma",
            Word::MmaShared { .. } => "mma_shared",
            Word::WaitForProducts { .. } => "the wait for products",
        })
    }
}

/// The rendezvous of a warp.
pub(super) struct Warp {
    /// The lanes that it has: the last warp of a block may be short.
    pub lanes: u32,
    pub exited: u32,
    /// Lanes wait at those that have `arrived` lanes; the others are free.
    slots: Vec<Slot>,
}

struct Slot {
    word: Word,
    members: u32,
    arrived: u32,
    operands: [*mut (); WARP],
}

impl Warp {
    pub fn new(lanes: usize) -> Self {
        Warp { lanes: (u64::MAX >> (64 - lanes)) as u32, exited: 0, slots: Vec::new() }
    }

    pub fn reset(&mut self) {
        self.exited = 0;
        self.slots.clear();
    }

    /// The lanes that have arrived where `lane` waits.
    pub fn arrived_with(&self, lane: usize) -> u32 {
        self.slots.iter().find(|slot| slot.arrived >> lane & 1 == 1).map_or(0, |slot| slot.arrived)
    }
}

/// All members of a word, and what each has brought.
pub(super) struct Meeting<T> {
    pub members: u32,
    /// The thread that is lane 0.
    pub first_thread: usize,
    operands: [*mut T; WARP],
}

impl<T> Meeting<T> {
    pub fn lanes(&self) -> impl Iterator<Item = usize> + use<T> {
        let members = self.members;
        (0..WARP).filter(move |lane| members >> lane & 1 == 1)
    }

    /// What a member has brought, and where it expects its result.
    #[inline(always)]
    pub fn operand(&mut self, lane: usize) -> &mut T {
        debug_assert!(self.members >> lane & 1 == 1);
        // SAFETY: the operand is on the stack of a lane that waits in `meet`, or of the one that runs this; the word that
        // the lanes have in common says its type. The lane does not touch it before `meet` ends.
        unsafe { &mut *self.operands[lane] }
    }
}

/// The running lane says `word` together with `members`. The last to come calls `finish` for all of them.
///
/// `T` must be the same wherever `word` is.
#[inline(always)]
pub(super) fn meet<T>(
    word: Word,
    members: u32,
    site: Site,
    operand: &mut T,
    finish: impl FnOnce(&mut Block, &mut Meeting<T>) -> Result<(), Stop>,
) {
    let operand: *mut T = operand;
    unless_stopped(with(|block| {
        let Some(slot) = block.arrive(word, members, site, operand.cast())? else { return Ok(()) };
        let warp = block.current / WARP;
        let operands = block.warps[warp].slots[slot].operands.map(|operand| operand.cast());
        let first_thread = warp * WARP;
        finish(block, &mut Meeting { members, first_thread, operands })?;
        block.part(first_thread, members);
        Ok(())
    }));
    suspend();
}

impl Block {
    /// The running lane arrives. If it is the last, the slot that has the operands of all.
    #[inline(always)]
    fn arrive(&mut self, word: Word, members: u32, site: Site, operand: *mut ()) -> Result<Option<usize>, Stop> {
        let (number, lane) = (self.current / WARP, self.current % WARP);
        let warp = &self.warps[number];
        let is_usual = members == u32::MAX && warp.lanes == members && warp.exited == 0;
        let index = match &warp.slots[..] {
            [slot] if is_usual && (slot.arrived == 0 || slot.word == word && slot.members == members) => 0,
            _ => self.find_slot(word, members, site)?,
        };
        let slot = &mut self.warps[number].slots[index];
        if slot.arrived == 0 {
            (slot.word, slot.members) = (word, members);
        } else if word.is_aligned() {
            let other = number * WARP + slot.arrived.trailing_zeros() as usize;
            if self.threads[other].site != Some(site) {
                return Err(self.diverges(word, site, other));
            }
        }
        slot.arrived |= 1 << lane;
        slot.operands[lane] = operand;
        let is_last = slot.arrived == members;
        if is_last {
            slot.arrived = 0;
        }
        self.wait(Waiting::Warp { word, members }, site);
        Ok(is_last.then_some(index))
    }

    /// The members of a word, which is done, go on: in their order, the last to come too.
    #[inline(always)]
    fn part(&mut self, first_thread: usize, members: u32) {
        for lane in 0..WARP {
            if members >> lane & 1 == 1 {
                self.wake(first_thread + lane);
            }
        }
        if members == self.warps[first_thread / WARP].lanes {
            self.traffic.settle(first_thread / WARP);
        }
    }

    /// The slot of the word with these members, or a free one; a fault, if the members cannot meet.
    #[inline(never)]
    fn find_slot(&mut self, word: Word, members: u32, site: Site) -> Result<usize, Stop> {
        let (lane, number) = (self.current % WARP, self.current / WARP);
        let Warp { lanes, exited, ref slots } = self.warps[number];
        let cannot = if members >> lane & 1 == 0 {
            Some(format!("{word} of {}, but the lane that says it, {lane}, is none of them", Lanes(members)))
        } else if members & !lanes != 0 {
            Some(format!("{word} of {}, but this warp has only {}", Lanes(members), Lanes(lanes)))
        } else {
            None
        };
        if let Some(message) = cannot {
            return Err(self.fault(FindingKind::Divergence, site, None, message));
        }
        if members & exited != 0 {
            let gone = number * WARP + (members & exited).trailing_zeros() as usize;
            let other = self.threads[gone].site.map(|site| self.party(gone, site));
            let message = format!("{word} of {}, but {} have exited", Lanes(members), Lanes(members & exited));
            return Err(self.fault(FindingKind::Divergence, site, other, message));
        }
        // Who waits for this lane elsewhere, and is waited for here, waits for ever.
        let torn = |slot: &Slot| {
            let is_other = slot.word != word || slot.members != members;
            is_other && slot.members >> lane & 1 == 1 && slot.arrived & members != 0
        };
        if let Some(slot) = slots.iter().find(|slot| torn(slot)) {
            let other = number * WARP + (slot.arrived & members).trailing_zeros() as usize;
            return Err(self.diverges(word, site, other));
        }
        let slots = &mut self.warps[number].slots;
        let same = |slot: &Slot| slot.arrived != 0 && slot.word == word && slot.members == members;
        let slot = slots.iter().position(same).or_else(|| slots.iter().position(|slot| slot.arrived == 0));
        Ok(slot.unwrap_or_else(|| {
            slots.push(Slot { word, members, arrived: 0, operands: [std::ptr::null_mut(); WARP] });
            slots.len() - 1
        }))
    }

    /// The running lane says `word` where lane `other`, which it must meet, says something else.
    #[cold]
    #[inline(never)]
    fn diverges(&mut self, word: Word, site: Site, other: usize) -> Stop {
        let thread = &self.threads[other];
        let elsewhere = match thread.waiting {
            Waiting::Warp { word: said, members } if said != word => format!("{said} of {}", Lanes(members)),
            Waiting::Warp { members, .. } => format!("that of {}, at another place", Lanes(members)),
            _ => "elsewhere".to_owned(),
        };
        let message = format!("the warp diverges: {word} here, but lane {} waits at {elsewhere}", other % WARP);
        let other = thread.site.map(|site| self.party(other, site));
        self.fault(FindingKind::Divergence, site, other, message)
    }

    /// The running lane has exited; a fault for the lanes that wait for it.
    pub fn leave_warp(&mut self) {
        let (lane, number) = (self.current % WARP, self.current / WARP);
        let warp = &mut self.warps[number];
        warp.exited |= 1 << lane;
        let Some(slot) = warp.slots.iter().find(|slot| slot.arrived != 0 && slot.members >> lane & 1 == 1) else {
            return;
        };
        let (word, members) = (slot.word, slot.members);
        let waiting = number * WARP + slot.arrived.trailing_zeros() as usize;
        let other = self.threads[self.current].site.map(|site| self.party(self.current, site));
        let message = format!("{word} of {}, but lane {lane} has exited", Lanes(members));
        let site = self.threads[waiting].site.expect("a thread waits somewhere");
        self.report_of(waiting, FindingKind::Divergence, site, other, message);
        self.stopped = true;
    }
}

/// Lanes, as a report calls them.
pub(super) struct Lanes(pub u32);

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            u32::MAX => write!(f, "all lanes"),
            0 => write!(f, "no lanes"),
            mask => {
                let (first, last) = (mask.trailing_zeros(), 31 - mask.leading_zeros());
                match mask.count_ones() {
                    1 => write!(f, "lane {first}"),
                    n if n == last - first + 1 => write!(f, "lanes {first} to {last}"),
                    _ => write!(f, "lanes {mask:#010x}"),
                }
            }
        }
    }
}
