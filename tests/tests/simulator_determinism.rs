//! The same launch gives the same report, whatever the host's threads do. A seed changes the order of the threads, and with
//! it what a wrong kernel does, but not a right one.
use cuda_std::atomic::{global_add_f32, shared_add_u32};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::{FindingKind, Launch, Memory, Options, Report, launch};
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x};
use cuda_std::warp::{ALL, shuffle_xor};

const BLOCKS: u32 = 24;
const THREADS: u32 = 96;

fn run(memory: &Memory, options: &Options, kernel: impl Fn() + Sync) -> Report {
    let launch_of = Launch { kernel: "k", grid: [BLOCKS, 1, 1], block: [THREADS, 1, 1], shared_bytes: 1024 };
    launch(&launch_of, memory, options, kernel)
}

/// A kernel with faults within blocks and between them, and sums whose rounding depends on the order.
fn faulty(options: &Options) -> (String, Vec<u32>) {
    let memory = Memory::new();
    let (sums, rows) = (memory.upload("sums", &[0f32; 4]), memory.allocate::<u32>("rows", 4096));
    let (sum_at, row_at) = (sums.global(), rows.global());
    let report = run(&memory, options, || {
        let (t, block) = (thread_idx_x(), block_idx_x());
        let shared = dynamic_shared::<u32>();
        shared.store(t, t);
        if block % 3 != 0 {
            sync_threads();
        }
        shared.load((t + 32) % THREADS);
        row_at.store((block * 64 + t) as usize, t);
        row_at.load((block * 64 + t) as usize);
        global_add_f32(sum_at, 1.0 / (1.0 + block as f32 + shuffle_xor(ALL, t as f32, 5)));
        if block % 7 == 6 {
            assert!(t != 50, "thread 50");
        }
        row_at.load(4000 + t as usize);
    });
    let findings: Vec<String> = report.findings.iter().map(|finding| finding.to_string()).collect();
    let text = format!("{}\n{:?}", findings.join("\n"), report.counters);
    (text, memory.read(&sums).iter().map(|sum| sum.to_bits()).collect())
}

#[test]
fn reports_do_not_depend_on_the_host() {
    let first = faulty(&Options { workers: 1, ..Options::default() });
    assert!(first.0.contains("race") && first.0.contains("thread 50"), "{}", first.0);
    for workers in [1, 2, 2, 5] {
        assert_eq!(faulty(&Options { workers, ..Options::default() }), first);
    }
}

#[test]
fn a_seed_gives_the_same_report_again() {
    let options = |workers| Options { seed: 17, workers, ..Options::default() };
    assert_eq!(faulty(&options(1)), faulty(&options(3)));
}

/// The order in which the threads of a block count themselves.
fn order(seed: u64) -> Vec<u32> {
    let memory = Memory::new();
    let places = memory.allocate::<u32>("places", (BLOCKS * THREADS) as usize);
    let at = places.global();
    let report = run(&memory, &Options { seed, ..Options::default() }, || {
        let (t, counter) = (thread_idx_x(), dynamic_shared::<u32>());
        if t == 0 {
            counter.store(0, 0);
        }
        sync_threads();
        at.store((block_idx_x() * THREADS + t) as usize, shared_add_u32(counter, 1));
    });
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    memory.read(&places)
}

#[test]
fn a_seed_shuffles_the_threads() {
    let natural: Vec<u32> = (0..BLOCKS * THREADS).map(|i| i % THREADS).collect();
    assert_eq!(order(0), natural);
    let shuffled = order(1);
    assert_ne!(shuffled, natural);
    assert_ne!(shuffled, order(2));
    assert_ne!(
        shuffled[..THREADS as usize],
        shuffled[THREADS as usize..][..THREADS as usize],
        "each block has its own"
    );
    assert_eq!(order(1), shuffled);
}

#[test]
fn faults_are_found_in_any_order() {
    for seed in 0..20 {
        let report = run(&Memory::new(), &Options { seed, ..Options::default() }, || {
            let (t, shared) = (thread_idx_x(), dynamic_shared::<u32>());
            shared.store(t, t);
            sync_threads();
            shared.load((t + 1) % THREADS);
            shared.store(t, t);
        });
        assert!(report.findings.iter().all(|finding| finding.kind == FindingKind::Race));
        assert!(!report.findings.is_empty());
    }
}

#[test]
fn progress_is_told_in_order() {
    let told = std::sync::Mutex::new(Vec::new());
    let progress = |done, of| told.lock().unwrap().push((done, of));
    run(&Memory::new(), &Options { progress: Some(&progress), ..Options::default() }, || ());
    assert_eq!(*told.lock().unwrap(), (1..=24).map(|done| (done, 24)).collect::<Vec<_>>());
}
