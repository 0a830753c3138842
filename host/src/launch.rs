//! Launches of kernels, whatever the type of their parameters.
use std::ffi::c_void;

use cuda_std::{DType, Kernel};
use kernels::Config;

use crate::error::{Error, Result};
use crate::report::LaunchReport;

/// The most blocks that a grid of one dimension has.
const MOST_BLOCKS: u64 = i32::MAX as u64;

/// A kernel with its grid and its parameters.
pub(crate) struct Launch {
    /// The entry point.
    pub entry: &'static str,
    /// Blocks.
    pub grid: u32,
    /// Threads a block.
    pub block: u32,
    /// Dynamic shared memory a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks a cluster.
    pub cluster: u32,
    call: Box<dyn Call>,
}

impl Launch {
    /// `kernel` in `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if these are more than a grid has.
    pub fn new<P: Copy + Send + Sync + 'static>(
        kernel: &Kernel<P, Config>,
        blocks: u64,
        parameters: P,
    ) -> Result<Self> {
        let grid = Self::check_blocks(blocks)?;
        let Kernel { name: entry, cluster, config: Config { threads: block, shared_bytes, .. }, run, .. } = *kernel;
        Ok(Launch { entry, grid, block, shared_bytes, cluster, call: Box::new(Bound { run, parameters }) })
    }

    /// As many blocks, if a grid has so many.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if not.
    pub fn check_blocks(blocks: u64) -> Result<u32> {
        if blocks <= MOST_BLOCKS {
            return Ok(blocks as u32);
        }
        let what = "blocks of a kernel";
        Err(Error::TooLarge { what, found: u128::from(blocks), limit: u128::from(MOST_BLOCKS) })
    }

    /// Where its parameter struct is: what a driver takes.
    pub fn parameters(&self) -> *const c_void {
        self.call.parameters()
    }

    /// Runs one thread of it: what the simulator calls in each.
    pub fn run(&self) {
        self.call.run();
    }

    /// What a report says about it.
    pub fn report(&self) -> LaunchReport {
        let Launch { entry, grid, block, shared_bytes, .. } = *self;
        LaunchReport { entry, grid, block, shared_bytes, simulation: None }
    }
}

/// A kernel function and its parameters.
struct Bound<P> {
    run: fn(P),
    parameters: P,
}

trait Call: Send + Sync {
    fn parameters(&self) -> *const c_void;
    fn run(&self);
}

impl<P: Copy + Send + Sync> Call for Bound<P> {
    fn parameters(&self) -> *const c_void {
        (&raw const self.parameters).cast()
    }

    fn run(&self) {
        (self.run)(self.parameters);
    }
}

/// Device memory that kernels need besides inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workspace {
    /// What the algorithm calls it.
    pub name: &'static str,
    /// The dtype of its elements.
    pub dtype: DType,
    /// How many there are.
    pub len: u64,
}

impl Workspace {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.len.saturating_mul(self.dtype.bytes() as u64)
    }
}
