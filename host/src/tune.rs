//! Entry points that are in no table, for those who look for better ones: `cargo xtask tune`.
use std::fmt;
use std::marker::PhantomData;

use cuda_std::Kernel;
use kernels::{Config, flash3};

use crate::ptx::Entry;

/// What PTX for FlashAttention-3 is built for.
const ARCH: &str = "sm_90a";

/// An entry point of FlashAttention-3, forward, with a configuration that its table does not have. It runs on a GPU
/// alone: the simulator runs functions, and of this there is only PTX.
#[derive(Clone, Copy)]
pub struct Flash3Variant {
    pub(crate) kernel: &'static Kernel<flash3::Params, Config>,
}

impl fmt::Debug for Flash3Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Flash3Variant {
    /// The entry point `name` of PTX that is compressed by zstd. All of it stays in memory until the program ends, as the
    /// entry points of the tables do; of two with one name the first is launched.
    pub fn new(name: String, config: Config, compressed: Vec<u8>) -> Self {
        let name: &'static str = name.leak();
        Entry::add(name, ARCH, compressed.leak());
        let kernel = Kernel { name, config, arch: ARCH, cluster: 1, run: not_simulated, parameters: PhantomData };
        Flash3Variant { kernel: Box::leak(Box::new(kernel)) }
    }

    /// The name of its entry point.
    pub fn name(&self) -> &'static str {
        self.kernel.name
    }

    /// Its configuration.
    pub fn config(&self) -> &'static Config {
        &self.kernel.config
    }
}

fn not_simulated(_: flash3::Params) {
    unreachable!("sessions refuse a variant on the simulator")
}
