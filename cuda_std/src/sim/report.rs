//! What a launch has to say.
use super::Counters;
use std::collections::HashMap;
use std::fmt;
use std::panic::Location;

/// What came of a launch.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What is wrong with the kernel, by block and then by time: nothing, for a correct one.
    pub findings: Vec<Finding>,
    /// What was moved and computed.
    pub counters: Counters,
}

/// A fault of a kernel.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What kind of fault it is.
    pub kind: FindingKind,
    /// The kernel, as the launch names it.
    pub kernel: &'static str,
    /// The block it was first found in.
    pub block: [u32; 3],
    /// The thread it was first found in.
    pub thread: [u32; 3],
    /// What this thread was at.
    pub location: &'static Location<'static>,
    /// The other thread, where a fault has two.
    pub other: Option<Party>,
    /// What happened.
    pub message: String,
    /// How often it was found at the same place, or pair of places.
    pub occurrences: u64,
}

/// The other side of a fault between two threads.
#[derive(Clone, Copy, Debug)]
pub struct Party {
    /// Its block.
    pub block: [u32; 3],
    /// Its thread.
    pub thread: [u32; 3],
    /// What it was, or had been, at.
    pub location: &'static Location<'static>,
}

/// The kinds of faults that the simulated GPU finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// Two threads access the same bytes, one of them writes, and nothing orders them.
    Race,
    /// Memory is read that nobody has written.
    Uninitialised,
    /// The destination of an asynchronous copy is used before its wait, or the copy is never waited for.
    UnfinishedCopy,
    /// The async proxy reads what a thread has written, or writes over it, without a fence in between.
    ProxyFence,
    /// A copy of a tensor that no tensor map, place in shared memory or place in global memory allows. It ends the
    /// block.
    TensorCopy,
    /// An access outside of every allocation. It ends the block.
    OutOfBounds,
    /// An address that is no multiple of the access's size. It ends the block.
    Misaligned,
    /// The lanes of a warp do not meet at a word that they must say together. It ends the block.
    Divergence,
    /// A barrier with a wrong number of threads, or that some threads never reach. It ends the block.
    Barrier,
    /// No thread can go on, or the threads spin for what never comes. It ends the block.
    Deadlock,
    /// The kernel panicked. It ends the block.
    Panic,
    /// No GPU can make this launch: too many threads, or too much shared memory.
    Launch,
}

impl FindingKind {
    /// Its name in a report.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::Race => "race",
            FindingKind::Uninitialised => "uninitialised read",
            FindingKind::UnfinishedCopy => "unfinished copy",
            FindingKind::ProxyFence => "missing proxy fence",
            FindingKind::TensorCopy => "impossible tensor copy",
            FindingKind::OutOfBounds => "out of bounds",
            FindingKind::Misaligned => "misaligned access",
            FindingKind::Divergence => "divergence",
            FindingKind::Barrier => "incomplete barrier",
            FindingKind::Deadlock => "deadlock",
            FindingKind::Panic => "panic",
            FindingKind::Launch => "impossible launch",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { kind, kernel, block, thread, location, other, message, occurrences } = self;
        write!(f, "{}: {kernel}, block {}, thread {}", kind.name(), Index(*block), Index(*thread))?;
        write!(f, " at {location}: {message}")?;
        if let Some(Party { block, thread, location }) = other {
            write!(f, "\n    the other: block {}, thread {} at {location}", Index(*block), Index(*thread))?;
        }
        if *occurrences > 1 {
            write!(f, " ({occurrences} times)")?;
        }
        Ok(())
    }
}

/// An index of up to three dimensions.
struct Index([u32; 3]);

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [x, 0, 0] => write!(f, "{x}"),
            [x, y, z] => write!(f, "({x}, {y}, {z})"),
        }
    }
}

/// Findings without repetition: those of the same kind at the same places are one.
#[derive(Default)]
pub(super) struct Findings {
    list: Vec<Finding>,
    known: HashMap<Key, usize>,
}

pub(super) type Key = (FindingKind, &'static Location<'static>, Option<&'static Location<'static>>);

/// More than these help nobody.
const MOST_FINDINGS: usize = 100;

impl Findings {
    /// Adds one, or counts it to one that is known.
    pub fn add(&mut self, finding: Finding) {
        let key = (finding.kind, finding.location, finding.other.map(|other| other.location));
        self.count(key, finding.occurrences, || finding);
    }

    /// Counts `occurrences` of a finding, which is made only if none is known at the same places.
    pub fn count(&mut self, key: Key, occurrences: u64, finding: impl FnOnce() -> Finding) {
        if let Some(&known) = self.known.get(&key) {
            self.list[known].occurrences += occurrences;
        } else if self.list.len() < MOST_FINDINGS {
            self.known.insert(key, self.list.len());
            self.list.push(finding());
        }
    }

    /// All of them, which are no longer here.
    pub fn take(&mut self) -> Vec<Finding> {
        self.known.clear();
        std::mem::take(&mut self.list)
    }
}
