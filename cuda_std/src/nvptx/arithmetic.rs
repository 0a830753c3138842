//! Arithmetic and conversions in one instruction. PTX ISA: `ex2`, `lg2`, `rcp`, `fma`, `max`, `min`, `cvt`.
use core::arch::asm;

macro_rules! instructions {
    ($($name:ident($($x:ident: $t:ty, $class:ident),*) -> $r:ty, $result:ident = $ptx:literal;)*) => {$(
        #[inline(always)]
        pub fn $name($($x: $t),*) -> $r {
            let y;
            // SAFETY: arithmetic on registers.
            unsafe { asm!($ptx, y = out($result) y, $($x = in($class) $x,)* options(pure, nomem, nostack)) };
            y
        }
    )*};
}

instructions! {
    ex2(x: f32, reg32) -> f32, reg32 = "ex2.approx.ftz.f32 {y}, {x};";
    lg2(x: f32, reg32) -> f32, reg32 = "lg2.approx.ftz.f32 {y}, {x};";
    rcp(x: f32, reg32) -> f32, reg32 = "rcp.approx.ftz.f32 {y}, {x};";
    fma(a: f32, reg32, b: f32, reg32, c: f32, reg32) -> f32, reg32 = "fma.rn.ftz.f32 {y}, {a}, {b}, {c};";
    max(a: f32, reg32, b: f32, reg32) -> f32, reg32 = "max.ftz.f32 {y}, {a}, {b};";
    min_or_nan(a: f32, reg32, b: f32, reg32) -> f32, reg32 = "min.ftz.NaN.f32 {y}, {a}, {b};";
    round_to_tf32(x: f32, reg32) -> f32, reg32 = "cvt.rna.tf32.f32 {y}, {x};";
    unknown(n: u32, reg32) -> u32, reg32 = "mov.b32 {y}, {n};";
    f16_to_f32(x: u16, reg16) -> f32, reg32 = "cvt.f32.f16 {y}, {x};";
    f32_to_f16(x: f32, reg32) -> u16, reg16 = "cvt.rn.f16.f32 {y}, {x};";
    f32_to_bf16(x: f32, reg32) -> u16, reg16 = "cvt.rn.bf16.f32 {y}, {x};";
    pack_f16(low: f32, reg32, high: f32, reg32) -> u32, reg32 = "cvt.rn.f16x2.f32 {y}, {high}, {low};";
    pack_bf16(low: f32, reg32, high: f32, reg32) -> u32, reg32 = "cvt.rn.bf16x2.f32 {y}, {high}, {low};";
}

#[inline(always)]
pub fn unknown_before(n: u32, x: u32) -> u32 {
    let same: u32;
    // SAFETY: a copy.
    unsafe {
        asm!("mov.b32 {same}, {n}; // {x}", same = out(reg32) same, n = in(reg32) n, x = in(reg32) x,
            options(pure, nomem, nostack))
    };
    same
}
