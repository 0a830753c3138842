//! What ends a block otherwise: spinning, panics, launches that cannot be.
use crate::{Source, expect_clean, run};
use cuda_std::atomic::{shared_cas_u32, shared_max_u32};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{FindingKind, Launch, Memory, Options, launch};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{ALL, any, sync_warp};

const HERE: Source = Source(include_str!("endings.rs"));

#[test]
fn a_lock_that_nobody_opens() {
    let kernel = |right| {
        move || {
            let (lock, t) = (dynamic_shared::<u32>(), thread_idx_x());
            if t == 0 {
                lock.store(0, 0);
            }
            sync_threads();
            while shared_cas_u32(lock, 0, 1) != 0 {} // spins
            if right {
                shared_cas_u32(lock, 1, 0);
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Deadlock, "spins", None);
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn a_plain_load_that_never_changes() {
    let kernel = |right| {
        move || {
            let (flag, t) = (dynamic_shared::<u32>(), thread_idx_x());
            flag.store(t, 0);
            sync_threads();
            if t == 0 && right {
                flag.store(0, 1);
            }
            if t == 0 {
                while flag.load(0) == 0 {} // spins on a load
            }
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Deadlock, "spins on a load", None);
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn a_warp_that_asks_for_ever() {
    let kernel = |right| {
        move || {
            let (flag, t) = (dynamic_shared::<u32>(), thread_idx_x());
            flag.store(t, right as u32);
            sync_threads();
            while !any(ALL, flag.load(t) == 1) {} // asks for ever
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Deadlock, "asks for ever", None);
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn atomics_that_change_nothing_are_no_spin() {
    expect_clean(&run(64, || {
        let maximum = dynamic_shared::<u32>();
        if thread_idx_x() == 0 {
            maximum.store(0, u32::MAX);
        }
        sync_threads();
        for _ in 0..20_000 {
            shared_max_u32(maximum, 1);
        }
    }));
}

#[test]
fn a_panic() {
    let kernel = |len: usize| {
        move || {
            let table = [0; 32];
            sync_warp(ALL);
            let i = thread_idx_x() as usize % len;
            std::hint::black_box(table[std::hint::black_box(i)]); // index out of bounds
        }
    };
    let report = run(64, kernel(64));
    HERE.expect(&report, FindingKind::Panic, "index out of bounds", None);
    assert_eq!(report.findings[0].thread, [32, 0, 0]);
    assert!(report.findings[0].message.contains("the index is 32"), "{}", report.findings[0]);
    expect_clean(&run(64, kernel(32)));
}

#[test]
fn what_a_stopped_thread_holds_is_dropped() {
    let held = std::sync::Arc::new(());
    let report = run(64, || {
        let mine = held.clone();
        sync_threads();
        assert!(thread_idx_x() != 3, "thread 3 fails");
        sync_threads();
        drop(mine);
    });
    assert_eq!(report.findings.len(), 1);
    assert_eq!(std::sync::Arc::strong_count(&held), 1);
}

#[test]
fn launches_that_cannot_be() {
    let fits = Launch { kernel: "large", grid: [1; 3], block: [1024, 1, 1], shared_bytes: 227 << 10 };
    let try_launch = |launch_of| launch(&launch_of, &Memory::new(), &Options::default(), || ());
    expect_clean(&try_launch(fits));
    for too_large in [
        Launch { block: [1025, 1, 1], ..fits },
        Launch { block: [0, 1, 1], ..fits },
        Launch { grid: [1, 0, 1], ..fits },
        Launch { shared_bytes: fits.shared_bytes + 1, ..fits },
    ] {
        let report = try_launch(too_large);
        assert_eq!(report.findings[0].kind, FindingKind::Launch);
        assert_eq!(report.counters.blocks, 0);
    }
}
