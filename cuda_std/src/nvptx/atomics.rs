//! Atomic read-modify-write. PTX ISA: `atom`.
use core::arch::asm;

macro_rules! atomics {
    ($($global:ident, $shared:ident: $t:ty, $ptx:literal;)*) => {$(
        #[inline(always)]
        pub fn $global(address: u64, x: $t) -> $t {
            let old;
            // SAFETY: the launch promised the memory (crate documentation).
            unsafe {
                asm!(concat!("atom.relaxed.gpu.global.", $ptx, " {0}, [{1}], {2};"),
                    out(reg32) old, in(reg64) address, in(reg32) x, options(nostack))
            };
            old
        }

        #[inline(always)]
        pub fn $shared(address: u32, x: $t) -> $t {
            let old;
            // SAFETY: as above.
            unsafe {
                asm!(concat!("atom.relaxed.cta.shared.", $ptx, " {0}, [{1}], {2};"),
                    out(reg32) old, in(reg32) address, in(reg32) x, options(nostack))
            };
            old
        }
    )*};
}

atomics! {
    global_add_u32, shared_add_u32: u32, "add.u32";
    global_add_f32, shared_add_f32: f32, "add.f32";
    global_max_u32, shared_max_u32: u32, "max.u32";
    global_inc_u32, shared_inc_u32: u32, "inc.u32";
}

macro_rules! compare_and_swap {
    ($name:ident, $address:ty, $class:ident, $ptx:literal) => {
        #[inline(always)]
        pub fn $name(address: $address, expected: u32, new: u32) -> u32 {
            let old;
            // SAFETY: the launch promised the memory (crate documentation).
            unsafe {
                asm!(concat!($ptx, " {0}, [{1}], {2}, {3};"),
                    out(reg32) old, in($class) address, in(reg32) expected, in(reg32) new, options(nostack))
            };
            old
        }
    };
}
compare_and_swap!(global_cas_u32, u64, reg64, "atom.relaxed.gpu.global.cas.b32");
compare_and_swap!(shared_cas_u32, u32, reg32, "atom.relaxed.cta.shared.cas.b32");

#[inline(always)]
pub fn arrive_in_grid(address: u64) {
    // SAFETY: as above. What bulk copies did needs no fence of its own: their end, once waited for, is one (PTX ISA, "Async
    // proxy"); a whole one, which looks after shared memory too, is two more barriers of memory.
    unsafe { asm!("red.release.gpu.global.add.u32 [{0}], 1;", in(reg64) address, options(nostack)) }
}

#[inline(always)]
pub fn wait_in_grid(address: u64, count: u32) {
    wait_in_grid_for_all(address, count);
}

#[inline(always)]
pub fn wait_in_grid_for_all(address: u64, count: u32) -> u32 {
    let mut there: u32 = 0;
    while there < count {
        // SAFETY: as above.
        unsafe { asm!("ld.acquire.gpu.global.u32 {0}, [{1}];", out(reg32) there, in(reg64) address, options(nostack)) }
    }
    // SAFETY: orders memory, and touches none.
    unsafe { asm!("fence.proxy.async.global;", options(nostack)) }
    there
}
