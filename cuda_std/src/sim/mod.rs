//! The simulated GPU.
mod access;
mod banks;
mod barriers;
mod block;
mod clocks;
mod cluster;
mod copies;
mod counters;
mod deadlock;
mod footprints;
mod global_shadow;
mod launch;
mod memory;
mod order;
mod panics;
mod rendezvous;
mod report;
mod scheduler;
mod shadow;
mod shared_memory;
mod site;
mod stacks;
mod traffic;
mod uninitialised;
mod unit;
pub(crate) mod words;

pub use counters::{ConflictSite, Counters, Flops, SharedTraffic, TensorTraffic};
pub use launch::{Launch, Options, launch};
pub use memory::{Buffer, Memory};
pub use report::{Finding, FindingKind, Party, Report};

/// Lanes of a warp.
const WARP: usize = 32;
