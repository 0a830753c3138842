//! Words that the 128 threads of a warpgroup say together: the last to come does the work for all.
use super::block::{Block, Stop, suspend, unless_stopped, with};
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;
use std::fmt;

/// Threads of a warpgroup.
pub(super) const GROUP: usize = 128;

/// A word that warpgroups say together, with all that must be equal for their threads to meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum GroupWord {
    Product { columns: u16, depth: u16, bf16: bool },
    SetMaxRegisters { count: u16, increase: bool },
}

impl fmt::Display for GroupWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupWord::Product { .. } => f.write_str("wgmma"),
            GroupWord::SetMaxRegisters { count, increase: true } => write!(f, "claim_registers::<{count}>"),
            GroupWord::SetMaxRegisters { count, increase: false } => write!(f, "release_registers::<{count}>"),
        }
    }
}

/// The rendezvous of a warpgroup.
pub(super) struct Warpgroup {
    /// A bit a lane, a word a warp: who waits in `word`.
    arrived: [u32; 4],
    count: usize,
    word: Option<(GroupWord, Site)>,
    operands: [*mut (); GROUP],
    /// What it has set its registers to.
    pub registers: u32,
}

impl Warpgroup {
    /// Those of a block.
    pub fn all_of(threads: usize) -> Vec<Self> {
        let new = |_| Warpgroup {
            arrived: [0; 4],
            count: 0,
            word: None,
            operands: [std::ptr::null_mut(); GROUP],
            registers: 0,
        };
        (0..threads / GROUP).map(new).collect()
    }

    pub fn reset(&mut self) {
        (self.arrived, self.count, self.word, self.registers) = ([0; 4], 0, None, 0);
    }

    pub fn has_arrived(&self, thread: usize) -> bool {
        let index = thread % GROUP;
        self.arrived[index / 32] >> (index % 32) & 1 == 1
    }
}

/// All threads of a warpgroup, and what each has brought.
pub(super) struct GroupMeeting<T> {
    pub first_thread: usize,
    operands: [*mut T; GROUP],
}

impl<T> GroupMeeting<T> {
    /// What a thread has brought, and where it expects its result.
    pub fn operand(&mut self, thread: usize) -> &mut T {
        // SAFETY: the operand is on the stack of a thread that waits in `meet`, or of the one that runs this; the word
        // that they have in common says its type. The thread does not touch it before `meet` ends.
        unsafe { &mut *self.operands[thread] }
    }
}

/// The running thread says `word` together with its warpgroup, at the same place. The last to come calls `finish` for
/// all.
///
/// `T` must be the same wherever `word` is.
pub(super) fn meet<T>(
    word: GroupWord,
    site: Site,
    operand: &mut T,
    finish: impl FnOnce(&mut Block, &mut GroupMeeting<T>) -> Result<(), Stop>,
) {
    let operand: *mut T = operand;
    unless_stopped(with(|block| {
        let group = block.current / GROUP;
        if !block.arrive_at_warpgroup(group, word, site, operand.cast())? {
            return Ok(());
        }
        let operands = block.warpgroups[group].operands.map(|operand| operand.cast());
        finish(block, &mut GroupMeeting { first_thread: group * GROUP, operands })?;
        let warpgroup = &mut block.warpgroups[group];
        (warpgroup.arrived, warpgroup.count, warpgroup.word) = ([0; 4], 0, None);
        for thread in group * GROUP..(group + 1) * GROUP {
            block.wake(thread);
        }
        for warp in 4 * group..4 * group + 4 {
            block.traffic.settle(warp);
        }
        Ok(())
    }));
    suspend();
}

impl Block {
    /// Whether the running thread is the last.
    fn arrive_at_warpgroup(
        &mut self,
        group: usize,
        word: GroupWord,
        site: Site,
        operand: *mut (),
    ) -> Result<bool, Stop> {
        let thread = self.current;
        let Some(warpgroup) = self.warpgroups.get_mut(group) else {
            let message = format!("{word}, but the block has no four warps for it from thread {} on", group * GROUP);
            return Err(self.fault(FindingKind::Divergence, site, None, message));
        };
        if warpgroup.word.is_some_and(|said| said != (word, site)) {
            return Err(self.warpgroup_diverges(group, word, site));
        }
        let index = thread % GROUP;
        warpgroup.word = Some((word, site));
        warpgroup.arrived[index / 32] |= 1 << (index % 32);
        warpgroup.operands[index] = operand;
        warpgroup.count += 1;
        let is_last = warpgroup.count == GROUP;
        self.wait(Waiting::Warpgroup(word), site);
        if !is_last && self.has_left(group) {
            return Err(self.warpgroup_is_torn(group));
        }
        Ok(is_last)
    }

    fn has_left(&self, group: usize) -> bool {
        (4 * group..4 * group + 4).any(|warp| self.warps[warp].exited != 0)
    }

    #[cold]
    fn warpgroup_diverges(&mut self, group: usize, word: GroupWord, site: Site) -> Stop {
        let mut threads = group * GROUP..(group + 1) * GROUP;
        let other = threads.find(|&thread| self.warpgroups[group].has_arrived(thread)).expect("one has said the other");
        let said = self.warpgroups[group].word.map_or(word, |(said, _)| said);
        let there = if said == word { "that, at another place".to_owned() } else { said.to_string() };
        let message = format!("the warpgroup diverges: {word} here, but thread {other} waits at {there}");
        let other = self.threads[other].site.map(|site| self.party(other, site));
        self.fault(FindingKind::Divergence, site, other, message)
    }

    /// Threads of a warpgroup wait for one that has exited.
    #[cold]
    fn warpgroup_is_torn(&mut self, group: usize) -> Stop {
        let threads = group * GROUP..(group + 1) * GROUP;
        let waiting = threads.clone().find(|&thread| self.warpgroups[group].has_arrived(thread)).expect("one waits");
        let gone =
            threads.clone().find(|&thread| self.threads[thread].waiting == Waiting::Exited).expect("one is gone");
        let (word, site) = self.warpgroups[group].word.expect("one waits");
        let message =
            format!("{word} of threads {} to {}, but thread {gone} has exited", threads.start, threads.end - 1);
        let other = self.threads[gone].site.map(|site| self.party(gone, site));
        self.report_of(waiting, FindingKind::Divergence, site, other, message);
        Stop
    }

    /// The running thread has exited: nobody may wait for it.
    pub fn leave_warpgroup(&mut self) {
        let group = self.current / GROUP;
        if self.warpgroups.get(group).is_some_and(|warpgroup| warpgroup.count > 0) {
            let Stop = self.warpgroup_is_torn(group);
            self.stopped = true;
        }
    }

    /// The running thread's warpgroup changes its registers.
    pub fn set_max_registers(&mut self, count: u32, increase: bool, site: Site) -> Result<(), Stop> {
        let group = self.current / GROUP;
        self.warpgroups[group].registers = count;
        let all: u32 = self.warpgroups.iter().map(|warpgroup| warpgroup.registers).sum();
        if increase && all > MOST_REGISTERS {
            let message = format!(
                "asks for {count} registers a thread, where a multiprocessor has {MOST_REGISTERS} for all warpgroups, \
                 which now ask for {all}"
            );
            return Err(self.fault(FindingKind::Deadlock, site, None, message));
        }
        Ok(())
    }
}

/// Registers of a multiprocessor by the threads of a warpgroup: 65536 / 128.
const MOST_REGISTERS: u32 = 512;
