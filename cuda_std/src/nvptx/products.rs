//! Products of a warpgroup. PTX ISA: `wgmma`.
//!
//! The assembler keeps products asynchronous only as long as it sees that nothing touches their registers (else it
//! warns, C7510 to C7514, and waits after each): so what is in flight has an owner of its own, all registers of a
//! product are operands of its instructions, and of the wait.
use crate::matrix::{Format, PackedElement};
use crate::wgmma::{DEPTH, Right};
use core::arch::asm;
use core::mem::MaybeUninit;

/// The registers that a product is added to. What the first step does not add to is never read.
pub struct Sum<const N: usize> {
    registers: [[MaybeUninit<f32>; 4]; N],
    /// Whether the first step adds to them: a constant, when all is inlined.
    is_zero: bool,
}

impl<const N: usize> Sum<N> {
    #[inline(always)]
    pub fn zero() -> Self {
        // SAFETY: nothing is said of what they hold.
        Sum { registers: unsafe { MaybeUninit::uninit().assume_init() }, is_zero: true }
    }

    #[inline(always)]
    pub fn from_registers(registers: [[f32; 4]; N]) -> Self {
        // SAFETY: the same numbers.
        Sum { registers: unsafe { core::mem::transmute_copy(&registers) }, is_zero: false }
    }

    #[inline(always)]
    pub fn from_flight(flight: Flight<N>) -> Self {
        Sum { registers: flight.0, is_zero: false }
    }
}

/// Registers that the tensor cores may still be writing.
pub struct Flight<const N: usize>([[MaybeUninit<f32>; 4]; N]);

#[inline(always)]
fn fence() {
    // SAFETY: orders registers and shared memory.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

#[inline(always)]
fn commit() {
    // SAFETY: makes a group.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// `say!(width in columns, register operands.., arguments..)` for the width that `8 N` is.
macro_rules! by_width {
    ($n:expr, $say:ident!($($argument:tt)*)) => {
        by_width!(@ $n, $say!($($argument)*), [],
            8 {0 1 2 3} 16 {4 5 6 7} 24 {8 9 10 11} 32 {12 13 14 15} 40 {16 17 18 19} 48 {20 21 22 23} 56 {24 25 26 27}
            64 {28 29 30 31} 72 {32 33 34 35} 80 {36 37 38 39} 88 {40 41 42 43} 96 {44 45 46 47} 104 {48 49 50 51}
            112 {52 53 54 55} 120 {56 57 58 59} 128 {60 61 62 63} 136 {64 65 66 67} 144 {68 69 70 71} 152 {72 73 74 75}
            160 {76 77 78 79} 168 {80 81 82 83} 176 {84 85 86 87} 184 {88 89 90 91} 192 {92 93 94 95} 200 {96 97 98 99}
            208 {100 101 102 103} 216 {104 105 106 107} 224 {108 109 110 111} 232 {112 113 114 115}
            240 {116 117 118 119} 248 {120 121 122 123} 256 {124 125 126 127})
    };
    (@ $n:expr, $say:ident!($($argument:tt)*), [$($known:literal)*],
        $width:literal {$($new:literal)*} $($rest:tt)*) => {
        if 8 * $n == $width {
            $say!($width, [$($known)* $($new)*], $($argument)*)
        } else {
            by_width!(@ $n, $say!($($argument)*), [$($known)* $($new)*], $($rest)*)
        }
    };
    (@ $n:expr, $say:ident!($($argument:tt)*), [$($known:literal)*],) => { unreachable!() };
}

/// One step: the descriptors are put together inside, so that only their lower halves take registers.
macro_rules! step_shared {
    ($width:literal, [$first:literal $($i:literal)*], $dtype:literal, $d:ident, $a:ident, $b:ident, $scale:ident,
        $left:ident, $right:ident) => {
        asm!(
            "{{ .reg .b64 a, b; mov.b64 a, {{{a}, {a_high}}}; mov.b64 b, {{{b}, {b_high}}};",
            concat!("wgmma.mma_async.sync.aligned.m64n", $width, "k16.f32.", $dtype, ".", $dtype,
                " {{{", $first, "}", $(", {", $i, "}",)* "}}, a, b, {scale}, 1, 1, {a_columns}, {b_columns}; }}"),
            inout(reg32) *$d.add($first), $(inout(reg32) *$d.add($i),)*
            a = in(reg32) $a, b = in(reg32) $b,
            a_high = const $left::DESCRIPTOR_HIGH, b_high = const $right::DESCRIPTOR_HIGH,
            scale = const $scale, a_columns = const $left::COLUMNS as u32, b_columns = const $right::COLUMNS as u32,
            options(nostack)
        )
    };
}

macro_rules! step_registers {
    ($width:literal, [$first:literal $($i:literal)*], $dtype:literal, $d:ident, $a:ident, $b:ident, $scale:ident,
        $right:ident) => {
        asm!(
            "{{ .reg .b64 b; mov.b64 b, {{{b}, {b_high}}};",
            concat!("wgmma.mma_async.sync.aligned.m64n", $width, "k16.f32.", $dtype, ".", $dtype,
                " {{{", $first, "}", $(", {", $i, "}",)* "}}, {{{a0}, {a1}, {a2}, {a3}}}, b, ",
                "{scale}, 1, 1, {b_columns}; }}"),
            inout(reg32) *$d.add($first), $(inout(reg32) *$d.add($i),)*
            a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3], b = in(reg32) $b,
            b_high = const $right::DESCRIPTOR_HIGH, scale = const $scale, b_columns = const $right::COLUMNS as u32,
            options(nostack)
        )
    };
}

macro_rules! step {
    ($t:ident, $n:ident, $step:ident!($($argument:tt)*)) => {
        // SAFETY: the launch promised the memory (crate documentation). There are `4 N` registers.
        unsafe {
            if matches!($t::FORMAT, Format::BF16) {
                by_width!($n, $step!("bf16", $($argument)*));
            } else {
                by_width!($n, $step!("f16", $($argument)*));
            }
        }
    };
}

#[inline(always)]
fn shared_step<T: PackedElement, A: Right<T>, B: Right<T>, const N: usize, const SCALE: u32>(
    registers: &mut [[MaybeUninit<f32>; 4]; N],
    a: u32,
    b: u32,
) {
    let d = registers.as_mut_ptr().cast::<MaybeUninit<f32>>();
    step!(T, N, step_shared!(d, a, b, SCALE, A, B));
}

#[inline(always)]
fn register_step<T: PackedElement, B: Right<T>, const N: usize, const SCALE: u32>(
    registers: &mut [[MaybeUninit<f32>; 4]; N],
    a: [u32; 4],
    b: u32,
) {
    let d = registers.as_mut_ptr().cast::<MaybeUninit<f32>>();
    step!(T, N, step_registers!(d, a, b, SCALE, B));
}

#[inline(always)]
pub fn wgmma_shared<T: PackedElement, A: Right<T>, B: Right<T>, const N: usize>(sum: Sum<N>, a: A, b: B) -> Flight<N> {
    let Sum { mut registers, is_zero } = sum;
    fence();
    for step in 0..A::LENGTH / DEPTH {
        let (a, b) = (a.descriptor_low(step), b.descriptor_low(step));
        if step == 0 && is_zero {
            shared_step::<T, A, B, N, 0>(&mut registers, a, b);
        } else {
            shared_step::<T, A, B, N, 1>(&mut registers, a, b);
        }
    }
    commit();
    Flight(registers)
}

#[inline(always)]
pub fn wgmma_registers<T: PackedElement, const STEPS: usize, B: Right<T>, const N: usize>(
    sum: Sum<N>,
    a: [[u32; 4]; STEPS],
    b: B,
) -> Flight<N> {
    let Sum { mut registers, is_zero } = sum;
    fence();
    for step in 0..STEPS {
        let b = b.descriptor_low(step);
        if step == 0 && is_zero {
            register_step::<T, B, N, 0>(&mut registers, a[step], b);
        } else {
            register_step::<T, B, N, 1>(&mut registers, a[step], b);
        }
    }
    commit();
    Flight(registers)
}

/// The registers are operands, or LLVM would move their uses before the wait.
macro_rules! wait {
    ($width:literal, [$($i:literal)*], $d:ident, $pending:ident) => {
        asm!(concat!("wgmma.wait_group.sync.aligned {pending}; //", $(" {", $i, "}",)*),
            $(inout(reg32) *$d.add($i),)* pending = const $pending, options(nostack))
    };
}

#[inline(always)]
pub fn wgmma_wait<const PENDING: usize, const N: usize>(mut flight: Flight<N>) -> [[f32; 4]; N] {
    let d = flight.0.as_mut_ptr().cast::<MaybeUninit<f32>>();
    // SAFETY: there are `4 N` registers, which the product has written.
    unsafe {
        by_width!(N, wait!(d, PENDING));
        core::mem::transmute_copy(&flight.0)
    }
}

macro_rules! touch {
    ($width:literal, [$($i:literal)*], $d:ident) => {
        asm!(concat!("//", $(" {", $i, "}",)*), $(inout(reg32) *$d.add($i),)* options(nostack))
    };
}

#[inline(always)]
pub fn pin<const N: usize>(registers: &mut [[f32; 4]; N]) {
    let d = registers.as_mut_ptr().cast::<f32>();
    // SAFETY: says nothing; there are `4 N` registers.
    unsafe { by_width!(N, touch!(d)) }
}
