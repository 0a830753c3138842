//! Barriers, shuffles and votes.
use super::super::WARP;
use super::super::barriers::{barrier, block_barrier, block_vote};
use super::super::block::{Block, Stop, here};
use super::super::rendezvous::{Lanes, Meeting, Word, meet};
use super::super::report::FindingKind;
use super::super::site::Site;

#[inline(always)]
#[track_caller]
pub(crate) fn sync_threads() {
    block_barrier(here());
}

#[inline(always)]
#[track_caller]
pub(crate) fn sync_threads_or(predicate: bool) -> bool {
    block_vote(predicate, here())
}

#[inline(always)]
#[track_caller]
pub(crate) fn barrier_sync(id: u32, threads: u32) {
    barrier(id, threads, true, here());
}

#[inline(always)]
#[track_caller]
pub(crate) fn barrier_arrive(id: u32, threads: u32) {
    barrier(id, threads, false, here());
}

#[inline(always)]
#[track_caller]
pub(crate) fn sync_warp(members: u32) {
    meet(Word::SyncWarp, members, here(), &mut (), |block, meeting| {
        if block.context.race_detector {
            block.clocks.join_warp(block.first_id() + meeting.first_thread, members);
        }
        Ok(())
    });
}

/// What a lane brings to a shuffle, and takes from it.
struct Shuffled {
    x: u32,
    argument: u32,
    result: u32,
}

#[inline(always)]
fn shuffle_word(
    word: Word,
    members: u32,
    x: u32,
    argument: u32,
    site: Site,
    source: impl Fn(usize, usize) -> usize,
) -> u32 {
    let mut operand = Shuffled { x, argument, result: 0 };
    meet(word, members, site, &mut operand, |block, meeting| {
        let mut values = [0; WARP];
        for lane in meeting.lanes() {
            values[lane] = meeting.operand(lane).x;
        }
        for lane in meeting.lanes() {
            let operand = meeting.operand(lane);
            let source = source(lane, operand.argument as usize);
            operand.result = values[source];
            if members >> source & 1 == 0 {
                return Err(reads_no_member(block, meeting, lane, source, site));
            }
        }
        Ok(())
    });
    operand.result
}

#[cold]
#[inline(never)]
fn reads_no_member(block: &mut Block, meeting: &Meeting<Shuffled>, lane: usize, source: usize, site: Site) -> Stop {
    let message = format!("lane {lane} shuffles from lane {source}, but only {} take part", Lanes(meeting.members));
    block.report_of(meeting.first_thread + lane, FindingKind::Divergence, site, None, message);
    Stop
}

#[inline(always)]
#[track_caller]
pub(crate) fn shuffle_xor(members: u32, x: u32, lane_mask: u32) -> u32 {
    shuffle_word(Word::ShuffleXor, members, x, lane_mask, here(), |lane, mask| (lane ^ mask) % WARP)
}

#[inline(always)]
#[track_caller]
pub(crate) fn shuffle(members: u32, x: u32, source: u32) -> u32 {
    shuffle_word(Word::Shuffle, members, x, source, here(), |_, source| source % WARP)
}

#[inline(always)]
#[track_caller]
pub(crate) fn shuffle_quad(members: u32, x: u32, source: u32) -> u32 {
    shuffle_word(Word::ShuffleQuad, members, x, source, here(), |lane, source| lane / 4 * 4 + source % 4)
}

#[inline(always)]
#[track_caller]
pub(crate) fn shuffle_up(members: u32, x: u32, delta: u32) -> u32 {
    shuffle_word(Word::ShuffleUp, members, x, delta, here(), |lane, delta| lane.checked_sub(delta).unwrap_or(lane))
}

#[inline(always)]
#[track_caller]
pub(crate) fn shuffle_down(members: u32, x: u32, delta: u32) -> u32 {
    let source = |lane, delta| if lane + delta < WARP { lane + delta } else { lane };
    shuffle_word(Word::ShuffleDown, members, x, delta, here(), source)
}

/// What a lane brings to a vote, and takes from it.
struct Vote {
    predicate: bool,
    ballot: u32,
}

#[inline(always)]
fn vote(word: Word, members: u32, predicate: bool, site: Site) -> u32 {
    let mut operand = Vote { predicate, ballot: 0 };
    meet(word, members, site, &mut operand, |_, meeting| {
        let ballot = meeting.lanes().fold(0, |votes, lane| votes | (meeting.operand(lane).predicate as u32) << lane);
        meeting.lanes().for_each(|lane| meeting.operand(lane).ballot = ballot);
        Ok(())
    });
    operand.ballot
}

#[inline(always)]
#[track_caller]
pub(crate) fn ballot(members: u32, predicate: bool) -> u32 {
    vote(Word::Ballot, members, predicate, here())
}

#[inline(always)]
#[track_caller]
pub(crate) fn any(members: u32, predicate: bool) -> bool {
    vote(Word::Any, members, predicate, here()) != 0
}

#[inline(always)]
#[track_caller]
pub(crate) fn all(members: u32, predicate: bool) -> bool {
    vote(Word::All, members, predicate, here()) == members
}
