//! The shared memory of a block: the dynamic part at address 0, and behind it the static arrays.
use super::shadow::{GRANULE, Shadow};
use super::site::Site;

/// Shared memory that one block may have on an sm_90; 163 KiB on an sm_80.
pub const MOST_SHARED_BYTES: u32 = 227 << 10;

/// Where the parts begin: what the swizzles of tiles ask for.
const ALIGNMENT: u32 = 1024;

/// The dynamic part or a static array.
struct Region {
    start: u32,
    bytes: u32,
    first_granule: usize,
    /// What a static array is of: its place, and the size of its elements.
    array: Option<(Site, usize)>,
}

/// The shared memory of one block.
#[derive(Default)]
pub(super) struct SharedMemory {
    data: Vec<u128>,
    regions: Vec<Region>,
    /// The region of the last access: most kernels have one.
    recent: usize,
    pub shadow: Shadow,
}

impl SharedMemory {
    /// Begins a block. Its memory holds all ones: NaN.
    pub fn reset(&mut self, dynamic: u32) {
        self.data.clear();
        self.regions.clear();
        self.shadow.clear();
        self.recent = 0;
        self.add_region(0, dynamic, None);
    }

    /// The address of the static array of one place in the source; `None` if there is no room for it.
    pub fn static_array(&mut self, site: Site, element: usize, bytes: u32) -> Option<u32> {
        let array = Some((site, element));
        if let Some(region) = self.regions.iter().find(|r| r.array == array && r.bytes == bytes) {
            return Some(region.start);
        }
        let used: u32 = self.regions.iter().map(|r| r.bytes).sum();
        if used + bytes > MOST_SHARED_BYTES {
            return None;
        }
        // At least one byte between two regions belongs to nobody.
        let end = self.regions.last().map_or(0, |r| r.start + r.bytes);
        let start = (end / ALIGNMENT + 1) * ALIGNMENT;
        self.add_region(start, bytes, array);
        Some(start)
    }

    /// Whether an access lies in one region; the granule at its address, if it does.
    #[inline(always)]
    pub fn granule(&mut self, address: u32, bytes: u32) -> Option<usize> {
        let mut region = &self.regions[self.recent];
        if !region.holds(address, bytes) {
            self.recent = self.regions.iter().position(|r| r.holds(address, bytes))?;
            region = &self.regions[self.recent];
        }
        Some(region.first_granule + ((address - region.start) as usize) / GRANULE)
    }

    /// How large it is, for reports.
    pub fn bytes(&self) -> u32 {
        self.regions.iter().map(|r| r.bytes).sum()
    }

    /// Where the byte at `address` lies.
    ///
    /// The address must be one that [`granule`](Self::granule) has accepted.
    #[inline(always)]
    pub fn data(&mut self, address: u32) -> *mut u8 {
        debug_assert!((address as usize) < self.data.len() * 16);
        self.data.as_mut_ptr().cast::<u8>().wrapping_add(address as usize)
    }

    fn add_region(&mut self, start: u32, bytes: u32, array: Option<(Site, usize)>) {
        let first_granule = self.shadow.add((bytes as usize).div_ceil(GRANULE));
        self.data.resize(((start + bytes) as usize).div_ceil(16), u128::MAX);
        self.regions.push(Region { start, bytes, first_granule, array });
    }
}

impl Region {
    #[inline(always)]
    fn holds(&self, address: u32, bytes: u32) -> bool {
        let offset = address.wrapping_sub(self.start);
        offset < self.bytes && self.bytes - offset >= bytes
    }
}
