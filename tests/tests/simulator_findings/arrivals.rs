//! Blocks that wait for blocks before them, or should.
use crate::{Source, expect_clean, run_blocks};
use cuda_std::arrivals::Arrivals;
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{FindingKind, Memory};
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x};
use cuda_std::{Global, bulk, fence};

const HERE: Source = Source(include_str!("arrivals.rs"));

fn counters(memory: &Memory) -> impl Fn(u32) -> Arrivals + Copy + Sync + use<> {
    let counters = memory.upload("counters", &[0u32; 64]).global();
    move |i| Arrivals::at(counters.offset(i as usize))
}

#[test]
fn a_block_reads_what_the_one_before_has_written() {
    for right in [true, false] {
        let memory = Memory::new();
        let (x, written) = (memory.allocate::<u32>("x", 16), counters(&memory));
        let at = x.global();
        let report = run_blocks(16, 1, &memory, move || {
            let i = block_idx_x();
            let mut before = 0;
            if i > 0 {
                if right {
                    written(i - 1).wait(1);
                }
                before = at.load(i as usize - 1); // read
            }
            at.store(i as usize, before + 1); // written
            written(i).arrive();
        });
        if right {
            expect_clean(&report);
            assert_eq!(memory.read(&x), (1..=16).collect::<Vec<u32>>());
        } else {
            HERE.expect(&report, FindingKind::Race, "read", Some("written"));
        }
    }
}

#[test]
fn an_arrival_tells_of_what_was_before_it() {
    let kernel = |x: Global<u32>, written: Arrivals, right: bool| {
        move || {
            if block_idx_x() == 0 {
                if right {
                    x.store(0, 1);
                }
                written.arrive();
                if !right {
                    x.store(0, 1); // too late
                }
            } else {
                written.wait(1);
                x.load(0); // read after the wait
            }
        }
    };
    let memory = Memory::new();
    let (x, counters) = (memory.upload("x", &[0u32]).global(), counters(&memory));
    expect_clean(&run_blocks(2, 1, &memory, kernel(x, counters(0), true)));
    let report = run_blocks(2, 1, &memory, kernel(x, counters(1), false));
    HERE.expect(&report, FindingKind::Race, "read after the wait", Some("too late"));
}

#[test]
fn as_many_as_are_waited_for() {
    for right in [true, false] {
        let memory = Memory::new();
        let (x, counters) = (memory.upload("x", &[0u32; 8]).global(), counters(&memory));
        let report = run_blocks(9, 1, &memory, move || {
            if block_idx_x() < 8 {
                x.store(block_idx_x() as usize, 1); // one of eight
                counters(0).arrive();
            } else {
                counters(0).wait(if right { 8 } else { 7 });
                (0..8).for_each(|i| _ = x.load(i)); // all eight
            }
        });
        if right {
            expect_clean(&report);
        } else {
            HERE.expect(&report, FindingKind::Race, "all eight", Some("one of eight"));
        }
    }
}

#[test]
fn arrivals_in_an_order_are_known_by_their_number() {
    let memory = Memory::new();
    let (x, counters) = (memory.upload("x", &[0u32; 8]).global(), counters(&memory));
    expect_clean(&run_blocks(9, 1, &memory, move || {
        let i = block_idx_x();
        if i < 8 {
            counters(0).wait(i);
            x.store(i as usize, 1);
            counters(0).arrive();
        } else {
            counters(0).wait(3);
            (0..3).for_each(|i| _ = x.load(i));
        }
    }));
}

#[test]
fn a_wait_is_that_of_one_thread() {
    let kernel = |x: Global<u32>, written: Arrivals, right: bool| {
        move || {
            if block_idx_x() == 0 {
                x.store(thread_idx_x() as usize, 1); // by all threads
                sync_threads();
                if thread_idx_x() == 0 {
                    written.arrive();
                }
            } else {
                if thread_idx_x() == 0 {
                    written.wait(1);
                }
                if right {
                    sync_threads();
                }
                x.load(thread_idx_x() as usize); // by others too
            }
        }
    };
    let memory = Memory::new();
    let (x, counters) = (memory.upload("x", &[0u32; 64]).global(), counters(&memory));
    expect_clean(&run_blocks(2, 64, &memory, kernel(x, counters(0), true)));
    let report = run_blocks(2, 64, &memory, kernel(x, counters(1), false));
    HERE.expect(&report, FindingKind::Race, "by others too", Some("by all threads"));
}

#[test]
fn an_arrival_is_that_of_one_thread() {
    let kernel = |x: Global<u32>, counter: u32, right: bool, counters: &(dyn Fn(u32) -> Arrivals + Sync)| {
        if block_idx_x() == 0 {
            x.store(thread_idx_x() as usize * 32, 1); // the own half
            counters(counter + thread_idx_x() / 32).arrive();
        } else {
            counters(counter + 1).wait(1);
            if right {
                counters(counter).wait(1);
            }
            x.load(0); // the other half
        }
    };
    let memory = Memory::new();
    let (x, counters) = (memory.upload("x", &[0u32; 2048]).global(), counters(&memory));
    let launch = |counter, right| {
        run_blocks(2, 33, &memory, || {
            if thread_idx_x().is_multiple_of(32) {
                kernel(x, counter, right, &counters);
            }
        })
    };
    expect_clean(&launch(0, true));
    HERE.expect(&launch(2, false), FindingKind::Race, "the other half", Some("the own half"));
}

#[test]
fn news_are_passed_on() {
    for right in [true, false] {
        let memory = Memory::new();
        let (x, counters) = (memory.upload("x", &[0u32]).global(), counters(&memory));
        let report = run_blocks(3, 1, &memory, move || match block_idx_x() {
            0 => {
                x.store(0, 1); // by the first
                counters(0).arrive();
            }
            1 => {
                if right {
                    counters(0).wait(1);
                }
                counters(1).arrive();
            }
            _ => {
                counters(1).wait(1);
                x.store(0, 2); // by the third
            }
        });
        if right {
            expect_clean(&report);
        } else {
            HERE.expect(&report, FindingKind::Race, "by the third", Some("by the first"));
        }
    }
}

#[test]
fn a_bulk_addition_has_ended_before_its_thread_arrives() {
    for right in [true, false] {
        let memory = Memory::new();
        let (sums, found) = (memory.upload("sums", &[0f32; 4]).global(), memory.allocate::<f32>("found", 4));
        let (to, counters) = (found.global(), counters(&memory));
        let report = run_blocks(3, 1, &memory, move || {
            if block_idx_x() < 2 {
                let x = dynamic_shared::<f32>();
                x.store_vector(0, [1.0; 4]);
                fence::proxy_async();
                bulk::add(sums, x, 4); // added
                bulk::commit();
                if right {
                    bulk::wait::<0>();
                } else {
                    bulk::wait_read::<0>();
                }
                counters(0).arrive();
            } else {
                counters(0).wait(2);
                to.store_vector(0, sums.load_vector::<4>(0)); // all of it
            }
        });
        if right {
            expect_clean(&report);
            assert_eq!(memory.read(&found), [2.0; 4]);
        } else {
            HERE.expect(&report, FindingKind::Race, "all of it", Some("added"));
        }
    }
}

/// Of a ring of one place: blocks add to it in pairs, the next block takes the sum and clears it.
#[test]
fn a_place_is_taken_over_once_it_is_cleared() {
    for (waits, clears) in [(true, true), (false, true), (true, false)] {
        let memory = Memory::new();
        let (sum, found, counters) =
            (memory.upload("sum", &[0u32]), memory.upload("found", &[0u32; 4]), counters(&memory));
        let (sum, to) = (sum.global(), found.global());
        let report = run_blocks(12, 1, &memory, move || {
            let (head, part) = (block_idx_x() / 3, block_idx_x() % 3);
            let (added, finished) = (counters(2 * head), counters(2 * head + 1));
            if part < 2 {
                if head > 0 && waits {
                    counters(2 * head - 1).wait(1);
                }
                cuda_std::atomic::global_add_u32(sum, 1); // added to
                added.arrive();
            } else {
                added.wait(2);
                to.store(head as usize, sum.load(0));
                if clears {
                    sum.store(0, 0); // cleared
                }
                finished.arrive();
            }
        });
        match (waits, clears) {
            (true, true) => {
                expect_clean(&report);
                assert_eq!(memory.read(&found), [2; 4]);
            }
            // Forgotten, this is no race, but a wrong result.
            (true, false) => {
                expect_clean(&report);
                assert_eq!(memory.read(&found), [2, 4, 6, 8]);
            }
            _ => {
                let is_it = |finding: &cuda_std::sim::Finding| finding.kind == FindingKind::Race;
                assert!(!report.findings.is_empty() && report.findings.iter().all(is_it));
                assert!(report.findings.iter().any(|finding| finding.location.line() == HERE.line("added to")));
            }
        }
    }
}

#[test]
fn nobody_waits_for_a_later_block() {
    let memory = Memory::new();
    let counters = counters(&memory);
    let report = run_blocks(2, 1, &memory, move || {
        if block_idx_x() == 0 {
            counters(0).wait(1); // for the next
        } else {
            counters(0).arrive();
        }
    });
    HERE.expect(&report, FindingKind::Deadlock, "for the next", None);
}
