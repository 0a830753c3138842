//! The architectures that PTX is built for.
use std::fmt;
use std::str::FromStr;

/// What a module's `.target` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Ampere. PTX for it runs on every later GPU, too: the driver compiles it when it is loaded.
    Sm80,
    /// Hopper with its own instructions (`wgmma`, TMA, `setmaxnreg`). Runs on Hopper alone.
    Sm90a,
}

impl Arch {
    /// All of them, oldest first.
    pub const ALL: [Arch; 2] = [Arch::Sm80, Arch::Sm90a];

    /// The name in PTX: `sm_80`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
        }
    }

    /// The oldest PTX version that knows the architecture and what our kernels say to it, as a target feature of rustc.
    pub(crate) fn ptx_version(self) -> &'static str {
        match self {
            Arch::Sm80 => "ptx78",
            Arch::Sm90a => "ptx80",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Arch::ALL.map(Arch::name).join(", ");
        Arch::ALL
            .into_iter()
            .find(|arch| arch.name() == name)
            .ok_or_else(|| format!("no architecture {name}: {}", known()))
    }
}
