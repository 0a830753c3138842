//! What the threads of one warp say to each other without memory.
//!
//! Every word names the lanes that take part through `members`, a bit a lane; each of them must say the word, and
//! [`ALL`] is the whole warp.
use crate::element::Scalar;
use crate::machine;

/// All 32 lanes.
pub const ALL: u32 = u32::MAX;

/// Waits until all `members` are here, and orders their accesses to memory. PTX ISA: `bar.warp.sync`.
#[inline(always)]
#[track_caller]
pub fn sync_warp(members: u32) {
    machine::sync_warp(members);
}

/// The `x` of lane `lane ^ lane_mask`. PTX ISA: `shfl.sync.bfly.b32`.
#[inline(always)]
#[track_caller]
pub fn shuffle_xor<T: Scalar<Bits = u32>>(members: u32, x: T, lane_mask: u32) -> T {
    T::from_bits(machine::shuffle_xor(members, x.to_bits(), lane_mask))
}

/// The `x` of lane `source`. PTX ISA: `shfl.sync.idx.b32`.
#[inline(always)]
#[track_caller]
pub fn shuffle<T: Scalar<Bits = u32>>(members: u32, x: T, source: u32) -> T {
    T::from_bits(machine::shuffle(members, x.to_bits(), source))
}

/// The `x` of lane `source`, 0 to 3, of the four that this lane is among. PTX ISA: `shfl.sync.idx.b32`, segments of four.
#[inline(always)]
#[track_caller]
pub fn shuffle_quad<T: Scalar<Bits = u32>>(members: u32, x: T, source: u32) -> T {
    T::from_bits(machine::shuffle_quad(members, x.to_bits(), source))
}

/// The `x` of lane `lane - delta`, or its own below that. PTX ISA: `shfl.sync.up.b32`.
#[inline(always)]
#[track_caller]
pub fn shuffle_up<T: Scalar<Bits = u32>>(members: u32, x: T, delta: u32) -> T {
    T::from_bits(machine::shuffle_up(members, x.to_bits(), delta))
}

/// The `x` of lane `lane + delta`, or its own above that. PTX ISA: `shfl.sync.down.b32`.
#[inline(always)]
#[track_caller]
pub fn shuffle_down<T: Scalar<Bits = u32>>(members: u32, x: T, delta: u32) -> T {
    T::from_bits(machine::shuffle_down(members, x.to_bits(), delta))
}

/// A bit a lane: whose `predicate` holds. PTX ISA: `vote.sync.ballot.b32`.
#[inline(always)]
#[track_caller]
pub fn ballot(members: u32, predicate: bool) -> u32 {
    machine::ballot(members, predicate)
}

/// Whether `predicate` holds in any member. PTX ISA: `vote.sync.any.pred`.
#[inline(always)]
#[track_caller]
pub fn any(members: u32, predicate: bool) -> bool {
    machine::any(members, predicate)
}

/// Whether `predicate` holds in all members. PTX ISA: `vote.sync.all.pred`.
#[inline(always)]
#[track_caller]
pub fn all(members: u32, predicate: bool) -> bool {
    machine::all(members, predicate)
}

/// Reduces `x` over groups of `WIDTH` neighbouring lanes (2, 4, 8, 16 or 32); each lane gets its group's result.
///
/// `combine` must be associative and commutative up to rounding; the order is the same in every lane and every run.
#[inline(always)]
#[track_caller]
pub fn reduce<const WIDTH: u32, T: Scalar<Bits = u32>>(mut x: T, combine: impl Fn(T, T) -> T) -> T {
    const { assert!(WIDTH.is_power_of_two() && WIDTH <= 32) };
    let mut lane_mask = 1;
    while lane_mask < WIDTH {
        x = combine(x, shuffle_xor(ALL, x, lane_mask));
        lane_mask *= 2;
    }
    x
}

/// Whether this lane is the one of `members` that is to do what one thread does. PTX ISA: `elect.sync`. sm_90.
#[inline(always)]
#[track_caller]
pub fn elect(members: u32) -> bool {
    machine::elect(members)
}
