//! Asynchronous copies.
use super::super::block::{here, unless_stopped, with};

#[inline(always)]
#[track_caller]
pub(crate) fn copy_async_16(to: u32, from: u64, valid: bool) {
    let site = here();
    unless_stopped(with(|block| block.begin_copy(to, valid.then_some(from), site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn copy_async_commit() {
    with(|block| block.threads[block.current].copies.commit());
}

#[inline(always)]
#[track_caller]
pub(crate) fn copy_async_wait<const PENDING: usize>() {
    unless_stopped(with(|block| block.wait_for_copies(PENDING)));
}
