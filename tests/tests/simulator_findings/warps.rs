//! Words that the lanes of a warp must say together.
use crate::{Source, expect_clean, run};
use cuda_std::element::f16;
use cuda_std::matrix::{ldmatrix, mma};
use cuda_std::shared::dynamic_shared;
use cuda_std::sim::FindingKind;
use cuda_std::thread::thread_idx_x;
use cuda_std::warp::{ALL, ballot, shuffle, shuffle_xor, sync_warp};

const HERE: Source = Source(include_str!("warps.rs"));

#[test]
fn two_kinds_of_shuffles() {
    let kernel = |right| {
        move || {
            let t = thread_idx_x();
            if right || t < 16 {
                shuffle_xor(ALL, t, 1); // one kind
            } else {
                shuffle(ALL, t, 1); // the other kind
            }
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Divergence, "the other kind", Some("one kind"));
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn a_shuffle_in_a_branch() {
    let kernel = |members| {
        move || {
            if thread_idx_x() < 16 {
                shuffle_xor(members, 0u32, 1); // half a warp
            }
        }
    };
    HERE.expect(&run(32, kernel(ALL)), FindingKind::Divergence, "half a warp", None);
    expect_clean(&run(32, kernel(0xffff)));
}

#[test]
fn a_loop_that_some_leave_early() {
    let kernel = |right| {
        move || {
            let mut rounds = if right { 4 } else { 4 + thread_idx_x() / 31 };
            while rounds > 0 {
                sync_warp(ALL); // in the loop
                rounds -= 1;
            }
            ballot(ALL, true); // behind the loop
        }
    };
    // Lane 31 is the last to run, and the one that does not come out.
    HERE.expect(&run(32, kernel(false)), FindingKind::Divergence, "in the loop", Some("behind the loop"));
    expect_clean(&run(32, kernel(true)));
}

#[test]
#[expect(clippy::if_same_then_else, reason = "two places are what this is about")]
fn branches_may_meet_in_a_shuffle() {
    expect_clean(&run(32, || {
        let t = thread_idx_x();
        let other = if t < 16 { shuffle_xor(ALL, t, 1) } else { shuffle_xor(ALL, t, 1) };
        assert_eq!(other, t ^ 1);
        if t < 8 {
            shuffle_xor(0xff, t, 1);
        }
        sync_warp(ALL);
    }));
}

#[test]
fn branches_may_not_meet_in_a_product() {
    let kernel = |right| {
        move || {
            let (mut d, a, b) = ([[[0.0; 4]; 1]; 1], [[0; 4]; 1], [[0; 2]; 1]);
            if right || thread_idx_x() < 16 {
                mma::<f16, 1, 1>(&mut d, &a, &b); // here
            } else {
                mma::<f16, 1, 1>(&mut d, &a, &b); // and there
            }
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Divergence, "and there", Some("here"));
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn branches_may_not_meet_in_a_load_of_matrices() {
    let kernel = |right| {
        move || {
            let row = 16 * thread_idx_x();
            dynamic_shared::<u32>().store_vector(row / 4, [0; 4]);
            sync_warp(ALL);
            if right || row < 256 {
                ldmatrix([row]); // one place
            } else {
                ldmatrix([row]); // another place
            }
        }
    };
    HERE.expect(&run(32, kernel(false)), FindingKind::Divergence, "another place", Some("one place"));
    expect_clean(&run(32, kernel(true)));
}

#[test]
fn a_lane_that_is_no_member() {
    let kernel = |members| {
        move || {
            sync_warp(members); // lane 31 too
        }
    };
    HERE.expect(&run(32, kernel(ALL >> 1)), FindingKind::Divergence, "lane 31 too", None);
    expect_clean(&run(32, kernel(ALL)));
}

#[test]
fn a_shuffle_from_no_member() {
    let kernel = |distance| {
        move || {
            if thread_idx_x() < 16 {
                shuffle_xor(0xffff, 0u32, distance); // from lane 16
            }
        }
    };
    HERE.expect(&run(32, kernel(16)), FindingKind::Divergence, "from lane 16", None);
    expect_clean(&run(32, kernel(8)));
}

#[test]
fn a_block_of_half_a_warp() {
    let kernel = |members| {
        move || {
            sync_warp(members); // of 16 threads
        }
    };
    HERE.expect(&run(16, kernel(ALL)), FindingKind::Divergence, "of 16 threads", None);
    expect_clean(&run(16, kernel(0xffff)));
}
