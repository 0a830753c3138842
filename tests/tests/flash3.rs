//! FlashAttention-3 on the simulated GPU, whose two multiprocessors take several tiles each: what the grid that all
//! kernels share leaves out.
use ferroflash::{AttentionOptions, Backend, DType, Inputs, Kernel, Session, SimulatorOptions, TensorRef, accuracy};
use ferroflash_tests::beside;
use ferroflash_tests::combination::Combination;
use ferroflash_tests::features::plain;
use ferroflash_tests::grid::Case;
use ferroflash_tests::guarded::Gaps;
use ferroflash_tests::inputs::tensor;
use ferroflash_tests::pointers::Machine;
use half::f16;
use kernels::{Config, flash3};

/// How many sequences are put into order at a head dimension, by kernels that are neither for few queries nor general.
fn most_sequences(headdim: u32) -> usize {
    let is_its = |config: &&Config| config.headdim == headdim && !config.few && !config.general;
    let mut configs = flash3::FORWARD.iter().map(|kernel| &kernel.config);
    configs.find(is_its).expect("the table has it").sequences as usize
}

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

/// Many keys, for which there are kernels with tiles of their own, where they are not divided: queries that end in the middle of
/// one.
#[test]
fn many_keys() {
    let chosen = flash3::FORWARD.iter().filter(|kernel| kernel.config.from_keys > 0);
    for kernel in chosen.filter(|kernel| kernel.config.dtype == DType::BF16) {
        let Config { headdim, headdim_v, causal, from_keys, .. } = kernel.config;
        let headdims = (headdim as usize, headdim_v as usize);
        let mut combination = plain(DType::BF16, (180, from_keys as usize + 13), headdims);
        combination.options.causal = causal == Some(true);
        combination.options.num_splits = 1;
        let tensors = combination.tensors();
        let forward = combination.forward(&session(), &tensors).unwrap_or_else(|reason| panic!("{reason}"));
        assert_eq!(forward.report.launches[0].entry, kernel.name);
        let accuracy = combination.accuracy(&tensors, &forward).expect("of these tensors");
        assert!(accuracy.passed(), "{}: {accuracy}", kernel.name);
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

/// Heads that share K and V lie in tiles together, as the report says: steps of decoding and short pieces, also with tails;
/// groups that hold several packs; and heads that are no power of two.
#[test]
fn packed_heads() {
    for (i, (seqlen_q, nheads, nheads_k, packed)) in [
        (1, 2, 1, 2),
        (1, 8, 2, 4),
        (5, 16, 2, 8),
        (33, 8, 2, 4),
        (1, 64, 1, 64),
        (3, 128, 1, 64),
        (2, 12, 1, 4),
        (40, 6, 1, 2),
        (130, 4, 1, 4),
        (3, 6, 2, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let headdim = [64, 128, 192][i % 3];
        for causal in [false, true] {
            let shape = Case::single([DType::F16, DType::BF16][i % 2], (seqlen_q, 290), headdim, causal);
            let case = Case { batch: 2, nheads, nheads_k, ..shape };
            let (result, accuracy) = case.run(&session());
            assert!(accuracy.passed(), "{case:?}: {accuracy}");
            let said = format!("{packed} heads that share K and V are packed into tiles");
            let reason = &result.report.reason;
            assert!(if packed > 1 { reason.contains(&said) } else { !reason.contains("packed") }, "{case:?}: {reason}");
        }
    }
}

/// Packed heads of sequences of different lengths, also of none and of more queries than keys; of more sequences than are put
/// into order; and of tensors with gaps.
#[test]
fn packed_heads_of_sequences_and_of_tensors_with_gaps() {
    let lengths = vec![(1, 90), (0, 7), (40, 300), (13, 0), (6, 193), (50, 40), (1, 1), (0, 0)];
    let many = (0..most_sequences(64) + 1).map(|i| (i % 2, (5 * i) % 7)).collect();
    for (lengths, group, causal) in [(lengths.clone(), 8, false), (lengths, 8, true), (many, 4, true)] {
        let mut combination = Combination { varlen: true, nheads_k: 1, group, ..plain(DType::F16, (0, 0), (64, 64)) };
        (combination.lengths, combination.options.causal) = (lengths, causal);
        let forward = combination.forward(&session(), &combination.tensors()).expect("valid");
        assert!(forward.report.reason.contains("are packed"), "{}", forward.report.reason);
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
    for (i, group) in [2, 4, 8].into_iter().enumerate() {
        let mut combination = Combination { group, ..plain(DType::BF16, (19, 150), (64, 64)) };
        combination.options.causal = i % 2 == 0;
        let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i % 2];
        let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
        checked.unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// A value that is not finite reaches the queries that see it, of the heads that have it, and no other row of their tile.
#[test]
fn packed_heads_see_what_they_see() {
    let (seqlen_q, seqlen_k, nheads, nheads_k) = (30, 60, 8, 2);
    let case = Case { nheads, nheads_k, ..Case::single(DType::BF16, (seqlen_q, seqlen_k), 64, true) };
    let [q, k, v] = case.inputs();
    for value in [f32::NAN, f32::INFINITY] {
        // Column 5 of key 45 of the second head of V.
        let mut values = v.to_f32();
        values[(45 * nheads_k + 1) * 64 + 5] = value;
        let v = tensor(DType::BF16, values, v.shape());
        let result = session().attention(&q, &k, &v, &case.options()).expect("valid");
        let accuracy = accuracy::check(&q, &k, &v, &case.options(), &result).expect("valid");
        assert!(accuracy.passed(), "{value}: {accuracy}");
        for (row, o) in result.out.to_f32().chunks(64).enumerate() {
            let (query, head) = (row / nheads, row % nheads);
            let sees = query + seqlen_k - seqlen_q >= 45 && head >= nheads / nheads_k;
            let others_are_finite = o.iter().enumerate().all(|(column, o)| column == 5 || o.is_finite());
            assert!(others_are_finite && o[5].is_finite() != sees, "{value}: query {query}, head {head}");
        }
    }
}

/// Keys that are divided into parts: as many as asked for, or one a block; of packed heads and of single ones, of tiles of which
/// rows see no key of a part, and of several tiles.
#[test]
fn divided_keys() {
    for (i, (lengths, nheads, nheads_k, splits)) in [
        ((1, 600), 4, 4, 2),
        ((1, 1300), 8, 2, 5),
        ((3, 700), 8, 1, 128),
        ((70, 500), 4, 2, 3),
        ((300, 330), 2, 1, 4),
        ((260, 200), 2, 2, 3),
        ((33, 40), 4, 1, 7),
    ]
    .into_iter()
    .enumerate()
    {
        let headdim = [64, 128][i % 2];
        for causal in [false, true] {
            let shape = Case::single([DType::F16, DType::BF16][i % 2], lengths, headdim, causal);
            let case = Case { batch: 2, nheads, nheads_k, ..shape };
            let [q, k, v] = case.inputs();
            let options = case.options().num_splits(splits);
            let result = session().attention(&q, &k, &v, &options).unwrap_or_else(|error| panic!("{case:?}: {error}"));
            let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("of these tensors");
            assert!(accuracy.passed(), "{case:?}: {accuracy}");
            let launches: Vec<_> = result.report.launches.iter().map(|launch| launch.entry).collect();
            let blocks = lengths.1.div_ceil(headdim);
            assert_eq!(launches.len(), if blocks > 1 { 2 } else { 1 }, "{case:?}: {launches:?}");
            let said = format!("the keys of a tile are divided among {} blocks of threads", splits.min(blocks));
            assert!(blocks == 1 || result.report.reason.contains(&said), "{case:?}: {}", result.report.reason);
        }
    }
}

/// A step of decoding, whose keys are divided without being asked, and the same bits again; never where that is asked.
#[test]
fn divided_keys_of_a_step_of_decoding() {
    let case = Case { nheads: 4, nheads_k: 2, ..Case::single(DType::BF16, (1, 2100), 128, false) };
    let [q, k, v] = case.inputs();
    let run = |num_splits| session().attention(&q, &k, &v, &case.options().num_splits(num_splits)).expect("valid");
    let (first, second) = (run(0), run(0));
    assert!(first.report.reason.ends_with("divided among 9 blocks of threads"), "{}", first.report.reason);
    assert_eq!(first.out.bytes(), second.out.bytes());
    assert_eq!(run(1).report.launches.len(), 1);
    let accuracy = accuracy::check(&q, &k, &v, &case.options(), &first).expect("valid");
    assert!(accuracy.passed(), "{accuracy}");
}

/// Divided keys of sequences of different lengths, which have few parts, or no keys at all; and of tensors with gaps.
#[test]
fn divided_keys_of_sequences_and_of_tensors_with_gaps() {
    for (group, causal) in [(1, false), (4, true)] {
        let mut combination = Combination { varlen: true, nheads_k: 2, group, ..plain(DType::F16, (0, 0), (64, 64)) };
        combination.lengths = vec![(1, 900), (0, 7), (40, 300), (13, 0), (6, 193), (50, 40), (1, 1), (0, 0)];
        combination.options = combination.options.causal(causal).num_splits(6);
        let forward = combination.forward(&session(), &combination.tensors()).expect("valid");
        assert!(forward.report.reason.contains("divided among 6"), "{}", forward.report.reason);
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
    for (i, group) in [1, 4].into_iter().enumerate() {
        let mut combination = Combination { group, ..plain(DType::BF16, (19, 350), (64, 64)) };
        combination.options = combination.options.causal(i % 2 == 0).num_splits(3);
        let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i % 2];
        let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
        checked.unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// A value that is not finite reaches the queries that see it, also through parts of the keys, and no other row; and a score
/// that is NaN makes its row NaN.
#[test]
fn divided_keys_are_seen_by_who_sees_them() {
    let (seqlen_q, seqlen_k, nheads, nheads_k) = (30, 260, 8, 2);
    let case = Case { nheads, nheads_k, ..Case::single(DType::BF16, (seqlen_q, seqlen_k), 64, true) };
    let [q, k, v] = case.inputs();
    let options = case.options().num_splits(4);
    let with = |x: &ferroflash::Tensor, at: usize, value: f32| {
        let mut values = x.to_f32();
        values[at] = value;
        tensor(DType::BF16, values, x.shape())
    };
    for value in [f32::NAN, f32::INFINITY] {
        // Column 5 of key 245 of the second head of V.
        let v = with(&v, (245 * nheads_k + 1) * 64 + 5, value);
        let result = session().attention(&q, &k, &v, &options).expect("valid");
        let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
        assert!(accuracy.passed(), "{value}: {accuracy}");
        for (row, o) in result.out.to_f32().chunks(64).enumerate() {
            let (query, head) = (row / nheads, row % nheads);
            let sees = query + seqlen_k - seqlen_q >= 245 && head >= nheads / nheads_k;
            let others_are_finite = o.iter().enumerate().all(|(column, o)| column == 5 || o.is_finite());
            assert!(others_are_finite && o[5].is_finite() != sees, "{value}: query {query}, head {head}");
        }
        // Query 7 of head 3.
        let q = with(&q, (7 * nheads + 3) * 64, value);
        let result = session().attention(&q, &k, &case.inputs()[2], &options).expect("valid");
        for (row, o) in result.out.to_f32().chunks(64).enumerate() {
            let is_of_nan = row == 7 * nheads + 3;
            assert!(o.iter().all(|o| o.is_nan() == is_of_nan), "{value}: row {row}");
        }
        assert!(result.softmax_lse.to_f32()[3 * seqlen_q + 7].is_nan());
    }
}

/// Many keys a query under a causal mask, where tiles are not paired: of packed heads, and of single ones, which are too few for
/// the larger tiles of kernels for many keys.
#[test]
fn tiles_that_cost_the_same() {
    for (lengths, nheads) in [((40, 700), 8), ((150, 2400), 1)] {
        let case = Case { batch: 3, nheads, ..Case::single(DType::BF16, lengths, 128, true) };
        let (result, accuracy) = case.run(&session());
        assert!(accuracy.passed(), "{case:?}: {accuracy}");
        assert_eq!(result.report.launches[0].entry, "flash3_fwd_bf16_d128_2x128_causal_few", "{case:?}");
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

/// Under a causal mask: units of two tiles, of which two multiprocessors have as many each and one is left, whose tiles they share;
/// and fewer tiles than multiprocessors.
#[test]
fn tiles_of_a_unit_that_is_left_are_shared() {
    for (i, (nheads, headdim, seqlen)) in
        [(5, 128, 256), (3, 64, 500), (5, 256, 250), (3, 192, 256), (1, 96, 100)].into_iter().enumerate()
    {
        let dtype = [DType::F16, DType::BF16][i % 2];
        let case = Case { nheads, nheads_k: nheads, ..Case::single(dtype, (seqlen, seqlen), headdim, true) };
        case.check(&session());
    }
}

/// Many sequences, which blocks of threads take the longest first; and more than they put into order.
#[test]
fn many_sequences() {
    let lengths = |count, most| (0..count).map(|i| ((7 * i) % most, (5 * i + 3) % most)).collect::<Vec<_>>();
    for (lengths, causal) in
        [(lengths(40, 290), false), (lengths(40, 290), true), (lengths(most_sequences(64) + 1, 5), false)]
    {
        let group = if lengths.len() > 40 { 1 } else { 2 };
        let plain = plain(DType::F16, (0, 0), (64, 64));
        let mut combination = Combination { varlen: true, lengths, nheads_k: 1, group, ..plain };
        combination.options.causal = causal;
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
    // Where tiles leave room for fewer: as many, and one more.
    let most = most_sequences(256);
    for count in [most, most + 1] {
        let plain = plain(DType::BF16, (0, 0), (256, 256));
        let combination = Combination { varlen: true, lengths: lengths(count, 9), nheads_k: 1, group: 1, ..plain };
        combination.check_forward(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// Tensors with gaps between heads, tokens and batches, which it neither reads nor writes; forward, and backward where
/// heads of V are as long as those of K.
#[test]
fn tensors_with_gaps() {
    for (i, headdims) in [(64, 64), (48, 48), (128, 128), (192, 128), (256, 256)].into_iter().enumerate() {
        let mut combination = plain(DType::BF16, (140, 230), headdims);
        combination.options.causal = i % 2 == 1;
        let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i % 2];
        let has_order = combination.headdim <= 128;
        for deterministic in [false, true].into_iter().filter(|deterministic| !deterministic || has_order) {
            combination.options.deterministic = deterministic;
            let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
            checked.unwrap_or_else(|reason| panic!("{reason}"));
        }
    }
}

/// A problem of so many queries and keys that a kernel has to ask its arguments for, in each way in which it may.
fn asking(lengths: (usize, usize), headdims: (usize, usize)) -> [Combination; 6] {
    let plain = || plain(DType::BF16, lengths, headdims);
    let of = |options: fn(AttentionOptions) -> AttentionOptions| Combination {
        options: options(AttentionOptions::new()),
        ..plain()
    };
    [
        of(|options| options.causal(true).window_size(100, None)),
        of(|options| options.window_size(30, 70)),
        of(|options| options.causal(true).softcap(2.0)),
        Combination { alibi: Some(true), ..of(|options| options.window_size(None, 50).softcap(20.0)) },
        Combination { sinks: true, alibi: Some(false), ..of(|options| options.causal(true)) },
        Combination { sinks: true, ..of(|options| options.softmax_scale(-0.2).window_size(90, None)) },
    ]
}

/// Checks a problem, and that it was a general kernel that ran it. What has run, and how, as the report says.
fn check_general(combination: &Combination) -> (Vec<&'static str>, String) {
    let tensors = combination.tensors();
    let forward =
        combination.forward(&session(), &tensors).unwrap_or_else(|reason| panic!("{combination:?}: {reason}"));
    let entry = forward.report.launches[0].entry;
    assert!(entry.ends_with("_general"), "{combination:?}: {entry}");
    let accuracy = combination.accuracy(&tensors, &forward).expect("of these tensors");
    assert!(accuracy.passed(), "{combination:?}: {accuracy}");
    (forward.report.launches.iter().map(|launch| launch.entry).collect(), forward.report.reason)
}

/// Windows, caps, ALiBi, sinks and scales of any sign, of all head dimensions that it is built for and of shorter ones, with
/// tails of tiles and of blocks.
#[test]
fn general_head_dimensions() {
    let headdims = [(8, 8), (64, 64), (88, 96), (128, 128), (192, 128), (192, 192), (256, 256)];
    for (i, headdims) in headdims.into_iter().enumerate() {
        for (j, combination) in asking((210, 470), headdims).into_iter().enumerate() {
            let dtype = [DType::F16, DType::BF16][(i + j) % 2];
            check_general(&Combination { dtype, lengths: vec![(210, 470)], group: 1, ..combination });
        }
    }
}

/// Windows of any width, in which a warpgroup leaves out blocks of keys before or behind its own, that other warpgroups see; of
/// queries that see no key; of more queries than keys, and fewer; of tile after tile.
#[test]
fn windows() {
    for (lengths, left, right) in [
        ((700, 700), Some(0), Some(0)),
        ((700, 700), Some(63), Some(0)),
        ((700, 900), Some(128), Some(0)),
        ((700, 700), Some(300), Some(0)),
        ((500, 900), Some(0), Some(64)),
        ((500, 400), Some(1), Some(200)),
        ((260, 1100), Some(1000), Some(3)),
        ((400, 130), Some(20), Some(0)),
        ((500, 300), None, Some(40)),
        ((500, 300), Some(40), None),
        ((1, 600), Some(130), Some(0)),
        ((20, 600), Some(70), Some(5)),
        ((193, 1), Some(7), Some(9)),
    ] {
        for headdim in [64, 256] {
            let mut combination = plain(DType::BF16, lengths, (headdim, headdim));
            combination.options = combination.options.window_size(left, right);
            combination.group = 3;
            check_general(&combination);
        }
    }
}

/// Sequences of different lengths, of which some have no key, no query, or rows that see nothing.
#[test]
fn general_sequences_of_different_lengths() {
    let lengths = vec![(5, 9), (0, 7), (200, 300), (130, 0), (64, 193), (150, 40), (0, 0), (300, 300)];
    let many = (0..most_sequences(64) + 1).map(|i| (i % 2, (5 * i) % 7)).collect();
    for (i, combination) in asking((0, 0), (64, 64)).into_iter().enumerate() {
        check_general(&Combination { varlen: true, lengths: lengths.clone(), sinks: i % 2 == 0, ..combination });
    }
    let [window, ..] = asking((0, 0), (64, 64));
    check_general(&Combination { varlen: true, lengths: many, nheads_k: 1, group: 1, sinks: true, ..window });
}

/// Packed heads, each with a slope and a sink of its own, of all head dimensions: steps of decoding and short pieces, with windows
/// that begin behind the first block; of more queries than keys, so that rows see nothing.
#[test]
fn general_packed_heads() {
    let shapes = [(1, 290, 1, 4), (5, 330, 2, 8), (33, 290, 1, 4), (1, 140, 1, 64), (200, 105, 1, 4), (130, 300, 1, 8)];
    for (i, (seqlen_q, seqlen_k, nheads_k, group)) in shapes.into_iter().enumerate() {
        for (j, combination) in asking((seqlen_q, seqlen_k), (64, 64)).into_iter().enumerate() {
            let headdim = [64, 128, 96, 192, 40, 256][(i + j) % 6];
            let mut combination = Combination { nheads_k, group, headdim, headdim_v: headdim, ..combination };
            combination.dtype = [DType::F16, DType::BF16][(i + j) % 2];
            combination.sinks |= i % 2 == 0;
            combination.alibi = combination.alibi.or((i % 3 == 0).then_some(true));
            let (entries, reason) = check_general(&combination);
            assert!(entries.len() == 1 && entries[0].ends_with("_few_general"), "{combination:?}: {entries:?}");
            assert!(reason.contains(&format!("{group} heads that share K and V are packed")), "{reason}");
        }
    }
}

/// Divided keys, with windows of which only what they show is divided, with rows that see no key of a part, or none at all, and
/// with sinks, which count once.
#[test]
fn general_divided_keys() {
    let shapes = [
        ((1, 600), 4, 1, 2),
        ((1, 900), 2, 4, 128),
        ((3, 700), 1, 8, 5),
        ((70, 500), 2, 2, 3),
        ((260, 200), 2, 1, 3),
        ((33, 140), 1, 4, 7),
    ];
    for (i, (lengths, nheads_k, group, splits)) in shapes.into_iter().enumerate() {
        for (j, combination) in asking(lengths, (64, 64)).into_iter().enumerate() {
            let headdim = [64, 128, 96, 48, 192, 256][(i + j) % 6];
            let mut combination = Combination { nheads_k, group, headdim, headdim_v: headdim, ..combination };
            combination.dtype = [DType::F16, DType::BF16][(i + j) % 2];
            combination.sinks |= (i + j) % 2 == 0;
            combination.options.num_splits = splits;
            let (entries, reason) = check_general(&combination);
            let combine = format!("flash3_combine_{}_general", combination.dtype.name());
            assert_eq!(entries[1..], [combine], "{combination:?}");
            assert!(entries[0].ends_with("_few_general"), "{combination:?}: {entries:?}");
            assert!(reason.contains("the keys of a tile are divided among"), "{reason}");
        }
    }
}

/// A step of decoding in a window, whose keys are divided without being asked; never where that is asked.
#[test]
fn general_divided_keys_of_a_step_of_decoding() {
    let mut combination = Combination { group: 4, sinks: true, ..plain(DType::BF16, (1, 2600), (128, 128)) };
    combination.options = combination.options.causal(true).window_size(1999, None);
    let (entries, reason) = check_general(&combination);
    assert_eq!(entries, ["flash3_fwd_bf16_d128_2x128_few_general", "flash3_combine_bf16_general"]);
    // 2000 keys are at most 17 blocks of 128.
    assert!(reason.ends_with("divided among 9 blocks of threads"), "{reason}");
    combination.options.num_splits = 1;
    assert_eq!(check_general(&combination).0.len(), 1);
}

/// Few queries of sequences of different lengths, packed and divided, of which some have no key, no query, or rows that see
/// nothing; of more sequences than are put into order; and of tensors with gaps.
#[test]
fn general_few_queries_of_sequences_and_of_tensors_with_gaps() {
    let lengths = vec![(1, 700), (0, 7), (40, 300), (13, 0), (6, 193), (50, 40), (1, 1), (0, 0)];
    for (i, combination) in asking((0, 0), (64, 64)).into_iter().enumerate() {
        let mut combination = Combination { varlen: true, lengths: lengths.clone(), group: 4, ..combination };
        (combination.sinks, combination.options.num_splits) = (i % 3 != 1, [0, 6][i % 2]);
        let (entries, reason) = check_general(&combination);
        assert_eq!(entries.len(), if i % 2 == 0 { 1 } else { 2 }, "{combination:?}: {entries:?}");
        assert!(reason.contains("4 heads that share K and V are packed"), "{reason}");
    }
    let many = (0..most_sequences(64) + 1).map(|i| (i % 2, (5 * i) % 7)).collect();
    let [.., of_sinks] = asking((0, 0), (64, 64));
    check_general(&Combination { varlen: true, lengths: many, nheads_k: 1, group: 4, ..of_sinks });
    for (i, combination) in asking((19, 350), (64, 64)).into_iter().enumerate() {
        let mut combination = Combination { group: [1, 4][i % 2], ..combination };
        combination.options.num_splits = 3;
        let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i / 2 % 2];
        let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
        checked.unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// Scores near the cap and beyond, where tanh is no polynomial; and far below.
#[test]
fn caps() {
    for (softcap, scale) in [(1.0, 2.0), (5.0, 0.5), (50.0, 0.125), (0.01, 0.125), (3.0, -1.0)] {
        let mut combination = plain(DType::F16, (70, 200), (64, 64));
        combination.options = combination.options.causal(true).softcap(softcap).softmax_scale(scale);
        check_general(&combination);
    }
}

/// Tensors with gaps, which general kernels neither read nor write.
#[test]
fn general_tensors_with_gaps() {
    for (i, headdims) in [(48, 48), (128, 128)].into_iter().enumerate() {
        for combination in asking((140, 230), headdims) {
            let gaps = [Gaps::Aligned, Gaps::HeadsFirst][i % 2];
            let checked = combination.check_pointers(Machine::Simulator, Kernel::Flash3, gaps);
            checked.unwrap_or_else(|reason| panic!("{reason}"));
        }
    }
}

/// A value that is not finite reaches the queries whose windows have its key, and no other row of their tile.
#[test]
fn windows_hide_what_is_not_finite() {
    let (seqlen, left, nheads) = (150, 40, 2);
    let case = Case { nheads, nheads_k: nheads, ..Case::single(DType::BF16, (seqlen, seqlen), 64, true) };
    let [q, k, v] = case.inputs();
    for (value, softcap) in [(f32::NAN, None), (f32::INFINITY, None), (f32::NAN, Some(30.0))] {
        let mut options = AttentionOptions::new().causal(true).window_size(left, None);
        options.softcap = softcap;
        // Column 5 of key 61 of the second head of V.
        let mut values = v.to_f32();
        values[(61 * nheads + 1) * 64 + 5] = value;
        let v = tensor(DType::BF16, values, v.shape());
        let result = session().attention(&q, &k, &v, &options).expect("valid");
        let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
        assert!(accuracy.passed(), "{value}: {accuracy}");
        for (row, o) in result.out.to_f32().chunks(64).enumerate() {
            let (query, head) = (row / nheads, row % nheads);
            let sees = (61..=61 + left).contains(&query) && head == 1;
            let others_are_finite = o.iter().enumerate().all(|(column, o)| column == 5 || o.is_finite());
            assert!(others_are_finite && o[5].is_finite() != sees, "{value}: query {query}, head {head}");
        }
    }
}

/// The same where heads are packed, and keys divided: through the parts that a window shows, capped or not.
#[test]
fn windows_of_divided_keys_hide_what_is_not_finite() {
    let (seqlen_q, seqlen_k, nheads, nheads_k, left) = (30, 400, 8, 2, 150);
    let case = Case { nheads, nheads_k, ..Case::single(DType::BF16, (seqlen_q, seqlen_k), 64, true) };
    let [q, k, v] = case.inputs();
    for (value, softcap) in [(f32::NAN, None), (f32::INFINITY, None), (f32::NAN, Some(30.0))] {
        let mut options = AttentionOptions::new().causal(true).window_size(left, None).num_splits(3);
        options.softcap = softcap;
        // Column 5 of keys that the first queries see and the last do not, and the other way round, of the second head of V.
        for key in [230, 390] {
            let mut values = v.to_f32();
            values[(key * nheads_k + 1) * 64 + 5] = value;
            let v = tensor(DType::BF16, values, v.shape());
            let result = session().attention(&q, &k, &v, &options).expect("valid");
            assert_eq!(result.report.launches.len(), 2, "{}", result.report.reason);
            let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
            assert!(accuracy.passed(), "{value}: {accuracy}");
            for (row, o) in result.out.to_f32().chunks(64).enumerate() {
                let (place, head) = (row / nheads + seqlen_k - seqlen_q, row % nheads);
                let sees = key <= place && place <= key + left && head >= nheads / nheads_k;
                let others_are_finite = o.iter().enumerate().all(|(column, o)| column == 5 || o.is_finite());
                assert!(others_are_finite && o[5].is_finite() != sees, "{value}: key {key}, row {row}");
            }
        }
        // Query 7 of head 3: its scores are NaN.
        let mut queries = q.to_f32();
        queries[(7 * nheads + 3) * 64] = f32::NAN;
        let result = session().attention(&tensor(DType::BF16, queries, q.shape()), &k, &v, &options).expect("valid");
        for (row, o) in result.out.to_f32().chunks(64).enumerate() {
            assert!(o.iter().all(|o| o.is_nan() == (row == 7 * nheads + 3)), "row {row}");
        }
        assert!(result.softmax_lse.to_f32()[3 * seqlen_q + 7].is_nan());
    }
}

/// What general kernels leave to flash2 is named.
#[test]
fn features_that_it_has_not() {
    let refused = |combination: Combination| {
        combination.forward(&session(), &combination.tensors()).expect_err("refused").to_string()
    };
    let problem = || plain(DType::BF16, (20, 30), (64, 64));
    let of_bias = refused(Combination { bias: Some([false; 3]), ..problem() });
    assert!(of_bias.contains("flash3: no kernel of bf16 and headdim 64 for bias ["), "{of_bias}");
    assert!(of_bias.ends_with("; allowed: no bias"), "{of_bias}");
    let of_both = refused(Combination {
        mask: Some([true; 3]),
        options: problem().options.softcap(3.0).dropout(0.5, 1, 2),
        ..problem()
    });
    assert!(of_both.contains("flash3: no kernel of bf16 and headdim 64 for mask ["), "{of_both}");
    assert!(of_both.ends_with(", dropout_p 0.5; allowed: no mask, dropout_p 0"), "{of_both}");
}

/// Gradients of the head dimensions that the backward pass is built for and of shorter ones, with tails of blocks.
#[test]
fn gradients_of_head_dimensions() {
    let session = session();
    for (i, headdim) in [8, 40, 64, 96, 128, 192, 256].into_iter().enumerate() {
        let dtype = [DType::F16, DType::BF16][i % 2];
        for causal in [false, true] {
            Case::single(dtype, (90, 150), headdim, causal).check_backward(&session);
        }
    }
}

/// Gradients by the tile for many keys.
#[test]
fn gradients_of_many_keys() {
    let case = Case::single(DType::BF16, (100, 2050), 128, false);
    let (gradients, accuracy) = case.run_backward(&session());
    assert!(accuracy.passed(), "{accuracy}");
    assert_eq!(gradients.report.launches[1].entry, "flash3_bwd_bf16_d128_m80");
}

/// Gradients of so many heads that these take turns at the sums of dQ: two more than have a place.
#[test]
fn gradients_of_many_heads() {
    let case = Case { batch: 67, nheads: 4, nheads_k: 4, ..Case::single(DType::BF16, (20, 30), 64, false) };
    let (gradients, accuracy) = case.run_backward(&session());
    assert!(accuracy.passed(), "{accuracy}");
    let launches: Vec<_> = gradients.report.launches.iter().map(|launch| (launch.entry, launch.grid)).collect();
    let in_ring = |what: &str| format!("flash3_bwd_{what}ring_bf16_d64_m128");
    assert_eq!(launches.iter().map(|&(entry, _)| entry).collect::<Vec<_>>(), ["prepare_", "", "finish_"].map(in_ring));
    // The last heads: one, and as many as a wave of blocks of threads and a fifth of one takes.
    assert_eq!(launches.iter().map(|&(_, grid)| grid).collect::<Vec<_>>(), [268, 268, 160]);
}

/// Gradients of heads that share K and V, and of more queries than keys.
#[test]
fn gradients_of_grouped_queries() {
    for (seqlen_q, nheads, nheads_k) in [(130, 6, 2), (260, 2, 1)] {
        for causal in [false, true] {
            let case = Case { batch: 2, nheads, nheads_k, ..Case::single(DType::F16, (seqlen_q, 140), 64, causal) };
            case.check_backward(&session());
        }
    }
}

/// Gradients of sequences of different lengths, also of none, of a loss that depends on the LSE.
#[test]
fn gradients_of_sequences_of_different_lengths() {
    for (headdim, causal) in [(64, false), (64, true), (48, true), (256, false)] {
        let mut combination = Combination { varlen: true, dlse: true, ..plain(DType::F16, (0, 0), (headdim, headdim)) };
        combination.lengths = vec![(5, 9), (0, 7), (100, 150), (70, 0), (64, 130), (150, 40), (0, 0)];
        combination.options.causal = causal;
        combination.check(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// Checks a problem's gradients, and that it was the general pass that found them.
fn check_general_gradients(combination: &Combination) {
    let checked = combination.check_and_see(&session(), |gradients| {
        let entry = gradients.report.launches[1].entry;
        assert!(entry.starts_with("flash3_bwd_general_"), "{combination:?}: {entry}");
    });
    checked.unwrap_or_else(|reason| panic!("{reason}"));
}

/// Gradients through windows, caps, ALiBi, sinks and scales of any sign, of all head dimensions that the pass is built for and of
/// shorter ones, with tails of blocks.
#[test]
fn general_gradients_of_head_dimensions() {
    for (i, headdim) in [8, 64, 88, 128, 192, 256].into_iter().enumerate() {
        for (j, combination) in asking((210, 330), (headdim, headdim)).into_iter().enumerate() {
            let dtype = [DType::F16, DType::BF16][(i + j) % 2];
            check_general_gradients(&Combination { dtype, dlse: j % 2 == 0, group: 1 + j % 2, ..combination });
        }
    }
}

/// Windows of any width: keys that nobody sees, queries that see no key, blocks that only the window's left or right edge crosses,
/// or both.
#[test]
fn gradients_in_windows() {
    for (lengths, left, right) in [
        ((700, 700), Some(0), Some(0)),
        ((700, 900), Some(128), Some(0)),
        ((500, 700), Some(300), Some(64)),
        ((500, 400), Some(1), Some(200)),
        ((400, 130), Some(20), Some(0)),
        ((300, 500), None, Some(40)),
        ((500, 300), Some(40), None),
        ((1, 600), Some(130), Some(0)),
        ((193, 1), Some(7), Some(9)),
    ] {
        for headdim in [64, 128, 256] {
            let mut combination = plain(DType::BF16, lengths, (headdim, headdim));
            combination.options = combination.options.window_size(left, right);
            combination.group = 2;
            check_general_gradients(&combination);
        }
    }
}

/// The same of sequences of different lengths, also of none.
#[test]
fn general_gradients_of_sequences_of_different_lengths() {
    let lengths = vec![(5, 9), (0, 7), (200, 300), (130, 0), (64, 193), (150, 40), (0, 0), (300, 300)];
    for (i, combination) in asking((0, 0), (64, 64)).into_iter().enumerate() {
        let headdim = [64, 128, 256][i % 3];
        let combination = Combination { headdim, headdim_v: headdim, ..combination };
        check_general_gradients(&Combination {
            varlen: true,
            lengths: lengths.clone(),
            sinks: i % 2 == 0,
            ..combination
        });
    }
}

/// Sinks are in the LSE already: each pass has them, also those that sum dQ in one order.
#[test]
fn gradients_of_sinks() {
    for (headdim, deterministic) in [(64, false), (128, false), (256, false), (64, true), (128, true), (256, true)] {
        let mut combination = Combination { sinks: true, ..plain(DType::BF16, (150, 260), (headdim, headdim)) };
        combination.options = combination.options.causal(true).deterministic(deterministic);
        combination.check(&session()).unwrap_or_else(|reason| panic!("{reason}"));
    }
}

/// What its backward pass cannot do is refused, and named.
#[test]
fn gradients_that_it_has_not() {
    let refused = |change: fn(&mut Combination)| {
        let mut combination = plain(DType::BF16, (20, 30), (64, 64));
        let forward = combination.forward(&session(), &combination.tensors()).expect("plain");
        change(&mut combination);
        let refused = combination.backward(&session(), &combination.tensors(), &forward).expect_err("refused");
        refused.to_string()
    };
    let of_bias = refused(|combination| combination.bias = Some([false; 3]));
    assert!(of_bias.contains("flash3 backward: no kernel of bf16 and headdim 64 for bias ["), "{of_bias}");
    assert!(of_bias.ends_with("; allowed: no bias"), "{of_bias}");
    let in_order =
        refused(|combination| combination.options = AttentionOptions::new().softcap(9.0).deterministic(true));
    let expected = "flash3 backward, in order: no kernel of bf16 and headdim 64 for softcap 9; allowed: no softcap";
    assert!(in_order.ends_with(expected), "{in_order}");
}

/// What the next sequence has in the last rows of a tile, however large, changes no bit of this one.
#[test]
fn the_next_sequence_changes_no_bit() {
    let rows = |of_next: f32, causal| {
        let numbers = |rows: u32, seed: u32, scale: f32| {
            let number =
                move |i: u32| (i + seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(2_246_822_519);
            (0..64 * rows).map(move |i| f16::from_f32((number(i) as f32 / u32::MAX as f32 - 0.5) * 6.0 * scale))
        };
        let both = |first, next, seed, scale| -> Vec<f16> {
            numbers(first, seed, 1.0).chain(numbers(next, seed + 7, scale)).collect()
        };
        let (q, k, v) = (both(200, 64, 1, of_next), both(290, 64, 2, 1.0), both(290, 64, 3, 1.0));
        let tensor = |data| TensorRef::new(data, &[264, 1, 64]).expect("so many");
        let of_keys = |data| TensorRef::new(data, &[354, 1, 64]).expect("so many");
        let starts = |starts| TensorRef::new(starts, &[3]).expect("so many");
        let inputs = Inputs::<TensorRef>::new(tensor(&q), of_keys(&k), of_keys(&v))
            .cu_seqlens(starts(&[0i32, 200, 264]), starts(&[0i32, 290, 354]));
        let found = session().attention_with(&inputs, &AttentionOptions::new().causal(causal)).expect("plain");
        found.out.bytes()[..200 * 64 * 2].to_vec()
    };
    for causal in [false, true] {
        assert!(rows(0.0, causal) == rows(20.0, causal), "causal {causal}");
    }
}

/// Gradients of a sequence are the same bits in any order of threads, alone, and beside others, also beside longer ones.
#[test]
fn deterministic_gradients_do_not_depend_on_what_else_runs() {
    let session = |seed| {
        let mut options = SimulatorOptions::default();
        options.seed = seed;
        session().simulator_options(options)
    };
    let others: [&[_]; 3] = [&[], &[(70, 0)], &[(0, 9), (130, 400), (90, 20)]];
    for headdim in [64, 128, 256] {
        for causal in [false, true] {
            beside::check(session, (headdim, causal), (200, 290), &others, "flash3_bwd_ordered_")
                .unwrap_or_else(|reason| panic!("{reason}"));
        }
    }
}

/// The order in which threads run must not matter, where stages are used again and again.
#[test]
fn any_order_of_threads_gives_the_same_bits() {
    let case = Case { nheads: 3, ..Case::single(DType::F16, (200, 700), 64, true) };
    let [q, k, v] = case.inputs();
    for options in [case.options(), case.options().window_size(70, None).softcap(9.0)] {
        let run = |seed| {
            let mut simulator = SimulatorOptions::default();
            simulator.seed = seed;
            let session = session().simulator_options(simulator);
            session.attention(&q, &k, &v, &options).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
        };
        let natural = run(0);
        for seed in 1..=4 {
            let permuted = run(seed);
            assert_eq!(natural.out.bytes(), permuted.out.bytes(), "seed {seed}");
            assert_eq!(natural.softmax_lse.bytes(), permuted.softmax_lse.bytes(), "seed {seed}");
        }
    }
}
