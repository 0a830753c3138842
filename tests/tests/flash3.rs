//! FlashAttention-3 on the simulated GPU, whose two multiprocessors take several tiles each: what the grid that all
//! kernels share leaves out.
use ferroflash::{Backend, DType, Kernel, Session, SimulatorOptions};
use ferroflash_tests::combination::Combination;
use ferroflash_tests::features::plain;
use ferroflash_tests::grid::Case;
use ferroflash_tests::guarded::Gaps;
use ferroflash_tests::pointers::Machine;

fn session() -> Session {
    Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(Kernel::Flash3)
}

/// The head dimensions that it is built for, shorter ones, and tiles of several blocks of keys.
#[test]
fn head_dimensions() {
    let session = session();
    for (i, headdim) in [8, 40, 64, 96, 128, 192, 256].into_iter().enumerate() {
        let dtype = [DType::F16, DType::BF16][i % 2];
        for causal in [false, true] {
            Case::single(dtype, (150, 450), headdim, causal).check(&session);
        }
    }
}

/// Heads of V that are shorter or longer than those of K.
#[test]
fn head_dimensions_of_v() {
    for headdims in [(64, 128), (192, 128), (40, 16)] {
        let combination = plain(DType::BF16, (70, 230), headdims);
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// More tiles than blocks of threads, of heads that share K and V, with a last block that has less to do.
#[test]
fn blocks_take_tile_after_tile() {
    for (seqlen_q, nheads, nheads_k) in [(300, 3, 3), (130, 6, 2), (700, 2, 1), (257, 1, 1)] {
        for causal in [false, true] {
            let case = Case { batch: 2, nheads, nheads_k, ..Case::single(DType::BF16, (seqlen_q, 400), 64, causal) };
            case.check(&session());
        }
    }
}

/// Sequences of different lengths, also of none.
#[test]
fn sequences_of_different_lengths() {
    for causal in [false, true] {
        let mut combination = Combination { varlen: true, ..plain(DType::F16, (0, 0), (64, 64)) };
        combination.lengths = vec![(5, 9), (0, 7), (200, 300), (130, 0), (64, 193), (150, 40), (0, 0)];
        combination.options.causal = causal;
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// Tensors with gaps between heads, tokens and batches, which it neither reads nor writes.
#[test]
fn tensors_with_gaps() {
    for (i, headdims) in [(64, 64), (48, 48), (128, 128), (192, 128), (256, 256)].into_iter().enumerate() {
        let mut combination = plain(DType::BF16, (140, 230), headdims);
        combination.options.causal = i % 2 == 1;
        let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i % 2];
        let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
        checked.unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// The order in which threads run must not matter, where stages are used again and again.
#[test]
fn any_order_of_threads_gives_the_same_bits() {
    let case = Case { nheads: 3, ..Case::single(DType::F16, (200, 700), 64, true) };
    let [q, k, v] = case.inputs();
    let run = |seed| {
        let mut options = SimulatorOptions::default();
        options.seed = seed;
        let session = session().simulator_options(options);
        session.attention(&q, &k, &v, &case.options()).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
    };
    let natural = run(0);
    for seed in 1..=4 {
        let permuted = run(seed);
        assert_eq!(natural.out.bytes(), permuted.out.bytes(), "seed {seed}");
        assert_eq!(natural.softmax_lse.bytes(), permuted.softmax_lse.bytes(), "seed {seed}");
    }
}
