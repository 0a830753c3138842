//! flash3's table, and the sources of the variants: a copy of the kernels, in which the table has a row for each of them.
//!
//! A copy, because the kernel's body, its shared memory and its number of barriers are then what they are, whatever is
//! tried, and nothing in the repository changes. Only the rows of the table differ, the names of the entry points, which
//! tell stages apart, and comments in the PTX that carry each configuration: so the copy is built for the GPU alone.
use super::grid::{Headdims, Variant};
use crate::artefacts::Declared;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// What the PTX says of a configuration: `// .configured NAME`, and the numbers of [`Configured`].
const CONFIGURED: &str = "// .configured ";
/// The packages that the device build reads.
const PACKAGES: [&str; 2] = ["cuda_std", "kernels"];
/// The file with the table.
const TABLE: &str = "kernels/src/flash3/mod.rs";
/// The columns of its rows.
const COLUMNS: &str = "HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS";
const ROOT: &str = "kernels/src/lib.rs";

/// What the `config` of a variant says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configured {
    pub block_m: u32,
    pub block_n: u32,
    pub threads: u32,
    pub sequences: u32,
    pub min_blocks_per_sm: u32,
    pub claimed_registers: u32,
    pub accumulators: u32,
    pub shared_bytes: u32,
    pub barriers: u32,
}

/// Its fields, in the order in which the PTX has them.
const FIELDS: [&str; 9] = [
    "block_m",
    "block_n",
    "threads",
    "sequences",
    "min_blocks_per_sm",
    "claimed_registers",
    "accumulators",
    "shared_bytes",
    "barriers",
];

impl Configured {
    pub fn declared(&self) -> Declared {
        let Configured { threads, min_blocks_per_sm: min_blocks, shared_bytes, barriers, .. } = *self;
        Declared { threads, min_blocks, barriers, shared_bytes }
    }
}

/// Writes a workspace with the packages that are built for the GPU.
pub fn write(root: &Path, to: &Path, variants: &[Variant]) -> Result<()> {
    for package in PACKAGES {
        // What is no longer in the repository is not to be in the copy.
        let copy = to.join(package);
        if copy.exists() {
            fs::remove_dir_all(&copy)?;
        }
        copy_all(&root.join(package), &copy)?;
    }
    fs::copy(root.join("Cargo.lock"), to.join("Cargo.lock")).context("Cargo.lock")?;
    let change = |file: &str, changed: &dyn Fn(&str) -> Result<String>| -> Result<()> {
        let text = fs::read_to_string(root.join(file)).with_context(|| file.to_owned())?;
        let text = changed(&text).with_context(|| format!("{file} is not as `cargo xtask tune` knows it"))?;
        fs::write(to.join(file), text).with_context(|| file.to_owned())
    };
    change("Cargo.toml", &workspace)?;
    change(ROOT, &without_other_hopper_kernels)?;
    change(TABLE, &|text| with_rows(text, variants))
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_all(&entry.path(), &to)?
        } else {
            fs::copy(entry.path(), to).map(drop)?
        }
    }
    Ok(())
}

/// The workspace's manifest, with the members that are copied.
fn workspace(manifest: &str) -> Result<String> {
    let line = |key: &str| {
        let line = manifest.lines().find(|line| line.starts_with(&format!("{key} = [")) && line.ends_with(']'));
        line.with_context(|| format!("it has no line `{key} = [..]`"))
    };
    let manifest = manifest.replace(line("default-members")?, "default-members = [\"kernels\"]");
    Ok(manifest.replace(line("members")?, "members = [\"cuda_std\", \"cuda_std/macros\", \"kernels\"]"))
}

/// The root of the kernels without the module of the other kernels for Hopper, which would be built, too.
fn without_other_hopper_kernels(root: &str) -> Result<String> {
    let others = ["pub mod flash3_backward;", "mod entries;", "pub use entries::{EntryInfo, entries};"];
    for other in others {
        ensure!(root.lines().any(|line| line == other), "it has no line `{other}`");
    }
    ensure!(root.contains("#![no_std]\n"), "it has no line `#![no_std]`");
    let kept: String = root.lines().filter(|line| !others.contains(line)).flat_map(|line| [line, "\n"]).collect();
    // What only those kernels use.
    Ok(kept.replace("#![no_std]\n", "#![no_std]\n#![allow(unused_imports)]\n"))
}

/// What is before the lists of the table's rows, the lists without their first `for T in`, and what is behind.
fn parts(text: &str) -> Result<(&str, &str, &str)> {
    let (before, rest) = text.split_once("\n    for T in ").context("there is no `for T in` of the table")?;
    let (lists, after) =
        rest.split_once("\n    config = config,").context("there is no `config = config` of the table")?;
    ensure!(!lists.contains("#[kernel("), "its first `for T in` is not that of the table");
    Ok((before, lists, after))
}

/// The configurations that the table has. Its text says them, because an entry point does not say all: two stages of Q
/// may take as much shared memory as one of K and V.
pub fn table(root: &Path) -> Result<Vec<Variant>> {
    let text = fs::read_to_string(root.join(TABLE)).context(TABLE)?;
    rows(&text).with_context(|| format!("{TABLE} is not as `cargo xtask tune` knows it"))
}

fn rows(text: &str) -> Result<Vec<Variant>> {
    let (_, lists, _) = parts(text)?;
    let lines = lists.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let lists = lines.collect::<Vec<_>>().join(" ");
    let mut variants = Vec::new();
    for list in lists.split("for T in ") {
        variants.extend(rows_of_list(list).with_context(|| format!("`for T in {list}`"))?);
    }
    Ok(variants)
}

/// Of `[f16, bf16], (HEADDIM, ..) in [(64, ..), (128, ..)], CAUSAL in [false], FEW in [false], GENERAL in [false],`. Of kernels
/// for few queries none, and of general ones: what is measured has many, and asks for nothing.
fn rows_of_list(list: &str) -> Result<Vec<Variant>> {
    let between = format!("], ({COLUMNS}) in [");
    let (dtypes, rest) = list.split_once(&between).with_context(|| format!("its rows are not of ({COLUMNS})"))?;
    let (rows, causal) = rest.split_once("], CAUSAL in [").context("`CAUSAL in [..]` does not follow the rows")?;
    let (causal, few) = causal.split_once("], FEW in [").context("`FEW in [..]` does not follow `CAUSAL in [..]`")?;
    let (few, general) =
        few.split_once("], GENERAL in [").context("`GENERAL in [..]` does not follow `FEW in [..]`")?;
    for (name, kind) in [("FEW", few), ("GENERAL", general)] {
        match kind.trim_end_matches([' ', ',', ']']) {
            "false" => (),
            "true" => return Ok(Vec::new()),
            other => anyhow::bail!("{name} in [{other}]; allowed: false or true"),
        }
    }
    let dtypes = dtypes.trim_start_matches('[').split(", ").map(|dtype| match dtype {
        "f16" => Ok("f16"),
        "bf16" => Ok("bf16"),
        _ => anyhow::bail!("dtype {dtype}; allowed: f16, bf16"),
    });
    let dtypes = dtypes.collect::<Result<Vec<_>>>()?;
    let causal = match causal.trim_end_matches([' ', ',', ']']) {
        "false" => &[false][..],
        "true" => &[true],
        "false, true" => &[false, true],
        other => anyhow::bail!("CAUSAL in [{other}]; allowed: false, true"),
    };
    let mut variants = Vec::new();
    for row in rows.split('(').skip(1) {
        let row = row.trim_end_matches([' ', ',', ')']);
        let numbers = row.split(", ").map(str::parse).collect::<Result<Vec<u32>, _>>();
        let numbers = numbers.with_context(|| format!("({row})"))?;
        let [headdim, headdim_v, groups, queries, block_n, stages, _, _, _, _] = numbers[..] else {
            anyhow::bail!("({row}): {} numbers; allowed: one each of {COLUMNS}", numbers.len());
        };
        let headdims = Headdims { headdim, headdim_v };
        for &dtype in &dtypes {
            let of = |&causal| Variant { headdims, causal, dtype, groups, queries, block_n, stages };
            variants.extend(causal.iter().map(of));
        }
    }
    Ok(variants)
}

/// The table with these rows, and the configurations as comments.
fn with_rows(text: &str, variants: &[Variant]) -> Result<String> {
    let (before, _, after) = parts(text)?;
    ensure!(before.contains("x{BLOCK_N}"), "the names of entry points do not say `x{{BLOCK_N}}`");
    let mut text = before.replace("x{BLOCK_N}", "x{BLOCK_N}x{STAGES}q{QUERIES}");
    let columns = COLUMNS.replace("FROM_KEYS", "CAUSAL, FROM_KEYS");
    write!(text, "\n    for (T, {columns}) in [\n")?;
    for variant in variants {
        writeln!(text, "        ({}),", variant.generics())?;
    }
    text.push_str("    ], FEW in [false], GENERAL in [false],\n    config = config,");
    text.push_str(after);
    let places: String = (0..FIELDS.len()).map(|i| format!(" {{{i}}}")).collect();
    for variant in variants {
        let (name, generics) = (variant.name(), variant.generics());
        let numbers = FIELDS.map(|field| format!("const config::<{generics}, false, false>().{field}")).join(", ");
        writeln!(text, "#[cfg(target_arch = \"nvptx64\")]")?;
        writeln!(text, "::cuda_std::entry::global_asm!(\"{CONFIGURED}{name}{places}\", {numbers});")?;
    }
    Ok(text)
}

/// The configurations that PTX says in comments, by the names of the entry points.
pub fn configured(ptx: &str) -> Result<BTreeMap<String, Configured>> {
    let comments = ptx.lines().filter_map(|line| line.trim().strip_prefix(CONFIGURED));
    comments.map(|comment| parse(comment).with_context(|| format!("`{CONFIGURED}{comment}`"))).collect()
}

fn parse(comment: &str) -> Result<(String, Configured)> {
    let mut words = comment.split_whitespace();
    let name = words.next().context("it has no name")?.to_owned();
    let numbers = words.map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let Ok(numbers) = <[u32; FIELDS.len()]>::try_from(&numbers[..]) else {
        anyhow::bail!("{} numbers; allowed: {}", numbers.len(), FIELDS.len());
    };
    let [block_m, block_n, threads, sequences, min_blocks_per_sm, rest @ ..] = numbers;
    let [claimed_registers, accumulators, shared_bytes, barriers] = rest;
    let configured = Configured {
        block_m,
        block_n,
        threads,
        sequences,
        min_blocks_per_sm,
        claimed_registers,
        accumulators,
        shared_bytes,
        barriers,
    };
    Ok((name, configured))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace as repository;
    use kernels::flash3::{FORWARD, GROUP_ROWS};
    use std::collections::BTreeSet;

    fn variant() -> Variant {
        let headdims = "128".parse().unwrap();
        Variant { headdims, causal: true, dtype: "bf16", groups: 2, queries: 4, block_n: 96, stages: 3 }
    }

    #[test]
    fn the_table_is_read() {
        let table = table(repository::root()).unwrap();
        let read = table.iter().map(|variant| {
            assert!(variant.fits(), "{variant}");
            // The table's names do not say how many stages there are.
            let stages = format!("x{}q{}", variant.stages, variant.queries);
            assert_eq!(variant.name().matches(&stages).count(), 1);
            (variant.name().replace(&stages, ""), variant.groups * GROUP_ROWS, variant.shared_bytes())
        });
        let built = FORWARD.iter().filter(|kernel| !kernel.config.few && !kernel.config.general).map(|kernel| {
            let config = &kernel.config;
            (kernel.name.to_owned(), config.block_m, config.shared_bytes)
        });
        let built = built.collect::<BTreeSet<_>>();
        assert_eq!(table.len(), built.len());
        assert_eq!(read.collect::<BTreeSet<_>>(), built);
    }

    #[test]
    fn rows_are_read() {
        let rows = |dtypes: &str, row: &str, causal: &str| {
            let row = format!("            // TFLOP/s (of old)\n            {row},");
            let list = format!("for T in [{dtypes}],\n        ({COLUMNS}) in [\n{row}\n        ],");
            let text = format!(
                "#[kernel(\n    {list}\n        CAUSAL in [{causal}], FEW in [false], GENERAL in [false],\n    config = config,\n"
            );
            rows(&text).map_err(|error| error.root_cause().to_string())
        };
        let row = "(128, 128, 2, 4, 96, 3, 6, 12, 16, 2048)";
        assert_eq!(rows("bf16", row, "true"), Ok(vec![variant()]));
        let two = [Variant { causal: false, ..variant() }, variant()];
        assert_eq!(rows("bf16", row, "false, true"), Ok(two.to_vec()));
        assert_eq!(rows("f16, bf16", &[row, row].join(",\n            "), "true").map(|rows| rows.len()), Ok(4));
        assert_eq!(rows("f32", row, "true").unwrap_err(), "dtype f32; allowed: f16, bf16");
        assert_eq!(rows("f16", row, "CAUSAL").unwrap_err(), "CAUSAL in [CAUSAL]; allowed: false, true");
        assert!(rows("f16", "(128, 128)", "true").unwrap_err().contains(": 2 numbers; allowed: one each of HEADDIM, "));
        assert!(rows("f16", "(128, N)", "true").unwrap_err().contains("invalid digit"));
    }

    #[test]
    fn the_files_of_the_repository_can_be_changed() {
        let to = std::env::temp_dir().join(format!("ferroflash-tune-{}", std::process::id()));
        write(repository::root(), &to, &[variant()]).unwrap();
        let read = |file: &str| fs::read_to_string(to.join(file)).unwrap();
        let (manifest, root, table) = (read("Cargo.toml"), read(ROOT), read(TABLE));
        // A second time, over what is there.
        write(repository::root(), &to, &[variant()]).unwrap();
        assert_eq!(read(TABLE), table);
        fs::remove_dir_all(&to).unwrap();

        assert!(manifest.contains("\nmembers = [\"cuda_std\", \"cuda_std/macros\", \"kernels\"]\n"), "{manifest}");
        assert!(manifest.contains("\ndefault-members = [\"kernels\"]\n"), "{manifest}");
        assert!(root.contains("pub mod flash3;") && !root.contains("flash3_backward") && !root.contains("entries"));
        assert_eq!(table.matches("#[kernel(").count(), 1);
        assert_eq!(table.matches("(bf16, 128, 128, 2, 4, 96, 3, 6, 12, 16, true, 0),\n").count(), 1, "{table}");
        assert!(
            table.contains("{GROUPS}x{BLOCK_N}x{STAGES}q{QUERIES}{CAUSAL?_causal}{FEW?_few}{GENERAL?_general}\""),
            "{table}"
        );
        assert!(!table.contains("for T in "), "{table}");
        let body = |text: &str| text[text.find("pub fn forward<").unwrap()..].to_owned();
        let original = fs::read_to_string(repository::root().join(TABLE)).unwrap();
        assert!(body(&table).starts_with(&body(&original)), "the kernel is another");
    }

    #[test]
    fn what_is_not_as_expected_is_said() {
        assert!(workspace("[workspace]\n").unwrap_err().to_string().contains("default-members = [..]"));
        assert!(without_other_hopper_kernels("pub mod flash3;\n").unwrap_err().to_string().contains("flash3_backward"));
        assert!(with_rows("pub fn forward() {}", &[]).is_err() && rows("pub fn forward() {}").is_err());
    }

    #[test]
    fn configurations_are_read_from_comments() {
        let ptx =
            "\t// begin inline asm\n\t// .configured f 128 96 384 1024 1 232 168 180000 9\n// .launch_bounds f 384 1\n";
        let f = Configured {
            block_m: 128,
            block_n: 96,
            threads: 384,
            sequences: 1024,
            min_blocks_per_sm: 1,
            claimed_registers: 232,
            accumulators: 168,
            shared_bytes: 180000,
            barriers: 9,
        };
        assert_eq!(configured(ptx).unwrap(), BTreeMap::from([("f".to_owned(), f)]));
        let error = configured("// .configured f 1 2").unwrap_err();
        assert_eq!(format!("{error:#}"), "`// .configured f 1 2`: 2 numbers; allowed: 9");
    }
}
