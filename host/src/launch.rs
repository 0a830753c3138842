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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Plan;
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use crate::options::{AttentionOptions, SoftmaxMethod};
    use crate::parameters::{self, Access};
    use crate::problem::Problem;
    use crate::raw::RawTensor;
    use crate::simulator::RESOURCES;
    use crate::target::Target;
    use cuda_std::Global;

    #[test]
    fn a_grid_has_as_many_blocks_as_an_i32_counts() {
        assert_eq!(Launch::check_blocks(MOST_BLOCKS), Ok(i32::MAX as u32));
        for blocks in [MOST_BLOCKS + 1, u64::MAX] {
            let refused = Launch::check_blocks(blocks).expect_err("too many").to_string();
            assert_eq!(refused, format!("blocks of a kernel: {blocks}; allowed: at most 2147483647"));
        }
    }

    /// Each extent can be counted, and so can all elements; not the blocks of its kernel.
    #[test]
    fn a_problem_of_more_blocks_than_a_grid_has_is_refused() {
        let x = Layout::strided(DType::BF16, &[1 << 20, 16, 1 << 12, 64], &[0, 0, 0, 1]).expect("four strides");
        let problem = Problem::new(&x, &x, &x, &AttentionOptions::new()).expect("each can be counted");
        let plan = Plan::new(&problem, Access::ANY, crate::Kernel::Flash2, Target::OLDEST).expect("there is a kernel");
        let tensor = || RawTensor { address: 0x1000, layout: x.clone() };
        let attention = parameters::attention(&problem, &Inputs::new(tensor(), tensor(), tensor()), &tensor(), 0x1000);
        let refused = plan.launches(&problem, attention, &[], &RESOURCES).err().map(|error| error.to_string());
        assert_eq!(refused.as_deref(), Some("blocks of a kernel: 4294967296; allowed: at most 2147483647"));
    }

    #[test]
    fn rows_and_columns_of_a_softmax_are_counted() {
        let most = i32::MAX as usize;
        let refused = |shape| {
            let launch = crate::dispatch::softmax(DType::F32, SoftmaxMethod::Online, shape, Global::NULL, Global::NULL);
            launch.err().map(|error| error.to_string())
        };
        let too_many = |what| Some(format!("{what}: 2147483648; allowed: at most 2147483647"));
        assert_eq!(refused((most + 1, 4)), too_many("rows"));
        assert_eq!(refused((4, most + 1)), too_many("columns"));
        assert_eq!(refused((most, 4)), None);
    }
}
