//! Kernels write their outputs and nothing else, and read nothing around their inputs: all tensors lie in larger
//! allocations, with gaps between heads, tokens and batches that must not change around outputs and hold NaN around
//! inputs.
use ferroflash::raw::{Arguments, Call, RawTensor};
use ferroflash::{AttentionOptions, DType, Error, Inputs, Kernel, Layout, SimulatorOptions, sim};
use ferroflash_tests::combination::Combination;
use ferroflash_tests::features::{FEATURES, plain};
use ferroflash_tests::grid::DTYPES;
use ferroflash_tests::guarded::Gaps;
use ferroflash_tests::pointers::Machine;
use rayon::prelude::*;

/// Runs a problem by plain pointers, its gradients in one order of additions and in any.
fn check(machine: Machine, problem: &Combination, gaps: Gaps) {
    for deterministic in [true, false] {
        let mut problem = problem.clone();
        problem.options.deterministic = deterministic;
        problem.check_pointers(machine, Kernel::Auto, gaps).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// The elder families: causal or not, where rows are aligned.
fn check_elders(machine: Machine, lengths: (usize, usize), headdims: &[usize]) {
    for kernel in [Kernel::Standard, Kernel::Flash1] {
        for dtype in DTYPES {
            for &headdim in headdims {
                for causal in [false, true] {
                    let mut problem = plain(dtype, lengths, (headdim, headdim));
                    problem.options.causal = causal;
                    for gaps in [Gaps::Aligned, Gaps::HeadsFirst] {
                        problem.check_pointers(machine, kernel, gaps).unwrap_or_else(|reason| panic!("{reason}"));
                    }
                }
            }
        }
    }
}

#[test]
fn of_each_feature_on_the_simulator() {
    for (i, (_, feature)) in FEATURES.into_iter().enumerate() {
        // A head that is shorter than the kernel's, and one of an odd length.
        let headdims = if i % 2 == 0 { (24, 24) } else { (40, 27) };
        let mut problem = plain(DTYPES[i % 3], (35, 70), headdims);
        problem.nheads_k = 1;
        feature(&mut problem);
        check(Machine::Simulator, &problem, Gaps::OF_TOKENS[i % 3]);
    }
}

#[test]
fn of_each_head_dimension_on_the_simulator() {
    for (i, headdims) in
        [(32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (192, 192), (256, 256)].into_iter().enumerate()
    {
        let mut problem = plain(DTYPES[1 + i % 2], (19, 37), headdims);
        (problem.lengths, problem.group) = (vec![(19, 37)], 1);
        problem.options.causal = i % 2 == 0;
        check(Machine::Simulator, &problem, Gaps::OF_TOKENS[i % 2]);
    }
}

#[test]
fn of_the_elders_on_the_simulator() {
    check_elders(Machine::Simulator, (35, 70), &[32]);
}

/// Hopper's gradients, which the simulator chooses only where they are asked for: of wide heads too in one order of additions.
#[test]
fn of_gradients_of_flash3_on_the_simulator() {
    for (i, headdim) in [64, 96, 128, 192, 256].into_iter().enumerate() {
        for deterministic in [false, true] {
            let mut problem = plain(DTYPES[1 + i % 2], (70, 150), (headdim, headdim));
            problem.lengths = vec![(70, 150)];
            problem.options = problem.options.causal(i % 2 == 0).deterministic(deterministic);
            assert!(problem.has_backward(Kernel::Flash3), "{problem:?}");
            let gaps = Gaps::OF_TOKENS[i % 2];
            problem
                .check_pointers(Machine::Simulator, Kernel::Flash3, gaps)
                .unwrap_or_else(|reason| panic!("{reason}"));
        }
    }
}

/// The GPU; `None`, said aloud, where there is none.
fn gpu(test: &str) -> Option<Machine> {
    Machine::gpu().inspect_err(|reason| println!("skipped: {test}: {reason}")).ok()
}

#[test]
fn of_the_elders_on_the_gpu() {
    let Some(machine) = gpu("of_the_elders_on_the_gpu") else { return };
    check_elders(machine, (113, 203), &[32, 64, 128]);
}

/// Each feature with each head dimension and dtype; the gaps go round, so that each of these meets all of them.
#[test]
fn of_everything_on_the_gpu() {
    let Some(machine) = gpu("of_everything_on_the_gpu") else { return };
    let headdims = [
        (8, 8),
        (32, 32),
        (40, 40),
        (59, 59),
        (64, 64),
        (96, 96),
        (111, 64),
        (128, 128),
        (192, 128),
        (192, 192),
        (256, 256),
    ];
    let dtypes = [(DType::F32, false), (DType::F32, true), (DType::F16, false), (DType::BF16, false)];
    let all = headdims.iter().flat_map(|headdims| dtypes.iter().map(move |dtype| (headdims, dtype)));
    let all = all.flat_map(|of| FEATURES.iter().map(move |(_, feature)| (of, feature)));
    let problems = all.enumerate().map(|(i, ((&headdims, &(dtype, allow_tf32)), feature))| {
        let mut problem = plain(dtype, (113, 203), headdims);
        feature(&mut problem);
        problem.options.allow_tf32 = allow_tf32;
        (problem, Gaps::OF_TOKENS[i % 3])
    });
    // Beside each other, as most of the time is the driver's, which compiles what no problem before has launched.
    problems.par_bridge().for_each(|(problem, gaps)| check(machine, &problem, gaps));
}

/// What the simulator is relied on for: an output that is one element too short is reported, as is an input.
#[test]
fn one_element_too_few_is_reported() {
    const SHAPE: [usize; 4] = [1, 20, 1, 32];
    const ELEMENTS: usize = 20 * 32;
    let run = |short: &str| {
        let memory = sim::Memory::new();
        let len = |name| ELEMENTS - usize::from(name == short);
        let tensor = |name: &'static str| RawTensor {
            address: memory.upload(name, &vec![half::f16::ONE; len(name)]).global().address(),
            layout: Layout::contiguous(DType::F16, &SHAPE).expect("small"),
        };
        let lse = memory.upload("LSE", &vec![0f32; 20 - usize::from(short == "LSE")]);
        let call = Call::new(&Arguments {
            inputs: Inputs::new(tensor("Q"), tensor("K"), tensor("V")),
            out: tensor("O"),
            softmax_lse: RawTensor {
                address: lse.global().address(),
                layout: Layout::contiguous(DType::F32, &[1, 1, 20]).expect("small"),
            },
            options: AttentionOptions::new(),
            kernel: Kernel::Flash2,
        });
        call.expect("the layouts fit").simulate(&memory, 0, &SimulatorOptions::default())
    };
    assert!(run("nothing").is_ok());
    for name in ["Q", "K", "V", "O", "LSE"] {
        let Err(Error::Simulation { findings, .. }) = run(name) else { panic!("{name}: no finding") };
        let named = format!(" at {name}[");
        assert!(findings.iter().any(|f| f.starts_with("out of bounds") && f.contains(&named)), "{findings:?}");
    }
}
