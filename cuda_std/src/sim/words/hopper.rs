//! Words of Hopper: mbarriers, fences, clusters, registers of warpgroups.
use super::super::block::{here, suspend, unless_stopped, with};
use super::super::mbarriers;
use super::super::rendezvous::{Word, meet};
use super::super::unit::Use;
use super::super::warpgroups::{self, GroupWord};

#[inline(always)]
#[track_caller]
pub(crate) fn mbarrier_init(address: u32, count: u32) {
    let site = here();
    unless_stopped(with(|block| block.init_mbarrier(address, count, site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn mbarrier_arrive(address: u32) {
    mbarrier_arrive_expect(address, 0);
}

#[inline(always)]
#[track_caller]
pub(crate) fn mbarrier_arrive_expect(address: u32, bytes: u32) {
    let site = here();
    unless_stopped(with(|block| block.arrive_at_mbarrier(address, bytes, site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn mbarrier_arrive_at(address: u32, rank: u32) {
    let site = here();
    unless_stopped(with(|block| block.arrive_at_mbarrier_of(rank, address, site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn mbarrier_wait(address: u32, parity: u32) {
    mbarriers::wait(address, parity, here());
}

#[inline(always)]
pub(crate) fn fence_mbarrier_init() {
    with(|block| block.show_mbarriers());
}

#[inline(always)]
pub(crate) fn fence_proxy_async() {
    with(|block| {
        if block.context.race_detector {
            block.clocks.fence(block.first_id() + block.current);
        }
    });
}

#[inline(always)]
pub(crate) fn cluster_rank() -> u32 {
    with(|block| block.rank)
}

#[inline(always)]
pub(crate) fn cluster_size() -> u32 {
    with(|block| block.context.cluster)
}

#[inline(always)]
#[track_caller]
pub(crate) fn cluster_arrive() {
    let site = here();
    unless_stopped(with(|block| block.arrive_at_cluster(site)));
}

#[inline(always)]
#[track_caller]
pub(crate) fn cluster_wait() {
    let site = here();
    while !unless_stopped(with(|block| block.poll_cluster(site))) {
        suspend();
    }
}

/// Where the rank is in an address of the cluster.
const RANK_SHIFT: u32 = 24;

#[inline(always)]
pub(crate) fn map_to_rank(address: u32, rank: u32) -> u32 {
    address | rank << RANK_SHIFT
}

#[inline(always)]
#[track_caller]
pub(crate) fn load_cluster(address: u32) -> u32 {
    use_cluster(address, Use::Read, |at| at)
}

#[inline(always)]
#[track_caller]
pub(crate) fn store_cluster(address: u32, x: u32) {
    use_cluster(address, Use::Write, |_| x);
}

/// Replaces a word in the shared memory of a block of the cluster by `update` of it; gives the old one.
#[track_caller]
fn use_cluster(address: u32, usage: Use, update: impl FnOnce(u32) -> u32) -> u32 {
    let site = here();
    unless_stopped(with(|block| {
        let (rank, address) = (address >> RANK_SHIFT, address & ((1 << RANK_SHIFT) - 1));
        let data = block.use_shared_of(rank, address, usage, site)?.cast::<u32>();
        // SAFETY: the word before has checked that four bytes lie there.
        let old = unsafe { data.read_unaligned() };
        // SAFETY: as above.
        unsafe { data.write_unaligned(update(old)) };
        Ok(old)
    }))
}

#[inline(always)]
pub(crate) fn launch_dependents() {}

#[inline(always)]
pub(crate) fn wait_for_prerequisites() {}

#[inline(always)]
#[track_caller]
pub(crate) fn set_max_registers<const COUNT: u32, const INCREASE: bool>() {
    let (word, site) = (GroupWord::SetMaxRegisters { count: COUNT as u16, increase: INCREASE }, here());
    warpgroups::meet(word, site, &mut (), |block, _| block.set_max_registers(COUNT, INCREASE, site));
}

#[inline(always)]
#[track_caller]
pub(crate) fn elect(members: u32) -> bool {
    let mut elected = false;
    meet(Word::Elect, members, here(), &mut elected, |_, meeting| {
        let leader = meeting.members.trailing_zeros() as usize;
        *meeting.operand(leader) = true;
        Ok(())
    });
    elected
}
