//! What a host knows of an entry point.
use cuda_std::thread::WARP;
use cuda_std::warpgroup::WARPGROUP;
use cuda_std::{DType, Kernel};

/// The most shared memory that a block may have on every GPU that the kernels run on, in bytes: that of compute capabilities
/// 8.6, 8.9 and 12.0. Source: CUDA C++ Programming Guide, technical specifications per compute capability.
pub const SHARED_BYTES_OF_EVERY_GPU: u32 = 99 << 10;

/// The most shared memory that a block may have on any GPU, in bytes: that of compute capabilities 9.0 and 10.0. Source: as above.
pub const SHARED_BYTES_OF_LARGEST_GPU: u32 = 227 << 10;

/// Shared memory of a multiprocessor of such a GPU. Each block takes [`SHARED_BYTES_OF_SYSTEM`] more of it than its own.
const SHARED_BYTES_OF_MULTIPROCESSOR: u32 = 228 << 10;
const SHARED_BYTES_OF_SYSTEM: u32 = 1 << 10;

/// Registers of a multiprocessor, and the most that a thread may have. A warp gets them in units of so many a thread.
const REGISTERS_OF_MULTIPROCESSOR: u32 = 64 << 10;
const REGISTERS_OF_THREAD: u32 = 255;
const REGISTER_UNIT: u32 = 8;

/// Threads of a block, at most.
const THREADS_OF_BLOCK: u32 = 1024;

/// Of the threads of a warpgroup that gives registers up (`setmaxnreg`), the fewest that it may keep. Source: PTX ISA, setmaxnreg.
const LEAST_REGISTERS: u32 = 24;

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
    /// Registers that a thread of those that multiply claims, where the first warpgroup gives up its own to the others; 0 where
    /// all threads have as many.
    pub claimed_registers: u32,
    /// Registers of a thread for what it multiplies and sums, where these are most: sums, scores, and factors that are not read
    /// from shared memory again.
    pub accumulators: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// Barriers in its source: what its PTX must hold, so that no optimiser has copied or removed one.
    pub barriers: u32,
}

impl Config {
    /// Registers that a thread which multiplies may have.
    pub const fn registers(&self) -> u32 {
        if self.claimed_registers > 0 {
            return self.claimed_registers;
        }
        let share = REGISTERS_OF_MULTIPROCESSOR / (self.threads * self.min_blocks_per_sm);
        let share = share / REGISTER_UNIT * REGISTER_UNIT;
        if share < REGISTERS_OF_THREAD { share } else { REGISTERS_OF_THREAD }
    }

    /// Whether a block may have so many threads.
    const fn has_allowed_threads(&self) -> bool {
        self.threads > 0 && self.threads <= THREADS_OF_BLOCK && self.threads.is_multiple_of(WARP)
    }

    /// Whether there are the registers that threads claim, and whether what a thread multiplies and sums fits its own, and leaves
    /// some for addresses.
    const fn fits_registers(&self) -> bool {
        let claimed = if self.claimed_registers > 0 {
            (self.threads - WARPGROUP) * self.claimed_registers + WARPGROUP * LEAST_REGISTERS
        } else {
            0
        };
        let is_whole = self.claimed_registers.is_multiple_of(REGISTER_UNIT);
        is_whole && claimed <= REGISTERS_OF_MULTIPROCESSOR && self.accumulators < self.registers()
    }

    /// Whether a block may have so much shared memory, and a multiprocessor has it for as many blocks as must fit it.
    const fn fits_shared_memory(&self) -> bool {
        let of_blocks = self.min_blocks_per_sm * (self.shared_bytes + SHARED_BYTES_OF_SYSTEM);
        self.shared_bytes <= SHARED_BYTES_OF_LARGEST_GPU && of_blocks <= SHARED_BYTES_OF_MULTIPROCESSOR
    }
}

/// As many blocks of so many threads as fit a multiprocessor at once where each thread has all registers that it may.
pub(crate) const fn blocks_of_all_registers(threads: u32, shared_bytes: u32) -> u32 {
    let by_registers = REGISTERS_OF_MULTIPROCESSOR / ((REGISTERS_OF_THREAD + 1) * threads);
    let by_shared_memory = SHARED_BYTES_OF_MULTIPROCESSOR / (shared_bytes + SHARED_BYTES_OF_SYSTEM);
    if by_registers < by_shared_memory { by_registers } else { by_shared_memory }
}

/// Panics, which at compile time is an error, if no GPU could run a kernel of a table: its message is the kernel's name.
pub(crate) const fn check<P>(table: &[Kernel<P, Config>]) {
    let mut i = 0;
    while i < table.len() {
        let Kernel { name, config, .. } = &table[i];
        // One `if` for each, so that the compiler's line says which it is: a panic at compile time shows a text alone, unformatted.
        if !config.has_allowed_threads() {
            panic!("{}", *name);
        }
        if !config.fits_registers() {
            panic!("{}", *name);
        }
        if !config.fits_shared_memory() {
            panic!("{}", *name);
        }
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that fits, and leaves nothing.
    const FULL: Config = Config {
        family: "test",
        dtype: DType::F16,
        tf32: false,
        headdim: 64,
        headdim_v: 64,
        causal: None,
        general: true,
        block_m: 64,
        block_n: 64,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: 256,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: 254,
        shared_bytes: SHARED_BYTES_OF_LARGEST_GPU,
        barriers: 0,
    };

    #[test]
    fn threads_are_whole_warps_and_at_most_1024() {
        for (threads, allowed) in [(0, false), (32, true), (48, false), (1024, true), (1056, false)] {
            assert_eq!(Config { threads, ..FULL }.has_allowed_threads(), allowed, "{threads}");
        }
    }

    #[test]
    fn a_thread_has_its_share_of_registers_or_what_it_claims() {
        let of = |threads, min_blocks_per_sm| Config { threads, min_blocks_per_sm, ..FULL }.registers();
        assert_eq!([of(128, 1), of(256, 1), of(256, 2), of(384, 1), of(1024, 1)], [255, 255, 128, 168, 64]);
        assert_eq!(Config { threads: 384, claimed_registers: 240, ..FULL }.registers(), 240);
    }

    #[test]
    fn accumulators_leave_registers_for_addresses() {
        assert!(FULL.fits_registers());
        assert!(!Config { accumulators: 255, ..FULL }.fits_registers());
        assert!(!Config { min_blocks_per_sm: 2, ..FULL }.fits_registers());
    }

    #[test]
    fn what_warpgroups_claim_others_give_up() {
        let of = |threads, claimed_registers| Config { threads, claimed_registers, accumulators: 100, ..FULL };
        assert!(of(384, 240).fits_registers() && of(512, 160).fits_registers() && of(640, 120).fits_registers());
        assert!(!of(384, 248).fits_registers() && !of(512, 168).fits_registers() && !of(640, 128).fits_registers());
        assert!(!of(384, 236).fits_registers(), "no multiple of 8");
    }

    #[test]
    fn blocks_fit_the_shared_memory_of_a_multiprocessor() {
        let of = |min_blocks_per_sm, shared_bytes| Config { min_blocks_per_sm, shared_bytes, ..FULL };
        assert!(of(1, 227 << 10).fits_shared_memory() && of(2, 113 << 10).fits_shared_memory());
        assert!(!of(1, (227 << 10) + 1).fits_shared_memory() && !of(2, (113 << 10) + 1).fits_shared_memory());
    }

    #[test]
    fn blocks_with_all_registers_are_bounded_by_shared_memory_too() {
        let of = |threads, kibibytes: u32| blocks_of_all_registers(threads, kibibytes << 10);
        assert_eq!([of(128, 64), of(128, 113), of(128, 114), of(64, 96), of(256, 1)], [2, 2, 1, 2, 1]);
    }
}
