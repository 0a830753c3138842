//! Barriers of a block.
use crate::{Source, expect_clean, run};
use cuda_std::barrier::NamedBarrier;
use cuda_std::sim::FindingKind;
use cuda_std::thread::{sync_threads, thread_idx_x};

const HERE: Source = Source(include_str!("barriers.rs"));

#[test]
fn not_reached_by_all() {
    let kernel = |right| {
        move || {
            if right || thread_idx_x() != 5 {
                sync_threads(); // without thread 5
            }
        }
    };
    let report = run(64, kernel(false));
    HERE.expect(&report, FindingKind::Barrier, "without thread 5", None);
    assert!(report.findings[0].message.contains("thread 5"), "{}", report.findings[0]);
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn at_two_places_of_one_warp() {
    let kernel = |first_of_second| {
        move || {
            if thread_idx_x() < first_of_second {
                sync_threads(); // some lanes
            } else {
                sync_threads(); // the other lanes
            }
        }
    };
    HERE.expect(&run(64, kernel(16)), FindingKind::Divergence, "the other lanes", Some("some lanes"));
    expect_clean(&run(64, kernel(32)));
}

#[test]
fn of_two_sizes() {
    let kernel = |right| {
        move || {
            if right || thread_idx_x() < 32 {
                NamedBarrier::<1, 64>.sync(); // of 64
            } else {
                NamedBarrier::<1, 96>.sync(); // of 96
            }
        }
    };
    let report = run(96, move || {
        if thread_idx_x() < 64 {
            kernel(false)()
        }
    });
    HERE.expect(&report, FindingKind::Barrier, "of 96", Some("of 64"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn larger_than_the_block() {
    let report = run(64, || {
        NamedBarrier::<1, 96>.sync(); // of a larger block
    });
    HERE.expect(&report, FindingKind::Barrier, "of a larger block", None);
}

#[test]
fn a_part_of_a_warp() {
    let kernel = |size| {
        move || {
            if thread_idx_x() % 32 < size {
                NamedBarrier::<1, 32>.sync(); // half of each
            }
        }
    };
    HERE.expect(&run(64, kernel(16)), FindingKind::Barrier, "half of each", None);
    expect_clean(&run(32, kernel(32)));
}

#[test]
fn arrives_twice() {
    let kernel = |right| {
        move || {
            let (full, empty) = (NamedBarrier::<1, 64>, NamedBarrier::<2, 64>);
            for _ in 0..2 {
                if thread_idx_x() < 32 {
                    full.arrive(); // again
                    if right {
                        empty.sync();
                    }
                } else {
                    full.sync();
                    if right {
                        empty.arrive();
                    }
                }
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Barrier, "again", Some("again"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn each_waits_for_the_other() {
    let kernel = |right| {
        move || {
            let (a, b) = (NamedBarrier::<1, 64>, NamedBarrier::<2, 64>);
            if right || thread_idx_x() < 32 {
                a.sync(); // first a
                b.sync();
            } else {
                b.sync(); // first b
                a.sync();
            }
        }
    };
    let report = run(64, kernel(false));
    assert_eq!(report.findings.len(), 2);
    let lines = |i: usize| {
        let finding = &report.findings[i];
        assert_eq!(finding.kind, FindingKind::Deadlock, "{finding}");
        (finding.location.line(), finding.other.unwrap().location.line())
    };
    let (a, b) = (HERE.line("first a"), HERE.line("first b"));
    assert_eq!((lines(0), lines(1)), ((a, b), (b, a)));
    expect_clean(&run(64, kernel(true)));
}
