//! Faults between blocks.
use crate::{Source, expect_clean, run_blocks};
use cuda_std::atomic::{global_add_u32, global_cas_u32};
use cuda_std::sim::{FindingKind, Memory};
use cuda_std::thread::{block_idx_x, thread_idx_x};

const HERE: Source = Source(include_str!("blocks.rs"));

#[test]
fn two_blocks_write_the_same() {
    let memory = Memory::new();
    let x = memory.allocate::<f32>("x", 128).global();
    let kernel = |rows_a_block| {
        move || {
            let row = (block_idx_x() * rows_a_block + thread_idx_x()) as usize;
            x.store(row, 1.0); // rows of the next block too
        }
    };
    let report = run_blocks(4, 32, &memory, kernel(31));
    HERE.expect(&report, FindingKind::Race, "rows of the next block too", Some("rows of the next block too"));
    let finding = &report.findings[0];
    assert_eq!((finding.block, finding.other.unwrap().block), ([1, 0, 0], [0, 0, 0]));
    assert_eq!((finding.thread, finding.other.unwrap().thread), ([0, 0, 0], [31, 0, 0]));
    assert!(finding.message.contains("x[31]"), "{finding}");
    assert_eq!(finding.occurrences, 3);
    expect_clean(&run_blocks(4, 32, &memory, kernel(32)));
}

#[test]
fn a_block_reads_what_another_writes() {
    let memory = Memory::new();
    let x = memory.allocate::<f32>("x", 128).global();
    let kernel = move || {
        let row = (block_idx_x() * 32 + thread_idx_x()) as usize;
        x.store(row, 1.0); // its own rows
        if row >= 32 {
            x.load(row - 32); // another block's
        }
    };
    HERE.expect(&run_blocks(4, 32, &memory, kernel), FindingKind::Race, "another block's", Some("its own rows"));
}

#[test]
fn a_later_block_writes_what_one_has_read() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0f32; 64]).global();
    let kernel = move || {
        if block_idx_x() == 0 {
            x.load(thread_idx_x() as usize); // read first
        } else {
            x.store(thread_idx_x() as usize, 1.0); // written later
        }
    };
    HERE.expect(&run_blocks(2, 32, &memory, kernel), FindingKind::Race, "written later", Some("read first"));
}

#[test]
fn halves_of_a_word_are_two() {
    let memory = Memory::new();
    let x = memory.allocate::<u16>("x", 64).global();
    expect_clean(&run_blocks(64, 1, &memory, move || x.store(block_idx_x() as usize, 0)));
}

#[test]
fn what_all_read_does_not_race() {
    let memory = Memory::new();
    let x = memory.upload("x", &[1f32; 4096]).global();
    expect_clean(&run_blocks(8, 32, &memory, move || {
        for i in 0..32 {
            x.load_vector::<4>((i * 32 + thread_idx_x() as usize) * 4);
        }
    }));
}

#[test]
fn sums_need_atomics() {
    let memory = Memory::new();
    let sum = memory.upload("sum", &[0u32]);
    let x = sum.global();
    let kernel = |right| {
        move || {
            if right {
                global_add_u32(x, 1);
            } else if thread_idx_x() == 0 {
                x.store(0, x.load(0) + 1); // neither is atomic
            }
        }
    };
    let report = run_blocks(16, 64, &memory, kernel(false));
    // The write meets another block's read and write; the read another block's write.
    assert_eq!(report.findings.len(), 1, "all three are one line");
    HERE.expect(&report, FindingKind::Race, "neither is atomic", Some("neither is atomic"));
    let before = memory.read(&sum)[0];
    expect_clean(&run_blocks(16, 64, &memory, kernel(true)));
    assert_eq!(memory.read(&sum)[0], before + 16 * 64);
}

#[test]
fn an_atomic_and_a_plain_access() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0u32]).global();
    let kernel = move || {
        if block_idx_x() == 0 {
            x.store(0, 5); // plain
        } else {
            global_add_u32(x, 1); // atomic
        }
    };
    HERE.expect(&run_blocks(2, 1, &memory, kernel), FindingKind::Race, "atomic", Some("plain"));
}

#[test]
fn blocks_take_turns_at_atomics() {
    let memory = Memory::new();
    let (next, order) = (memory.upload("next", &[0u32]).global(), memory.upload("order", &[0u32; 64]));
    let seen = order.global();
    for _ in 0..3 {
        expect_clean(&run_blocks(64, 1, &memory, move || {
            let turn = global_add_u32(next, 1) % 64;
            global_add_u32(seen.offset(turn as usize), block_idx_x());
        }));
    }
    assert_eq!(memory.read(&order), (0..64).map(|block| 3 * block).collect::<Vec<u32>>());
}

#[test]
fn a_block_must_not_wait_for_a_later_one() {
    let run_with = |waiting| {
        let memory = Memory::new();
        let flag = memory.upload("flag", &[0u32]).global();
        run_blocks(2, 1, &memory, move || {
            if block_idx_x() == waiting {
                while global_cas_u32(flag, 1, 0) != 1 {} // for ever
            } else {
                global_add_u32(flag, 1);
            }
        })
    };
    HERE.expect(&run_with(0), FindingKind::Deadlock, "for ever", None);
    expect_clean(&run_with(1));
}

#[test]
fn a_fault_ends_its_block_alone() {
    let memory = Memory::new();
    let x = memory.upload("x", &[0u32; 8]);
    let at = x.global();
    let report = run_blocks(8, 1, &memory, move || {
        let block = block_idx_x() as usize;
        at.store(if block == 3 { 1000 } else { block }, 1); // only block 3
        at.store(block, 2);
    });
    HERE.expect(&report, FindingKind::OutOfBounds, "only block 3", None);
    assert_eq!(report.findings[0].block, [3, 0, 0]);
    assert_eq!(memory.read(&x), [2, 2, 2, 0, 2, 2, 2, 2]);
}
