//! The tensor copy engine. PTX ISA: `cp.async.bulk`, `cp.async.bulk.tensor`, `cp.reduce.async.bulk`.
use crate::tensor::TensorMap;
use core::arch::asm;

/// Where a map lies, as a generic address.
pub type MapAddress = u64;

/// `kernel_parameters` stands for the first parameter of the entry that this ends up in: `cuda_builder` puts its name
/// there, and aligns it. Rust's own reference to it would be one to a copy in local memory; of it only the distance is
/// used, a constant.
#[inline(always)]
pub fn map_address<P>(parameters: &P, map: &TensorMap) -> MapAddress {
    let offset = (&raw const *map as u64).wrapping_sub(&raw const *parameters as u64);
    let address: u64;
    // SAFETY: takes an address. The sum is made here, or LLVM would add up the three terms in another order. Not
    // `pure`: found where it is said, in a loop too, rather than kept in two registers.
    unsafe {
        asm!("{{ .reg .b64 parameters; mov.b64 parameters, kernel_parameters; cvta.param.u64 parameters, parameters;",
            "add.u64 {0}, parameters, {1}; }}",
            out(reg64) address, in(reg64) offset, options(nomem, nostack))
    };
    address
}

#[inline(always)]
pub fn prefetch_map(map: MapAddress) {
    // SAFETY: changes nothing.
    unsafe { asm!("prefetch.tensormap [{0}];", in(reg64) map, options(nostack)) }
}

macro_rules! policies {
    ($($name:ident: $ptx:literal;)*) => {$(
        #[inline(always)]
        pub fn $name() -> u64 {
            let policy: u64;
            // SAFETY: makes a number.
            unsafe { asm!(concat!($ptx, " {0}, 1.0;"), out(reg64) policy, options(pure, nomem, nostack)) };
            policy
        }
    )*};
}
policies! {
    policy_evict_first: "createpolicy.fractional.L2::evict_first.b64";
    policy_evict_last: "createpolicy.fractional.L2::evict_last.b64";
}

/// One instruction, with as many coordinates as the rank says.
macro_rules! of_rank {
    ($rank:expr, $at:ident, $say:ident!($($argument:tt)*)) => {
        match $rank {
            2 => $say!("2", "{{{0}, {1}}}", $at [0 1], $($argument)*),
            3 => $say!("3", "{{{0}, {1}, {2}}}", $at [0 1 2], $($argument)*),
            4 => $say!("4", "{{{0}, {1}, {2}, {3}}}", $at [0 1 2 3], $($argument)*),
            _ => $say!("5", "{{{0}, {1}, {2}, {3}, {4}}}", $at [0 1 2 3 4], $($argument)*),
        }
    };
}

macro_rules! load {
    ($rank:literal, $list:literal, $at:ident [$($i:literal)*], $to:ident, $map:ident, $barrier:ident, $kind:literal,
        $end:literal $(, $name:ident = $class:ident)*) => {
        // SAFETY: the launch promised the memory (crate documentation).
        unsafe {
            asm!(concat!("cp.async.bulk.tensor.", $rank, "d.shared::cluster.global.mbarrier::complete_tx::bytes", $kind,
                    " [{to}], [{map}, ", $list, "], [{barrier}]", $end, ";"),
                $(in(reg32) $at[$i],)* to = in(reg32) $to, map = in(reg64) $map, barrier = in(reg32) $barrier,
                $($name = in($class) $name,)* options(nostack))
        }
    };
}

#[inline(always)]
pub fn tensor_load(
    to: u32,
    map: MapAddress,
    rank: usize,
    at: [i32; 5],
    barrier: u32,
    blocks: Option<u16>,
    policy: Option<u64>,
) {
    match (blocks, policy) {
        (None, None) => of_rank!(rank, at, load!(to, map, barrier, "", "")),
        (None, Some(policy)) => {
            of_rank!(rank, at, load!(to, map, barrier, ".L2::cache_hint", ", {policy}", policy = reg64))
        }
        (Some(blocks), None) => {
            of_rank!(rank, at, load!(to, map, barrier, ".multicast::cluster", ", {blocks}", blocks = reg16))
        }
        (Some(blocks), Some(policy)) => of_rank!(
            rank,
            at,
            load!(
                to,
                map,
                barrier,
                ".multicast::cluster.L2::cache_hint",
                ", {blocks}, {policy}",
                blocks = reg16,
                policy = reg64
            )
        ),
    }
}

macro_rules! store {
    ($rank:literal, $list:literal, $at:ident [$($i:literal)*], $map:ident, $from:ident, $ptx:literal, $kind:literal,
        $end:literal $(, $name:ident = $class:ident)*) => {
        // SAFETY: as above.
        unsafe {
            asm!(concat!($ptx, $rank, "d.global.shared::cta", $kind, " [{map}, ", $list, "], [{from}]", $end, ";"),
                $(in(reg32) $at[$i],)* map = in(reg64) $map, from = in(reg32) $from,
                $($name = in($class) $name,)* options(nostack))
        }
    };
}

#[inline(always)]
pub fn tensor_store(map: MapAddress, rank: usize, at: [i32; 5], from: u32, policy: Option<u64>) {
    match policy {
        None => of_rank!(rank, at, store!(map, from, "cp.async.bulk.tensor.", ".bulk_group", "")),
        Some(policy) => of_rank!(
            rank,
            at,
            store!(map, from, "cp.async.bulk.tensor.", ".bulk_group.L2::cache_hint", ", {policy}", policy = reg64)
        ),
    }
}

#[inline(always)]
pub fn tensor_add(map: MapAddress, rank: usize, at: [i32; 5], from: u32) {
    of_rank!(rank, at, store!(map, from, "cp.reduce.async.bulk.tensor.", ".add.bulk_group", ""))
}

#[inline(always)]
pub fn bulk_load(to: u32, from: u64, bytes: u32, barrier: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}], {2}, [{3}];",
            in(reg32) to, in(reg64) from, in(reg32) bytes, in(reg32) barrier, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_load_cached(to: u32, from: u64, bytes: u32, barrier: u32, policy: u64) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}], {2}, [{3}], {4};",
            in(reg32) to, in(reg64) from, in(reg32) bytes, in(reg32) barrier, in(reg64) policy, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_send(to: u32, from: u32, bytes: u32, barrier: u32, rank: u32) {
    // SAFETY: as above, in another block of the cluster.
    unsafe {
        asm!("{{ .reg .b32 there, told; mapa.shared::cluster.u32 there, {0}, {4}; mapa.shared::cluster.u32 told, {3}, {4};",
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [{1}], {2}, [told]; }}",
            in(reg32) to, in(reg32) from, in(reg32) bytes, in(reg32) barrier, in(reg32) rank, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_store(to: u64, from: u32, bytes: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.async.bulk.global.shared::cta.bulk_group [{0}], [{1}], {2};",
            in(reg64) to, in(reg32) from, in(reg32) bytes, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_store_cached(to: u64, from: u32, bytes: u32, policy: u64) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [{0}], [{1}], {2}, {3};",
            in(reg64) to, in(reg32) from, in(reg32) bytes, in(reg64) policy, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_add(to: u64, from: u32, bytes: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{0}], [{1}], {2};",
            in(reg64) to, in(reg32) from, in(reg32) bytes, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_add_cached(to: u64, from: u32, bytes: u32, policy: u64) {
    // SAFETY: as above.
    unsafe {
        asm!("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [{0}], [{1}], {2}, {3};",
            in(reg64) to, in(reg32) from, in(reg32) bytes, in(reg64) policy, options(nostack))
    }
}

#[inline(always)]
pub fn bulk_commit() {
    // SAFETY: orders copies.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

#[inline(always)]
pub fn bulk_wait_read<const PENDING: usize>() {
    // SAFETY: orders copies.
    unsafe { asm!("cp.async.bulk.wait_group.read {0};", const PENDING, options(nostack)) }
}

#[inline(always)]
pub fn bulk_wait<const PENDING: usize>() {
    // SAFETY: orders copies.
    unsafe { asm!("cp.async.bulk.wait_group {0};", const PENDING, options(nostack)) }
}
