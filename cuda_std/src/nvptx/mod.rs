//! Each word as PTX.
//!
//! Words that threads say together (barriers, shuffles, votes) are LLVM intrinsics: LLVM knows that it must not move
//! those into or out of branches, which it does not know of inline assembly. Memory is accessed by assembly that names
//! its state space, since a pointer that comes out of a parameter struct has lost its own. Assembly that reads memory
//! is `pure, readonly`: it may be moved and merged, though not over a store or a barrier.

mod arithmetic;
mod atomics;
mod clusters;
mod copies;
mod matrices;
mod mbarriers;
mod memory;
mod products;
mod special_registers;
mod synchronisation;
mod tensors;

pub use arithmetic::*;
pub use atomics::*;
pub use clusters::*;
pub use copies::*;
pub use matrices::*;
pub use mbarriers::*;
pub use memory::*;
pub use products::*;
pub use special_registers::*;
pub use synchronisation::*;
pub use tensors::*;

/// Kernels hold no panic (what is checked on their PTX); the crate that they make needs a handler all the same.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
