//! Atomics. One that changes nothing may be a poll: then the other threads get their turn. And the counters of blocks.
use super::super::block::{here, unless_stopped, with};
use super::super::scheduler::count_poll;

macro_rules! atomic_words {
    ($($global:ident, $shared:ident($($x:ident: $t:ty),*) -> $result:ty: |$old:ident| $new:expr, $polls:literal;)*) => {$(
        #[inline(always)]
        #[track_caller]
        pub(crate) fn $global(address: u64, $($x: $t),*) -> $result {
            let site = here();
            let update = |$old: u32| $new;
            let (old, changed) = unless_stopped(with(|block| block.update_global(address, update, site)));
            if $polls && !changed {
                count_poll(site);
            }
            <$result>::from_ne_bytes(old.to_ne_bytes())
        }

        #[inline(always)]
        #[track_caller]
        pub(crate) fn $shared(address: u32, $($x: $t),*) -> $result {
            let site = here();
            let update = |$old: u32| $new;
            let (old, changed) = unless_stopped(with(|block| block.update_shared(address, update, site)));
            if $polls && !changed {
                count_poll(site);
            }
            <$result>::from_ne_bytes(old.to_ne_bytes())
        }
    )*};
}

atomic_words! {
    global_add_u32, shared_add_u32(x: u32) -> u32: |old| old.wrapping_add(x), true;
    global_add_f32, shared_add_f32(x: f32) -> f32: |old| (f32::from_bits(old) + x).to_bits(), false;
    global_max_u32, shared_max_u32(x: u32) -> u32: |old| old.max(x), false;
    global_inc_u32, shared_inc_u32(x: u32) -> u32: |old| if old >= x { 0 } else { old + 1 }, false;
    global_cas_u32, shared_cas_u32(expected: u32, new: u32) -> u32: |old| if old == expected { new } else { old }, true;
}

#[inline(always)]
#[track_caller]
pub(crate) fn arrive_in_grid(address: u64) {
    let site = here();
    unless_stopped(with(|block| block.arrive_in_grid(address, site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn wait_in_grid(address: u64, count: u32) {
    let site = here();
    while !unless_stopped(with(|block| block.poll_in_grid(address, count, site))) {
        count_poll(site);
    }
}

/// No more have arrived than must have.
#[inline(always)]
#[track_caller]
pub(crate) fn wait_in_grid_for_all(address: u64, count: u32) -> u32 {
    wait_in_grid(address, count);
    count
}
