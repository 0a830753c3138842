//! The order of blocks. They start in it and run in parallel; what depends on their order happens in it: atomics on global
//! memory, and the search for races between blocks. So each run of a launch gives the same report.
use super::access::{noun, verb};
use super::arrivals::Heard;
use super::footprints::{BlockRival, Footprints};
use super::global_shadow::Footprint;
use super::launch::Context;
use super::memory::{self, Allocation};
use super::report::{Finding, FindingKind, Findings, Party};
use super::shadow::GRANULE;
use super::uninitialised::FirstRead;
use super::unit::Actor;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};

/// What is left of a block that has ended.
pub(super) struct Ended {
    pub findings: Vec<Finding>,
    pub footprint: Footprint,
    pub first_reads: Vec<FirstRead>,
    /// What its threads have heard of other blocks, which touches refer to.
    pub heard: Vec<Heard>,
}

/// The blocks of a launch that have ended.
#[derive(Default)]
pub(super) struct Order {
    folded: Mutex<Folded>,
    grown: Condvar,
}

#[derive(Default)]
struct Folded {
    /// All blocks before this one have ended, and are folded in here.
    blocks: u32,
    waiting: BTreeMap<u32, Ended>,
    findings: Findings,
    footprints: Footprints,
}

impl Order {
    /// Waits until all blocks before `block` have ended.
    ///
    /// Blocks start in order, and the first that has not ended waits for none: so this ends if they do.
    #[cold]
    pub fn wait_for_turn(&self, block: u32) {
        let mut folded = self.folded.lock().unwrap();
        while folded.blocks < block {
            folded = self.grown.wait(folded).unwrap();
        }
    }

    /// Block `number` has ended. Calls `progress` with how many have.
    pub fn end(&self, number: u32, ended: Ended, context: &Context, progress: impl Fn(u64)) {
        let mut folded = self.folded.lock().unwrap();
        folded.waiting.insert(number, ended);
        loop {
            let next = folded.blocks;
            let Some(ended) = folded.waiting.remove(&next) else { break };
            folded.fold(next, ended, context);
            folded.blocks += 1;
            progress(folded.blocks as u64);
        }
        self.grown.notify_all();
    }

    /// All blocks have ended: the findings.
    pub fn finish(&self, allocations: &[Arc<Allocation>]) -> Vec<Finding> {
        let mut folded = self.folded.lock().unwrap();
        folded.footprints.mark_written(allocations);
        folded.findings.take()
    }
}

impl Folded {
    fn fold(&mut self, block: u32, ended: Ended, context: &Context) {
        let Folded { findings, footprints, .. } = self;
        ended.findings.into_iter().for_each(|finding| findings.add(finding));
        for read in &ended.first_reads {
            if read.mask & !footprints.written(read.address / GRANULE as u64) != 0 {
                let message = || {
                    let place = memory::describe(read.address, &context.allocations);
                    format!("{} {place}, which nobody has written", verb(read.usage))
                };
                add(findings, context, FindingKind::Uninitialised, (block, read.actor), None, message);
            }
        }
        footprints.fold(
            block,
            ended.footprint,
            &ended.heard,
            |touch, BlockRival { block: other, actor, usage, mask }| {
                let message = || {
                    let address = touch.granule * GRANULE as u64 + 2 * mask.trailing_zeros() as u64;
                    let place = memory::describe(address, &context.allocations);
                    let (verb, noun) = (verb(touch.usage), noun(usage));
                    format!("{verb} {place}, and nothing orders it after the {noun} by another block")
                };
                add(findings, context, FindingKind::Race, (block, touch.actor), Some((other, actor)), message);
            },
        );
    }
}

fn add(
    findings: &mut Findings,
    context: &Context,
    kind: FindingKind,
    (block, actor): (u32, Actor),
    other: Option<(u32, Actor)>,
    message: impl FnOnce() -> String,
) {
    let Party { block, thread, location } = context.party(block, actor);
    let other = other.map(|(block, actor)| context.party(block, actor));
    findings.count((kind, location, other.map(|other| other.location)), 1, || {
        let kernel = context.kernel;
        Finding { kind, kernel, block, thread, location, other, message: message(), occurrences: 1 }
    });
}
