//! The simulator backend: the kernels on a simulated GPU, with every fault that it finds as an error.
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use cuda_std::Global;
use cuda_std::sim::{self, Buffer, Memory};

use crate::element::Datum;
use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::machine::Machine;
use crate::report::LaunchReport;
use crate::target::Resources;

/// The name of the device in reports.
pub(crate) fn device_name() -> String {
    "simulated GPU".to_owned()
}

/// Whether this build has the simulated GPU.
pub(crate) fn availability() -> Result<()> {
    if cuda_std::HAS_SIMULATOR { Ok(()) } else { Err(Error::NoSimulator) }
}

/// What the simulated GPU has. Of multiprocessors so few that blocks which stay take several tiles each.
pub(crate) const RESOURCES: Resources = Resources {
    multiprocessors: 2,
    tensor_map: |map| map.simulated().map_err(|reason| Error::TensorMap { argument: "a tensor", reason }),
};

/// How the simulator runs. Start from `SimulatorOptions::default()`.
#[derive(Clone)]
#[non_exhaustive]
pub struct SimulatorOptions {
    /// Whether to look for races and for reads of what nobody has written.
    pub race_detector: bool,
    /// Whether to count what is moved and computed.
    pub counters: bool,
    /// Another order in which threads take turns for each seed.
    pub seed: u64,
    /// Threads of the host; 0: one for each of its cores.
    pub workers: usize,
    pub(crate) progress: Option<ProgressCallback>,
}

pub(crate) type ProgressCallback = Arc<dyn Fn(Progress) + Send + Sync>;

/// How far a launch on the simulator has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The entry point.
    pub entry: &'static str,
    /// Blocks that have ended.
    pub done: u64,
    /// Blocks of the grid.
    pub total: u64,
}

impl Default for SimulatorOptions {
    fn default() -> Self {
        let sim::Options { race_detector, counters, seed, workers, .. } = sim::Options::default();
        SimulatorOptions { race_detector, counters, seed, workers, progress: None }
    }
}

impl fmt::Debug for SimulatorOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SimulatorOptions { race_detector, counters, seed, workers, .. } = self;
        let mut debug = f.debug_struct("SimulatorOptions");
        debug.field("race_detector", race_detector).field("counters", counters);
        debug.field("seed", seed).field("workers", workers).finish_non_exhaustive()
    }
}

/// A simulated GPU, whose memory ends with it.
pub(crate) struct Simulator<'a> {
    options: &'a SimulatorOptions,
    memory: Memory,
}

impl<'a> Simulator<'a> {
    pub fn new(options: &'a SimulatorOptions) -> Self {
        Simulator { options, memory: Memory::new() }
    }
}

/// Runs a launch, whose tensors are in this memory.
pub(crate) fn run(launch: &Launch, memory: &Memory, options: &SimulatorOptions) -> Result<LaunchReport> {
    availability()?;
    let entry = launch.entry;
    let progress = |done, total| {
        if let Some(progress) = &options.progress {
            progress(Progress { entry, done, total });
        }
    };
    let SimulatorOptions { race_detector, counters, seed, workers, .. } = *options;
    let options = sim::Options { race_detector, counters, seed, workers, progress: Some(&progress) };
    let (grid, block) = ([launch.grid, 1, 1], [launch.block, 1, 1]);
    let how = sim::Launch { kernel: entry, grid, block, shared_bytes: launch.shared_bytes };
    let simulation = sim::launch_clusters(&how, launch.cluster, memory, &options, || launch.run());
    if !simulation.findings.is_empty() {
        let findings = simulation.findings.iter().map(ToString::to_string).collect();
        return Err(Error::Simulation { entry, findings });
    }
    Ok(LaunchReport { simulation: Some(simulation), ..launch.report() })
}

impl Machine for Simulator<'_> {
    type Buffer<T: Datum> = Buffer<T>;

    fn upload<T: Datum>(&self, name: &'static str, data: &[T]) -> Result<Buffer<T>> {
        Ok(self.memory.upload(name, data))
    }

    fn allocate<T: Datum>(&self, name: &'static str, len: usize) -> Result<Buffer<T>> {
        check_size::<T>(name, len)?;
        Ok(self.memory.allocate(name, len))
    }

    fn output<T: Datum>(&self, name: &'static str, len: usize) -> Result<Buffer<T>> {
        self.allocate(name, len)
    }

    fn global<T: Datum>(&self, buffer: &Buffer<T>) -> Global<T> {
        buffer.global()
    }

    fn download<T: Datum>(&self, buffer: &Buffer<T>, to: &mut [T]) -> Result<()> {
        to.copy_from_slice(&self.memory.read(buffer));
        Ok(())
    }

    fn resources(&self) -> Resources {
        RESOURCES
    }

    fn run(&self, launches: &[Launch]) -> Result<(Vec<LaunchReport>, f64)> {
        let start = Instant::now();
        let run = |launch| run(launch, &self.memory, self.options);
        let reports = launches.iter().map(run).collect::<Result<_>>()?;
        Ok((reports, start.elapsed().as_secs_f64()))
    }
}

/// The simulated GPU has as much memory as a real one.
fn check_size<T>(name: &'static str, len: usize) -> Result<()> {
    const MEMORY: u64 = 80 << 30;
    let asked = (len as u64).saturating_mul(size_of::<T>() as u64);
    if asked <= MEMORY { Ok(()) } else { Err(Error::OutOfMemory { what: name, asked, free: MEMORY }) }
}
