//! Functions that become those of a library which is loaded when the first of them is called.
use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where one trampoline jumps.
#[repr(C)]
pub(crate) struct Slot {
    /// First [`bind`], then the driver's function. Read by the trampoline: the first field.
    target: AtomicPtr<c_void>,
    name: &'static CStr,
}

impl Slot {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Slot { target: AtomicPtr::new(bind as *mut c_void), name }
    }
}

/// Defines the functions named, each a jump through a slot of its own.
macro_rules! trampolines {
    ($($name:ident)*) => {$(
        const _: () = {
            static SLOT: $crate::trampoline::Slot = $crate::trampoline::Slot::new(
                match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => unreachable!(),
                },
            );

            // Naked: the arguments, whatever their number and types, stay where the caller put them.
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            extern "C" fn $name() {
                #[cfg(target_arch = "x86_64")]
                core::arch::naked_asm!("lea r11, [rip + {slot}]", "jmp qword ptr [r11]", slot = sym SLOT);
                #[cfg(target_arch = "aarch64")]
                core::arch::naked_asm!(
                    "adrp x16, {slot}",
                    "add x16, x16, :lo12:{slot}",
                    "ldr x17, [x16]",
                    "br x17",
                    slot = sym SLOT,
                );
            }
        };
    )*};
}
pub(crate) use trampolines;

/// Where a trampoline jumps the first time: finds the driver's function, notes it in the slot, and jumps there.
///
/// Entered with the slot in r11, which a caller does not expect to be kept, and the driver's arguments everywhere else:
/// so it saves all registers that may hold one round the call of [`resolve`].
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn bind() {
    core::arch::naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        "push r8",
        "push r9",
        "sub rsp, 128",
        "movups [rsp], xmm0",
        "movups [rsp + 16], xmm1",
        "movups [rsp + 32], xmm2",
        "movups [rsp + 48], xmm3",
        "movups [rsp + 64], xmm4",
        "movups [rsp + 80], xmm5",
        "movups [rsp + 96], xmm6",
        "movups [rsp + 112], xmm7",
        "mov rdi, r11",
        "call {resolve}",
        "movups xmm0, [rsp]",
        "movups xmm1, [rsp + 16]",
        "movups xmm2, [rsp + 32]",
        "movups xmm3, [rsp + 48]",
        "movups xmm4, [rsp + 64]",
        "movups xmm5, [rsp + 80]",
        "movups xmm6, [rsp + 96]",
        "movups xmm7, [rsp + 112]",
        "add rsp, 128",
        "pop r9",
        "pop r8",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "pop rbp",
        "jmp rax",
        resolve = sym resolve,
    );
}

/// The same for aarch64, where the slot comes in x16, the register that linkers' veneers use.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn bind() {
    core::arch::naked_asm!(
        "stp x29, x30, [sp, #-208]!",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "stp q0, q1, [sp, #80]",
        "stp q2, q3, [sp, #112]",
        "stp q4, q5, [sp, #144]",
        "stp q6, q7, [sp, #176]",
        "mov x0, x16",
        "bl {resolve}",
        "mov x16, x0",
        "ldp q6, q7, [sp, #176]",
        "ldp q4, q5, [sp, #144]",
        "ldp q2, q3, [sp, #112]",
        "ldp q0, q1, [sp, #80]",
        "ldp x6, x7, [sp, #64]",
        "ldp x4, x5, [sp, #48]",
        "ldp x2, x3, [sp, #32]",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #208",
        "br x16",
        resolve = sym resolve,
    );
}

/// The function to jump to from now on. Threads that come here at once find the same.
extern "C" fn resolve(slot: &Slot) -> *const c_void {
    let target = match crate::library::find(slot.name) {
        Ok(function) => function,
        Err(crate::NO_DEVICE) => no_device as *const c_void,
        Err(_) => not_found as *const c_void,
    };
    slot.target.store(target.cast_mut(), Ordering::Release);
    target
}

extern "C" fn no_device() -> u32 {
    crate::NO_DEVICE
}

extern "C" fn not_found() -> u32 {
    crate::NOT_FOUND
}
