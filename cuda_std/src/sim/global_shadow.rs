//! The shadow of what one block uses of global memory: pages that are made when they are first used.
use super::arrivals::{News, Told};
use super::memory::{self, Allocation};
use super::shadow::{GRANULE, Shadow};
use super::unit::{Actor, Rival, Use};
use std::collections::HashMap;

/// A use of a granule of global memory by a block, which may race with other blocks'.
#[derive(Clone, Copy)]
pub(super) struct Touch {
    /// Address / 16.
    pub granule: u64,
    pub actor: Actor,
    pub usage: Use,
    /// Which pairs of bytes.
    pub mask: u8,
    /// Which arrivals of the block tell of it and of what was before it there, by number: 0, none.
    pub told: u32,
    /// What the block had heard of others then, by number: 0, nothing.
    pub heard: u32,
}

/// All that a block has used.
pub(super) struct Footprint {
    pub touches: Vec<Touch>,
    /// What touches refer to.
    pub told: Vec<Told>,
}

/// Granules of a page: 4 KiB of memory.
pub(super) const PAGE_GRANULES: usize = 256;

struct Page {
    number: u64,
    first_granule: usize,
    used: [u64; PAGE_GRANULES / 64],
}

const RECENT_PAGES: usize = 256;

/// Where in the cache a page is, if it is there.
#[inline(always)]
fn recent_slot(number: u64) -> usize {
    (number ^ ((number >> 28) * 37)) as usize % RECENT_PAGES
}

/// The shadow of one block's view of global memory.
pub(super) struct GlobalShadow {
    pub shadow: Shadow,
    pages: Vec<Page>,
    by_number: HashMap<u64, u32>,
    /// A cache before the map.
    recent: [(u64, u32); RECENT_PAGES],
}

impl Default for GlobalShadow {
    fn default() -> Self {
        GlobalShadow {
            shadow: Shadow::default(),
            pages: Vec::new(),
            by_number: HashMap::new(),
            recent: [(u64::MAX, 0); RECENT_PAGES],
        }
    }
}

impl GlobalShadow {
    /// Begins a block.
    pub fn clear(&mut self) {
        self.shadow.clear();
        self.pages.clear();
        self.by_number.clear();
        self.recent = [(u64::MAX, 0); RECENT_PAGES];
    }

    /// The granule at `address`, which lies in `allocation`.
    #[inline(always)]
    pub fn granule(&mut self, address: u64, allocation: &Allocation) -> usize {
        let granule = address / GRANULE as u64;
        let (number, index) = (granule / PAGE_GRANULES as u64, granule as usize % PAGE_GRANULES);
        let slot = recent_slot(number);
        let (cached, mut page) = self.recent[slot];
        if cached != number {
            page = self.find_page(number, allocation);
            self.recent[slot] = (number, page);
        }
        let page = &mut self.pages[page as usize];
        page.used[index / 64] |= 1 << (index % 64);
        page.first_granule + index
    }

    /// That at `address`, if its page has been used.
    pub fn used_granule(&self, address: u64) -> Option<usize> {
        let granule = address / GRANULE as u64;
        let number = granule / PAGE_GRANULES as u64;
        let page = match self.recent[recent_slot(number)] {
            (cached, page) if cached == number => page,
            _ => *self.by_number.get(&number)?,
        };
        Some(self.pages[page as usize].first_granule + granule as usize % PAGE_GRANULES)
    }

    #[inline(never)]
    fn find_page(&mut self, number: u64, allocation: &Allocation) -> u32 {
        *self.by_number.entry(number).or_insert_with(|| {
            let first_granule = self.shadow.add(PAGE_GRANULES);
            let (_, offset) = memory::locate(number * (PAGE_GRANULES * GRANULE) as u64);
            for i in 0..PAGE_GRANULES {
                self.shadow.set_initialised(first_granule + i, allocation.written(offset as usize / GRANULE + i));
            }
            self.pages.push(Page { number, first_granule, used: [0; PAGE_GRANULES / 64] });
            self.pages.len() as u32 - 1
        })
    }

    /// All that the block has used, in a fixed order, with its news.
    pub fn footprint(&self, news: &News) -> Footprint {
        let (mut touches, mut told, mut numbers) = (Vec::new(), vec![Told::default()], HashMap::new());
        for page in &self.pages {
            for index in (0..PAGE_GRANULES).filter(|i| page.used[i / 64] >> (i % 64) & 1 == 1) {
                let (granule, unit) = (page.number * PAGE_GRANULES as u64 + index as u64, page.first_granule + index);
                let first = touches.len();
                match news.split(granule) {
                    Some(split) => touches.extend(split),
                    None => self.shadow.uses(unit, &mut |Rival { usage, actor }, mask| {
                        touches.push(Touch { granule, actor, usage, mask, told: 0, heard: 0 });
                    }),
                }
                if news.has_told() {
                    let mut epochs = Vec::new();
                    self.shadow.epochs(unit, &mut |thread, epoch, mask| epochs.push((mask, news.told(thread, epoch))));
                    for touch in &mut touches[first..] {
                        let mut uses = epochs.iter().filter(|(mask, _)| mask & touch.mask != 0).map(|(_, told)| told);
                        let mut all = uses.next().cloned().unwrap_or_default();
                        uses.for_each(|told| all.join(told));
                        touch.told = *numbers.entry(all).or_insert_with_key(|all| {
                            told.push(all.clone());
                            told.len() as u32 - 1
                        });
                    }
                }
            }
        }
        Footprint { touches, told }
    }
}
