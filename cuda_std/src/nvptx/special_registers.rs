//! Where a thread is. PTX ISA: special registers.
use core::arch::{asm, nvptx};

macro_rules! special_registers {
    ($($name:ident: $intrinsic:ident;)*) => {$(
        #[inline(always)]
        pub fn $name() -> u32 {
            // SAFETY: reads a special register.
            unsafe { nvptx::$intrinsic() as u32 }
        }
    )*};
}

special_registers! {
    thread_idx_x: _thread_idx_x;
    thread_idx_y: _thread_idx_y;
    thread_idx_z: _thread_idx_z;
    block_idx_x: _block_idx_x;
    block_idx_y: _block_idx_y;
    block_idx_z: _block_idx_z;
    block_dim_x: _block_dim_x;
    block_dim_y: _block_dim_y;
    block_dim_z: _block_dim_z;
    grid_dim_x: _grid_dim_x;
    grid_dim_y: _grid_dim_y;
    grid_dim_z: _grid_dim_z;
}

#[inline(always)]
pub fn lane_id() -> u32 {
    let lane: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %laneid;", out(reg32) lane, options(pure, nomem, nostack)) };
    // SAFETY: a warp has 32 lanes. Knowing it, LLVM simplifies swizzles.
    unsafe { core::hint::assert_unchecked(lane < 32) };
    lane
}

#[inline(always)]
pub fn pause(cycles: u32) {
    let begin = clock();
    while clock().wrapping_sub(begin) < cycles {}
}

#[inline(always)]
fn clock() -> u32 {
    let clock: u32;
    // SAFETY: reads a special register, which is another number each time.
    unsafe { asm!("mov.u32 {0}, %clock;", out(reg32) clock, options(nomem, nostack)) };
    clock
}
