//! A simulated GPU: runs kernels on the CPU, checks every access and every barrier, and counts what moves.
//!
//! ```
//! use cuda_std::sim::{Launch, Memory, Options, launch};
//! use cuda_std::thread::{block_dim_x, block_idx_x, thread_idx_x};
//!
//! let memory = Memory::new();
//! let (x, y) = (memory.upload("x", &[1.0f32; 256]), memory.allocate::<f32>("y", 256));
//! let (from, to) = (x.global(), y.global());
//! let two_blocks = Launch { kernel: "double", grid: [2, 1, 1], block: [128, 1, 1], shared_bytes: 0 };
//! let report = launch(&two_blocks, &memory, &Options::default(), || {
//!     let i = (block_idx_x() * block_dim_x() + thread_idx_x()) as usize;
//!     to.store(i, 2.0 * from.load(i));
//! });
//! assert!(report.findings.is_empty());
//! assert_eq!(memory.read(&y), [2.0; 256]);
//! assert_eq!(report.counters.tensor("y").unwrap().stored_bytes, 1024);
//! ```
//!
//! # The machine
//!
//! Each thread of a block is a coroutine. A block runs on one thread of the host, from one word that must wait to the
//! next, so a launch does the same in each run: threads take turns in the order of their indices, or in one that a
//! [seed](Options::seed) chooses. Blocks start in their order and run in parallel.
//!
//! - **Warps.** Lanes meet in shuffles, votes, matrix words and [`sync_warp`](crate::warp::sync_warp) if they name the
//!   same word and the same members; where PTX says `.aligned` (matrix words, barriers), at the same place in the
//!   source too.
//! - **Memory order.** `sync_warp` orders the accesses of its members, [`sync_threads`](crate::thread::sync_threads)
//!   those of the block, a named barrier what those that arrive did before with what those that wait do after,
//!   [`Arrivals`](crate::arrivals::Arrivals) the same between blocks. Nothing else orders memory: no shuffle, no vote, no
//!   atomic.
//! - **Asynchronous copies** take effect as late as they may, at the wait of the thread that issued them.
//! - **Hopper.** An mbarrier orders what those that arrive did before with what those that wait do after. Copies of the
//!   tensor copy engine bring their data when the first thread that waits for their phase could go on; stores read
//!   shared memory when their thread waits for that, and write global memory when it waits for their end, or exits.
//!   Products of warpgroups read shared memory when the first thread waits for them. To the race detector all these are
//!   done by agents, which are known to those alone that have waited; what threads write to shared memory is known to them
//!   after a fence of the writer, and what they write to global memory after a wait of
//!   [`Arrivals`](crate::arrivals::Arrivals), which has a fence.
//! - **Clusters** run on one thread of the host: each block as far as it can, then the next.
//! - **Atomics** on global memory are done block by block, in the order of the blocks: the first of a block waits until
//!   all blocks before it have ended. So sums of floats are the same in each run. A block that waits for a later one is
//!   reported as a deadlock, although a GPU may run both at once.
//! - **Memory** that nobody has written holds all ones: NaN, in every format of floats.
//!
//! # What is reported
//!
//! [`FindingKind`] lists it. Races are found by vector clocks, not by luck: two accesses that no barrier orders are
//! reported in whatever order they happen to run, within a block and between blocks. A finding names kernel, block,
//! thread and source line of both sides, and counts how often it occurred at the same pair of lines.
//!
//! What is not found: a race that hides behind another data-dependent branch than the one taken; a loop that says no
//! word (it hangs, here as there); too many registers; what depends on how many blocks are resident at once.
//! Blocks of a cluster that hand each other data through global memory are reported as racing, unless
//! [`Arrivals`](crate::arrivals::Arrivals) order them.
//!
//! # What is counted
//!
//! [`Counters`] has bytes and 32-byte sectors of each tensor, accesses and bank conflicts of shared memory, and flops
//! by unit. Sectors and bank conflicts are those of instructions of whole warps: lanes run one after the other, and
//! their n-th accesses at the same place, since they last met, are taken for one instruction. There are no caches: a
//! sector is counted each time that a warp asks for it. What the tensor copy engine moves is counted by stretches of
//! global memory, once for all blocks that it goes to, and not as traffic of shared memory.
//!
//! # What it costs
//!
//! On an idle machine a thread's turn takes 20 to 30 ns; an access 4 ns, with the race detector 10, with the counters
//! too 20. Words that do much at once (a matrix word of many tiles) cost little more than those that do little.
//! FlashAttention-2, one head of 512 tokens and dimension 64, takes 6 ms on two cores, with all checks 10.

// What a kernel says.
pub(crate) mod words;

// Threads: how they run, wait and meet.
mod barriers;
mod block;
mod cluster;
mod deadlock;
mod mbarriers;
mod panics;
mod rendezvous;
mod scheduler;
mod stacks;
mod warpgroups;

// Memory: where it lies, and how it is accessed and copied.
mod access;
mod boxes;
mod bulk;
mod copies;
mod memory;
mod shared_memory;
mod transfers;

// What warpgroups multiply.
mod products;

// The race detector: within a block, and between blocks.
mod arrivals;
mod clocks;
mod footprints;
mod global_shadow;
mod order;
mod shadow;
mod site;
mod uninitialised;
mod unit;

// Counters.
mod banks;
mod counters;
mod traffic;

// Launches, and what is reported of them.
mod launch;
mod report;

pub use counters::{ConflictSite, Counters, Flops, SharedTraffic, TensorTraffic};
pub use launch::{Launch, Options, launch, launch_clusters};
pub use memory::{Buffer, Memory};
pub use report::{Finding, FindingKind, Party, Report};
pub use shared_memory::MOST_SHARED_BYTES;

/// Lanes of a warp.
const WARP: usize = 32;
