//! Warpgroups: four neighbouring warps, the first of a number that is a multiple of four. They multiply together
//! ([`wgmma`](crate::wgmma)), and share a budget of registers. sm_90a.
use crate::{machine, thread, warp};

/// Threads a warpgroup.
pub const WARPGROUP: u32 = 128;

/// The warpgroup's index in its block, for blocks of one dimension: equal in all lanes, and known to be by the
/// compiler.
#[inline(always)]
#[track_caller]
pub fn warpgroup_id() -> u32 {
    warp::shuffle(warp::ALL, thread::thread_idx_x() / WARPGROUP, 0)
}

/// The warp's index in its warpgroup.
#[inline(always)]
pub fn warp_in_group() -> u32 {
    thread::warp_id() % 4
}

/// The thread's index in its warpgroup.
#[inline(always)]
pub fn thread_in_group() -> u32 {
    thread::thread_idx_x() % WARPGROUP
}

/// Gives registers back, so that `COUNT` are left a thread: a multiple of 8 from 24 to 256. Said by a whole warpgroup,
/// once, at the top of its branch. Without launch bounds the assembler ignores it.
/// PTX ISA: `setmaxnreg.dec.sync.aligned.u32`.
#[inline(always)]
#[track_caller]
pub fn release_registers<const COUNT: u32>() {
    const { assert!(COUNT >= 24 && COUNT <= 256 && COUNT.is_multiple_of(8), "24 to 256 registers, by eights") };
    machine::set_max_registers::<COUNT, false>();
}

/// Takes registers, once others have given them back, so that there are `COUNT` a thread. As for [`release_registers`].
/// PTX ISA: `setmaxnreg.inc.sync.aligned.u32`.
#[inline(always)]
#[track_caller]
pub fn claim_registers<const COUNT: u32>() {
    const { assert!(COUNT >= 24 && COUNT <= 256 && COUNT.is_multiple_of(8), "24 to 256 registers, by eights") };
    machine::set_max_registers::<COUNT, true>();
}
