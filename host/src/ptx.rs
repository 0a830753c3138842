//! The kernels that are embedded in this build.
use std::io::Read;
use std::sync::{LazyLock, PoisonError, RwLock};

use crate::error::{Error, Result};

static EMBEDDED: &[Entry] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// Those that a program has added to them.
static ADDED: RwLock<Vec<&'static Entry>> = RwLock::new(Vec::new());

/// One kernel for one architecture.
#[derive(Debug)]
#[non_exhaustive]
pub struct Entry {
    /// The name of the entry point.
    pub name: &'static str,
    /// The architecture that it was built for: `sm_80`.
    pub arch: &'static str,
    /// Bytes of its PTX, compressed as it is embedded.
    pub ptx_bytes: usize,
    compressed: &'static [u8],
}

/// All embedded kernels.
pub fn embedded() -> &'static [Entry] {
    EMBEDDED
}

/// Whether there are kernels for Hopper among them.
pub(crate) fn embeds_hopper() -> bool {
    static EMBEDS: LazyLock<bool> = LazyLock::new(|| EMBEDDED.iter().any(|entry| entry.arch == "sm_90a"));
    *EMBEDS
}

impl Entry {
    const fn new(name: &'static str, arch: &'static str, compressed: &'static [u8]) -> Self {
        Entry { name, arch, ptx_bytes: compressed.len(), compressed }
    }

    /// Makes PTX known that is not embedded.
    pub(crate) fn add(name: &'static str, arch: &'static str, compressed: &'static [u8]) {
        let entry = Box::leak(Box::new(Entry::new(name, arch, compressed)));
        ADDED.write().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// The PTX of entry point `name` that suits a GPU best.
    ///
    /// # Errors
    /// [`Error::MissingKernel`] if it is not embedded, [`Error::UnsupportedArchitecture`] if only for other GPUs.
    pub(crate) fn find(name: &'static str, device: &str, capability: (u32, u32)) -> Result<&'static Self> {
        let added = ADDED.read().unwrap_or_else(PoisonError::into_inner);
        let of_name = || EMBEDDED.iter().chain(added.iter().copied()).filter(|entry| entry.name == name);
        if of_name().next().is_none() {
            return Err(Error::MissingKernel { entry: name, embedded: EMBEDDED.len() });
        }
        let best = of_name().filter(|entry| Arch::parse(entry.arch).is_some_and(|arch| arch.runs_on(capability)));
        best.max_by_key(|entry| Arch::parse(entry.arch)).ok_or_else(|| Error::UnsupportedArchitecture {
            device: device.to_owned(),
            found: format!("sm_{}{}", capability.0, capability.1),
            allowed: of_name().map(|entry| entry.arch).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its PTX.
    ///
    /// # Errors
    /// [`Error::BrokenKernel`] if it does not unpack.
    pub fn text(&self) -> Result<String> {
        let broken = |reason: String| Error::BrokenKernel { entry: self.name, reason };
        let mut decoder =
            ruzstd::decoding::StreamingDecoder::new(self.compressed).map_err(|error| broken(error.to_string()))?;
        let mut text = String::new();
        decoder.read_to_string(&mut text).map_err(|error| broken(error.to_string()))?;
        Ok(text)
    }

    /// Its PTX, ended by a NUL, as the driver takes it.
    pub(crate) fn image(&self) -> Result<Vec<u8>> {
        let mut image = self.text()?.into_bytes();
        image.push(0);
        Ok(image)
    }
}

/// What PTX was built for. The more special one is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arch {
    capability: (u32, u32),
    /// `sm_90a`: uses what only this very architecture has.
    specific: bool,
}

impl Arch {
    fn parse(name: &str) -> Option<Self> {
        let number = name.strip_prefix("sm_")?;
        let digits = number.trim_end_matches('a');
        let number_of: u32 = digits.parse().ok()?;
        Some(Arch { capability: (number_of / 10, number_of % 10), specific: digits != number })
    }

    /// PTX runs on every newer GPU, unless it is specific to one.
    fn runs_on(self, capability: (u32, u32)) -> bool {
        if self.specific { capability == self.capability } else { capability >= self.capability }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptx_runs_on_newer_gpus_unless_it_is_specific() {
        let arch = |name| Arch::parse(name).expect("an architecture");
        assert!(arch("sm_80").runs_on((8, 0)) && arch("sm_80").runs_on((12, 0)) && !arch("sm_80").runs_on((7, 5)));
        assert!(arch("sm_90a").runs_on((9, 0)) && !arch("sm_90a").runs_on((10, 0)));
        assert!(arch("sm_90a") > arch("sm_90") && arch("sm_90") > arch("sm_80") && arch("sm_120") > arch("sm_90a"));
        assert_eq!(Arch::parse("compute"), None);
    }

    #[test]
    fn every_embedded_kernel_unpacks() {
        for entry in embedded() {
            assert!(entry.text().expect("sound").contains(entry.name), "{}", entry.name);
        }
    }
}
