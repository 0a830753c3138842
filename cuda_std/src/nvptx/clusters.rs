//! Clusters, dependent launches, and the registers of warpgroups. PTX ISA: `barrier.cluster`, `mapa`, `griddepcontrol`,
//! `setmaxnreg`, `elect.sync`.
use core::arch::asm;

// LLVM: llvm/include/llvm/IR/IntrinsicsNVVM.td. LLVM knows that these must not be moved into or out of branches.
unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cluster.arrive.aligned"]
    fn barrier_cluster_arrive();
    #[link_name = "llvm.nvvm.barrier.cluster.wait.aligned"]
    fn barrier_cluster_wait();
}

#[inline(always)]
pub fn cluster_arrive() {
    // SAFETY: a rendezvous of the threads of the cluster.
    unsafe { barrier_cluster_arrive() }
}

#[inline(always)]
pub fn cluster_wait() {
    // SAFETY: as above.
    unsafe { barrier_cluster_wait() }
}

#[inline(always)]
pub fn cluster_rank() -> u32 {
    let rank: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_ctarank;", out(reg32) rank, options(pure, nomem, nostack)) };
    rank
}

#[inline(always)]
pub fn cluster_size() -> u32 {
    let size: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %cluster_nctarank;", out(reg32) size, options(pure, nomem, nostack)) };
    size
}

#[inline(always)]
pub fn map_to_rank(address: u32, rank: u32) -> u32 {
    let there: u32;
    // SAFETY: computes an address.
    unsafe {
        asm!("mapa.shared::cluster.u32 {0}, {1}, {2};",
            out(reg32) there, in(reg32) address, in(reg32) rank, options(pure, nomem, nostack))
    };
    there
}

#[inline(always)]
pub fn load_cluster(address: u32) -> u32 {
    let x: u32;
    // SAFETY: the launch promised the memory (crate documentation).
    unsafe { asm!("ld.shared::cluster.b32 {0}, [{1}];", out(reg32) x, in(reg32) address, options(readonly, nostack)) };
    x
}

#[inline(always)]
pub fn store_cluster(address: u32, x: u32) {
    // SAFETY: as above.
    unsafe { asm!("st.shared::cluster.b32 [{0}], {1};", in(reg32) address, in(reg32) x, options(nostack)) }
}

#[inline(always)]
pub fn launch_dependents() {
    // SAFETY: orders launches.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}

#[inline(always)]
pub fn wait_for_prerequisites() {
    // SAFETY: orders launches.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

#[inline(always)]
pub fn set_max_registers<const COUNT: u32, const INCREASE: bool>() {
    // SAFETY: changes no register that is in use.
    unsafe {
        if INCREASE {
            asm!("setmaxnreg.inc.sync.aligned.u32 {0};", const COUNT, options(nostack))
        } else {
            asm!("setmaxnreg.dec.sync.aligned.u32 {0};", const COUNT, options(nostack))
        }
    }
}

/// Not `pure`: the warp says it together, so it must stay where it is.
#[inline(always)]
pub fn elect(members: u32) -> bool {
    let elected: u32;
    // SAFETY: a rendezvous of the members.
    unsafe {
        asm!("{{ .reg .pred p; elect.sync _|p, {1}; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) elected, in(reg32) members, options(nomem, nostack))
    };
    elected != 0
}
