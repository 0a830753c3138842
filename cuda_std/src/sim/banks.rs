//! Bank conflicts. Shared memory has 32 banks, word `w` of 4 bytes lies in bank `w % 32`, and a bank serves one word a
//! cycle, to any number of lanes. A warp's access of 4 bytes a lane goes through at once; of 8 bytes by half warps, of
//! 16 by quarters.
use super::WARP;

const BANKS: usize = 32;

/// The cycles that an access of a warp takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Wavefronts {
    pub taken: u64,
    /// Those that another layout would not take.
    pub conflicts: u64,
}

/// The wavefronts of an access of `bytes` a lane, by the `active` lanes.
pub(super) fn of_warp(addresses: &[u64; WARP], active: u32, bytes: u32) -> Wavefronts {
    let lanes_at_once = (4 * WARP / bytes.max(4) as usize).min(WARP);
    let mut all = Wavefronts::default();
    for first in (0..WARP).step_by(lanes_at_once) {
        let lanes = (first..first + lanes_at_once).filter(|lane| active >> lane & 1 == 1);
        let taken = of_group(lanes.map(|lane| addresses[lane] as u32), bytes);
        all.taken += taken;
        all.conflicts += taken.saturating_sub(1);
    }
    all
}

/// The wavefronts of lanes that access at once: the most different words that any bank has to serve.
pub(super) fn of_group(addresses: impl Iterator<Item = u32> + Clone, bytes: u32) -> u64 {
    let words = || addresses.clone().flat_map(|address| address / 4..(address + bytes).div_ceil(4));
    if words().next().is_none() {
        return 0;
    }
    // Without conflict each bank sees one word.
    let mut first = [u32::MAX; BANKS];
    let is_alone = |word: u32| {
        let seen = &mut first[word as usize % BANKS];
        let alone = *seen == u32::MAX || *seen == word;
        *seen = word;
        alone
    };
    if words().all(is_alone) { 1 } else { most_words_of_a_bank(words()) }
}

#[cold]
fn most_words_of_a_bank(words: impl Iterator<Item = u32>) -> u64 {
    let mut words: Vec<u32> = words.collect();
    words.sort_unstable();
    words.dedup();
    let mut load = [0; BANKS];
    words.iter().for_each(|&word| load[word as usize % BANKS] += 1);
    load.into_iter().max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: u32, address: impl Fn(u64) -> u64) -> Wavefronts {
        of_warp(&std::array::from_fn(|lane| address(lane as u64)), u32::MAX, bytes)
    }

    #[test]
    fn neighbours_do_not_conflict() {
        for (bytes, taken) in [(2, 1), (4, 1), (8, 2), (16, 4)] {
            assert_eq!(of(bytes, |lane| lane * bytes as u64), Wavefronts { taken, conflicts: 0 });
        }
    }

    #[test]
    fn one_word_for_all_is_a_broadcast() {
        assert_eq!(of(4, |_| 128), Wavefronts { taken: 1, conflicts: 0 });
    }

    #[test]
    fn a_column_conflicts() {
        assert_eq!(of(4, |lane| lane * 128), Wavefronts { taken: 32, conflicts: 31 });
        assert_eq!(of(4, |lane| lane * 132), Wavefronts { taken: 1, conflicts: 0 });
        assert_eq!(of(16, |lane| lane * 128), Wavefronts { taken: 32, conflicts: 28 });
    }
}
