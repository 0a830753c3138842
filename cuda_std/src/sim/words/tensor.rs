//! The tensor copy engine.
use super::super::block::{Block, Stop, here, unless_stopped, with};
use super::super::report::FindingKind;
use super::super::site::Site;
use super::super::traffic::Way;
use super::super::transfers::Source;
use crate::tensor::{TensorMap, TensorMapDescription};

/// Where a map lies: among the parameters of the kernel that runs.
#[derive(Clone, Copy)]
pub struct MapAddress(*const TensorMap);

#[inline(always)]
pub(crate) fn map_address<P>(_parameters: &P, map: &TensorMap) -> MapAddress {
    MapAddress(map)
}

#[inline(always)]
pub(crate) fn prefetch_map(_: MapAddress) {}

#[inline(always)]
pub(crate) fn policy_evict_first() -> u64 {
    0
}

#[inline(always)]
pub(crate) fn policy_evict_last() -> u64 {
    0
}

/// The box of a map at some coordinates; a fault, if there is no such box.
fn find_box(block: &mut Block, map: MapAddress, rank: usize, at: [i32; 5], site: Site) -> Result<Source, Stop> {
    // SAFETY: a `TensorMapRef` borrows the map.
    let description = TensorMapDescription::of_simulated(unsafe { &*map.0 });
    let why = match &description {
        None => "a tensor map that was not made for the simulated GPU".to_owned(),
        Some(map) if map.rank != rank => format!("{rank} coordinates, for a tensor of {} dimensions", map.rank),
        Some(_) => String::new(),
    };
    match description {
        Some(map) if why.is_empty() => Ok(Source::Box { map, at }),
        _ => Err(block.fault(FindingKind::TensorCopy, site, None, why)),
    }
}

#[inline(always)]
#[track_caller]
pub(crate) fn tensor_load(
    to: u32,
    map: MapAddress,
    rank: usize,
    at: [i32; 5],
    barrier: u32,
    blocks: Option<u16>,
    _policy: Option<u64>,
) {
    let site = here();
    unless_stopped(with(|block| {
        let from = find_box(block, map, rank, at, site)?;
        block.begin_transfer(to, from, barrier, blocks.unwrap_or(1 << block.rank), site)
    }));
}

#[inline(always)]
#[track_caller]
pub(crate) fn tensor_store(map: MapAddress, rank: usize, at: [i32; 5], from: u32, _policy: Option<u64>) {
    let site = here();
    unless_stopped(with(|block| {
        let to = find_box(block, map, rank, at, site)?;
        block.begin_store(from, to, Way::Store, site)
    }));
}

#[inline(always)]
#[track_caller]
pub(crate) fn tensor_add(map: MapAddress, rank: usize, at: [i32; 5], from: u32) {
    let site = here();
    unless_stopped(with(|block| {
        let to = find_box(block, map, rank, at, site)?;
        block.begin_store(from, to, Way::Add, site)
    }));
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_load(to: u32, from: u64, bytes: u32, barrier: u32) {
    let site = here();
    unless_stopped(with(|block| {
        block.begin_transfer(to, Source::Stretch { address: from, bytes }, barrier, 1 << block.rank, site)
    }));
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_send(to: u32, from: u32, bytes: u32, barrier: u32, rank: u32) {
    let site = here();
    unless_stopped(with(|block| {
        block.begin_transfer(to, Source::Shared { rank: block.rank, address: from, bytes }, barrier, 1 << rank, site)
    }));
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_store(to: u64, from: u32, bytes: u32) {
    let site = here();
    unless_stopped(with(|block| block.begin_store(from, Source::Stretch { address: to, bytes }, Way::Store, site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_add(to: u64, from: u32, bytes: u32) {
    let site = here();
    unless_stopped(with(|block| block.begin_store(from, Source::Stretch { address: to, bytes }, Way::Add, site)));
}

/// Caches are not simulated.
#[inline(always)]
#[track_caller]
pub(crate) fn bulk_load_cached(to: u32, from: u64, bytes: u32, barrier: u32, _policy: u64) {
    bulk_load(to, from, bytes, barrier);
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_store_cached(to: u64, from: u32, bytes: u32, _policy: u64) {
    bulk_store(to, from, bytes);
}

#[inline(always)]
#[track_caller]
pub(crate) fn bulk_add_cached(to: u64, from: u32, bytes: u32, _policy: u64) {
    bulk_add(to, from, bytes);
}

#[inline(always)]
pub(crate) fn bulk_commit() {
    with(|block| block.threads[block.current].bulk.commit());
}

#[inline(always)]
pub(crate) fn bulk_wait_read<const PENDING: usize>() {
    unless_stopped(with(|block| block.read_bulk_groups(PENDING)));
}

#[inline(always)]
pub(crate) fn bulk_wait<const PENDING: usize>() {
    unless_stopped(with(|block| block.end_bulk_groups(PENDING)));
}
