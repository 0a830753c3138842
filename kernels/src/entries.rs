//! All entry points, for tools that walk over them.
use crate::config::{self, Config};
use crate::{flash1, flash2, flash2_backward, flash3, flash3_backward, softmax, standard};
use cuda_std::Kernel;

/// An entry point of any family, for tools that walk over all of them.
#[derive(Clone, Copy, Debug)]
pub struct EntryInfo {
    /// Its name in PTX.
    pub name: &'static str,
    /// Its configuration.
    pub config: Config,
    /// What its PTX is for: `"sm_80"`, which later GPUs run too, or `"sm_90a"`, which only Hopper runs.
    pub arch: &'static str,
}

/// Makes of all tables, in their order, what tools walk over, and checks at compile time that a GPU can run what is in them.
macro_rules! tables {
    ($first:expr, $($table:expr,)*) => {
        /// All entry points, in the order of their tables.
        pub fn entries() -> impl Iterator<Item = EntryInfo> {
            info($first)$(.chain(info($table)))*
        }

        const _: () = {
            config::check($first);
            $(config::check($table);)*
        };
    };
}

tables! {
    standard::SCORES,
    standard::PROBABILITIES,
    standard::OUTPUT,
    softmax::ROW_A_WARP,
    softmax::ROW_A_BLOCK,
    flash1::FORWARD,
    flash2::FORWARD,
    flash2_backward::ROW_SUMS,
    flash2_backward::KEYS_AND_VALUES,
    flash2_backward::WIDE_KEYS_AND_VALUES,
    flash2_backward::QUERIES,
    flash2_backward::BIAS,
    flash2_backward::SINKS,
    flash2_backward::fused::PREPARE,
    flash2_backward::fused::WHOLE,
    flash2_backward::fused::SPLIT,
    flash2_backward::fused::FINISH,
    flash3::FORWARD,
    flash3::COMBINE,
    flash3_backward::PREPARE,
    flash3_backward::PREPARE_HEADS,
    flash3_backward::PREPARE_RING,
    flash3_backward::PREPARE_ORDERED,
    flash3_backward::WHOLE,
    flash3_backward::GENERAL,
    flash3_backward::GENERAL_SPLIT,
    flash3_backward::ORDERED,
    flash3_backward::RING,
    flash3_backward::HEADS,
    flash3_backward::SPLIT,
    flash3_backward::ORDERED_SPLIT,
    flash3_backward::SHARED,
    flash3_backward::SHARED_SPLIT,
    flash3_backward::SHARED_RING,
    flash3_backward::FINISH,
    flash3_backward::FINISH_RING,
}

fn info<P>(table: &'static [Kernel<P, Config>]) -> impl Iterator<Item = EntryInfo> {
    table.iter().map(|kernel| EntryInfo { name: kernel.name, config: kernel.config, arch: kernel.arch })
}
