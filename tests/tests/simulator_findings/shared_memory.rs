//! Races in shared memory, reads of what nobody has written, addresses that are none.
use crate::{Source, expect_clean, run};
use cuda_std::barrier::NamedBarrier;
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::FindingKind;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{ALL, shuffle_xor, sync_warp};
use cuda_std::{Shared, atomic, matrix, shared_array};

const HERE: Source = Source(include_str!("shared_memory.rs"));

fn words() -> Shared<u32> {
    dynamic_shared()
}

#[test]
fn write_then_read() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            words().store(63 - t, 0);
            sync_threads();
            words().store(t, t); // the write that is read
            if right {
                sync_threads();
            }
            if t >= 32 {
                words().load(t - 32); // the read after it
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "the read after it", Some("the write that is read"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn read_then_write() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            words().store(t, t);
            sync_threads();
            words().load(t ^ 1); // the read before
            if right {
                sync_threads();
            }
            words().store(t, 0); // the write over it
        }
    };
    let report = run(32, kernel(false));
    // Half of the lanes read what has been written over, the others write over what has been read.
    assert_eq!(report.findings.len(), 2);
    let write = report.findings.iter().find(|f| f.location.line() == HERE.line("the write over it")).unwrap();
    assert_eq!(write.kind, FindingKind::Race);
    assert_eq!(write.other.unwrap().location.line(), HERE.line("the read before"));
    assert_eq!((write.thread, write.other.unwrap().thread), ([1, 0, 0], [0, 0, 0]));
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn two_writes() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            if t == 0 {
                words().store(0, 1); // one writes
            }
            if right {
                sync_threads();
            }
            if t == 40 {
                words().store(0, 1); // another writes the same
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "another writes the same", Some("one writes"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn neighbours_in_a_granule_do_not_race() {
    expect_clean(&run(64, || {
        let (halves, t) = (words().cast::<u16>(), thread_idx_x());
        halves.store(t, t as u16);
        assert_eq!(halves.load(t), t as u16);
        sync_threads();
        if t < 8 {
            words().load_vector::<4>(4 * t);
        }
        sync_threads();
        halves.store_vector(2 * t, [1, 2]);
        halves.store(2 * t + 1, 3);
    }));
}

#[test]
fn wide_and_narrow_accesses_meet() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            if t == 0 {
                words().store_vector(0, [0; 4]); // sixteen bytes
            }
            if right {
                sync_threads();
            }
            if t == 32 {
                words().cast::<u16>().store(5, 0); // two of them
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "two of them", Some("sixteen bytes"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn a_shuffle_orders_no_memory() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            words().store(t, t); // before the shuffle
            shuffle_xor(ALL, t, 1);
            if right {
                sync_warp(ALL);
            }
            words().load(t ^ 1); // after the shuffle
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Race, "after the shuffle", Some("before the shuffle"));
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn a_warp_barrier_orders_one_warp() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            words().store(t, t); // in one warp
            sync_warp(ALL);
            if right {
                sync_threads();
            }
            if t >= 32 {
                words().load(t ^ 32); // in another
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "in another", Some("in one warp"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn arriving_is_not_waiting() {
    let kernel = |right| {
        move || {
            let (t, full) = (thread_idx_x(), NamedBarrier::<1, 64>);
            if t < 32 {
                words().store(t, t); // the producer
                full.arrive();
            } else if right {
                full.sync();
                words().load(t - 32);
            } else {
                full.arrive();
                words().load(t - 32); // the consumer
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "the consumer", Some("the producer"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn a_buffer_that_is_filled_again_too_early() {
    let kernel = |right| {
        move || {
            let (t, full, empty) = (thread_idx_x(), NamedBarrier::<1, 64>, NamedBarrier::<2, 64>);
            for round in 0..2 {
                if t < 32 {
                    words().store(t, round); // filled again
                    full.sync();
                } else {
                    full.sync();
                    words().load(t - 32); // what it held before
                }
                if right {
                    empty.sync();
                }
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "what it held before", Some("filled again"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn an_atomic_and_a_plain_access() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            if t == 0 {
                words().store(0, 0);
            }
            sync_threads();
            atomic::shared_add_u32(words(), 1); // an atomic
            if right {
                sync_threads();
            }
            if t == 63 {
                assert_eq!(words().load(0), 64); // no atomic
            }
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Race, "no atomic", Some("an atomic"));
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn a_read_of_what_nobody_has_written() {
    let kernel = |right| {
        move || {
            let (t, array) = (thread_idx_x(), shared_array![f32; 64]);
            if right || t != 3 {
                array.store(t, 1.0);
            }
            sync_threads();
            array.load(63 - t); // the first to read
        }
    };
    HERE.expect(&run(64, kernel(false)), FindingKind::Uninitialised, "the first to read", None);
    expect_clean(&run(64, kernel(true)));
}

#[test]
fn beyond_the_end() {
    let kernel = |words_a_thread| {
        move || {
            words().store(thread_idx_x() * words_a_thread, 0); // out of 4 KiB
        }
    };
    HERE.expect(&run(64, kernel(17)), FindingKind::OutOfBounds, "out of 4 KiB", None);
    expect_clean(&run(64, kernel(16)));
}

#[test]
fn from_one_array_into_another() {
    let kernel = |len: u32| {
        move || {
            let (a, b) = (shared_array![u32; 256], shared_array![u32; 256]);
            b.store(0, 0);
            a.store(len - 1, 0); // out of the array
        }
    };
    HERE.expect(&run(1, kernel(257)), FindingKind::OutOfBounds, "out of the array", None);
    expect_clean(&run(1, kernel(256)));
}

#[test]
fn not_aligned() {
    let kernel = |first| {
        move || {
            words().store_vector(first + 4 * thread_idx_x(), [0; 4]); // sixteen bytes, aligned to four
        }
    };
    HERE.expect(&run(32, kernel(2)), FindingKind::Misaligned, "sixteen bytes, aligned to four", None);
    expect_clean(&run(32, kernel(4)));
}

#[test]
fn a_matrix_beyond_the_end() {
    let kernel = |last_row| {
        move || {
            let t = thread_idx_x();
            words().store_vector(4 * t, [0; 4]);
            sync_warp(ALL);
            matrix::ldmatrix([if t == 31 { last_row } else { 16 * t }]); // its last row is not there
        }
    };
    HERE.expect(&run(32, kernel(4096)), FindingKind::OutOfBounds, "its last row is not there", None);
    expect_clean(&run(32, kernel(496)));
}

#[test]
fn matrices_race_too() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            words().store_vector(4 * t, [0; 4]); // a row
            if right {
                sync_warp(ALL);
            }
            matrix::ldmatrix([(16 * t) ^ 16]); // read as a matrix
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Race, "read as a matrix", Some("a row"));
    expect_clean(&run(32, kernel(true)));
}
