//! The launches of FlashAttention-3: its grid and its tensor maps.
use cuda_std::{Global, Kernel};
use kernels::Config;
use kernels::attention::{Attention, Untyped};
use kernels::flash3::packing::Packing;
use kernels::flash3::schedule::Schedule;
use kernels::flash3::splits::{Parts, Splits};
use kernels::flash3::units::{dealt, tiles_of_pack, units_of_pack};
use kernels::flash3::{GROUP_ROWS, Params, combine};

use crate::error::Result;
use crate::launch::Launch;
use crate::options::WindowSize;
use crate::problem::Problem;
use crate::target::Resources;
use maps::{Extents, map, map_of_packs};
use packing::{packing, tiles};
use splits::splits;

pub(crate) mod backward;
mod maps;
pub(crate) mod packing;
pub(crate) mod shares;
pub(crate) mod splits;

/// The entry points of FlashAttention-3 for a problem.
#[derive(Clone, Copy)]
pub(crate) struct Flash3 {
    pub forward: &'static Kernel<Params, Config>,
    /// What combines parts of the keys, where these are divided.
    pub combine: Option<&'static Kernel<combine::Params, Config>>,
}

impl Flash3 {
    /// This one, for a problem that it can run.
    pub fn new(forward: &'static Kernel<Params, Config>, problem: &Problem) -> Self {
        let are_divided = splits_of(problem, &forward.config).are_divided();
        let suits = |config: &Config| config.dtype == problem.dtype && config.general == forward.config.general;
        let combine = combine::COMBINE.iter().find(|combine| suits(&combine.config));
        Flash3 { forward, combine: combine.filter(|_| are_divided) }
    }

    /// The launches for a problem with rows and keys, in a [workspace](splits::workspace) at these addresses.
    pub fn launches(
        self,
        problem: &Problem,
        attention: Attention,
        workspace: &[Global<Untyped>],
        machine: &Resources,
    ) -> Result<Vec<Launch>> {
        let config = &self.forward.config;
        let (packing, splits) = (packing(problem, config), splits_of(problem, config));
        let parts = match workspace {
            &[o, lse] => Parts { o: o.cast(), lse: lse.cast(), rows: problem.rows() as u64 },
            _ => Parts::NONE,
        };
        let forward = launch(self.forward, problem, attention, (packing, splits), parts, machine)?;
        let Some(combine) = self.combine else { return Ok(vec![forward]) };
        let Config { block_m, block_n, .. } = *config;
        let parameters = combine::Params { attention, parts, splits, packing, block_m, block_n };
        let heads = (problem.batch as u64).saturating_mul(problem.nheads as u64);
        let blocks = (problem.seqlen_q as u64).div_ceil(combine.config.block_m.into()).saturating_mul(heads);
        Ok(vec![forward, Launch::new(combine, blocks, parameters)?])
    }
}

/// Into how many parts a kernel divides the keys of a problem.
pub(crate) fn splits_of(problem: &Problem, config: &Config) -> Splits {
    splits(problem, packing(problem, config), config)
}

/// The launch of the kernel itself.
fn launch(
    kernel: &'static Kernel<Params, Config>,
    problem: &Problem,
    attention: Attention,
    (packing, splits): (Packing, Splits),
    parts: Parts,
    machine: &Resources,
) -> Result<Launch> {
    let (schedule, blocks) = schedule(problem, (packing, splits), &kernel.config, machine.multiprocessors)?;
    let Config { dtype, headdim, headdim_v, block_n, .. } = kernel.config;
    let q = Extents::of_queries(problem, problem.headdim);
    let [k, v] = [problem.headdim, problem.headdim_v].map(|columns| Extents::of_keys(problem, columns));
    let q = map_of_packs("q", &attention.q, dtype, (GROUP_ROWS, headdim), packing, q)?;
    let k = map("k", &attention.k, dtype, (block_n, headdim), k)?;
    let v = map("v", &attention.v, dtype, (block_n, headdim_v), v)?;
    let parameters = Params {
        q: (machine.tensor_map)(&q)?,
        k: (machine.tensor_map)(&k)?,
        v: (machine.tensor_map)(&v)?,
        attention,
        schedule,
        parts,
    };
    Launch::new(kernel, blocks, parameters)
}

/// Multiprocessors of an H100. Where they decide how a problem is computed all Hopper GPUs compute it as an H100 does, so that it
/// gives the same bits on each, and the workspace is known before the device is.
const MULTIPROCESSORS: u64 = 132;

/// From so many keys on, or in windows of so many, the last packs of a causal problem are left to blocks of one tile: on an H100
/// that gains 1 % to 5 %, and loses as much where sequences are shorter, unless the units of a pack differ.
const LONG: usize = 4096;

/// With so many keys a query the tiles of a causal problem cost the same, and are not paired: those of a pack run side by side
/// then, and read K and V from HBM once. On an H100, in µs, paired and not, 16 sequences of 64 queries of four packed heads of
/// 128: 4096 keys 184, 109; 16384 keys 693, 403. 4 sequences of 512 queries, not packed: 193, 185; 760, 739.
const KEYS_A_QUERY: usize = 16;

/// Whether there are so many keys that causal tiles cost the same.
fn has_many_keys_a_query(problem: &Problem) -> bool {
    problem.seqlen_q.saturating_mul(KEYS_A_QUERY) <= problem.seqlen_k
}

/// Whether the kernel for few queries is the faster of two: it divides keys; or it packs heads, and has tiles with fewer rows in
/// all; or it takes several tiles that cost the same, and the other one, which pairs them unless it is general, has not the larger
/// tiles of kernels for many keys.
pub(crate) fn has_few_queries(problem: &Problem, few: &Config, other: &Config) -> bool {
    // Its blocks of keys are others, so other bits: the longest sequence must not choose.
    if few.general && problem.deterministic && problem.varlen.is_some() {
        return false;
    }
    let packing = packing(problem, few);
    let rows = |config: &Config, packing| u128::from(tiles(problem, packing, config)) * u128::from(config.block_m);
    let saves_rows = 10 * rows(few, packing) <= 9 * rows(other, Packing::SINGLE);
    let of_one_cost = problem.is_causal() && has_many_keys_a_query(problem) && problem.seqlen_q > few.block_m as usize;
    let divides = splits(problem, packing, few).are_divided();
    divides || saves_rows && packing.heads() > 1 || of_one_cost && other.from_keys == 0 && !other.general
}

/// Whether the queries of the longest sequence fill nine tenths of a kernel's tiles. Kernels for many keys have larger tiles,
/// whose empty rows cost more than they gain: on an H100, with tiles of 192 instead of 128 rows, 64 queries of four packed
/// heads of 128 take 654 µs instead of 404, and 128 queries 915 instead of 766.
pub(super) fn fills_tiles(problem: &Problem, config: &Config) -> bool {
    let (rows, block_m) = (problem.seqlen_q as u64, u64::from(config.block_m));
    10 * u128::from(rows) >= 9 * u128::from(rows.div_ceil(block_m) * block_m)
}

/// Who does what, and how many blocks of threads that takes. There are no more than there are tiles.
fn schedule(
    problem: &Problem,
    (packing, splits): (Packing, Splits),
    config: &Config,
    multiprocessors: u32,
) -> Result<(Schedule, u64)> {
    let tiles = tiles_of_pack(packing.rows(problem.seqlen_q as u32), config.block_m);
    let packs = (problem.batch as u64).saturating_mul(packing.packs(problem.nheads as u32).into());
    Launch::check_blocks(packs.saturating_mul(u64::from(tiles)).saturating_mul(splits.count().into()))?;
    let packs = packs as u32;
    let asks = config.few || config.general;
    let may_differ = !asks || !splits.are_divided() && !has_many_keys_a_query(problem);
    // The wider the window of a row is, the further on it is; or the further back.
    let widens = problem.window.left.is_some() != problem.window.right.is_some();
    let is_paired = widens && may_differ;
    let units = units_of_pack(tiles, is_paired) * splits.count();
    let is_long = !splits.are_divided()
        && match problem.window {
            WindowSize { left: Some(left), right: Some(right) } => left.saturating_add(right) + 1 >= LONG,
            _ => is_paired && (problem.seqlen_k >= LONG || !tiles.is_multiple_of(2)),
        };
    let (walked_packs, others) = if problem.varlen.is_some() {
        // More sequences than walkers can put into order: each tile is left to a block.
        (if puts_into_order(problem, config) { packs } else { 0 }, Others::OfBlocks)
    } else if is_long {
        // The units that are left over when all walkers end, and as many as half of them do meanwhile.
        let unwalked = (u64::from(multiprocessors) * 3).div_ceil(2 * u64::from(units));
        (u64::from(packs).saturating_sub(unwalked) as u32, Others::OfBlocks)
    } else if is_paired && !config.few && problem.window.right.is_some() {
        // Of the units that walkers take one after the other some walkers have one more; or all take what is left tile by tile.
        (packs_in_whole_turns(problem, packs, tiles, config, multiprocessors), Others::OfWalkers)
    } else {
        (packs, Others::OfBlocks)
    };
    let units = u64::from(walked_packs) * u64::from(units);
    let tiles = u64::from(packs - walked_packs) * u64::from(tiles);
    let (most_walkers, blocks) = match others {
        Others::OfBlocks => (units, tiles),
        Others::OfWalkers => (units.max(tiles), 0),
    };
    let walkers = most_walkers.min(multiprocessors.into());
    let schedule = Schedule { walkers: walkers as u32, walked_packs, packing, paired: is_paired.into(), splits };
    Ok((schedule, walkers + blocks))
}

/// Who takes the tiles of packs that walkers take no units of.
enum Others {
    /// Blocks of threads of their own, one each.
    OfBlocks,
    /// Walkers, to which they are dealt at the end.
    OfWalkers,
}

/// Whether walkers can put the sequences into order.
fn puts_into_order(problem: &Problem, config: &Config) -> bool {
    problem.varlen.is_none() || problem.batch <= config.sequences as usize
}

/// Of how many packs walkers take units: of all; or of as many as make whole turns, where they end earlier if what is left is dealt
/// out tile by tile, the longest first. On an H100, causal, in TFLOP/s: headdim 128, 512 and 1024 tokens 329 and 489, then 335 and
/// 498; headdim 64, 1024 and 2048 tokens 406 and 490, then 415 and 499.
fn packs_in_whole_turns(problem: &Problem, packs: u32, tiles: u32, config: &Config, walkers: u32) -> u32 {
    let units = u64::from(units_of_pack(tiles, true));
    let turns = u64::from(packs) * units / u64::from(walkers);
    let walked_packs = (turns * u64::from(walkers) / units) as u32;
    let left_packs = packs - walked_packs;
    let left = left_packs * tiles;
    // Keys that the last row of a tile sees. Tiles are counted from the last.
    let cost = |tile: u32| (problem.seqlen_k as u64).saturating_sub(u64::from(tile) * u64::from(config.block_m));
    let cost_of_unit = cost(0) + cost(tiles - 1);
    let cost_of_left = |walker: u32| -> u64 {
        let dealt = (0..left.div_ceil(walkers)).map(|turn| dealt(turn, walker, walkers, true));
        dealt.filter(|tile| *tile < left).map(|tile| cost(tile / left_packs)).sum()
    };
    let most = (0..walkers).map(cost_of_left).max().unwrap_or(0);
    if most < cost_of_unit { walked_packs } else { packs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::{Family, Wanted};
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use crate::parameters::Access;
    use crate::sequences::Sequences;
    use crate::target::Target;
    use cuda_std::DType;
    use kernels::flash3::FORWARD;

    /// (batch, seqlen, nheads, headdim), in bf16.
    fn problem(shape: [usize; 4], causal: bool) -> Problem {
        let x = Layout::contiguous(DType::BF16, &shape).expect("small");
        Problem::new(&x, &x, &x, &AttentionOptions::new().causal(causal)).expect("valid")
    }

    /// Walkers, the heads that they do, and all blocks of threads, on a GPU of 132 multiprocessors.
    fn scheduled(shape: [usize; 4], causal: bool) -> (u32, u32, u64) {
        let config = Config { block_m: 128, block_n: 128, ..FORWARD[0].config };
        let problem = problem(shape, causal);
        let (schedule, blocks) = schedule(&problem, (Packing::SINGLE, Splits::ONE), &config, 132).expect("small");
        (schedule.walkers, schedule.walked_packs, blocks)
    }

    #[test]
    fn walkers_do_all_heads_but_the_last_of_long_causal_problems() {
        assert_eq!(scheduled([1, 16384, 16, 128], false), (132, 16, 132));
        assert_eq!(scheduled([1, 1024, 4, 128], false), (32, 4, 32));
        // Of five tiles the one in the middle is a unit of its own.
        assert_eq!(scheduled([64, 640, 4, 128], true), (132, 190, 132 + 66 * 5));
        // 64 units a head: 198 units are four heads, of 128 tiles each.
        assert_eq!(scheduled([1, 16384, 16, 128], true), (132, 12, 132 + 4 * 128));
        assert_eq!(scheduled([1, 16384, 2, 128], true), (0, 0, 2 * 128));
    }

    #[test]
    fn units_that_not_all_walkers_would_have_are_dealt_tile_by_tile() {
        // Seven turns of two units a head, and 100 more: 50 heads, of whose tiles none has more than the last, one of four.
        assert_eq!(scheduled([32, 512, 16, 128], true), (132, 462, 132));
        // Of 58 heads some would have five blocks of keys, as many as a unit.
        assert_eq!(scheduled([32, 512, 8, 128], true), (132, 256, 132));
        // Fewer tiles than walkers.
        assert_eq!(scheduled([1, 1024, 4, 128], true), (32, 0, 32));
        assert_eq!(scheduled([33, 512, 16, 128], false), (132, 528, 132));
    }

    #[test]
    fn walkers_do_all_sequences_of_different_lengths_that_they_can_put_into_order() {
        let scheduled = |sequences: usize| {
            let x = Layout::contiguous(DType::BF16, &[4096, 2, 128]).expect("small");
            let begins: Vec<_> = (0..=sequences).map(|i| (i * 4096 / sequences) as i32).collect();
            let cu_seqlens = Layout::contiguous(DType::I32, &[begins.len()]).expect("small");
            let inputs =
                Inputs { cu_seqlens_q: Some(&cu_seqlens), cu_seqlens_k: Some(&cu_seqlens), ..Inputs::new(&x, &x, &x) };
            let sequences = Sequences::new(&begins, 4096, &begins, 4096).expect("they end with the tensor");
            let problem = Problem::of(&inputs, Some(sequences), &AttentionOptions::new()).expect("valid");
            let config = Config { block_m: 128, block_n: 128, ..FORWARD[0].config };
            let (schedule, blocks) = schedule(&problem, (Packing::SINGLE, Splits::ONE), &config, 132).expect("small");
            (schedule.walkers, schedule.walked_packs, blocks)
        };
        assert_eq!(scheduled(1024), (132, 2048, 132));
        assert_eq!(scheduled(2048), (0, 0, 4096));
    }

    #[test]
    fn with_deterministic_gradients_the_longest_sequence_chooses_no_tiles() {
        let x = Layout::contiguous(DType::BF16, &[6000, 8, 128]).expect("small");
        let begins = [0, 1000, 6000];
        let cu_seqlens = Layout::contiguous(DType::I32, &[begins.len()]).expect("small");
        let inputs =
            Inputs { cu_seqlens_q: Some(&cu_seqlens), cu_seqlens_k: Some(&cu_seqlens), ..Inputs::new(&x, &x, &x) };
        let chosen = |deterministic| {
            let sequences = Sequences::new(&begins, 6000, &begins, 6000).expect("they end with the tensor");
            let options = AttentionOptions::new().deterministic(deterministic);
            let problem = Problem::of(&inputs, Some(sequences), &options).expect("valid");
            let wanted = Wanted::new(&problem, Access { aligned: true, mapped: true }, Target::HOPPER);
            Family::flash3(&wanted).expect("it is built for this").kernels()[0].0
        };
        assert_eq!([true, false].map(chosen), ["2x128", "3x80"].map(|tile| format!("flash3_fwd_bf16_d128_{tile}")));

        let layout = |tokens, nheads| Layout::contiguous(DType::BF16, &[tokens, nheads, 128]).expect("small");
        let (q, k) = (layout(64, 8), layout(600, 2));
        let inputs =
            Inputs { cu_seqlens_q: Some(&cu_seqlens), cu_seqlens_k: Some(&cu_seqlens), ..Inputs::new(&q, &k, &k) };
        let of_few_queries = |deterministic| {
            let sequences = Sequences::new(&[0, 32, 64], 64, &[0, 300, 600], 600).expect("they end with the tensors");
            let options = AttentionOptions::new().softcap(30.0).deterministic(deterministic);
            let problem = Problem::of(&inputs, Some(sequences), &options).expect("valid");
            let wanted = Wanted::new(&problem, Access { aligned: true, mapped: true }, Target::HOPPER);
            Family::flash3(&wanted).expect("it is built for this").kernels()[0].0
        };
        let tiles = ["3x64", "2x128_few"].map(|tile| format!("flash3_fwd_bf16_d128_{tile}_general"));
        assert_eq!([true, false].map(of_few_queries), tiles);
    }

    #[test]
    fn tiles_are_paired_where_they_differ() {
        let layout = |seqlen, nheads| Layout::contiguous(DType::BF16, &[1, seqlen, nheads, 128]).expect("small");
        let scheduled = |seqlen_q: usize, causal| {
            let k = layout(4096, 4);
            let options = AttentionOptions::new().causal(causal);
            let problem = Problem::new(&layout(seqlen_q, 16), &k, &k, &options).expect("valid");
            let config = Config { block_m: 128, block_n: 128, few: true, ..FORWARD[0].config };
            let (schedule, blocks) =
                schedule(&problem, (packing(&problem, &config), Splits::ONE), &config, 132).expect("small");
            (schedule.packing.heads(), schedule.paired, schedule.walkers, blocks)
        };
        // Tiles of four packed heads, and of one.
        assert_eq!(scheduled(64, true), (4, 0, 8, 8));
        assert_eq!(scheduled(256, true), (1, 0, 32, 32));
        assert_eq!(scheduled(512, true), (1, 1, 0, 64));
        assert_eq!(scheduled(512, false), (1, 0, 64, 64));
    }

    #[test]
    fn tiles_of_windows_that_are_open_on_one_side_are_paired() {
        let x = |seqlen| Layout::contiguous(DType::BF16, &[1, seqlen, 16, 128]).expect("small");
        let scheduled = |lengths: (usize, usize), left: Option<usize>, right: Option<usize>| {
            let options = AttentionOptions::new().window_size(left, right).softcap(9.0);
            let (q, k) = (x(lengths.0), x(lengths.1));
            let problem = Problem::new(&q, &k, &k, &options).expect("valid");
            let config = Config { block_m: 128, block_n: 64, general: true, ..FORWARD[0].config };
            let (schedule, blocks) = schedule(&problem, (Packing::SINGLE, Splits::ONE), &config, 132).expect("small");
            (schedule.paired, schedule.walked_packs, blocks)
        };
        // As under a causal mask.
        assert_eq!(scheduled((16384, 16384), None, Some(0)), (1, 12, 132 + 4 * 128));
        assert_eq!(scheduled((2048, 2048), Some(70), None), (1, 16, 128));
        // All tiles cost the same: two heads are left to blocks of one tile where these are long.
        assert_eq!(scheduled((16384, 16384), Some(4095), Some(0)), (0, 14, 132 + 2 * 128));
        assert_eq!(scheduled((16384, 16384), Some(1023), Some(0)), (0, 16, 132));
        assert_eq!(scheduled((2048, 2048), None, None), (0, 16, 132));
        assert_eq!(scheduled((128, 2048), None, Some(0)), (0, 16, 16));
    }

    #[test]
    fn general_kernels_take_what_others_do_not_know() {
        let chosen = |headdims: [usize; 2], options: AttentionOptions| {
            let x = |headdim| Layout::contiguous(DType::BF16, &[2, 512, 4, headdim]).expect("small");
            let problem = Problem::new(&x(headdims[0]), &x(headdims[0]), &x(headdims[1]), &options).expect("valid");
            let wanted = Wanted::new(&problem, Access { aligned: true, mapped: true }, Target::HOPPER);
            Family::flash3(&wanted).map(|family| family.kernels()[0].1)
        };
        let plain = AttentionOptions::new;
        for headdims in [[8, 8], [64, 64], [72, 96], [128, 128], [192, 128], [192, 192], [256, 256]] {
            assert!(!chosen(headdims, plain().causal(true)).expect("plain").general);
            for options in [plain().window_size(3, 5), plain().causal(true).softcap(9.0), plain().softmax_scale(-1.0)] {
                assert!(chosen(headdims, options.num_splits(4)).expect("it is built for this").general, "{headdims:?}");
            }
        }
        let dropped = chosen([64, 64], plain().window_size(3, 5).dropout(0.5, 1, 2)).expect_err("no dropout");
        assert_eq!(dropped, "flash3: no kernel of bf16 and headdim 64 for dropout_p 0.5; allowed: dropout_p 0");
    }

    #[test]
    fn kernels_for_few_queries_take_heads_that_are_packed_and_tiles_of_one_cost() {
        let layout = |seqlen, nheads| Layout::contiguous(DType::BF16, &[2, seqlen, nheads, 128]).expect("small");
        let chosen = |(seqlen_q, seqlen_k): (usize, usize), (nheads, nheads_k), causal| {
            let k = layout(seqlen_k, nheads_k);
            let options = AttentionOptions::new().causal(causal).num_splits(1);
            let problem = Problem::new(&layout(seqlen_q, nheads), &k, &k, &options).expect("valid");
            let wanted = Wanted::new(&problem, Access { aligned: true, mapped: true }, Target::HOPPER);
            Family::flash3(&wanted).expect("it is built for this").kernels()[0].0
        };
        let [plain, few, large] = ["2x128", "2x128_few", "3x80"].map(|tile| format!("flash3_fwd_bf16_d128_{tile}"));
        assert_eq!(chosen((1, 512), (8, 2), false), few);
        assert_eq!(chosen((1, 512), (8, 8), false), plain);
        // Four heads of 192 rows are 6 tiles of 128, and of 160 rows 5; a tile each of the larger ones is 4 of 192.
        assert_eq!(chosen((192, 512), (4, 1), false), few);
        assert_eq!(chosen((192, 4096), (4, 1), false), large);
        assert_eq!(chosen((160, 4096), (4, 1), false), few);
        assert_eq!(chosen((130, 4096), (4, 4), false), plain);
        let [plain, few, large] =
            ["2x128_causal", "2x128_causal_few", "3x64_causal"].map(|tile| format!("flash3_fwd_bf16_d128_{tile}"));
        assert_eq!(chosen((200, 3000), (4, 4), true), plain);
        assert_eq!(chosen((200, 3200), (4, 4), true), few);
        assert_eq!(chosen((100, 3200), (4, 4), true), plain);
        assert_eq!(chosen((190, 3200), (4, 4), true), large);
    }

    #[test]
    fn queries_fill_tiles() {
        let config = Config { block_m: 128, ..FORWARD[0].config };
        let fills = |seqlen_q| fills_tiles(&problem([1, seqlen_q, 1, 128], false), &config);
        assert!(fills(128) && fills(116) && fills(4000));
        assert!(!fills(1) && !fills(115) && !fills(130));
    }

    #[test]
    fn general_kernels_for_few_queries_pack_heads_and_divide_keys() {
        let layout = |seqlen, nheads| Layout::contiguous(DType::BF16, &[2, seqlen, nheads, 128]).expect("small");
        let of = |(seqlen_q, seqlen_k): (usize, usize), (nheads, nheads_k), options: &AttentionOptions| -> Vec<&str> {
            let k = layout(seqlen_k, nheads_k);
            let problem = Problem::new(&layout(seqlen_q, nheads), &k, &k, options).expect("valid");
            let wanted = Wanted::new(&problem, Access { aligned: true, mapped: true }, Target::HOPPER);
            let family = Family::flash3(&wanted).expect("it is built for this");
            family.kernels().iter().map(|kernel| kernel.0).collect()
        };
        let (plain, packed) = (["flash3_fwd_bf16_d128_3x64_general"], ["flash3_fwd_bf16_d128_2x128_few_general"]);
        let divided = [packed[0], "flash3_combine_bf16_general"];
        let capped = AttentionOptions::new().softcap(30.0);
        let window = AttentionOptions::new().causal(true).window_size(1023, None);
        assert_eq!(of((1, 8192), (8, 2), &capped), divided);
        assert_eq!(of((1, 8192), (8, 2), &capped.clone().num_splits(1)), packed);
        assert_eq!(of((1, 8192), (8, 8), &capped.clone().num_splits(1)), plain);
        assert_eq!(of((1, 8192), (8, 8), &capped.clone().num_splits(3)), divided);
        // A window of 1024 keys is worth dividing, one of 128 is not.
        assert_eq!(of((1, 8192), (8, 2), &window), divided);
        assert_eq!(of((1, 8192), (8, 2), &window.clone().window_size(127, None)), packed);
        // Four heads of 32 rows are one tile of 128 rows, or four of 192; of 192 rows six, or four.
        assert_eq!(of((32, 300), (8, 2), &capped), packed);
        assert_eq!(of((192, 3000), (8, 2), &window), plain);
        // Causal tiles that cost the same are paired by neither.
        assert_eq!(of((200, 3200), (4, 4), &capped.clone().causal(true).num_splits(1)), plain);
    }

    #[test]
    fn walkers_do_all_parts_of_divided_keys() {
        let x = |seqlen| Layout::contiguous(DType::BF16, &[1, seqlen, 2, 128]).expect("small");
        let options = AttentionOptions::new().window_size(Some(4095), Some(9)).num_splits(3);
        let problem = Problem::new(&x(300), &x(16384), &x(16384), &options).expect("valid");
        let config = Config { block_m: 128, block_n: 128, few: true, general: true, ..FORWARD[0].config };
        let splits = splits(&problem, Packing::SINGLE, &config);
        let (schedule, blocks) = schedule(&problem, (Packing::SINGLE, splits), &config, 132).expect("small");
        assert_eq!((schedule.walked_packs, schedule.walkers, blocks), (2, 18, 18));
    }

    #[test]
    fn too_many_tiles_are_refused() {
        let shape = [1 << 16, 1 << 16, 64, 8];
        let config = Config { block_m: 64, ..FORWARD[0].config };
        let refused = schedule(&problem(shape, false), (Packing::SINGLE, Splits::ONE), &config, 132);
        let refused = refused.expect_err("2^32 tiles").to_string();
        assert_eq!(refused, "blocks of a kernel: 4294967296; allowed: at most 2147483647");
    }
}
