//! Bank conflicts of FlashAttention-2's kernels, forward and backward: none in 16 bits; in f32 none in the main loops.
use ferroflash::{Backend, DType, LaunchReport, Session};
use ferroflash_tests::combination::Combination;
use ferroflash_tests::features::{FEATURES, plain};

/// Tokens: a multiple of the rows of all blocks.
const SEQLEN: usize = 128;

/// One sequence and one head with these features.
fn problem(dtype: DType, headdims: (usize, usize), feature: &str) -> Combination {
    let lengths = (SEQLEN, SEQLEN);
    let mut problem = Combination { lengths: vec![lengths], nheads_k: 1, group: 1, ..plain(dtype, lengths, headdims) };
    let (_, add) = FEATURES.into_iter().find(|(name, _)| *name == feature).expect("a feature");
    add(&mut problem);
    problem
}

/// Each launch, forward and backward, and what it met.
fn conflicts(problem: &Combination) -> Vec<(&'static str, u64)> {
    let session = Session::new(Backend::Simulator).expect("runs everywhere");
    let tensors = problem.tensors();
    let forward = problem.forward(&session, &tensors).expect("valid");
    let gradients = problem.backward(&session, &tensors, &forward).expect("valid");
    let of = |launch: LaunchReport| {
        let shared = launch.simulation.expect("simulated").counters.shared;
        // All but the sums of rows pass through shared memory.
        assert!(
            shared.accesses > 0 || ["row_sums", "prepare", "dsinks"].iter().any(|part| launch.entry.contains(part))
        );
        (launch.entry, shared.conflicts)
    };
    forward.report.launches.into_iter().chain(gradients.report.launches).map(of).collect()
}

#[test]
fn sixteen_bits_meet_none() {
    for headdims in [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)] {
        for feature in ["nothing", "causal", "everything"] {
            for deterministic in [false, true] {
                let mut problem = problem(DType::BF16, headdims, feature);
                problem.options.deterministic = deterministic;
                let met = conflicts(&problem);
                assert!(met.iter().all(|&(_, conflicts)| conflicts == 0), "{met:?}");
            }
        }
    }
}

/// Four lanes have the eight columns of a row of an accumulator, eight bytes each in f32: the four rows that a
/// wavefront could serve lie on the banks of two. It happens where O, dQ, dK and dV leave registers, once for each
/// element; were it in a main loop, there would be more for each step.
#[test]
fn f32_meets_them_where_results_leave_registers() {
    for headdim in [32, 64, 128, 256] {
        for allow_tf32 in [false, true] {
            let mut problem = problem(DType::F32, (headdim, headdim), "nothing");
            problem.options.allow_tf32 = allow_tf32;
            let of_a_result = (SEQLEN * headdim / 32) as u64;
            for (entry, conflicts) in conflicts(&problem) {
                let results = match entry {
                    _ if entry.contains("row_sums") => 0,
                    _ if entry.contains("dkdv") => 2,
                    _ => 1,
                };
                assert_eq!(conflicts, results * of_a_result, "{entry}");
            }
        }
    }
}
