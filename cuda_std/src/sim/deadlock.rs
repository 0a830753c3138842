//! What to say when no thread of a block can run and some have not exited, or when they run for nothing.
use super::WARP;
use super::block::Block;
use super::rendezvous::Lanes;
use super::report::FindingKind;
use super::scheduler::Waiting;
use super::site::Site;
use super::warpgroups::GROUP;

impl Block {
    /// Reports each group of threads that wait for the same at the same place.
    #[cold]
    pub fn report_deadlock(&mut self) {
        let mut groups: Vec<(Waiting, Site, Vec<usize>)> = Vec::new();
        for (number, thread) in self.threads.iter().enumerate() {
            if let (true, Some(site)) = (thread.waiting.is_stuck(), thread.site) {
                match groups.iter_mut().find(|group| group.0 == thread.waiting && group.1 == site) {
                    Some(group) => group.2.push(number),
                    None => groups.push((thread.waiting, site, vec![number])),
                }
            }
        }
        for (waiting, site, threads) in groups {
            self.report_stuck(waiting, site, &threads);
        }
    }

    /// Reports that the threads that can run wait for what nobody does.
    #[cold]
    pub fn report_spinning(&mut self) {
        self.stopped = true;
        let spins = |thread: &usize| self.threads[*thread].waiting == Waiting::Nothing;
        for thread in (0..self.threads.len()).filter(spins) {
            if let Some(site) = self.threads[thread].site {
                let message = "spins for a change that no thread makes; a block cannot wait for a later one".to_owned();
                return self.report_of(thread, FindingKind::Deadlock, site, None, message);
            }
        }
    }

    /// Threads wait for a phase that does not end.
    fn report_mbarrier(&mut self, address: u32, parity: u32, site: Site, threads: &[usize]) {
        let barrier = self.mbarriers.iter().find(|barrier| barrier.address == address);
        let state = barrier.map_or_else(String::new, |barrier| barrier.state());
        let message = format!(
            "{} for ever at the mbarrier at shared {address:#x} for the phase of parity {parity}: {state}",
            wait(threads)
        );
        self.report_of(threads[0], FindingKind::Deadlock, site, None, message);
    }

    fn report_stuck(&mut self, waiting: Waiting, site: Site, threads: &[usize]) {
        let first = threads[0];
        let (what, missing) = match waiting {
            Waiting::Barrier(id) => {
                let barrier = &self.barriers[id as usize];
                let (came, of) = (barrier.arrived.len(), barrier.threads);
                let missing: Vec<usize> =
                    (0..self.threads.len()).filter(|&t| !barrier.arrived.contains(&(t as u16))).collect();
                (format!("barrier {id}, to which {came} of {of} threads have come"), missing)
            }
            Waiting::Warp { word, members } => {
                let absent = members & !self.warps[first / WARP].arrived_with(first % WARP);
                let lanes = (0..WARP).filter(|lane| absent >> lane & 1 == 1);
                let missing: Vec<usize> = lanes.map(|lane| first / WARP * WARP + lane).collect();
                (format!("{word} of {}", Lanes(members)), missing)
            }
            Waiting::Warpgroup(word) => {
                let group = first / GROUP;
                let members = group * GROUP..(group + 1) * GROUP;
                let absent = members.filter(|&thread| !self.warpgroups[group].has_arrived(thread));
                (format!("{word} of its warpgroup"), absent.collect())
            }
            Waiting::Mbarrier { address, parity } => return self.report_mbarrier(address, parity, site, threads),
            Waiting::Cluster => {
                let message =
                    format!("{} for ever at the barrier of the cluster, to which not all come", wait(threads));
                return self.report_of(first, FindingKind::Deadlock, site, None, message);
            }
            Waiting::Nothing | Waiting::Exited => return,
        };
        let elsewhere = missing.iter().copied().find(|&t| self.threads[t].waiting != Waiting::Exited);
        let why = match elsewhere.map(|other| (other, self.threads[other].waiting)) {
            Some((other, Waiting::Barrier(id))) => format!("thread {other} waits at barrier {id}"),
            Some((other, Waiting::Warp { word, .. })) => format!("thread {other} waits at {word}"),
            Some((other, Waiting::Warpgroup(word))) => format!("thread {other} waits at {word}"),
            Some((other, Waiting::Mbarrier { address, .. })) => {
                format!("thread {other} waits at the mbarrier at shared {address:#x}")
            }
            Some((other, Waiting::Cluster)) => format!("thread {other} waits at the barrier of the cluster"),
            Some((_, Waiting::Nothing | Waiting::Exited)) | None => "all of them have exited".to_owned(),
        };
        let message = format!("{} for ever at {what}; missing: {}; {why}", wait(threads), Threads(&missing));
        let kind = match waiting {
            _ if elsewhere.is_some() => FindingKind::Deadlock,
            Waiting::Barrier(_) => FindingKind::Barrier,
            _ => FindingKind::Divergence,
        };
        let other = elsewhere.or(missing.first().copied());
        let other = other.and_then(|t| Some(self.party(t, self.threads[t].site?)));
        self.report_of(first, kind, site, other, message);
    }
}

impl Waiting {
    /// Whether a thread that waits like this when nobody can run does so for ever.
    fn is_stuck(self) -> bool {
        !matches!(self, Waiting::Nothing | Waiting::Exited)
    }
}

fn wait(threads: &[usize]) -> String {
    let verb = if threads.len() == 1 { "waits" } else { "wait" };
    format!("{} {verb}", Threads(threads))
}

/// Threads, by their numbers in the block, as a report calls them.
struct Threads<'a>(&'a [usize]);

impl std::fmt::Display for Threads<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            [] => write!(f, "no thread"),
            [one] => write!(f, "thread {one}"),
            [first, .., last] if last - first + 1 == self.0.len() => write!(f, "threads {first} to {last}"),
            [first, second, ..] => write!(f, "{} threads ({first}, {second}, ..)", self.0.len()),
        }
    }
}
