//! Which heads of Q FlashAttention-3 packs into tiles together.
use kernels::Config;
use kernels::flash3::GROUP_ROWS;
use kernels::flash3::packing::Packing;

use crate::problem::{MOST, Problem};

/// As many of the heads that share K and V as can, where a kernel packs heads, and that saves a tenth of the tiles. Where it
/// saves none it makes no difference to the time; on an H100, in µs without and with it, 16 sequences of 32 heads of 128 over
/// 16384 keys of 8 heads: 1 query 538, 350; 16 queries 537, 353; 64 queries 542, 404; 128 queries, which fill a tile, 768, 766.
pub(crate) fn packing(problem: &Problem, config: &Config) -> Packing {
    let (packed, plain) = (Packing::of_group((problem.nheads / problem.nheads_k) as u32, GROUP_ROWS), Packing::SINGLE);
    let tokens = problem.varlen.as_ref().map_or(problem.seqlen_q, |varlen| varlen.total_q);
    // Kernels count the rows of a pack in 32 bits.
    let are_counted = (tokens as u64).saturating_mul(packed.heads().into()) <= MOST as u64;
    let [fewer, most] = [packed, plain].map(|packing| u128::from(tiles(problem, packing, config)));
    if config.few && are_counted && 10 * fewer <= 9 * most { packed } else { plain }
}

/// How many tiles there are, of all heads and sequences. Where the lengths of these differ, about so many: each pack leaves
/// half of its last tile empty.
pub(crate) fn tiles(problem: &Problem, packing: Packing, config: &Config) -> u64 {
    let packs = (problem.batch as u64).saturating_mul(packing.packs(problem.nheads as u32).into());
    let tiles_of =
        |tokens: usize| (tokens as u64).saturating_mul(packing.heads().into()).div_ceil(config.block_m.into());
    match &problem.varlen {
        None => packs.saturating_mul(tiles_of(problem.seqlen_q)),
        Some(varlen) => {
            let whole = tiles_of(varlen.total_q).saturating_mul(packing.packs(problem.nheads as u32).into());
            whole.saturating_add(packs / 2)
        }
    }
}

/// What is packed, in words; `None` if nothing is.
pub(crate) fn in_words(problem: &Problem, config: &Config) -> Option<String> {
    let packing = packing(problem, config);
    let [packed, plain] = [packing, Packing::SINGLE].map(|packing| tiles(problem, packing, config));
    let about = if problem.varlen.is_some() { "about " } else { "" };
    let heads = packing.heads();
    (heads > 1).then(|| {
        format!("{heads} heads that share K and V are packed into tiles, {about}{packed} of them instead of {plain}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;
    use kernels::flash3::FORWARD;

    const CONFIG: Config = Config { block_m: 128, few: true, ..FORWARD[0].config };

    fn problem(seqlen_q: usize, nheads: usize, nheads_k: usize) -> Problem {
        let layout = |seqlen, nheads| Layout::contiguous(DType::BF16, &[3, seqlen, nheads, 64]).expect("small");
        let k = layout(4096, nheads_k);
        Problem::new(&layout(seqlen_q, nheads), &k, &k, &AttentionOptions::new()).expect("valid")
    }

    #[test]
    fn heads_are_packed_where_that_saves_tiles() {
        let packed = |seqlen_q, nheads, nheads_k| packing(&problem(seqlen_q, nheads, nheads_k), &CONFIG).heads();
        assert_eq!([packed(1, 32, 8), packed(1, 8, 8), packed(1, 32, 1), packed(1, 256, 1)], [4, 1, 32, 64]);
        // Of six heads two and two and two, of five none.
        assert_eq!([packed(1, 6, 1), packed(1, 5, 1)], [2, 1]);
        // A tile, nearly one, and little more than one; many.
        assert_eq!([128, 120, 130, 4000, 4096].map(|seqlen_q| packed(seqlen_q, 32, 8)), [1, 1, 4, 1, 1]);
        let words = in_words(&problem(1, 32, 8), &CONFIG);
        assert_eq!(
            words.as_deref(),
            Some("4 heads that share K and V are packed into tiles, 24 of them instead of 96")
        );
        assert_eq!(in_words(&problem(128, 32, 8), &CONFIG), None);
        let plain = Config { few: false, ..CONFIG };
        assert_eq!(packing(&problem(1, 32, 8), &plain), Packing::SINGLE);
    }

    #[test]
    fn heads_of_sequences_of_different_lengths_are_packed_by_the_mean() {
        let packed = |total: usize| {
            let [q, k] = [8, 2].map(|nheads| Layout::contiguous(DType::BF16, &[total, nheads, 64]).expect("small"));
            let cu_seqlens = Layout::contiguous(DType::I32, &[11]).expect("small");
            let inputs =
                Inputs { cu_seqlens_q: Some(&cu_seqlens), cu_seqlens_k: Some(&cu_seqlens), ..Inputs::new(&q, &k, &k) };
            let options = AttentionOptions::new().max_seqlens(total, total);
            let problem = Problem::of(&inputs, None, &options).expect("valid");
            (
                packing(&problem, &CONFIG).heads(),
                in_words(&problem, &CONFIG).is_some_and(|words| words.contains("about")),
            )
        };
        assert_eq!([packed(10), packed(1280), packed(81920)], [(4, true), (4, true), (1, false)]);
    }
}
