//! Faults of one block in global memory.
use crate::{Source, expect_clean, run_blocks};
use cuda_std::sim::{FindingKind, Memory};
use cuda_std::thread::{sync_threads, thread_idx_x};

const HERE: Source = Source(include_str!("global_memory.rs"));

#[test]
fn a_race_within_a_block() {
    let memory = Memory::new();
    let x = memory.allocate::<f32>("x", 64).global();
    let kernel = |right| {
        move || {
            let t = thread_idx_x() as usize;
            x.store(t, 1.0); // written by one
            if right {
                sync_threads();
            }
            if t >= 32 {
                x.load(t - 32); // read by another
            }
        }
    };
    let report = run_blocks(1, 64, &memory, kernel(false));
    HERE.expect(&report, FindingKind::Race, "read by another", Some("written by one"));
    assert!(report.findings[0].message.contains("x[0]"), "{}", report.findings[0]);
    assert_eq!(report.findings[0].occurrences, 32);
    expect_clean(&run_blocks(1, 64, &memory, kernel(true)));
}

#[test]
fn a_read_of_what_nobody_has_written() {
    let memory = Memory::new();
    let x = memory.allocate::<u16>("x", 64).global();
    let kernel = |right| {
        move || {
            let t = thread_idx_x() as usize;
            if right || t != 7 {
                x.store(t, 0);
            }
            sync_threads();
            if t < 8 {
                x.load_vector::<8>(8 * t); // eight at once
            }
        }
    };
    let report = run_blocks(1, 64, &memory, kernel(false));
    HERE.expect(&report, FindingKind::Uninitialised, "eight at once", None);
    expect_clean(&run_blocks(1, 64, &memory, kernel(true)));
}

#[test]
fn what_a_launch_has_written_the_next_may_read() {
    let memory = Memory::new();
    let x = memory.allocate::<f32>("x", 64).global();
    let write = move || x.store(thread_idx_x() as usize, 1.0);
    let read = move || {
        x.load(thread_idx_x() as usize); // in the next launch
    };
    HERE.expect(&run_blocks(1, 64, &memory, read), FindingKind::Uninitialised, "in the next launch", None);
    expect_clean(&run_blocks(1, 64, &memory, write));
    expect_clean(&run_blocks(1, 64, &memory, read));
}

#[test]
fn beyond_the_end() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0u32; 63]).global();
    let kernel = |len| {
        move || {
            if thread_idx_x() < len {
                x.store(thread_idx_x() as usize, 0); // element 63
            }
        }
    };
    let report = run_blocks(1, 64, &memory, kernel(64));
    HERE.expect(&report, FindingKind::OutOfBounds, "element 63", None);
    assert!(report.findings[0].message.contains("x[63]"), "{}", report.findings[0]);
    expect_clean(&run_blocks(1, 64, &memory, kernel(63)));
}

#[test]
fn before_the_beginning() {
    let memory = Memory::new();
    memory.upload("before", &[0u32; 64]);
    let x = memory.upload("x", &[0u32; 64]).global();
    let report = run_blocks(1, 1, &memory, move || {
        x.load(usize::MAX); // element -1
    });
    HERE.expect(&report, FindingKind::OutOfBounds, "element -1", None);
    assert!(report.findings[0].message.contains("x[-1]"), "{}", report.findings[0]);
}

#[test]
fn no_memory_at_all() {
    let report = run_blocks(1, 1, &Memory::new(), || {
        cuda_std::Global::<f32>::NULL.load(0); // null
    });
    HERE.expect(&report, FindingKind::OutOfBounds, "null", None);
}

#[test]
fn not_aligned() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0u32; 64]).global();
    let kernel = |first| {
        move || {
            x.load_vector::<2>(first); // eight bytes
        }
    };
    HERE.expect(&run_blocks(1, 1, &memory, kernel(3)), FindingKind::Misaligned, "eight bytes", None);
    expect_clean(&run_blocks(1, 1, &memory, kernel(4)));
}
