//! Arithmetic, which works outside of a launch too. Counted on each thread of the host, as kernels are that run there.
use super::super::counters::Flops;
use std::cell::Cell;

thread_local! {
    static FMAS: Cell<u64> = const { Cell::new(0) };
    static SPECIALS: Cell<u64> = const { Cell::new(0) };
}

/// What this thread of the host has computed since the last call.
pub(in super::super) fn take_flops() -> Flops {
    Flops { tensor: 0, fma: 2 * FMAS.take(), special: SPECIALS.take() }
}

#[inline(always)]
fn count(unit: &'static std::thread::LocalKey<Cell<u64>>) {
    unit.set(unit.get() + 1);
}

/// Subnormal numbers are 0, of the same sign.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

#[inline(always)]
pub(crate) fn ex2(x: f32) -> f32 {
    count(&SPECIALS);
    flush(flush(x).exp2())
}

#[inline(always)]
pub(crate) fn lg2(x: f32) -> f32 {
    count(&SPECIALS);
    flush(flush(x).log2())
}

#[inline(always)]
pub(crate) fn rcp(x: f32) -> f32 {
    count(&SPECIALS);
    flush(flush(x).recip())
}

#[inline(always)]
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    count(&FMAS);
    flush(flush(a).mul_add(flush(b), flush(c)))
}

#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    flush(a).max(flush(b))
}

#[inline(always)]
pub(crate) fn min_or_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { flush(a).min(flush(b)) }
}

#[inline(always)]
pub(crate) fn round_to_tf32(x: f32) -> f32 {
    const DROPPED: u32 = (1 << 13) - 1;
    // Half of the last place that stays: a carry out of the mantissa is right, up to infinity.
    if x.is_nan() { f32::from_bits(0x7fff_ffff) } else { f32::from_bits((x.to_bits() + DROPPED / 2 + 1) & !DROPPED) }
}

#[inline(always)]
pub(crate) fn unknown_before(n: u32, _x: u32) -> u32 {
    n
}

#[inline(always)]
pub(crate) fn unknown(n: u32) -> u32 {
    n
}

/// NaN, as conversions to 16 bits give it.
const NAN_16: u16 = 0x7fff;

#[inline(always)]
pub(crate) fn f16_to_f32(x: u16) -> f32 {
    // Exponent and mantissa where f32 has them, then the exponent's bias made up for: exact for subnormals too.
    let magnitude = f32::from_bits((x as u32 & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if x & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (x as u32 & 0x8000) << 16)
}

#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    if x.is_nan() { NAN_16 } else { half::f16::from_f32_const(x).to_bits() }
}

#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Half of the last place that stays, and one more if that place is odd: ties to even.
    if x.is_nan() { NAN_16 } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

#[inline(always)]
pub(crate) fn pack_f16(low: f32, high: f32) -> u32 {
    f32_to_f16(low) as u32 | (f32_to_f16(high) as u32) << 16
}

#[inline(always)]
pub(crate) fn pack_bf16(low: f32, high: f32) -> u32 {
    f32_to_bf16(low) as u32 | (f32_to_bf16(high) as u32) << 16
}
