//! All entry points, for tools that walk over them.
use crate::config::Config;
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

/// All entry points, in the order of their tables.
pub fn entries() -> impl Iterator<Item = EntryInfo> {
    info(standard::SCORES)
        .chain(info(standard::PROBABILITIES))
        .chain(info(standard::OUTPUT))
        .chain(info(softmax::ROW_A_WARP))
        .chain(info(softmax::ROW_A_BLOCK))
        .chain(info(flash1::FORWARD))
        .chain(info(flash2::FORWARD))
        .chain(info(flash2_backward::ROW_SUMS))
        .chain(info(flash2_backward::KEYS_AND_VALUES))
        .chain(info(flash2_backward::WIDE_KEYS_AND_VALUES))
        .chain(info(flash2_backward::QUERIES))
        .chain(info(flash2_backward::BIAS))
        .chain(info(flash2_backward::SINKS))
        .chain(info(flash2_backward::fused::PREPARE))
        .chain(info(flash2_backward::fused::WHOLE))
        .chain(info(flash2_backward::fused::SPLIT))
        .chain(info(flash2_backward::fused::FINISH))
        .chain(info(flash3::FORWARD))
        .chain(info(flash3::COMBINE))
        .chain(info(flash3_backward::PREPARE))
        .chain(info(flash3_backward::PREPARE_HEADS))
        .chain(info(flash3_backward::PREPARE_RING))
        .chain(info(flash3_backward::PREPARE_ORDERED))
        .chain(info(flash3_backward::WHOLE))
        .chain(info(flash3_backward::GENERAL))
        .chain(info(flash3_backward::GENERAL_SPLIT))
        .chain(info(flash3_backward::ORDERED))
        .chain(info(flash3_backward::RING))
        .chain(info(flash3_backward::HEADS))
        .chain(info(flash3_backward::SPLIT))
        .chain(info(flash3_backward::ORDERED_SPLIT))
        .chain(info(flash3_backward::SHARED))
        .chain(info(flash3_backward::SHARED_SPLIT))
        .chain(info(flash3_backward::SHARED_RING))
        .chain(info(flash3_backward::FINISH))
        .chain(info(flash3_backward::FINISH_RING))
}

fn info<P>(table: &'static [Kernel<P, Config>]) -> impl Iterator<Item = EntryInfo> {
    table.iter().map(|kernel| EntryInfo { name: kernel.name, config: kernel.config, arch: kernel.arch })
}
