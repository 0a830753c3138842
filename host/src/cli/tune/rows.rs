//! The rows of flash3's table that the measurements speak for.
use super::measure::Measured;
use super::variants::Candidate;
use std::fmt::Write;

/// By how much another row must be faster, in the geometric mean over the lengths, to take the place of one that is there,
/// and a second row, to be worth another entry point: as much as measurements of the same kernel differ.
const WORTH_A_CHANGE: f64 = 1.01;
const WORTH_AN_ENTRY: f64 = 1.02;

/// The variants for the same problems: of one dtype, of the same head dimensions, with the same mask; the fastest first.
pub fn groups(measured: &[Measured]) -> Vec<Vec<&Measured>> {
    let key = |measured: &Measured| {
        let config = measured.candidate.variant.config();
        (config.headdim, config.headdim_v, config.causal, config.dtype.name())
    };
    let mut keys: Vec<_> = measured.iter().map(key).collect();
    keys.sort_unstable();
    keys.dedup();
    let of = |wanted| {
        let mut group: Vec<_> = measured.iter().filter(|measured| key(measured) == wanted).collect();
        group.sort_by(|a, b| mean(&b.tflops).total_cmp(&mean(&a.tflops)));
        group
    };
    keys.into_iter().map(of).collect()
}

/// The rows to adopt, as `kernels/src/flash3/mod.rs` has them, with what was measured.
pub fn text(measured: &[Measured], seqlens: &[usize], device: &str) -> String {
    let lengths = seqlens.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut text = format!("Rows for the table of flash3::forward. On {device}, TFLOP/s at {lengths} tokens:\n");
    for group in groups(measured) {
        let config = group[0].candidate.variant.config();
        let _ = writeln!(text, "\n// {}, CAUSAL in [{}]", config.dtype.name(), config.causal == Some(true));
        let chosen = choose(&group, seqlens);
        for (row, from_keys) in &chosen {
            let remark = if row.candidate.in_table { " In the table." } else { "" };
            let others = group.iter().filter(|other| other.candidate.in_table && !std::ptr::eq(**other, *row));
            let others = others.map(|other| format!("; in the table {} {}", size(other), speeds(other)));
            let _ = writeln!(text, "// {}{}.{remark}", speeds(row), others.collect::<String>());
            let _ = writeln!(text, "{},", tuple(row, *from_keys));
        }
    }
    text
}

/// Rows, each from so many keys on, and what speaks for them.
type Rows<'a> = (f64, Vec<(&'a Measured, usize)>);

/// The row that is the fastest over all lengths; or two, for short and long sequences, where that is worth an entry point.
/// What is in the table stays where nothing is faster by more than measurements differ. There are variants.
fn choose<'a>(group: &[&'a Measured], seqlens: &[usize]) -> Vec<(&'a Measured, usize)> {
    let all = alternatives(group, seqlens);
    let in_table = |(_, rows): &&Rows| rows.iter().all(|(row, _)| row.candidate.in_table);
    let now = fastest(all.iter().filter(in_table));
    let best = fastest(all.iter()).expect("there are variants");
    now.filter(|now| now.0 * WORTH_A_CHANGE >= best.0).unwrap_or(best).1.clone()
}

fn fastest<'r, 'a: 'r>(alternatives: impl Iterator<Item = &'r Rows<'a>>) -> Option<&'r Rows<'a>> {
    alternatives.max_by(|a, b| a.0.total_cmp(&b.0))
}

/// Each row alone, and each two of which one is for short sequences.
fn alternatives<'a>(group: &[&'a Measured], seqlens: &[usize]) -> Vec<Rows<'a>> {
    let mut all: Vec<Rows> = group.iter().map(|row| (mean(&row.tflops), vec![(*row, 0)])).collect();
    for (length, from_keys) in seqlens.iter().enumerate().skip(1) {
        for short in group {
            for long in group.iter().filter(|long| size(long) != size(short)) {
                let tflops = [&short.tflops[..length], &long.tflops[length..]].concat();
                all.push((mean(&tflops) / WORTH_AN_ENTRY, vec![(*short, 0), (*long, *from_keys)]));
            }
        }
    }
    all
}

/// What tells names of entry points apart: two rows of one table differ in it.
fn size(row: &Measured) -> String {
    format!("{}x{}", row.candidate.groups, row.candidate.variant.config().block_n)
}

fn speeds(row: &Measured) -> String {
    row.tflops.iter().map(|tflops| format!("{tflops:.0}")).collect::<Vec<_>>().join(", ")
}

/// `(HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS)`.
fn tuple(row: &Measured, from_keys: usize) -> String {
    let config = row.candidate.variant.config();
    let (headdim, headdim_v, block_n) = (config.headdim, config.headdim_v, config.block_n);
    let Candidate { groups, queries, stages, .. } = row.candidate;
    let (steps, s_columns, o_columns) = (block_n / 16, block_n / 8, headdim_v / 8);
    format!(
        "({headdim}, {headdim_v}, {groups}, {queries}, {block_n}, {stages}, {steps}, {s_columns}, {o_columns}, {from_keys})"
    )
}

/// The geometric mean.
fn mean(x: &[f64]) -> f64 {
    (x.iter().map(|x| x.ln()).sum::<f64>() / x.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferroflash::DType;
    use ferroflash::tune::Flash3Variant;
    use kernels::Config;

    const SEQLENS: [usize; 3] = [512, 2048, 16384];

    fn measured(
        causal: bool,
        (groups, queries, block_n, stages): (u32, u32, u32, u32),
        in_table: bool,
        tflops: [f64; 3],
    ) -> Measured {
        let config = Config {
            family: "flash3",
            dtype: DType::BF16,
            tf32: false,
            headdim: 64,
            headdim_v: 64,
            causal: Some(causal),
            general: false,
            block_m: groups * 64,
            block_n,
            from_keys: 0,
            few: false,
            sequences: 0,
            threads: (1 + groups) * 128,
            min_blocks_per_sm: 1,
            claimed_registers: 0,
            accumulators: 0,
            shared_bytes: 0,
            barriers: 0,
        };
        let name = format!("of_test_{groups}x{block_n}x{stages}q{queries}_{causal}");
        let variant = Flash3Variant::new(name, config, Vec::new());
        let candidate = Candidate { variant, groups, queries, stages, registers: None, spill_bytes: None, in_table };
        Measured { candidate, tflops: tflops.to_vec() }
    }

    fn chosen(measured: &[Measured]) -> Vec<String> {
        let groups = groups(measured);
        let [group] = &groups[..] else { panic!("one kind of problem") };
        choose(group, &SEQLENS).into_iter().map(|(row, from_keys)| tuple(row, from_keys)).collect()
    }

    #[test]
    fn the_fastest_row_is_chosen_and_a_row_stays_that_is_as_fast() {
        let now = measured(false, (2, 2, 128, 3), true, [500.0, 600.0, 700.0]);
        let faster = measured(false, (2, 4, 176, 2), false, [520.0, 620.0, 720.0]);
        let as_fast = measured(false, (3, 3, 128, 2), false, [501.0, 602.0, 703.0]);
        assert_eq!(chosen(&[now.clone(), faster]), ["(64, 64, 2, 4, 176, 2, 11, 22, 8, 0)"]);
        assert_eq!(chosen(&[now, as_fast]), ["(64, 64, 2, 2, 128, 3, 8, 16, 8, 0)"]);
    }

    #[test]
    fn long_sequences_get_a_row_of_their_own_where_it_gains_enough() {
        for causal in [false, true] {
            let short = measured(causal, (2, 4, 128, 4), true, [240.0, 400.0, 480.0]);
            let long = measured(causal, (3, 3, 128, 4), true, [180.0, 410.0, 580.0]);
            let expected = ["(64, 64, 2, 4, 128, 4, 8, 16, 8, 0)", "(64, 64, 3, 3, 128, 4, 8, 16, 8, 2048)"];
            assert_eq!(chosen(&[short.clone(), long.clone()]), expected);
            let little = measured(causal, (3, 3, 128, 4), false, [180.0, 390.0, 490.0]);
            assert_eq!(chosen(&[short.clone(), little]), expected[..1]);
            // As much as measurements differ.
            let rival = measured(causal, (3, 3, 176, 2), false, [180.0, 412.0, 582.0]);
            assert_eq!(chosen(&[short.clone(), long, rival]), expected);
            // Entry points are not named after their stages: a table has one of these.
            for stages in [(2, 4, 128, 3), (2, 2, 128, 4)] {
                let namesake = measured(causal, stages, false, [180.0, 410.0, 580.0]);
                assert_eq!(chosen(&[short.clone(), namesake]).len(), 1);
            }
        }
    }

    #[test]
    fn rows_are_printed_with_what_was_measured() {
        let all = [
            measured(false, (2, 2, 128, 3), true, [500.0, 600.0, 700.0]),
            measured(false, (2, 4, 176, 2), false, [520.0, 620.4, 720.0]),
        ];
        let expected = "\
            Rows for the table of flash3::forward. On a GPU, TFLOP/s at 512, 2048, 16384 tokens:\n\n\
            // bf16, CAUSAL in [false]\n\
            // 520, 620, 720; in the table 2x128 500, 600, 700.\n\
            (64, 64, 2, 4, 176, 2, 11, 22, 8, 0),\n";
        assert_eq!(text(&all, &SEQLENS, "a GPU"), expected);
    }
}
