//! Races between blocks: what the blocks of a launch have used of global memory, folded together in the order of the
//! blocks, so that the report does not depend on which ran at the same time.
use super::arrivals::{Heard, Told};
use super::global_shadow::{Footprint, PAGE_GRANULES, Touch};
use super::memory::{self, Allocation};
use super::shadow::GRANULE;
use super::unit::{Actor, Use};
use std::collections::HashMap;
use std::sync::Arc;

/// The first use of some bytes of a granule, of its kind; of those that others hear of, all.
#[derive(Clone, Copy)]
struct FirstUse {
    block: u32,
    actor: Actor,
    next: u32,
    usage: Use,
    mask: u8,
    /// Which arrivals of its block tell of it, by number: 0, none.
    told: u32,
}

const END: u32 = u32::MAX;

/// The number of what nobody is told.
const NOBODY: u32 = 0;

/// What the blocks so far have used.
#[derive(Default)]
pub(super) struct Footprints {
    pages: HashMap<u64, Box<[u32; PAGE_GRANULES]>>,
    uses: Vec<FirstUse>,
    told: Vec<Told>,
}

/// A use by an earlier block that nothing orders a touch after.
pub(super) struct BlockRival {
    pub block: u32,
    pub actor: Actor,
    pub usage: Use,
    /// Which pairs of bytes both use.
    pub mask: u8,
}

impl Footprints {
    /// Adds what a block has used, whose touches refer to what it had `heard`; calls `race` for each use that may race with
    /// one of an earlier block.
    pub fn fold(
        &mut self,
        block: u32,
        footprint: Footprint,
        heard: &[Heard],
        mut race: impl FnMut(&Touch, BlockRival),
    ) {
        let first_told = self.told.len() as u32;
        self.told.extend(footprint.told);
        let mut current: Option<(u64, &mut Box<[u32; PAGE_GRANULES]>)> = None;
        for touch in &footprint.touches {
            let (page, index) = (touch.granule / PAGE_GRANULES as u64, touch.granule as usize % PAGE_GRANULES);
            let heads = match current.take() {
                Some((number, heads)) if number == page => heads,
                _ => self.pages.entry(page).or_insert_with(|| Box::new([END; PAGE_GRANULES])),
            };
            let head = &mut heads[index];
            let touch_told = if touch.told == 0 { NOBODY } else { first_told + touch.told };
            let (mut at, mut known) = (*head, 0);
            while at != END {
                let FirstUse { block: other, actor, next, usage, mask, told } = self.uses[at as usize];
                let both = mask & touch.mask;
                // Whatever races with this one races with that.
                if usage == touch.usage && (told == NOBODY || told == touch_told) {
                    known |= both;
                }
                let is_ordered = || heard[touch.heard as usize].is_told(other, &self.told[told as usize]);
                if both != 0 && other != block && conflict(usage, touch.usage) && !is_ordered() {
                    race(touch, BlockRival { block: other, actor, usage, mask: both });
                }
                at = next;
            }
            let mask = touch.mask & !known;
            if mask != 0 {
                let Touch { actor, usage, .. } = *touch;
                self.uses.push(FirstUse { block, actor, next: *head, usage, mask, told: touch_told });
                *head = self.uses.len() as u32 - 1;
            }
            current = Some((page, heads));
        }
    }

    /// Which pairs of bytes of a granule have been written.
    pub fn written(&self, granule: u64) -> u8 {
        let Some(page) = self.pages.get(&(granule / PAGE_GRANULES as u64)) else { return 0 };
        self.list(page[granule as usize % PAGE_GRANULES])
    }

    /// Tells the allocations what the launch has written.
    pub fn mark_written(&self, allocations: &[Arc<Allocation>]) {
        for (&number, page) in &self.pages {
            for (index, &head) in page.iter().enumerate() {
                let mask = self.list(head);
                if mask != 0 {
                    let granule = number * PAGE_GRANULES as u64 + index as u64;
                    let (allocation, offset) = memory::locate(granule * GRANULE as u64);
                    allocations[allocation].set_written(offset as usize / GRANULE, mask);
                }
            }
        }
    }

    /// What the uses of a list have written.
    fn list(&self, head: u32) -> u8 {
        let (mut at, mut written) = (head, 0);
        while at != END {
            let first_use = &self.uses[at as usize];
            written |= if first_use.usage == Use::Read { 0 } else { first_use.mask };
            at = first_use.next;
        }
        written
    }
}

/// Whether two uses by different blocks are a race.
fn conflict(a: Use, b: Use) -> bool {
    !matches!((a, b), (Use::Read, Use::Read) | (Use::Atomic, Use::Atomic))
}
