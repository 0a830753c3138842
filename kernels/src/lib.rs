//! The attention kernels of ferroflash: algorithms, tiles, masks and schedules, in the vocabulary of [`cuda_std`].
//!
//! Built for `nvptx64-nvidia-cuda` this crate is PTX; built for the host, the same functions run on the simulated GPU
//! ([`cuda_std::sim`]), and the host crate reads parameter structs, tile sizes and the tables of entry points from it.
#![no_std]
// Arrays are registers: only loops over constant indices are sure to be unrolled, iterators are not.
#![allow(clippy::needless_range_loop)]

pub mod attention;
mod config;
pub mod dropout;
mod entries;
pub mod flash1;
pub mod flash2;
pub mod flash2_backward;
pub mod flash3;
pub mod flash3_backward;
pub mod mask;
mod online_softmax;
mod row_softmax;
pub mod schedule;
pub mod scores;
pub mod softmax;
pub mod spoiled_rows;
pub mod standard;
mod stored;

pub use config::{Config, SHARED_BYTES_OF_EVERY_GPU, SHARED_BYTES_OF_LARGEST_GPU};
pub use entries::{EntryInfo, entries};
pub use online_softmax::OnlineSoftmax;
pub use row_softmax::{Rescale, RowSoftmax};
