//! What a host knows of an entry point.
use cuda_std::DType;

/// The most shared memory that a block may have on every GPU that the kernels run on, in bytes: that of compute capabilities
/// 8.6, 8.9 and 12.0. Source: CUDA C++ Programming Guide, technical specifications per compute capability.
pub const SHARED_BYTES_OF_EVERY_GPU: u32 = 99 << 10;

/// What a host needs to choose and launch one entry point. Sizes are in elements, rows or threads; shared memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The kernel family and the part of it: `"flash2"`, `"standard.scores"` ...
    pub family: &'static str,
    /// The dtype of its tensors.
    pub dtype: DType,
    /// Whether it multiplies f32 in tf32.
    pub tf32: bool,
    /// The head dimension of Q and K that it is built for; 0 for any.
    pub headdim: u32,
    /// The head dimension of V that it is built for; 0 for any.
    pub headdim_v: u32,
    /// Whether it masks causally; `None` when its argument says.
    pub causal: Option<bool>,
    /// Whether it asks its arguments for windows, masks, caps, biases, dropout and alignment; those of Hopper for windows, caps,
    /// ALiBi and sinks. Others know only their own mask.
    pub general: bool,
    /// Rows of Q (or of a softmax) that a block takes at a time.
    pub block_m: u32,
    /// Rows of K and V that a block takes at a time.
    pub block_n: u32,
    /// From how many keys on it is the fastest of those that compute the same; 0 for one that always is.
    pub from_keys: u32,
    /// Whether it is for few queries, of heads that share K and V: its tiles may hold rows of several.
    pub few: bool,
    /// How many sequences of different lengths it puts into order, those that cost the most first; 0 for one that puts none.
    pub sequences: u32,
    /// Threads a block.
    pub threads: u32,
    /// Blocks that must fit a multiprocessor at once: bounds the registers.
    pub min_blocks_per_sm: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Barriers in its source: what its PTX must hold, so that no optimiser has copied or removed one.
    pub barriers: u32,
}
