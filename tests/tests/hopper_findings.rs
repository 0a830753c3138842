//! A faulty kernel for each fault that Hopper's words can make, which must be reported with the lines of both sides,
//! and its corrected twin, of which nothing must be reported.
//!
//! A kernel and its twin are one function of a `bool`: whether it is right. Comments at the ends of lines name those
//! that a report must name.
use cuda_std::arrivals::Arrivals;
use cuda_std::barrier::NamedBarrier;
use cuda_std::cluster::{self, Blocks};
use cuda_std::element::bf16;
use cuda_std::fragment::Accumulator;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::{Phases, Pipeline};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{Finding, FindingKind, Launch, Memory, Options, Report, launch_clusters};
use cuda_std::tensor::{TensorMap, TensorMapDescription, TensorMapRef};
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x, warp_id};
use cuda_std::warpgroup::{self, warpgroup_id};
use cuda_std::{DType, Shared, SmemTile, bulk, fence, wgmma};

const SOURCE: &str = include_str!("hopper_findings.rs");

fn line(comment: &str) -> u32 {
    let is_it = |line: &str| line.ends_with(&format!("// {comment}"));
    SOURCE.lines().position(is_it).expect("a line with this comment") as u32 + 1
}

/// Checks that a report says one thing: a fault of this kind, in the line that ends with the comment `at`, with the
/// other side in that which ends with `other`, in words that contain `says`.
#[track_caller]
fn expect(report: &Report, kind: FindingKind, at: &str, other: Option<&str>, says: &str) {
    let list: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
    let [finding] = &report.findings[..] else { panic!("one finding expected:\n{}", list.join("\n")) };
    assert_eq!(finding.kind, kind, "{finding}");
    assert_eq!(finding.location.line(), line(at), "{finding}");
    assert_eq!(finding.other.map(|other| other.location.line()), other.map(line), "{finding}");
    assert!(finding.message.contains(says), "{finding}");
}

#[track_caller]
fn expect_clean(report: &Report) {
    let list: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
    assert!(list.is_empty(), "{}", list.join("\n"));
}

fn run_clusters(cluster: u32, threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    let launch_of = Launch { kernel: "faulty", grid: [cluster, 1, 1], block: [threads, 1, 1], shared_bytes: 64 << 10 };
    launch_clusters(&launch_of, cluster, memory, &Options::default(), kernel)
}

fn run(threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    run_clusters(1, threads, memory, kernel)
}

type Tile = SmemTile<bf16, 64, 64>;

/// A tensor of one tile, in memory of its own, and its map.
fn tensor() -> (Memory, TensorMap) {
    let memory = Memory::new();
    let address = memory.upload("x", &[bf16::ONE; 64 * 64]).global().address();
    let map =
        TensorMapDescription::of_tiles::<bf16, 64, 64>(address, (64, 64), 64, &[]).and_then(|map| map.simulated());
    (memory, map.expect("a map"))
}

/// A tile at the base of shared memory, and the first address behind four of them.
fn places() -> (Tile, Shared<u64>) {
    let tile = Tile::at(dynamic_shared());
    (tile, tile.stage(3).end())
}

/// A barrier of one arrival, initialised by the first thread.
fn barrier(at: Shared<u64>) -> Mbarrier {
    let barrier = Mbarrier::at(at);
    if thread_idx_x() == 0 {
        barrier.init(1);
        fence::mbarrier_init();
    }
    sync_threads();
    barrier
}

#[test]
fn wrong_numbers_of_bytes() {
    let (memory, map) = tensor();
    let kernel = |bytes: u32| {
        let (tile, end) = places();
        let full = barrier(end);
        if thread_idx_x() == 0 {
            full.arrive_expect(bytes);
            TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // too many bytes
        }
        Phases::of(full).wait(); // too few bytes
    };
    expect_clean(&run(32, &memory, || kernel(Tile::BYTES)));
    let says = "8192 of 8208 bytes are under way";
    expect(&run(32, &memory, || kernel(Tile::BYTES + 16)), FindingKind::Deadlock, "too few bytes", None, says);
    let says = "copies bring 8192 bytes to the mbarrier at shared 0x8000, which expects 8176";
    expect(&run(32, &memory, || kernel(Tile::BYTES - 16)), FindingKind::Barrier, "too many bytes", None, says);
}

#[test]
fn phases_that_never_come() {
    let kernel = |right: bool| {
        let pipeline = Pipeline::<2>::at(dynamic_shared());
        if thread_idx_x() == 0 {
            pipeline.init(1, 1);
            fence::mbarrier_init();
        }
        sync_threads();
        if warp_id() == 0 {
            let mut producer = pipeline.producer();
            for _ in 0..3 {
                let slot = producer.acquire(); // waits for an empty stage
                if lane_id() == 0 {
                    slot.fill();
                }
                producer.advance();
            }
        } else {
            let mut consumer = pipeline.consumer();
            for _ in 0..3 {
                let slot = consumer.wait(); // waits for a full stage
                if right && lane_id() == 0 {
                    slot.release();
                }
                consumer.advance();
            }
        }
    };
    expect_clean(&run(64, &Memory::new(), || kernel(true)));
    let report = run(64, &Memory::new(), || kernel(false));
    let [empty, full] = &report.findings[..] else { panic!("{:?}", report.findings) };
    let state = "threads 0 to 31 wait for ever at the mbarrier at shared 0x10 for the phase of parity 0: \
                 in its phase 0 0 of 1 arrivals have come";
    assert_eq!((empty.kind, &*empty.message), (FindingKind::Deadlock, state));
    assert_eq!(
        (empty.location.line(), full.location.line()),
        (line("waits for an empty stage"), line("waits for a full stage"))
    );
}

#[test]
fn barriers_that_are_misused() {
    let report = run(32, &Memory::new(), || Mbarrier::at(dynamic_shared()).arrive()); // never initialised
    expect(&report, FindingKind::Barrier, "never initialised", None, "no mbarrier has been initialised at shared 0x0");
    let (memory, map) = tensor();
    let kernel = |arrivals: u32, fenced: bool| {
        let (tile, end) = places();
        let full = Mbarrier::at(end);
        if thread_idx_x() == 0 {
            full.init(1); // initialises
            if fenced {
                fence::mbarrier_init();
            }
        }
        sync_threads();
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES);
            TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // tells the barrier
            if arrivals == 2 {
                full.arrive(); // arrives again
            }
            Phases::of(full).wait();
        }
    };
    expect_clean(&run(32, &memory, || kernel(1, true)));
    let report = run(32, &memory, || kernel(2, true));
    expect(&report, FindingKind::Barrier, "arrives again", None, "takes only 1 arrivals");
    let report = run(32, &memory, || kernel(1, false));
    expect(
        &report,
        FindingKind::ProxyFence,
        "tells the barrier",
        Some("initialises"),
        "without a fence::mbarrier_init",
    );
}

#[test]
fn a_barrier_used_before_it_is_seen() {
    let kernel = |right: bool| {
        let full = Mbarrier::at(dynamic_shared());
        if thread_idx_x() == 0 {
            full.init(1); // initialises alone
            full.arrive();
        }
        if right {
            sync_threads();
        }
        if thread_idx_x() == 40 {
            Phases::of(full).wait(); // looks at it
        }
    };
    expect_clean(&run(64, &Memory::new(), || kernel(true)));
    let report = run(64, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::Race, "looks at it", Some("initialises alone"), "");
}

#[test]
fn tiles_read_before_they_have_come() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES);
            TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // loads the tile
        }
        sync_threads();
        if right {
            Phases::of(full).wait();
        }
        tile.element(3, thread_idx_x()).load(0); // reads the tile
    };
    expect_clean(&run(32, &memory, || kernel(true)));
    let report = run(32, &memory, || kernel(false));
    expect(&report, FindingKind::UnfinishedCopy, "reads the tile", Some("loads the tile"), "is on its way");
}

#[test]
fn tiles_read_by_a_thread_that_has_not_waited() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES);
            TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // loads for one
            Phases::of(full).wait();
        }
        if right {
            sync_threads();
        }
        if thread_idx_x() == 40 {
            tile.element(0, 0).load(0); // reads for another
        }
    };
    expect_clean(&run(64, &memory, || kernel(true)));
    let report = run(64, &memory, || kernel(false));
    expect(&report, FindingKind::Race, "reads for another", Some("loads for one"), "");
}

#[test]
fn tiles_loaded_over_what_is_still_read() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, end) = places();
        let (full, empty) = (barrier(end), barrier(end.offset(1)));
        let mut filled = Phases::of(full);
        if thread_idx_x() == 0 {
            for round in 0..2 {
                if right && round == 1 {
                    Phases::of(empty).wait();
                }
                full.arrive_expect(Tile::BYTES);
                TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // loads again
                filled.wait();
            }
        } else if thread_idx_x() == 32 {
            filled.wait();
            tile.element(0, 0).load(0); // still reads
            empty.arrive();
        }
    };
    expect_clean(&run(64, &memory, || kernel(true)));
    let seeds = (1..20).map(|seed| {
        let launch_of = Launch { kernel: "faulty", grid: [1; 3], block: [64, 1, 1], shared_bytes: 64 << 10 };
        let options = Options { seed, ..Options::default() };
        launch_clusters(&launch_of, 1, &memory, &options, || kernel(false))
    });
    let mut races = seeds.filter(|report| !report.findings.is_empty());
    assert!(races.next().is_some());
}

#[test]
fn writes_that_the_async_proxy_does_not_see() {
    let (memory, map) = tensor();
    let kernel = |fence_before: bool, fence_after: bool| {
        let (tile, _) = places();
        for row in 0..64 {
            tile.element(row, thread_idx_x()).store(0, bf16::ONE); // writes a row
        }
        if fence_before {
            fence::proxy_async();
        }
        sync_threads();
        if fence_after {
            fence::proxy_async();
        }
        if thread_idx_x() == 0 {
            TensorMapRef::of(&map, &map).store_tile(tile, 0, []); // stores the rows
            bulk::commit();
            bulk::wait_read::<0>();
        }
    };
    expect_clean(&run(64, &memory, || kernel(true, false)));
    let report = run(64, &memory, || kernel(false, false));
    expect(&report, FindingKind::ProxyFence, "stores the rows", Some("writes a row"), "without a fence::proxy_async");
    let late = run(64, &memory, || kernel(false, true));
    assert_eq!(late.findings[0].kind, FindingKind::ProxyFence, "a fence after the barrier is none of the writers'");
}

#[test]
fn tiles_loaded_over_what_was_written() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        for row in 0..64 {
            tile.element(row, thread_idx_x()).store(0, bf16::ZERO); // writes first
        }
        if right {
            fence::proxy_async();
        }
        sync_threads();
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES);
            TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full); // loads over it
        }
        Phases::of(full).wait();
        assert!(tile.element(3, thread_idx_x()).load(0) == bf16::ONE);
    };
    expect_clean(&run(64, &memory, || kernel(true)));
    let report = run(64, &memory, || kernel(false));
    let says = "writes 16 bytes of shared memory at 0x0, which the other has written without a fence::proxy_async";
    expect(&report, FindingKind::ProxyFence, "loads over it", Some("writes first"), says);
}

#[test]
fn what_is_sent_over_what_the_other_block_wrote() {
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        let (from, to) = (tile.start::<u32>(), tile.stage(1).start::<u32>());
        if warp_id() == 0 {
            from.store(lane_id(), 7);
        } else {
            to.store(lane_id(), 8); // writes where the other sends
        }
        if right || warp_id() == 0 {
            fence::proxy_async();
        }
        cluster::sync();
        if thread_idx_x() == 0 {
            full.arrive_expect(128);
            bulk::send(to, from, 32, full, 1 - cluster::block_rank()); // sends over it
        }
        Phases::of(full).wait();
        cluster::sync();
    };
    expect_clean(&run_clusters(2, 64, &Memory::new(), || kernel(true)));
    let report = run_clusters(2, 64, &Memory::new(), || kernel(false));
    let other = Some("writes where the other sends");
    expect(&report, FindingKind::ProxyFence, "sends over it", other, "writes 16 bytes of shared memory");
    assert_ne!(report.findings[0].block, report.findings[0].other.expect("a writer").block);
}

/// Barriers order reads before the copies that come after them: of data the reader has what it has read.
#[test]
fn tiles_loaded_over_what_was_read_need_no_fence() {
    let (memory, map) = tensor();
    expect_clean(&run(64, &memory, || {
        let (tile, end) = places();
        let full = barrier(end);
        let mut filled = Phases::of(full);
        for _ in 0..2 {
            if thread_idx_x() == 0 {
                full.arrive_expect(Tile::BYTES);
                TensorMapRef::of(&map, &map).load_tile(tile, 0, [], full);
            }
            filled.wait();
            tile.element(3, thread_idx_x()).load(0);
            sync_threads();
        }
    }));
}

/// What a kernel does with global memory that its threads have written.
#[derive(Clone, Copy, PartialEq)]
enum AfterWrites {
    Load,
    Store,
    Add,
}

/// A block writes x, and then a copy of its first thread uses it.
fn uses_what_was_written(then: AfterWrites, right: bool) -> Report {
    let memory = Memory::new();
    let (x, counter) = (memory.upload("x", &[1f32; 64]).global(), memory.upload("counter", &[0u32]).global());
    run(64, &memory, || {
        let (sums, end) = (dynamic_shared::<f32>(), dynamic_shared::<u64>().offset(64));
        let full = barrier(end);
        sums.store(thread_idx_x(), 2.0);
        fence::proxy_async();
        x.store(thread_idx_x() as usize, 3.0); // writes x
        let written = Arrivals::at(counter);
        written.arrive();
        sync_threads();
        if thread_idx_x() != 0 {
            return;
        }
        if right {
            written.wait(64);
        }
        match then {
            AfterWrites::Load => {
                full.arrive_expect(256);
                bulk::load(sums, x, 64, full); // loads x
                Phases::of(full).wait();
            }
            AfterWrites::Store => {
                bulk::store(x, sums, 64); // stores x
            }
            AfterWrites::Add => {
                bulk::add(x, sums, 64); // adds to x
            }
        }
        bulk::commit();
        bulk::wait::<0>();
    })
}

#[test]
fn global_memory_that_the_async_proxy_does_not_see() {
    let uses = [
        (AfterWrites::Load, "loads x", "reads x[0], "),
        (AfterWrites::Store, "stores x", "writes x[0], "),
        (AfterWrites::Add, "adds to x", "atomically updates x[0], "),
    ];
    for (then, at, what) in uses {
        expect_clean(&uses_what_was_written(then, true));
        let says = format!("{what}which the other has written, with no Arrivals::wait in between");
        expect(&uses_what_was_written(then, false), FindingKind::ProxyFence, at, Some("writes x"), &says);
    }
}

/// What copies have written, copies see, once they have been waited for.
#[test]
fn global_memory_that_copies_have_written_needs_no_fence() {
    let memory = Memory::new();
    let x = memory.upload("x", &[1f32; 64]).global();
    expect_clean(&run(64, &memory, || {
        let (sums, end) = (dynamic_shared::<f32>(), dynamic_shared::<u64>().offset(64));
        let full = barrier(end);
        sums.store(thread_idx_x(), 2.0);
        fence::proxy_async();
        sync_threads();
        if thread_idx_x() == 0 {
            bulk::store(x, sums, 64);
            bulk::commit();
            bulk::wait::<0>();
            bulk::add(x, sums, 64);
            bulk::commit();
            bulk::wait::<0>();
            full.arrive_expect(256);
            bulk::load(sums, x, 64, full);
            Phases::of(full).wait();
            assert_eq!(sums.load(5), 4.0);
        }
    }));
}

/// The example of the book's page on the simulator.
#[test]
fn the_book_shows_what_is_reported() {
    const PAGE: &str = include_str!("../../docs/src/simulator.md");
    let (memory, map) = tensor();
    let report = run(64, &memory, || {
        let (tile, i) = (places().0, thread_idx_x());
        for row in 0..64 {
            tile.element(row, i).store(0, bf16::ONE); // writes in the book
        }
        sync_threads();
        if i == 0 {
            TensorMapRef::of(&map, &map).store_tile(tile, 0, []); // stores in the book
            bulk::commit();
            bulk::wait_read::<0>();
        }
    });
    expect(&report, FindingKind::ProxyFence, "stores in the book", Some("writes in the book"), "");
    let Finding { kind, message, occurrences, .. } = &report.findings[0];
    for said in [kind.name(), message, &format!("({occurrences} times)")] {
        assert!(PAGE.contains(said), "the page lacks {said:?}");
    }
}

#[test]
fn factors_that_the_tensor_cores_do_not_see() {
    let kernel = |right: bool| {
        let (tile, _) = places();
        for i in 0..32 {
            tile.element(2 * i + thread_idx_x() / 64, thread_idx_x() % 64).store(0, bf16::ONE); // writes a factor
        }
        if right {
            fence::proxy_async();
        }
        sync_threads();
        let s: Accumulator<1, 8> = wgmma::product(tile.rows(0), tile.rows(0)).wait::<0>(); // multiplies it
        assert_eq!(s.fold_row(0, 0, f32::max), 64.0);
    };
    expect_clean(&run(128, &Memory::new(), || kernel(true)));
    let report = run(128, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::ProxyFence, "multiplies it", Some("writes a factor"), "");
}

/// All ones, by the first warpgroup.
fn fill(tile: Tile) {
    if warpgroup_id() == 0 {
        for i in 0..32 {
            tile.element(2 * i + thread_idx_x() / 64, thread_idx_x() % 64).store(0, bf16::ONE);
        }
        fence::proxy_async();
    }
    sync_threads();
}

#[test]
fn factors_overwritten_while_they_are_multiplied() {
    let kernel = |right: bool| {
        let (tile, _) = places();
        fill(tile);
        if warpgroup_id() == 0 {
            let s = wgmma::product::<bf16, _, _, 8>(tile.rows(0), tile.rows(0)); // in flight
            if right {
                s.wait::<0>();
                NamedBarrier::<1, 160>.arrive();
            } else {
                NamedBarrier::<1, 160>.arrive();
                s.wait::<0>();
            }
        } else {
            NamedBarrier::<1, 160>.sync();
            if lane_id() == 0 {
                tile.element(5, 5).store(0, bf16::ZERO); // overwrites
            }
        }
    };
    expect_clean(&run(160, &Memory::new(), || kernel(true)));
    let report = run(160, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::Race, "overwrites", Some("in flight"), "");
}

#[test]
fn products_read_their_factors_as_late_as_they_may() {
    let memory = Memory::new();
    let result = memory.allocate::<f32>("result", 1);
    let at = result.global();
    let launch_of = Launch { kernel: "late", grid: [1; 3], block: [128, 1, 1], shared_bytes: 64 << 10 };
    let options = Options { race_detector: false, ..Options::default() };
    let report = launch_clusters(&launch_of, 1, &memory, &options, || {
        let (tile, _) = places();
        fill(tile);
        let s = wgmma::product::<bf16, _, _, 8>(tile.rows(0), tile.rows(0));
        sync_threads();
        if thread_idx_x() == 0 {
            tile.element(0, 0).store(0, bf16::from_f32(11.0));
        }
        sync_threads();
        let mut s = s.wait::<0>();
        if thread_idx_x() == 0 {
            at.store(0, *s.element_mut(0, 0, 0, 0));
        }
    });
    expect_clean(&report);
    assert_eq!(memory.read(&result), [63.0 + 121.0]);
}

#[test]
fn products_taken_too_early() {
    let kernel = |right: bool| {
        let (tile, _) = places();
        fill(tile);
        let first = wgmma::product::<bf16, _, _, 8>(tile.rows(0), tile.rows(0)); // the first product
        let second = wgmma::product::<bf16, _, _, 8>(tile.rows(0), tile.rows(0));
        if right {
            first.wait::<1>();
        } else {
            first.wait::<2>(); // takes it
        }
        second.wait::<0>();
    };
    expect_clean(&run(128, &Memory::new(), || kernel(true)));
    let report = run(128, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::UnfinishedCopy, "takes it", Some("the first product"), "only 1 were issued after it");
}

#[test]
fn products_that_nobody_waits_for() {
    let report = run(128, &Memory::new(), || {
        let (tile, _) = places();
        fill(tile);
        let _ = wgmma::product::<bf16, _, _, 8>(tile.rows(0), tile.rows(0)); // left in flight
    });
    expect(&report, FindingKind::UnfinishedCopy, "left in flight", None, "exits with a product");
}

#[test]
fn stores_that_nobody_waits_for() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, _) = places();
        fill(tile);
        if thread_idx_x() == 0 {
            TensorMapRef::of(&map, &map).store_tile(tile, 0, []); // never waited for
            bulk::commit();
            if right {
                bulk::wait_read::<0>();
            }
        }
    };
    expect_clean(&run(128, &memory, || kernel(true)));
    let report = run(128, &memory, || kernel(false));
    expect(&report, FindingKind::UnfinishedCopy, "never waited for", None, "have read shared memory");
}

#[test]
fn tiles_overwritten_while_they_are_stored() {
    let (memory, map) = tensor();
    let kernel = |right: bool| {
        let (tile, _) = places();
        fill(tile);
        if thread_idx_x() == 0 {
            TensorMapRef::of(&map, &map).store_tile(tile, 0, []); // stores slowly
            bulk::commit();
            if right {
                bulk::wait_read::<0>();
            }
        }
        sync_threads();
        if thread_idx_x() == 64 {
            tile.element(5, 5).store(0, bf16::ZERO); // overwrites early
        }
        sync_threads();
        if thread_idx_x() == 0 {
            bulk::wait_read::<0>();
        }
    };
    expect_clean(&run(128, &memory, || kernel(true)));
    let report = run(128, &memory, || kernel(false));
    assert!(!report.findings.is_empty());
}

#[test]
fn warpgroups_that_do_not_meet() {
    let kernel = |right: bool| {
        if right || warp_id() != 2 {
            warpgroup::claim_registers::<232>(); // part of a warpgroup
        }
    };
    expect_clean(&run(128, &Memory::new(), || kernel(true)));
    let report = run(128, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::Divergence, "part of a warpgroup", None, "thread 64 has exited");
}

#[test]
fn more_registers_than_there_are() {
    let kernel = |right: bool| {
        if warpgroup_id() == 0 && right {
            warpgroup::release_registers::<24>();
        } else if right {
            warpgroup::claim_registers::<240>();
        } else {
            warpgroup::claim_registers::<232>(); // asks for too many
        }
    };
    expect_clean(&run(384, &Memory::new(), || kernel(true)));
    let report = run(384, &Memory::new(), || kernel(false));
    expect(&report, FindingKind::Deadlock, "asks for too many", None, "a multiprocessor has 512");
}

#[test]
fn boxes_that_cannot_be_copied() {
    let (memory, map) = tensor();
    let kernel = |offset: u32, real: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        let parameters = if real { TensorMap::from_encoded([1; 16]) } else { map };
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES);
            let map = TensorMapRef::of(&parameters, &parameters);
            map.load(tile.chunk(0, 0).offset(offset), [0, 0], full); // loads a box
            Phases::of(full).wait();
        }
    };
    expect_clean(&run(32, &memory, || kernel(0, false)));
    let report = run(32, &memory, || kernel(64, false));
    expect(&report, FindingKind::TensorCopy, "loads a box", None, "at shared 0x80, no multiple of 1024");
    let report = run(32, &memory, || kernel(0, true));
    expect(&report, FindingKind::TensorCopy, "loads a box", None, "not made for the simulated GPU");
    let flat = TensorMapDescription {
        address: memory.upload("y", &[0f32; 64]).global().address(),
        dtype: DType::F32,
        rank: 2,
        dimensions: [32, 9, 1, 1, 1],
        strides: [128, 0, 0, 0],
        tile: [32, 2, 1, 1, 1],
        swizzle: cuda_std::tensor::Swizzle::Bytes128,
    };
    let flat = flat.simulated().expect("a map");
    let report = run(32, &memory, || {
        let full = barrier(dynamic_shared::<u64>().offset(512));
        if thread_idx_x() == 0 {
            full.arrive_expect(256);
            TensorMapRef::of(&flat, &flat).load(dynamic_shared::<f32>(), [0, 8], full); // beyond the allocation
        }
    });
    expect(&report, FindingKind::OutOfBounds, "beyond the allocation", None, "y[256]");
}

#[test]
fn clusters_that_do_not_meet() {
    let kernel = |right: bool| {
        if right || cluster::block_rank() == 0 {
            cluster::arrive();
            cluster::wait(); // waits for the cluster
        } else {
            let never = barrier(dynamic_shared());
            Phases::of(never).wait();
        }
    };
    expect_clean(&run_clusters(2, 64, &Memory::new(), || kernel(true)));
    let report = run_clusters(2, 64, &Memory::new(), || kernel(false));
    let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::Deadlock; 2]);
    assert_eq!(report.findings[0].location.line(), line("waits for the cluster"));
}

#[test]
fn shared_memory_of_a_block_that_is_not_ready() {
    let kernel = |right: bool| {
        let (rank, at) = (cluster::block_rank(), dynamic_shared::<u32>());
        if thread_idx_x() == 0 {
            at.store(0, 7); // its own
        }
        if right {
            cluster::sync();
        }
        if thread_idx_x() == 0 {
            let other = cluster::map(at, 1 - rank).load(0); // the other's
            assert!(other == 7 || !right);
        }
        cluster::sync();
    };
    expect_clean(&run_clusters(2, 32, &Memory::new(), || kernel(true)));
    let report = run_clusters(2, 32, &Memory::new(), || kernel(false));
    assert!(
        report
            .findings
            .iter()
            .any(|finding| finding.kind == FindingKind::Race || finding.kind == FindingKind::Uninitialised)
    );
}

#[test]
fn what_is_sent_is_written_before_it_has_come() {
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        let other = 1 - cluster::block_rank();
        tile.start::<u32>().store(thread_idx_x(), 7);
        fence::proxy_async();
        cluster::sync();
        if thread_idx_x() == 0 {
            full.arrive_expect(Tile::BYTES / 64);
            let (to, from) = (tile.stage(1).start::<u32>(), tile.start::<u32>());
            bulk::send(to, from, Tile::BYTES / 64 / 4, full, other); // sends
        }
        if right {
            Phases::of(full).wait();
            assert!(tile.stage(1).start::<u32>().load(thread_idx_x()) == 7);
            // What this block has sent has come as well.
            cluster::sync();
        }
        tile.start::<u32>().store(thread_idx_x(), 8); // writes again
        if !right {
            Phases::of(full).wait();
        }
        cluster::sync();
    };
    expect_clean(&run_clusters(2, 32, &Memory::new(), || kernel(true)));
    let report = run_clusters(2, 32, &Memory::new(), || kernel(false));
    assert!(!report.findings.is_empty());
    assert!(report.findings.iter().all(|finding| finding.kind == FindingKind::Race), "{}", report.findings[0]);
    assert!(report.findings.iter().any(|finding| finding.location.line() == line("writes again")));
}

#[test]
fn what_is_sent_without_a_fence() {
    let kernel = |right: bool| {
        let (tile, end) = places();
        let full = barrier(end);
        let other = 1 - cluster::block_rank();
        tile.start::<u32>().store(thread_idx_x(), 7); // fills
        if right {
            fence::proxy_async();
        }
        cluster::sync();
        if thread_idx_x() == 0 {
            full.arrive_expect(128);
            bulk::send(tile.stage(1).start::<u32>(), tile.start(), 32, full, other); // is sent
        }
        Phases::of(full).wait();
        cluster::sync();
    };
    expect_clean(&run_clusters(2, 32, &Memory::new(), || kernel(true)));
    let report = run_clusters(2, 32, &Memory::new(), || kernel(false));
    assert!(!report.findings.is_empty());
    assert!(report.findings.iter().all(|finding| finding.location.line() == line("is sent")), "{}", report.findings[0]);
}

#[test]
fn copies_to_blocks_that_are_not_there() {
    let (memory, map) = tensor();
    let kernel = |count: u32| {
        let (tile, end) = places();
        let full = barrier(end);
        cluster::sync();
        if thread_idx_x() == 0 {
            full.arrive_expect(2 * Tile::BYTES);
            let to = tile.stage(cluster::block_rank());
            TensorMapRef::of(&map, &map).load_tile_multicast(to, 0, [], full, Blocks::first(count)); // to all
        }
        Phases::of(full).wait();
        cluster::sync();
    };
    expect_clean(&run_clusters(2, 32, &memory, || kernel(2)));
    let report = run_clusters(2, 32, &memory, || kernel(3));
    expect(&report, FindingKind::OutOfBounds, "to all", None, "block 2 of the cluster, which has 2");
}
