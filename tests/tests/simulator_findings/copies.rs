//! Asynchronous copies.
use crate::{Source, expect_clean, run_blocks};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{FindingKind, Memory};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::{Global, Shared, copy};

const HERE: Source = Source(include_str!("copies.rs"));

fn source(memory: &Memory) -> Global<u32> {
    memory.upload("x", &(0..1024).collect::<Vec<u32>>()).global()
}

fn words() -> Shared<u32> {
    dynamic_shared()
}

/// Each thread copies its 16 bytes.
#[track_caller]
fn copy_own(x: Global<u32>) {
    copy::copy_async(words().offset(4 * thread_idx_x()), x.offset(4 * thread_idx_x() as usize), true);
}

#[test]
fn read_before_the_wait() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            copy_own(x); // issued
            copy::commit();
            if right {
                copy::wait::<0>();
            }
            let seen = words().load(4 * t + 1); // too early
            assert_eq!(seen == 4 * t + 1, right, "the copy comes as late as it may");
            copy::wait::<0>();
        }
    };
    HERE.expect(&run_blocks(1, 32, &memory, kernel(false)), FindingKind::UnfinishedCopy, "too early", Some("issued"));
    expect_clean(&run_blocks(1, 32, &memory, kernel(true)));
}

#[test]
fn a_wait_for_too_few_groups() {
    let memory = Memory::new();
    let x = source(&memory);
    fn kernel<const PENDING: usize>(x: Global<u32>) {
        let t = thread_idx_x();
        copy_own(x);
        copy::commit();
        copy::copy_async(words().offset(512 + 4 * t), x.offset(4 * t as usize), true); // the second group
        copy::commit();
        copy::wait::<PENDING>();
        words().load(4 * t);
        words().load(512 + 4 * t); // the second group's data
        copy::wait::<0>();
    }
    let report = run_blocks(1, 32, &memory, || kernel::<1>(x));
    HERE.expect(&report, FindingKind::UnfinishedCopy, "the second group's data", Some("the second group"));
    expect_clean(&run_blocks(1, 32, &memory, || kernel::<0>(x)));
}

#[test]
fn read_by_another_thread() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            copy_own(x); // by its own thread
            copy::commit();
            copy::wait::<0>();
            if right {
                sync_threads();
            }
            if t >= 32 {
                words().load(4 * (t - 32)); // by another
            }
        }
    };
    let report = run_blocks(1, 64, &memory, kernel(false));
    HERE.expect(&report, FindingKind::Race, "by another", Some("by its own thread"));
    expect_clean(&run_blocks(1, 64, &memory, kernel(true)));
}

#[test]
fn a_barrier_instead_of_the_wait() {
    let memory = Memory::new();
    let x = source(&memory);
    let report = run_blocks(1, 64, &memory, move || {
        copy_own(x); // not waited for yet
        copy::commit();
        sync_threads();
        if thread_idx_x() < 32 {
            words().load(4 * (thread_idx_x() + 32)); // after a barrier only
        }
        copy::wait::<0>();
    });
    HERE.expect(&report, FindingKind::UnfinishedCopy, "after a barrier only", Some("not waited for yet"));
}

#[test]
fn the_next_stage_comes_too_early() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            copy_own(x);
            copy::commit();
            copy::wait::<0>();
            sync_threads();
            words().load_vector::<4>(4 * (63 - t)); // still read
            if right {
                sync_threads();
            }
            copy_own(x); // overwritten
            copy::commit();
            copy::wait::<0>();
        }
    };
    let report = run_blocks(1, 64, &memory, kernel(false));
    let overwrites = |f: &&cuda_std::sim::Finding| f.location.line() == HERE.line("overwritten");
    let finding = report.findings.iter().find(overwrites).expect("the copy is at fault");
    assert_eq!(finding.kind, FindingKind::Race);
    assert_eq!(finding.other.unwrap().location.line(), HERE.line("still read"));
    expect_clean(&run_blocks(1, 64, &memory, kernel(true)));
}

#[test]
fn never_waited_for() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |right| {
        move || {
            copy_own(x); // forgotten
            copy::commit();
            if right {
                copy::wait::<0>();
            }
        }
    };
    HERE.expect(&run_blocks(1, 32, &memory, kernel(false)), FindingKind::UnfinishedCopy, "forgotten", None);
    expect_clean(&run_blocks(1, 32, &memory, kernel(true)));
}

#[test]
fn the_source_changes_under_way() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |right| {
        move || {
            let t = thread_idx_x() as usize;
            copy_own(x); // from here
            copy::commit();
            if right {
                copy::wait::<0>();
                sync_threads();
            }
            if t >= 32 {
                x.store(4 * (t - 32), 0); // to there
            }
            copy::wait::<0>();
        }
    };
    HERE.expect(&run_blocks(1, 64, &memory, kernel(false)), FindingKind::Race, "to there", Some("from here"));
    expect_clean(&run_blocks(1, 64, &memory, kernel(true)));
}

#[test]
fn what_is_not_valid_is_not_read() {
    let memory = Memory::new();
    let x = source(&memory);
    let kernel = |valid| {
        move || {
            words().store_vector(0, [7; 4]);
            copy::copy_async(words(), x.offset(1024), valid); // beyond the end
            copy::commit();
            copy::wait::<0>();
            assert_eq!(words().load_vector::<4>(0), [0; 4]);
        }
    };
    HERE.expect(&run_blocks(1, 1, &memory, kernel(true)), FindingKind::OutOfBounds, "beyond the end", None);
    expect_clean(&run_blocks(1, 1, &memory, kernel(false)));
}
