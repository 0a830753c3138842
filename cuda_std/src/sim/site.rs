//! Source locations as small numbers, so that a shadow can keep many of them.
use std::cell::Cell;
use std::collections::HashMap;
use std::panic::Location;
use std::sync::Mutex;

/// A place in a kernel's source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Site(u32);

impl Site {
    /// Sites fit so many bits, and pack with other things into one word.
    pub const BITS: u32 = 20;

    /// The site of a location. Locations of the same file, line and column are one site.
    #[inline(always)]
    pub fn of(location: &'static Location<'static>) -> Self {
        let slot = (location as *const Location as usize / align_of::<Location>()) % CACHE_SIZE;
        let (cached, site) = CACHE.with(|cache| cache[slot].get());
        if std::ptr::eq(cached, location) { site } else { intern(location, slot) }
    }

    pub const fn from_bits(bits: u32) -> Self {
        Site(bits)
    }

    pub const fn bits(self) -> u32 {
        self.0
    }

    #[cold]
    pub fn location(self) -> &'static Location<'static> {
        LOCATIONS.lock().unwrap().as_ref().expect("a site was made").by_number[self.0 as usize]
    }
}

const CACHE_SIZE: usize = 1024;

thread_local! {
    static CACHE: [Cell<(*const Location<'static>, Site)>; CACHE_SIZE] =
        const { [const { Cell::new((std::ptr::null(), Site(0))) }; CACHE_SIZE] };
}

#[derive(Default)]
struct Locations {
    by_number: Vec<&'static Location<'static>>,
    numbers: HashMap<&'static Location<'static>, u32>,
}

static LOCATIONS: Mutex<Option<Locations>> = Mutex::new(None);

#[cold]
#[inline(never)]
fn intern(location: &'static Location<'static>, slot: usize) -> Site {
    let mut locations = LOCATIONS.lock().unwrap();
    let Locations { by_number, numbers } = locations.get_or_insert_default();
    let number = *numbers.entry(location).or_insert_with(|| {
        by_number.push(location);
        by_number.len() as u32 - 1
    });
    assert!(number < 1 << Site::BITS, "a program with more than a million words");
    CACHE.with(|cache| cache[slot].set((location, Site(number))));
    Site(number)
}
