//! Into how many parts FlashAttention-3 divides the keys of a tile.
use cuda_std::DType;
use kernels::Config;
use kernels::flash3::packing::Packing;
use kernels::flash3::splits::Splits;

use super::packing::tiles;
use super::{MULTIPROCESSORS, has_many_keys_a_query, puts_into_order};
use crate::launch::Workspace;
use crate::options::{AttentionOptions, WindowSize};
use crate::problem::Problem;

/// What it costs to divide at all, in keys that a block of threads walks over meanwhile: another launch. On an H100.
const COST: u64 = 512;

/// And what each part costs: it is loaded where parts are combined.
const COST_OF_PART: u64 = 16;

/// As many as the caller says, but at most one a block of keys that a tile sees; or, where queries are few, as many as fill the
/// multiprocessors: that depends on how many sequences there are, so with deterministic gradients it is one.
pub(crate) fn splits(problem: &Problem, packing: Packing, config: &Config) -> Splits {
    // Without an order of the sequences each tile is left to a block of threads.
    if !config.few || !puts_into_order(problem, config) {
        return Splits::ONE;
    }
    let blocks = key_blocks(problem, packing, config);
    let parts = match problem.num_splits as u64 {
        0 if has_many_keys_a_query(problem) && !problem.deterministic => {
            filling(tiles(problem, packing, config), blocks, config.block_n.into())
        }
        0 => 1,
        asked => asked.min(blocks),
    };
    Splits::new(parts as u32)
}

/// The most blocks of keys that a tile sees: all, or those of its queries' windows, which may begin in the middle of a block.
fn key_blocks(problem: &Problem, packing: Packing, config: &Config) -> u64 {
    let (all, block_n) = (problem.seqlen_k as u64, u64::from(config.block_n));
    let WindowSize { left: Some(left), right } = problem.window else { return all.div_ceil(block_n) };
    // From the place of the tile's first query on: up to what the last one sees, or to the last key.
    let queries = u64::from(packing.query(config.block_m)).max(1);
    let most = (problem.seqlen_q as u64).max(1);
    let right = right.map_or(most, |right| (right as u64).saturating_add(queries).min(most));
    let keys = (left as u64).saturating_add(right);
    if keys < all { ((keys - 1).div_ceil(block_n) + 1).min(all.div_ceil(block_n)) } else { all.div_ceil(block_n) }
}

/// The parts of the keys of so many tiles, of so many blocks each, with which it takes the least time: that of the keys which
/// the multiprocessor with the most parts walks over, one after the other, and of what dividing costs. The fewest of those.
fn filling(tiles: u64, blocks: u64, block_n: u64) -> u64 {
    if tiles == 0 || blocks < 2 || 5 * tiles >= 4 * MULTIPROCESSORS {
        return 1;
    }
    let time = |parts: u64| {
        let keys = (tiles * parts).div_ceil(MULTIPROCESSORS) * blocks.div_ceil(parts) * block_n;
        if parts > 1 { keys + COST + COST_OF_PART * parts } else { keys }
    };
    // In so many turns: as many parts as there are multiprocessors for, unless they cost more than they save; and of those that
    // have as many blocks the fewest.
    let in_turns = |turns: u64| {
        let worth = (turns * blocks * block_n / COST_OF_PART).isqrt();
        let parts =
            (turns * MULTIPROCESSORS / tiles).min(worth).clamp(1, blocks.min(AttentionOptions::MOST_SPLITS as u64));
        blocks.div_ceil(blocks.div_ceil(parts))
    };
    let most_turns = 4;
    std::iter::once(1).chain((1..=most_turns).map(in_turns)).min_by_key(|&parts| (time(parts), parts)).unwrap_or(1)
}

/// What the parts leave behind: O and the LSE of each.
pub(crate) fn workspace(problem: &Problem, splits: Splits) -> Vec<Workspace> {
    if !splits.are_divided() {
        return Vec::new();
    }
    let rows = (problem.rows() as u64).saturating_mul(splits.count().into());
    let of = |name, len| Workspace { name, dtype: DType::F32, len };
    vec![of("O", rows.saturating_mul(problem.headdim_v as u64)), of("LSE", rows)]
}

/// How keys are divided, in words; `None` if they are not.
pub(crate) fn in_words(splits: Splits) -> Option<String> {
    let count = splits.count();
    splits.are_divided().then(|| format!("the keys of a tile are divided among {count} blocks of threads"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use kernels::flash3::FORWARD;
    use kernels::mask::{Mask, UNBOUNDED};

    #[test]
    fn parts_fill_the_multiprocessors() {
        let filling = |tiles, blocks| filling(tiles, blocks, 128);
        // Eight tiles, as of a step of decoding one sequence, with 8 heads of K. On an H100 such a step takes, in µs, with so many
        // parts and undivided: 12.4, 15.0; 14.2, 23.2; 15.5, 39.1; 17.9, 71.6; 33.2, 136.9.
        assert_eq!([8, 16, 32, 64, 128].map(|blocks| filling(8, blocks)), [8, 8, 16, 16, 16]);
        // Of few keys another launch would cost more: 12.3 and 11.1 µs.
        assert_eq!([1, 2, 4].map(|blocks| filling(8, blocks)), [1, 1, 1]);
        // Two parts of 64 tiles are 128 units; five of 100 take four turns, and 104 blocks instead of 128.
        assert_eq!([filling(64, 128), filling(66, 128), filling(100, 128)], [2, 2, 5]);
        assert_eq!([filling(106, 128), filling(132, 128), filling(1000, 128)], [1, 1, 1]);
        assert_eq!([filling(0, 128), filling(1, 3), filling(2, 1 << 20)], [1, 1, 66]);
    }

    #[test]
    fn keys_are_divided_as_asked_or_where_queries_are_few() {
        let few = Config { block_m: 128, block_n: 128, few: true, ..FORWARD[0].config };
        let splits_of = |(seqlen_q, seqlen_k), num_splits, config: &Config| {
            let layout = |seqlen| Layout::contiguous(DType::BF16, &[1, seqlen, 8, 64]).expect("small");
            let k = layout(seqlen_k);
            let options = AttentionOptions::new().num_splits(num_splits);
            let problem = Problem::new(&layout(seqlen_q), &k, &k, &options).expect("valid");
            splits(&problem, Packing::SINGLE, config).count()
        };
        assert_eq!(splits_of((1, 16384), 0, &few), 16);
        assert_eq!(splits_of((1, 16384), 1, &few), 1);
        assert_eq!(splits_of((1, 16384), 5, &few), 5);
        assert_eq!(splits_of((1, 300), 5, &few), 3);
        assert_eq!(splits_of((100, 100), 0, &few), 1);
        assert_eq!(splits_of((1, 16384), 0, &Config { few: false, ..few }), 1);
        let layout = |seqlen| Layout::contiguous(DType::BF16, &[1, seqlen, 8, 64]).expect("small");
        let options = AttentionOptions::new().deterministic(true);
        let problem = Problem::new(&layout(1), &layout(16384), &layout(16384), &options).expect("valid");
        assert_eq!(splits(&problem, Packing::SINGLE, &few), Splits::ONE);
    }

    #[test]
    fn of_a_window_only_what_it_shows_is_divided() {
        let config = Config { block_m: 128, block_n: 128, few: true, general: true, ..FORWARD[0].config };
        let problem = |lengths: (usize, usize), left, right, num_splits| {
            let layout = |seqlen| Layout::contiguous(DType::BF16, &[1, seqlen, 8, 64]).expect("small");
            let k = layout(lengths.1);
            let options = AttentionOptions::new().window_size(left, right).num_splits(num_splits);
            Problem::new(&layout(lengths.0), &k, &k, &options).expect("valid")
        };
        let parts = |lengths, left, right, num_splits| {
            splits(&problem(lengths, left, right, num_splits), Packing::SINGLE, &config).count()
        };
        // Of 4096 keys, which are 33 blocks if they begin in the middle of one, eleven parts of three; as many as of 4224 keys.
        assert_eq!(parts((1, 16384), Some(4095), Some(0), 0), parts((1, 33 * 128), None, None, 0));
        assert_eq!(parts((1, 16384), Some(4095), Some(0), 0), 11);
        assert_eq!(parts((1, 16384), Some(127), Some(0), 0), 1);
        assert_eq!([3, 100].map(|asked| parts((1, 16384), Some(127), Some(0), asked)), [2, 2]);
        assert_eq!(parts((1, 16384), None, Some(0), 0), 16);

        // No tile sees more, and one sees nearly as many.
        let packed = Packing::of_group(4, 64);
        for (seqlen_q, seqlen_k) in [(1, 1000), (7, 1000), (33, 40), (150, 1000), (300, 200), (700, 1500)] {
            for left in [0, 1, 100, 127, 128, 300, 900, 2000] {
                for right in [Some(0), Some(5), Some(200), None] {
                    for packing in [Packing::SINGLE, packed] {
                        let problem = problem((seqlen_q, seqlen_k), Some(left), right, 0);
                        let side = |side: Option<usize>| side.map_or(UNBOUNDED, |keys| keys as u32);
                        let WindowSize { left, right } = problem.window;
                        let (seqlen_q, seqlen_k) = (seqlen_q as u32, seqlen_k as u32);
                        let mask = Mask { seqlen_q, seqlen_k, left: side(left), right: side(right) };
                        let seen = |row: u32| mask.key_blocks(packing.query(row), packing.query(128), 128).count();
                        let most = (0..packing.rows(seqlen_q)).step_by(128).map(seen).max();
                        let (bound, most) = (key_blocks(&problem, packing, &config), most.unwrap_or(0).into());
                        assert!(bound >= most && bound <= most + 1, "{problem}: {bound}, {most}");
                    }
                }
            }
        }
    }

    #[test]
    fn too_many_parts_are_refused() {
        let x = Layout::contiguous(DType::BF16, &[1, 8, 8, 64]).expect("small");
        let refused = Problem::new(&x, &x, &x, &AttentionOptions::new().num_splits(129)).expect_err("too many");
        assert_eq!(refused.to_string(), "num_splits: 129; allowed: 0 to 128");
    }
}
