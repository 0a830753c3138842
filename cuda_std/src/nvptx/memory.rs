//! Loads and stores. PTX ISA: `ld`, `st`, `.shared`.
use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 dynamic_shared_memory[];");

#[inline(always)]
pub fn dynamic_shared() -> u32 {
    let address: u32;
    // SAFETY: takes an address.
    unsafe { asm!("mov.u32 {0}, dynamic_shared_memory;", out(reg32) address, options(pure, nomem, nostack)) };
    address
}

/// Not `pure`: two arrays of one size must stay two.
#[inline(always)]
pub fn static_shared<T, const N: usize>() -> u32 {
    let address: u32;
    // SAFETY: declares a variable of the block and takes its address.
    unsafe {
        asm!(
            "{{ .shared .align 16 .b8 array[{bytes}]; mov.u32 {address}, array; }}",
            address = out(reg32) address,
            bytes = const N * size_of::<T>(),
            options(nomem, nostack)
        )
    };
    address
}

/// A value that one instruction loads or stores.
pub trait Access: Copy + 'static {
    fn load_shared(address: u32) -> Self;
    fn store_shared(self, address: u32);
    fn load_global(address: u64) -> Self;
    fn store_global(self, address: u64);
}

macro_rules! access_one {
    ($t:ty, $class:ident, $suffix:literal) => {
        impl Access for $t {
            #[inline(always)]
            fn load_shared(address: u32) -> Self {
                let x;
                // SAFETY: the launch promised the memory (crate documentation).
                unsafe {
                    asm!(concat!("ld.shared.", $suffix, " {0}, [{1}];"), out($class) x, in(reg32) address,
                        options(pure, readonly, nostack))
                };
                x
            }
            #[inline(always)]
            fn store_shared(self, address: u32) {
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("st.shared.", $suffix, " [{0}], {1};"), in(reg32) address, in($class) self, options(nostack))
                }
            }
            #[inline(always)]
            fn load_global(address: u64) -> Self {
                let x;
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("ld.global.", $suffix, " {0}, [{1}];"), out($class) x, in(reg64) address,
                        options(pure, readonly, nostack))
                };
                x
            }
            #[inline(always)]
            fn store_global(self, address: u64) {
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("st.global.", $suffix, " [{0}], {1};"), in(reg64) address, in($class) self, options(nostack))
                }
            }
        }
    };
}
/// Registers have 16 bits at least.
impl Access for u8 {
    #[inline(always)]
    fn load_shared(address: u32) -> Self {
        let x: u16;
        // SAFETY: the launch promised the memory (crate documentation).
        unsafe { asm!("ld.shared.u8 {0}, [{1}];", out(reg16) x, in(reg32) address, options(pure, readonly, nostack)) };
        x as u8
    }
    #[inline(always)]
    fn store_shared(self, address: u32) {
        // SAFETY: as above.
        unsafe { asm!("st.shared.u8 [{0}], {1};", in(reg32) address, in(reg16) self as u16, options(nostack)) }
    }
    #[inline(always)]
    fn load_global(address: u64) -> Self {
        let x: u16;
        // SAFETY: as above.
        unsafe { asm!("ld.global.u8 {0}, [{1}];", out(reg16) x, in(reg64) address, options(pure, readonly, nostack)) };
        x as u8
    }
    #[inline(always)]
    fn store_global(self, address: u64) {
        // SAFETY: as above.
        unsafe { asm!("st.global.u8 [{0}], {1};", in(reg64) address, in(reg16) self as u16, options(nostack)) }
    }
}
access_one!(u16, reg16, "b16");
access_one!(u32, reg32, "b32");
access_one!(u64, reg64, "b64");

macro_rules! access_vector {
    ($t:ty, $suffix:literal, $registers:literal, $($i:literal)*) => {
        impl Access for $t {
            #[inline(always)]
            fn load_shared(address: u32) -> Self {
                let mut x: $t = Default::default();
                // SAFETY: the launch promised the memory (crate documentation).
                unsafe {
                    asm!(concat!("ld.shared.", $suffix, " ", $registers, ", [{address}];"),
                        $(out(reg32) x[$i],)* address = in(reg32) address, options(pure, readonly, nostack))
                };
                x
            }
            #[inline(always)]
            fn store_shared(self, address: u32) {
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("st.shared.", $suffix, " [{address}], ", $registers, ";"),
                        $(in(reg32) self[$i],)* address = in(reg32) address, options(nostack))
                }
            }
            #[inline(always)]
            fn load_global(address: u64) -> Self {
                let mut x: $t = Default::default();
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("ld.global.", $suffix, " ", $registers, ", [{address}];"),
                        $(out(reg32) x[$i],)* address = in(reg64) address, options(pure, readonly, nostack))
                };
                x
            }
            #[inline(always)]
            fn store_global(self, address: u64) {
                // SAFETY: as above.
                unsafe {
                    asm!(concat!("st.global.", $suffix, " [{address}], ", $registers, ";"),
                        $(in(reg32) self[$i],)* address = in(reg64) address, options(nostack))
                }
            }
        }
    };
}
access_vector!([u32; 2], "v2.b32", "{{{0}, {1}}}", 0 1);
access_vector!([u32; 4], "v4.b32", "{{{0}, {1}, {2}, {3}}}", 0 1 2 3);
