//! Barriers, shuffles and votes. PTX ISA: `bar`, `bar.warp.sync`, `shfl.sync`, `vote.sync`.

// LLVM: llvm/include/llvm/IR/IntrinsicsNVVM.td
unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_all(id: u32);
    #[link_name = "llvm.nvvm.barrier.cta.red.or.aligned.all"]
    fn barrier_or(id: u32, predicate: bool) -> bool;
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    fn barrier_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.barrier.cta.arrive.aligned.count"]
    fn arrive_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn warp_sync(members: u32);
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shfl_bfly(members: u32, x: u32, lane_mask: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_idx(members: u32, x: u32, source: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
    fn shfl_up(members: u32, x: u32, delta: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shfl_down(members: u32, x: u32, delta: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn vote_ballot(members: u32, predicate: bool) -> u32;
    #[link_name = "llvm.nvvm.vote.any.sync"]
    fn vote_any(members: u32, predicate: bool) -> bool;
    #[link_name = "llvm.nvvm.vote.all.sync"]
    fn vote_all(members: u32, predicate: bool) -> bool;
}

macro_rules! words {
    ($($name:ident($($x:ident: $t:ty),*) $(-> $r:ty)? = $intrinsic:ident($($argument:expr),*);)*) => {$(
        #[inline(always)]
        pub fn $name($($x: $t),*) $(-> $r)? {
            // SAFETY: a rendezvous of the threads that take part; the simulator checks that these do.
            unsafe { $intrinsic($($argument),*) }
        }
    )*};
}

words! {
    sync_threads() = barrier_all(0);
    sync_threads_or(predicate: bool) -> bool = barrier_or(0, predicate);
    barrier_sync(id: u32, threads: u32) = barrier_count(id, threads);
    barrier_arrive(id: u32, threads: u32) = arrive_count(id, threads);
    sync_warp(members: u32) = warp_sync(members);
    shuffle_xor(members: u32, x: u32, lane_mask: u32) -> u32 = shfl_bfly(members, x, lane_mask, 31);
    shuffle(members: u32, x: u32, source: u32) -> u32 = shfl_idx(members, x, source, 31);
    shuffle_quad(members: u32, x: u32, source: u32) -> u32 = shfl_idx(members, x, source, 0x1c1f);
    shuffle_up(members: u32, x: u32, delta: u32) -> u32 = shfl_up(members, x, delta, 0);
    shuffle_down(members: u32, x: u32, delta: u32) -> u32 = shfl_down(members, x, delta, 31);
    ballot(members: u32, predicate: bool) -> u32 = vote_ballot(members, predicate);
    any(members: u32, predicate: bool) -> bool = vote_any(members, predicate);
    all(members: u32, predicate: bool) -> bool = vote_all(members, predicate);
}
