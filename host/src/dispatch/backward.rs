//! Which kernels run a backward pass.
use cuda_std::{DType, Kernel as EntryPoint};
use kernels::Config;
use kernels::flash2_backward::{KEYS_AND_VALUES, Params, QUERIES, ROW_SUMS};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::families::find;
use crate::launch::{Launch, Workspace};
use crate::options::Kernel;
use crate::problem::Problem;

/// FlashAttention-2's backward kernels for one problem: the only family that has any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackwardPlan {
    row_sums: &'static EntryPoint<Params, Config>,
    keys_and_values: &'static EntryPoint<Params, Config>,
    queries: &'static EntryPoint<Params, Config>,
    kernel: Kernel,
}

impl BackwardPlan {
    /// The kernels for a problem.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the reason.
    pub fn new(problem: &Problem, kernel: Kernel, backend: Backend) -> Result<Self> {
        let unsupported = |reason| Error::Unsupported { kernel, backend, reasons: vec![reason] };
        if let Kernel::Standard | Kernel::Flash1 = kernel {
            return Err(unsupported(format!("{kernel} has no backward pass; allowed: auto, flash2")));
        }
        Self::flash2(problem, kernel).map_err(unsupported)
    }

    fn flash2(problem: &Problem, kernel: Kernel) -> Result<Self, String> {
        const FAMILY: &str = "flash2 backward";
        Ok(BackwardPlan {
            row_sums: find(FAMILY, ROW_SUMS, problem)?,
            keys_and_values: find(FAMILY, KEYS_AND_VALUES, problem)?,
            queries: find(FAMILY, QUERIES, problem)?,
            kernel,
        })
    }

    /// The name of the family.
    pub fn algorithm(&self) -> &'static str {
        "flash2"
    }

    /// Why this family.
    pub fn reason(&self) -> &'static str {
        match self.kernel {
            Kernel::Auto => "flash2 is the family with a backward pass",
            _ => "flash2 was asked for",
        }
    }

    /// The memory that it needs besides the inputs and the gradients: D, a number for each row of O.
    pub fn workspace(&self, problem: &Problem) -> Workspace {
        Workspace { name: "D", dtype: DType::F32, len: problem.rows() as u64 }
    }

    /// The launches, in order, for tensors at these addresses, D among them. No extent is 0.
    pub fn launches(&self, problem: &Problem, parameters: Params) -> Result<[Launch; 3]> {
        let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, .. } = *problem;
        let blocks = |rows: usize, of: u32, heads: usize| (rows.div_ceil(of as usize) * heads * batch) as u64;
        let BackwardPlan { row_sums, keys_and_values, queries, .. } = *self;
        let row_blocks = (problem.rows() as u64).div_ceil(u64::from(row_sums.config.block_m));
        let key_blocks = blocks(seqlen_k, keys_and_values.config.block_n, nheads_k);
        let query_blocks = blocks(seqlen_q, queries.config.block_m, nheads);
        Ok([
            Launch::new(row_sums, row_blocks, parameters)?,
            Launch::new(keys_and_values, key_blocks, parameters)?,
            Launch::new(queries, query_blocks, parameters)?,
        ])
    }
}
