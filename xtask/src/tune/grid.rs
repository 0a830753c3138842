//! The configurations to try, and those that flash3's table has.
use anyhow::{Context, Result, ensure};
use kernels::Config;
use kernels::flash3::{FORWARD, GROUP_ROWS};
use std::fmt;
use std::str::FromStr;

/// Threads of a warpgroup.
const WARPGROUP: u32 = 128;
/// Columns that one product of P and V takes from P.
const STEP: u32 = 16;
/// Bytes of an element of f16 or bf16, and of a barrier in shared memory.
const ELEMENT: u32 = 2;
const BARRIER: u32 = 8;
/// The most shared memory that a block may have on Hopper.
const SHARED_BYTES: u32 = 227 * 1024;

/// The head dimensions of Q and K, and of V: `128` or `192/128`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Headdims {
    pub headdim: u32,
    pub headdim_v: u32,
}

impl FromStr for Headdims {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (headdim, headdim_v) = text.split_once('/').unwrap_or((text, text));
        let number = |text: &str| {
            let number =
                text.parse().ok().filter(|number: &u32| (16..=256).contains(number) && number.is_multiple_of(16));
            number.with_context(|| format!("headdim {text}; allowed: multiples of 16 up to 256, as 128 or 192/128"))
        };
        Ok(Headdims { headdim: number(headdim)?, headdim_v: number(headdim_v)? })
    }
}

/// A configuration of `flash3::forward`: its generic parameters, but for those that follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Variant {
    pub headdims: Headdims,
    pub causal: bool,
    /// `f16` or `bf16`.
    pub dtype: &'static str,
    /// Warpgroups of consumers.
    pub groups: u32,
    /// Keys a block.
    pub block_n: u32,
    /// Blocks of K, and of V, that are in shared memory at once.
    pub stages: u32,
}

/// What to combine.
pub struct Grid<'a> {
    pub headdims: &'a [Headdims],
    pub causal: &'a [bool],
    pub dtypes: &'a [&'static str],
    pub groups: &'a [u32],
    pub blocks_n: &'a [u32],
    pub stages: &'a [u32],
}

impl Grid<'_> {
    /// All combinations that fit a multiprocessor, and for the same problems what the table has.
    pub fn variants(&self) -> Result<Vec<Variant>> {
        for block_n in self.blocks_n {
            ensure!(
                block_n.is_multiple_of(STEP) && *block_n > 0,
                "keys a block: {block_n}; allowed: multiples of {STEP}"
            );
        }
        for groups in self.groups {
            ensure!((1..=3).contains(groups), "warpgroups: {groups}; allowed: 1 to 3");
        }
        ensure!(
            self.stages.iter().all(|stages| (1..=8).contains(stages)),
            "stages: {:?}; allowed: 1 to 8",
            self.stages
        );
        let mut variants = Vec::new();
        for (&headdims, &causal, &dtype) in product(self.headdims, self.causal, self.dtypes) {
            for (&groups, &block_n, &stages) in product(self.groups, self.blocks_n, self.stages) {
                variants.push(Variant { headdims, causal, dtype, groups, block_n, stages });
            }
        }
        variants.retain(Variant::fits);
        let asked = |variant: &Variant| {
            self.headdims.contains(&variant.headdims)
                && self.causal.contains(&variant.causal)
                && self.dtypes.contains(&variant.dtype)
        };
        variants.extend(in_table().filter(asked));
        variants.sort();
        variants.dedup();
        ensure!(!variants.is_empty(), "no combination fits a multiprocessor");
        Ok(variants)
    }
}

/// All triples.
fn product<'a, A, B, C>(a: &'a [A], b: &'a [B], c: &'a [C]) -> impl Iterator<Item = (&'a A, &'a B, &'a C)> {
    a.iter().flat_map(move |a| b.iter().flat_map(move |b| c.iter().map(move |c| (a, b, c))))
}

/// The configurations of flash3's table.
pub fn in_table() -> impl Iterator<Item = Variant> {
    FORWARD.iter().map(|kernel| Variant::of(&kernel.config))
}

impl Variant {
    /// Of an entry point.
    fn of(config: &Config) -> Self {
        let Config { headdim, headdim_v, block_n, shared_bytes, .. } = *config;
        let mut variant = Variant {
            headdims: Headdims { headdim, headdim_v },
            causal: config.causal == Some(true),
            dtype: config.dtype.name(),
            groups: config.threads / WARPGROUP - 1,
            block_n,
            stages: 0,
        };
        // The rest is Q and its barriers, which are less than a stage.
        variant.stages = (shared_bytes - variant.shared_bytes()) / variant.stage_bytes();
        variant
    }

    /// Bytes of a stage of K and one of V: the tiles, and of each the barriers that say that it is full or empty.
    fn stage_bytes(&self) -> u32 {
        let Headdims { headdim, headdim_v } = self.headdims;
        self.block_n * (headdim + headdim_v) * ELEMENT + 4 * BARRIER
    }

    /// Shared memory of a block: that, and of each warpgroup a tile of Q.
    fn shared_bytes(&self) -> u32 {
        let q = GROUP_ROWS * self.headdims.headdim * ELEMENT + 2 * BARRIER;
        self.groups * q + self.stages * self.stage_bytes()
    }

    /// Whether a multiprocessor has the shared memory for it, and a thread the registers for S and O, which are f32.
    fn fits(&self) -> bool {
        // What `flash3::forward` claims.
        let registers = if self.groups > 2 { 160 } else { 232 };
        let accumulators = (self.block_n + self.headdims.headdim_v) * GROUP_ROWS / WARPGROUP;
        self.shared_bytes() <= SHARED_BYTES && accumulators < registers
    }

    /// The name of its entry point.
    pub fn name(&self) -> String {
        let Variant { dtype, headdims: Headdims { headdim, headdim_v }, groups, block_n, stages, causal } = self;
        let of_v = if headdim_v == headdim { String::new() } else { format!("_v{headdim_v}") };
        let causal = if *causal { "_causal" } else { "" };
        format!("flash3_fwd_{dtype}_d{headdim}{of_v}_{groups}x{block_n}x{stages}{causal}")
    }

    /// The values of the generic parameters of `flash3::forward`, in their order.
    pub fn generics(&self) -> String {
        let Variant { dtype, headdims: Headdims { headdim, headdim_v }, groups, block_n, stages, causal } = self;
        let (steps, s_columns, o_columns) = (block_n / STEP, block_n / 8, headdim_v / 8);
        format!(
            "{dtype}, {headdim}, {headdim_v}, {groups}, {block_n}, {stages}, {steps}, {s_columns}, {o_columns}, {causal}, 0"
        )
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D128: Headdims = Headdims { headdim: 128, headdim_v: 128 };

    fn variant(groups: u32, block_n: u32, stages: u32) -> Variant {
        Variant { headdims: D128, causal: false, dtype: "bf16", groups, block_n, stages }
    }

    #[test]
    fn the_table_is_read_back() {
        for (variant, kernel) in in_table().zip(FORWARD) {
            assert_eq!(variant.shared_bytes(), kernel.config.shared_bytes, "{}", kernel.name);
            assert_eq!(variant.groups * GROUP_ROWS, kernel.config.block_m, "{}", kernel.name);
            assert!(variant.fits(), "{}", kernel.name);
            // The table's names do not say how many stages there are.
            let name = variant.name().replace(&format!("x{}", variant.stages), "");
            assert_eq!(name.replace("_causal", ""), kernel.name.replace("_causal", ""));
        }
        assert_eq!(in_table().count(), FORWARD.len());
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_what_the_table_has_is_there() {
        let grid = Grid {
            headdims: &[D128],
            causal: &[false],
            dtypes: &["bf16"],
            groups: &[2, 3],
            blocks_n: &[128, 176, 256],
            stages: &[2, 4],
        };
        let variants = grid.variants().unwrap();
        let now: Vec<_> = in_table().filter(|v| v.headdims == D128 && !v.causal && v.dtype == "bf16").collect();
        assert!(!now.is_empty() && now.iter().all(|now| variants.contains(now)), "{variants:?}");
        assert!(variants.contains(&variant(2, 128, 2)) && variants.contains(&variant(2, 176, 2)));
        // 4 · 64 KiB of K and V; 192 registers of 160.
        assert!(!variants.contains(&variant(2, 128, 4)) && !variants.contains(&variant(3, 256, 2)));
        let mut sorted = variants.clone();
        sorted.dedup();
        assert_eq!(sorted, variants);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |groups: &[u32], blocks_n: &[u32]| {
            let headdims = &["128".parse().unwrap()];
            let grid = Grid { headdims, causal: &[false], dtypes: &["bf16"], groups, blocks_n, stages: &[2] };
            grid.variants().unwrap_err().to_string()
        };
        assert_eq!(refused(&[2], &[100]), "keys a block: 100; allowed: multiples of 16");
        assert_eq!(refused(&[4], &[128]), "warpgroups: 4; allowed: 1 to 3");
        let headdims = |text: &str| text.parse::<Headdims>().map_err(|error| error.to_string());
        assert_eq!(headdims("192/128"), Ok(Headdims { headdim: 192, headdim_v: 128 }));
        assert_eq!(headdims("100").unwrap_err(), "headdim 100; allowed: multiples of 16 up to 256, as 128 or 192/128");
        assert!(headdims("").is_err() && headdims("64/").is_err() && headdims("512").is_err());
    }

    #[test]
    fn names_and_generics() {
        let headdims = Headdims { headdim: 192, headdim_v: 128 };
        let variant = Variant { headdims, causal: true, ..variant(2, 96, 3) };
        assert_eq!(variant.name(), "flash3_fwd_bf16_d192_v128_2x96x3_causal");
        assert_eq!(variant.generics(), "bf16, 192, 128, 2, 96, 3, 6, 12, 16, true, 0");
    }
}
