//! Which kernels run a problem, and why these.
use cuda_std::{DType, Global, Kernel as EntryPoint};
use kernels::Config;
use kernels::attention::{Attention, Untyped};
use kernels::softmax::{self, ROW_A_BLOCK, ROW_A_WARP};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::families::{Family, Wanted};
use crate::launch::{Launch, Workspace};
use crate::options::{Kernel, SoftmaxMethod};
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::{Resources, Target};
use crate::tune::Flash3Variant;

mod backward;

pub(crate) use backward::{BackwardPlan, Optional};

/// Chooses a family's kernels for a problem, or says why it has none.
type FamilyFor<'a, F> = &'a dyn Fn() -> Result<F, String>;

/// The kernels of the first family that has some, and what stands against those before it; or against all of them.
fn first_able<F>(families: &[FamilyFor<F>]) -> Result<(F, Vec<String>), Vec<String>> {
    let mut refused = Vec::new();
    for family in families {
        match family() {
            Ok(kernels) => return Ok((kernels, refused)),
            Err(reason) => refused.push(reason),
        }
    }
    Err(refused)
}

/// The kernels that will run, and what they need.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    family: Family,
    asked: Kernel,
    /// What stands against newer families, each with its name.
    pub refused: Vec<String>,
    /// How its kernels run this problem, where there is a choice.
    how: Option<String>,
    /// The memory that it needs besides Q, K, V, O and LSE.
    pub workspace: Vec<Workspace>,
}

impl Plan {
    /// Chooses the kernels for a problem, whose tensors may be accessed so, on a machine: the family that is asked for, or with
    /// [`Kernel::Auto`] the newest that can.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the reason of each family.
    pub fn new(problem: &Problem, access: Access, kernel: Kernel, target: Target) -> Result<Self> {
        let wanted = Wanted::new(problem, access, target);
        let flash3 = || target.allow_hopper(kernel).and_then(|()| Family::flash3(&wanted));
        let flash2 = || Family::flash2(&wanted);
        let flash1 = || Family::flash1(&wanted);
        let standard = || Family::standard(&wanted);
        let families: &[FamilyFor<Family>] = match kernel {
            Kernel::Auto => &[&flash3, &flash2, &flash1, &standard],
            Kernel::Flash3 => &[&flash3],
            Kernel::Flash2 => &[&flash2],
            Kernel::Flash1 => &[&flash1],
            Kernel::Standard => &[&standard],
        };
        let unsupported = |reasons| Error::Unsupported { kernel, backend: target.backend, reasons };
        let (family, refused) = first_able(families).map_err(unsupported)?;
        let (how, workspace) = (family.how(problem), family.workspace(problem));
        Ok(Plan { family, asked: kernel, refused, how, workspace })
    }

    /// The same with one entry point of FlashAttention-3, which need not be in its table.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it cannot run the problem, or the machine cannot run it.
    pub fn of_variant(problem: &Problem, access: Access, variant: Flash3Variant, target: Target) -> Result<Self> {
        let asked = Kernel::Flash3;
        let runs = || match target.backend {
            Backend::Cuda => target.allow_hopper(asked),
            _ => Err(format!("flash3: {} is PTX alone", variant.name())),
        };
        let wanted = Wanted::new(problem, access, target);
        let family = runs().and_then(|()| Family::flash3_of(&wanted, std::slice::from_ref(variant.kernel)));
        let unsupported = |reason| Error::Unsupported { kernel: asked, backend: target.backend, reasons: vec![reason] };
        let family = family.map_err(unsupported)?;
        let (how, workspace) = (family.how(problem), family.workspace(problem));
        Ok(Plan { family, asked, refused: Vec::new(), how, workspace })
    }

    /// Why this family, and how it runs the problem.
    pub fn reason(&self) -> String {
        let why = why(self.family.name(), self.asked, &self.refused);
        self.how.iter().fold(why, |why, how| format!("{why}; {how}"))
    }

    /// The name of the family.
    pub fn algorithm(&self) -> &'static str {
        self.family.name()
    }

    /// Its kernels, in the order in which they run.
    pub fn kernels(&self) -> Vec<(&'static str, Config)> {
        self.family.kernels()
    }

    /// Whether its kernels are for Hopper alone.
    pub fn is_for_hopper(&self) -> bool {
        matches!(self.family, Family::Flash3(_))
    }

    /// The shared memory that its kernels need, in bytes a block.
    pub fn shared_bytes(&self) -> u32 {
        self.family.shared_bytes()
    }

    /// Whether a kernel runs that asks its arguments for all features.
    pub fn is_general(&self) -> bool {
        self.family.is_general()
    }

    /// Bytes of memory besides Q, K, V and O: workspace and LSE.
    pub fn extra_bytes(&self, problem: &Problem) -> u64 {
        let lse = (problem.rows() * size_of::<f32>()) as u64;
        self.workspace.iter().map(Workspace::bytes).fold(lse, u64::saturating_add)
    }

    /// The launches, in order, for tensors and a workspace at these addresses of a machine.
    pub fn launches(
        &self,
        problem: &Problem,
        attention: Attention,
        workspace: &[Global<Untyped>],
        machine: &Resources,
    ) -> Result<Vec<Launch>> {
        self.family.launches(problem, attention, workspace, machine)
    }
}

/// Why a family runs, where this kernel was asked for and newer families were refused.
fn why(family: &str, asked: Kernel, refused: &[String]) -> String {
    match (asked, refused) {
        (Kernel::Auto, []) => format!("{family} is the newest kernel"),
        (Kernel::Auto, refused) => format!("{family} is the newest kernel that can: {}", refused.join("; ")),
        _ => format!("{family} was asked for"),
    }
}

/// Rows longer than this take a block each, shorter ones a warp: from here on a warp's 32 lanes have more than 32 elements
/// each, and the block's barriers cost less than they save.
const LONGEST_ROW_A_WARP: usize = 1024;

/// The launch of softmax over `rows` rows of `columns` elements, contiguous.
///
/// # Errors
/// [`Error::TooLarge`] if rows or columns are more than the kernel counts.
pub(crate) fn softmax(
    dtype: DType,
    method: SoftmaxMethod,
    (rows, columns): (usize, usize),
    x: Global<Untyped>,
    y: Global<Untyped>,
) -> Result<Launch> {
    for (what, found) in [("rows", rows), ("columns", columns)] {
        if found > i32::MAX as usize {
            return Err(Error::TooLarge { what, found: found as u128, limit: i32::MAX as u128 });
        }
    }
    let kernel = softmax_kernel(dtype, method, columns)?;
    let parameters = softmax::Params { x, y, rows: rows as u32, columns: columns as u32, row_stride: columns as u64 };
    Launch::new(kernel, (rows as u64).div_ceil(u64::from(kernel.config.block_m)), parameters)
}

fn softmax_kernel(
    dtype: DType,
    method: SoftmaxMethod,
    columns: usize,
) -> Result<&'static EntryPoint<softmax::Params, Config>> {
    let (table, part) = if columns <= LONGEST_ROW_A_WARP { (ROW_A_WARP, "warp") } else { (ROW_A_BLOCK, "block") };
    let method = match method {
        SoftmaxMethod::TwoPass => "two_pass",
        SoftmaxMethod::Online => "online",
    };
    let family = format!("softmax.{method}.{part}");
    let found = table.iter().find(|kernel| kernel.config.dtype == dtype && kernel.config.family == family);
    let dtypes =
        || table.iter().filter(|kernel| kernel.config.family == family).map(|kernel| kernel.config.dtype.name());
    let allowed = || dtypes().collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| Error::DType { argument: "x", found: dtype.name(), allowed: allowed() })
}
