//! Where attention can run.
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::options::named_choices;
use crate::{cpu, cuda, simulator};

named_choices! {
    /// Where attention runs.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[non_exhaustive]
    pub enum Backend: "backend", "auto, cuda, cpu, simulator" {
        /// The kernels, on an NVIDIA GPU.
        Cuda = "cuda",
        /// The tiled algorithm on the cores of this machine.
        Cpu = "cpu",
        /// The kernels, on a simulated GPU: slow, and every fault is reported.
        Simulator = "simulator",
    }
}

/// A backend, and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendChoice {
    /// The backend.
    pub backend: Backend,
    /// Why this one, and not another.
    pub reason: String,
}

impl Backend {
    /// The device that this backend would use.
    ///
    /// # Errors
    /// Why it cannot run here: for CUDA [`Error::NoDriver`], [`Error::NoDevice`], [`Error::UnsupportedArchitecture`],
    /// [`Error::MissingKernel`]; for the simulator [`Error::NoSimulator`].
    pub fn availability(self) -> Result<String> {
        match self {
            Backend::Cuda => cuda::Device::get(0).map(|device| device.info().name.clone()),
            Backend::Cpu => Ok(cpu::device_name()),
            Backend::Simulator => simulator::availability().map(|()| simulator::device_name()),
        }
    }

    /// CUDA where there is a GPU that the embedded kernels run on, else the CPU. The simulator is never chosen.
    ///
    /// A choice before anything runs: once chosen, a GPU that fails is an error, and nothing runs elsewhere instead.
    pub fn auto() -> BackendChoice {
        match Backend::Cuda.availability() {
            Ok(device) => BackendChoice { backend: Backend::Cuda, reason: format!("{device} is there") },
            Err(error) => BackendChoice { backend: Backend::Cpu, reason: format!("not cuda: {error}") },
        }
    }
}
