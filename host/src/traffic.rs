//! How many bytes each attention kernel moves between HBM and SRAM: formulas, exact for every shape.
//!
//! The simulator counts the same bytes access by access, and the tests hold the two equal. So a kernel that starts to load
//! a tile twice fails a test, and the formulas can be trusted for lengths that nobody waits for a simulator to run.
//!
//! Counted is what blocks of threads ask HBM for. A GPU's L2 cache may answer some of it, which no formula here assumes.
//!
//! In the derivations below: N_q and N_k are the lengths of Q and of K and V, d is the head dimension, e the bytes of an
//! element of Q, T_r and T_c the numbers of blocks that N_q and N_k fall into. All is for one head of one sequence; there are
//! `batch * nheads` of them. Grouped heads save memory, not traffic: each head of Q loads its K and V, unless it is packed
//! into tiles with others.
use cuda_std::Kernel as EntryPoint;
use kernels::Config;
use kernels::flash3::packing::Packing;
use kernels::mask::{Blocks, Mask, UNBOUNDED};

use crate::families::hopper::has_few_queries;
use crate::families::hopper::packing::packing;
use crate::features::Feature;
use crate::options::Kernel;
use crate::parameters::Access;
use crate::problem::Problem;
use crate::report::{LaunchReport, Report};

mod backward;

pub use backward::backward;

/// What one kernel launch moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it computes: `"S = QKᵀ"`.
    pub name: &'static str,
    /// The tensors that it moves, each once, in the order of [`TENSORS`].
    pub tensors: Vec<Moved>,
}

/// Bytes of one tensor moved between HBM and SRAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The tensor: one of [`TENSORS`].
    pub tensor: &'static str,
    /// From HBM to SRAM.
    pub loaded: u64,
    /// From SRAM to HBM.
    pub stored: u64,
}

/// All tensors, by the names that the papers give them. O is the output together with what the output is made from.
/// D is rowsum(dO ∘ O), of the backward pass.
pub const TENSORS: [&str; 14] = ["Q", "K", "V", "S", "P", "O", "l", "m", "LSE", "dO", "D", "dQ", "dK", "dV"];

const SCORES: &str = "S = QKᵀ";
const PROBABILITIES: &str = "P = softmax(S)";
const OUTPUT: &str = "O = PV";
const FUSED: &str = "O = softmax(QKᵀ)V";

/// What a kernel family moves for a problem, launch by launch, by its formula. `None` for [`Kernel::Auto`], where the
/// family has no kernel of just this head dimension and dtype, and for problems that ask for more than a causal mask
/// and grouped queries: these formulas do not know what else is then loaded.
pub fn formula(kernel: Kernel, problem: &Problem) -> Option<Vec<Step>> {
    let is_plain = is_plain(problem);
    match kernel {
        Kernel::Auto => None,
        Kernel::Standard => is_plain.then(|| standard(problem)),
        Kernel::Flash1 => is_plain.then(|| flash1(problem)),
        Kernel::Flash2 => flash2(problem),
        Kernel::Flash3 => flash3(problem),
    }
}

/// Whether the formulas count all that is moved for a problem.
fn is_plain(problem: &Problem) -> bool {
    Feature::of(problem, Access::ANY).iter().all(|feature| Feature::OF_ELDERS.contains(feature))
}

/// The configuration of the kernel of a table that is built for just this problem.
fn config<P>(table: &[EntryPoint<P, Config>], problem: &Problem) -> Option<Config> {
    config_of(table, problem, false)
}

/// The same, or that of the kernel for few queries.
fn config_of<P>(table: &[EntryPoint<P, Config>], problem: &Problem, few: bool) -> Option<Config> {
    let headdims = [problem.headdim, problem.headdim_v].map(|headdim| headdim as u32);
    let wanted = (problem.dtype, headdims, Some(problem.is_causal()), false, few);
    let of =
        |config: &Config| (config.dtype, [config.headdim, config.headdim_v], config.causal, config.general, config.few);
    let found = table.iter().map(|kernel| kernel.config).find(|config| of(config) == wanted);
    found.filter(|_| is_plain(problem))
}

/// What the launches of a report moved, as the simulator counted. `None` if another backend ran them, which counts nothing.
pub fn counted(report: &Report) -> Option<Vec<Step>> {
    if report.launches.is_empty() { None } else { report.launches.iter().map(counted_step).collect() }
}

fn counted_step(launch: &LaunchReport) -> Option<Step> {
    let counters = &launch.simulation.as_ref()?.counters;
    let moved = |&tensor: &&'static str| {
        let traffic = counters.tensor(tensor)?;
        let (loaded, stored) = (traffic.loaded_bytes, traffic.stored_bytes);
        (loaded + stored > 0).then_some(Moved { tensor, loaded, stored })
    };
    let names = [
        ("standard_scores", SCORES),
        ("standard_probabilities", PROBABILITIES),
        ("standard_output", OUTPUT),
        ("flash2_bwd_row_sums", backward::ROW_SUMS),
        ("flash2_bwd_dkdv", backward::KEYS_AND_VALUES_GRADIENTS),
        ("flash2_bwd_dq", backward::QUERIES_GRADIENT),
    ];
    let name = names.into_iter().find(|(entry, _)| launch.entry.starts_with(entry)).map_or(FUSED, |(_, name)| name);
    Some(Step { name, tensors: TENSORS.iter().filter_map(moved).collect() })
}

/// Standard attention: three kernels, with S and P whole in HBM. Θ(N d + N²).
///
/// S and P have N_k columns rounded up to whole tiles: C below.
///
/// * S = QKᵀ computes T_r x T_c tiles, for each of which it loads a tile of Q and one of K: Q comes T_c times, K comes T_r
///   times. It stores S once: e N_q C.
/// * P = softmax(S) reads the keys that a row sees twice, for the row's maximum and sum and then for its probabilities. It
///   stores P once, with its zeros, and 4 bytes of LSE a row.
/// * O = PV loads P once, and V once for each of the T_r blocks of rows. It stores O once.
pub fn standard(problem: &Problem) -> Vec<Step> {
    const BLOCK: u64 = kernels::standard::BLOCK as u64;
    let Head { q, k, rows, keys, element, mask } = Head::of(problem);
    let (query_blocks, key_blocks) = (rows.div_ceil(BLOCK), keys.div_ceil(BLOCK));
    let matrix = element * rows * kernels::standard::columns(mask.seqlen_k) as u64;
    let visible: u64 = (0..mask.seqlen_q).map(|row| mask.end(row) as u64).sum();
    for_all_heads(
        problem,
        [
            (SCORES, vec![load("Q", key_blocks * q), load("K", query_blocks * k), store("S", matrix)]),
            (PROBABILITIES, vec![load("S", 2 * element * visible), store("P", matrix), store("LSE", 4 * rows)]),
            (OUTPUT, vec![load("V", query_blocks * k), load("P", matrix), store("O", q)]),
        ],
    )
}

/// FlashAttention: one kernel, whose outer loop goes over blocks of K and V. Θ(N² d² / M) for an SRAM of M elements.
///
/// K and V are loaded once. Block i of Q meets n_i blocks of keys: T_c of them, or under a causal mask as many as it sees,
/// at least one. Each time its rows of Q are loaded. Between the times its rows of O, in f32, and of l and m are stored and
/// loaded again: n_i - 1 times each. The last time stores O in the dtype of Q, and the LSE.
///
/// The four lanes of a warp that share a row each load its l and m for themselves, and one of them stores these.
pub fn flash1(problem: &Problem) -> Vec<Step> {
    const LANES_A_ROW: u64 = 4;
    const BLOCK: u32 = kernels::flash1::BLOCK as u32;
    let Head { q, k, rows, element, mask, .. } = Head::of(problem);
    let (mut rows_met, mut rows_between) = (0, 0);
    for (first_row, block_rows) in query_blocks(mask, BLOCK) {
        let meetings = mask.key_blocks(first_row, BLOCK, BLOCK).end.max(1) as u64;
        rows_met += meetings * block_rows;
        rows_between += (meetings - 1) * block_rows;
    }
    let headdim = problem.headdim as u64;
    let o = rows_between * 4 * headdim;
    let tensors = vec![
        load("Q", rows_met * element * headdim),
        load("K", k),
        load("V", k),
        Moved { tensor: "O", loaded: o, stored: o + q },
        Moved { tensor: "l", loaded: LANES_A_ROW * 4 * rows_between, stored: 4 * rows_between },
        Moved { tensor: "m", loaded: LANES_A_ROW * 4 * rows_between, stored: 4 * rows_between },
        store("LSE", 4 * rows),
    ];
    for_all_heads(problem, [(FUSED, tensors)])
}

/// FlashAttention-2: one kernel, whose outer loop, over blocks of Q, is the grid. Θ(N² d² / M) for an SRAM of M elements.
///
/// Q is loaded once; O and LSE are stored once. Block i of Q loads the blocks of K and V that its rows see: T_c of them, or
/// fewer under a causal mask. `None` where [`formula`] has none.
pub fn flash2(problem: &Problem) -> Option<Vec<Step>> {
    let config = config(kernels::flash2::FORWARD, problem)?;
    Some(tile_by_tile(problem, config, Packing::SINGLE, |blocks| blocks))
}

/// FlashAttention-3: what FlashAttention-2 moves with its tiles, but that a tile whose rows see no key loads a block of keys
/// nevertheless. Where heads are packed, all of a pack load K and V together. `None` where [`formula`] has none.
pub fn flash3(problem: &Problem) -> Option<Vec<Step>> {
    let plain = config(kernels::flash3::FORWARD, problem)?;
    let few = config_of(kernels::flash3::FORWARD, problem, true).filter(|few| has_few_queries(problem, few, &plain));
    let config = few.unwrap_or(plain);
    Some(tile_by_tile(problem, config, packing(problem, &config), Blocks::or_one))
}

/// Each tile of queries loads the blocks of keys that `needed` makes of those that it sees.
fn tile_by_tile(problem: &Problem, config: Config, packing: Packing, needed: impl Fn(Blocks) -> Blocks) -> Vec<Step> {
    let Config { block_m, block_n, .. } = config;
    let Head { q, rows, element, mask, .. } = Head::of(problem);
    let end = |first: u32| needed(mask.key_blocks(packing.query(first), packing.query(block_m), block_n)).end;
    let keys_of = |first| u64::from((end(first) * block_n).min(mask.seqlen_k));
    let tiles = (0..packing.rows(mask.seqlen_q)).step_by(block_m as usize);
    let k = tiles.map(keys_of).sum::<u64>() * element * problem.headdim as u64;
    let heads = u64::from(packing.heads());
    let (q, lse) = (heads * q, heads * 4 * rows);
    let tensors = vec![load("Q", q), load("K", k), load("V", k), store("O", q), store("LSE", lse)];
    for_all(problem.batch as u64 * u64::from(packing.packs(problem.nheads as u32)), [(FUSED, tensors)])
}

/// All bytes of all steps, loaded and stored.
pub fn total(steps: &[Step]) -> u64 {
    steps.iter().flat_map(|step| &step.tensors).map(|moved| moved.loaded + moved.stored).sum()
}

/// One head of one sequence.
struct Head {
    /// Bytes of its Q, and of its O.
    q: u64,
    /// Bytes of its K, and of its V.
    k: u64,
    /// Rows of its Q.
    rows: u64,
    /// Rows of its K.
    keys: u64,
    /// Bytes of an element.
    element: u64,
    mask: Mask,
}

impl Head {
    fn of(problem: &Problem) -> Head {
        let &Problem { seqlen_q, seqlen_k, headdim, window, .. } = problem;
        let element = problem.dtype.bytes() as u64;
        let row = element * headdim as u64;
        let (rows, keys) = (seqlen_q as u64, seqlen_k as u64);
        let side = |keys: Option<usize>| keys.map_or(UNBOUNDED, |keys| keys as u32);
        let (left, right) = (side(window.left), side(window.right));
        let mask = Mask { seqlen_q: seqlen_q as u32, seqlen_k: seqlen_k as u32, left, right };
        Head { q: rows * row, k: keys * row, rows, keys, element, mask }
    }
}

/// The first row and the number of rows of each block of queries.
fn query_blocks(mask: Mask, block: u32) -> impl Iterator<Item = (u32, u64)> {
    (0..mask.seqlen_q).step_by(block as usize).map(move |first| (first, block.min(mask.seqlen_q - first) as u64))
}

/// The steps of the whole problem, from those of one head.
fn for_all_heads<const N: usize>(problem: &Problem, steps: [(&'static str, Vec<Moved>); N]) -> Vec<Step> {
    for_all(problem.batch as u64 * problem.nheads as u64, steps)
}

/// The steps of the whole problem, from those of one of so many parts.
fn for_all<const N: usize>(count: u64, steps: [(&'static str, Vec<Moved>); N]) -> Vec<Step> {
    let all = |m: Moved| Moved { loaded: count * m.loaded, stored: count * m.stored, ..m };
    let is_moved = |m: &Moved| m.loaded + m.stored > 0;
    steps.map(|(name, tensors)| Step { name, tensors: tensors.into_iter().map(all).filter(is_moved).collect() }).into()
}

fn load(tensor: &'static str, loaded: u64) -> Moved {
    Moved { tensor, loaded, stored: 0 }
}

fn store(tensor: &'static str, stored: u64) -> Moved {
    Moved { tensor, loaded: 0, stored }
}
