//! What blocks know of each other: by the counters in global memory at which they arrive, and for which they wait.
//!
//! Each thread numbers its arrivals. An arrival tells what its thread knows to have happened in the block, and what it knows
//! of other blocks; who waits for a count hears that of the arrivals that must be among so many, whatever their order. So each
//! use of global memory has two marks: the arrivals of its block that tell of it, and what its thread had heard of other blocks.
//! With these the search for races between blocks ([`Footprints`](super::footprints::Footprints)) knows which uses are ordered.
use super::block::{Block, Stop};
use super::clocks::Clocks;
use super::global_shadow::Touch;
use super::memory::Bits;
use super::site::Site;
use super::traffic::What;
use super::unit::{Actor, Use};
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

/// How many arrivals of each thread have been heard of: by its block, and its number among the threads of that which have
/// arrived anywhere.
#[derive(Clone, Default)]
pub(super) struct Heard(BTreeMap<(u32, u32), u32>);

impl Heard {
    fn add(&mut self, block: u32, teller: u32, arrivals: u32) {
        let known = self.0.entry((block, teller)).or_default();
        *known = arrivals.max(*known);
    }

    fn join(&mut self, other: &Heard) {
        other.0.iter().for_each(|(&(block, teller), &arrivals)| self.add(block, teller, arrivals));
    }

    /// Whether something of a block has been heard of.
    pub fn is_told(&self, block: u32, told: &Told) -> bool {
        let is_heard = |(teller, arrival): (usize, &u32)| self.0.get(&(block, teller as u32)) >= Some(arrival);
        told.0.iter().enumerate().any(is_heard)
    }
}

/// The counters of a launch: of each, by its address, the arrivals so far.
#[derive(Default)]
pub(super) struct Counters(Mutex<HashMap<u64, Vec<Arrival>>>);

/// An arrival of a thread of a block, and what it tells.
struct Arrival {
    block: u32,
    teller: u32,
    /// Which of that thread.
    number: u32,
    tells: Heard,
}

impl Arrival {
    /// Whether it comes after another, or is that.
    fn knows(&self, other: &Arrival) -> bool {
        self.tells.0.get(&(other.block, other.teller)) >= Some(&other.number)
    }
}

impl Counters {
    /// What is heard of a counter by who has waited until `missing` fewer had arrived than have.
    fn heard(&self, address: u64, missing: usize) -> Heard {
        let counters = self.0.lock().unwrap();
        let arrivals = counters.get(&address).map_or(&[][..], |arrivals| arrivals);
        let mut heard = Heard::default();
        for arrival in arrivals {
            // Those that may have come without it are too few.
            let without = arrivals.iter().filter(|other| !other.knows(arrival)).count();
            if without + missing < arrivals.len() {
                heard.join(&arrival.tells);
            }
        }
        heard
    }
}

/// Which arrivals tell of something: of each thread that has arrived anywhere the first; [`NEVER`], if none does.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Told(Vec<u32>);

const NEVER: u32 = u32::MAX;

impl Told {
    /// Which tell of both.
    pub fn join(&mut self, other: &Told) {
        self.0.iter_mut().zip(&other.0).for_each(|(arrival, &other)| *arrival = other.max(*arrival));
    }
}

/// The arrivals of a thread.
struct Teller {
    thread: usize,
    /// Of each, by thread and agent: the last epoch that it tells of.
    epochs: Vec<Vec<u32>>,
}

/// A use of some bytes by threads that had heard the same.
struct HeardUse {
    actor: Actor,
    usage: Use,
    mask: u8,
    heard: u32,
}

/// What a block has told others, and has heard from them.
#[derive(Default)]
pub(super) struct News {
    tellers: Vec<Teller>,
    /// Of each wait its thread and epoch, and what it heard.
    waits: Vec<(usize, u32, Heard)>,
    /// What threads have heard, by the numbers of the waits before; the first is nothing.
    heard: Vec<Heard>,
    heard_by_waits: HashMap<Vec<u32>, u32>,
    /// The uses of each granule, from the first wait on.
    uses: HashMap<u64, Vec<HeardUse>>,
    scratch: Vec<u32>,
}

impl News {
    /// Begins a block.
    pub fn clear(&mut self) {
        *self = News::default();
        self.heard.push(Heard::default());
        self.heard_by_waits.insert(Vec::new(), 0);
    }

    /// What thread `thread` of the cluster has heard at present.
    fn heard(&mut self, thread: usize, clocks: &Clocks) -> u32 {
        let is_before = |(other, epoch, _): &(usize, u32, Heard)| clocks.is_before(*other, *epoch, thread);
        self.scratch.clear();
        self.scratch.extend((0..self.waits.len() as u32).filter(|&i| is_before(&self.waits[i as usize])));
        if let Some(&known) = self.heard_by_waits.get(&self.scratch) {
            return known;
        }
        let number = self.heard.len() as u32;
        let mut all = Heard::default();
        self.scratch.iter().for_each(|&wait| all.join(&self.waits[wait as usize].2));
        self.heard.push(all);
        self.heard_by_waits.insert(self.scratch.clone(), number);
        number
    }

    /// Notes a use of global memory.
    #[inline(always)]
    pub fn note(&mut self, granule: u64, mask: u8, usage: Use, actor: Actor, clocks: &Clocks) {
        if !self.waits.is_empty() {
            let heard = self.heard(actor.thread(), clocks);
            self.note_heard(granule, HeardUse { actor, usage, mask, heard });
        }
    }

    fn note_heard(&mut self, granule: u64, new: HeardUse) {
        let uses = self.uses.entry(granule).or_default();
        match uses.iter_mut().find(|old| old.usage == new.usage && old.heard == new.heard) {
            Some(old) => old.mask |= new.mask,
            None => uses.push(new),
        }
    }

    /// Whether the block has told anything.
    pub fn has_told(&self) -> bool {
        !self.tellers.is_empty()
    }

    /// Which arrivals tell of what a thread of the cluster did in an epoch.
    pub fn told(&self, thread: usize, epoch: u32) -> Told {
        let first = |teller: &Teller| {
            let tells = |epochs: &Vec<u32>| epochs.get(thread).is_some_and(|&last| epoch <= last);
            teller.epochs.iter().position(tells).map_or(NEVER, |arrival| arrival as u32 + 1)
        };
        Told(self.tellers.iter().map(first).collect())
    }

    /// The uses of a granule by what threads had heard, if any thread of the block has heard something.
    pub fn split(&self, granule: u64) -> Option<impl Iterator<Item = Touch>> {
        let uses = self.uses.get(&granule)?;
        let touch = move |&HeardUse { actor, usage, mask, heard }: &HeardUse| Touch {
            granule,
            actor,
            usage,
            mask,
            told: 0,
            heard,
        };
        Some(uses.iter().map(touch))
    }

    /// The number of a thread that arrives.
    fn teller(&mut self, thread: usize) -> usize {
        let known = self.tellers.iter().position(|teller| teller.thread == thread);
        known.unwrap_or_else(|| {
            self.tellers.push(Teller { thread, epochs: Vec::new() });
            self.tellers.len() - 1
        })
    }

    /// What uses refer to by number.
    pub fn take_heard(&mut self) -> Vec<Heard> {
        std::mem::take(&mut self.heard)
    }
}

impl Block {
    /// The running thread arrives at a counter in global memory.
    pub fn arrive_in_grid(&mut self, address: u64, site: Site) -> Result<(), Stop> {
        self.update_global(address, |count| count.wrapping_add(1), site)?;
        if self.context.race_detector {
            let thread = self.first_id() + self.current;
            let heard = self.news.heard(thread, &self.clocks);
            let mut tells = self.news.heard[heard as usize].clone();
            let epochs = self.clocks.tell(thread);
            let teller = self.news.teller(thread);
            let told = &mut self.news.tellers[teller].epochs;
            told.push(epochs);
            let (block, teller, number) = (self.number, teller as u32, told.len() as u32);
            tells.add(block, teller, number);
            let mut counters = self.context.counters_in_grid.0.lock().unwrap();
            counters.entry(address).or_default().push(Arrival { block, teller, number, tells });
        }
        Ok(())
    }

    /// Whether `count` have arrived at a counter in global memory; then the running thread knows what they have told.
    pub fn poll_in_grid(&mut self, address: u64, count: u32, site: Site) -> Result<bool, Stop> {
        let (arrived, _) = self.update_global_uncounted(address, |count| count, site)?;
        self.count(What::GlobalLoad, address, u32::BYTES, site);
        if arrived < count {
            return Ok(false);
        }
        if self.context.race_detector {
            let thread = self.first_id() + self.current;
            if self.news.waits.is_empty() {
                for Touch { granule, actor, usage, mask, .. } in self.global.footprint(&self.news).touches {
                    self.news.note_heard(granule, HeardUse { actor, usage, mask, heard: 0 });
                }
            }
            let heard = self.context.counters_in_grid.heard(address, (arrived - count) as usize);
            let epoch = self.clocks.fence_globally(thread);
            self.news.waits.push((thread, epoch, heard));
        }
        Ok(true)
    }
}
