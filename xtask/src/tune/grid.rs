//! The configurations to try.
use anyhow::{Context, Result, ensure};
use kernels::SHARED_BYTES_OF_LARGEST_GPU;
use kernels::flash3::order::{self, Order};
use kernels::flash3::{GROUP_ROWS, claimed_registers};
use std::fmt;
use std::str::FromStr;

/// Threads of a warpgroup.
const WARPGROUP: u32 = 128;
/// Columns that one product of P and V takes from P.
const STEP: u32 = 16;
/// Bytes of an element of f16 or bf16, of a barrier in shared memory, and of the words that say where a tile of Q is.
const ELEMENT: u32 = 2;
const BARRIER: u32 = 8;
const PLACE: u32 = 16;

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
    /// Stages of Q, [`GROUP_ROWS`] rows each: as many as warpgroups, or for two tiles twice as many.
    pub queries: u32,
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
    /// Tiles of Q in shared memory.
    pub queries: &'a [u32],
    pub blocks_n: &'a [u32],
    pub stages: &'a [u32],
}

impl Grid<'_> {
    /// All combinations that fit a multiprocessor, and for the same problems what the table has.
    pub fn variants(&self, table: &[Variant]) -> Result<Vec<Variant>> {
        for block_n in self.blocks_n {
            ensure!(
                block_n.is_multiple_of(STEP) && *block_n > 0,
                "keys a block: {block_n}; allowed: multiples of {STEP}"
            );
        }
        for groups in self.groups {
            // `flash3::forward` knows how many registers so many may claim.
            ensure!((2..=4).contains(groups), "warpgroups: {groups}; allowed: 2 to 4");
        }
        for tiles in self.queries {
            ensure!((1..=2).contains(tiles), "tiles of Q: {tiles}; allowed: 1, 2");
        }
        ensure!(
            self.stages.iter().all(|stages| (1..=8).contains(stages)),
            "stages: {:?}; allowed: 1 to 8",
            self.stages
        );
        let mut variants = Vec::new();
        for (&headdims, &causal, &dtype) in product(self.headdims, self.causal, self.dtypes) {
            for (&groups, &block_n, &stages) in product(self.groups, self.blocks_n, self.stages) {
                let of = |&tiles: &u32| Variant {
                    headdims,
                    causal,
                    dtype,
                    groups,
                    queries: tiles * groups,
                    block_n,
                    stages,
                };
                variants.extend(self.queries.iter().map(of));
            }
        }
        variants.retain(Variant::fits);
        let asked = |variant: &Variant| {
            self.headdims.contains(&variant.headdims)
                && self.causal.contains(&variant.causal)
                && self.dtypes.contains(&variant.dtype)
        };
        variants.extend(table.iter().copied().filter(asked));
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

impl Variant {
    /// Shared memory of a block: the stages of Q, K and V, of each the barriers that say that it is full or empty, where each
    /// stage's Q is, and the order of sequences.
    pub fn shared_bytes(&self) -> u32 {
        let Headdims { headdim, headdim_v } = self.headdims;
        let stage = |rows: u32, columns: u32| rows * columns * ELEMENT + 2 * BARRIER;
        self.queries * (stage(GROUP_ROWS, headdim) + PLACE)
            + Order::bytes(order::room(headdim, self.queries))
            + self.stages * (stage(self.block_n, headdim) + stage(self.block_n, headdim_v))
    }

    /// Whether a multiprocessor has the shared memory for it, and a thread the registers for S and O, which are f32.
    pub fn fits(&self) -> bool {
        let accumulators = (self.block_n + self.headdims.headdim_v) * GROUP_ROWS / WARPGROUP;
        self.shared_bytes() <= SHARED_BYTES_OF_LARGEST_GPU && accumulators < claimed_registers(self.groups)
    }

    /// The name of its entry point.
    pub fn name(&self) -> String {
        let Variant { dtype, headdims: Headdims { headdim, headdim_v }, groups, queries, block_n, stages, causal } =
            self;
        let of_v = if headdim_v == headdim { String::new() } else { format!("_v{headdim_v}") };
        let causal = if *causal { "_causal" } else { "" };
        format!("flash3_fwd_{dtype}_d{headdim}{of_v}_{groups}x{block_n}x{stages}q{queries}{causal}")
    }

    /// The values of the generic parameters of `flash3::forward`, in their order.
    pub fn generics(&self) -> String {
        let Variant { dtype, headdims: Headdims { headdim, headdim_v }, groups, queries, block_n, stages, causal } =
            self;
        let (steps, s_columns, o_columns) = (block_n / STEP, block_n / 8, headdim_v / 8);
        format!(
            "{dtype}, {headdim}, {headdim_v}, {groups}, {queries}, {block_n}, {stages}, {steps}, {s_columns}, {o_columns}, \
             {causal}, 0"
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

    fn variant(groups: u32, queries: u32, block_n: u32, stages: u32) -> Variant {
        Variant { headdims: D128, causal: false, dtype: "bf16", groups, queries, block_n, stages }
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_what_the_table_has_is_there() {
        let grid = Grid {
            headdims: &[D128],
            causal: &[false],
            dtypes: &["bf16"],
            groups: &[2, 3, 4],
            queries: &[1, 2],
            blocks_n: &[64, 96, 128, 176, 256],
            stages: &[2, 4],
        };
        let asked = variant(3, 3, 80, 3);
        let others = [Variant { causal: true, ..asked }, Variant { dtype: "f16", ..asked }];
        let variants = grid.variants(&[asked, others[0], others[1], variant(2, 4, 128, 2)]).unwrap();
        assert!(variants.contains(&asked) && !others.iter().any(|other| variants.contains(other)), "{variants:?}");
        for fits in [variant(2, 2, 128, 2), variant(2, 4, 128, 2), variant(2, 2, 176, 2), variant(4, 4, 64, 2)] {
            assert!(variants.contains(&fits), "{fits}");
        }
        // 4 · 64 KiB of K and V; 64 KiB of Q and 2 · 88 KiB of K and V; 192 registers of 160; 112 of 112.
        for beyond in [variant(2, 2, 128, 4), variant(2, 4, 176, 2), variant(3, 3, 256, 2), variant(4, 4, 96, 2)] {
            assert!(!variants.contains(&beyond), "{beyond}");
        }
        let mut sorted = variants.clone();
        sorted.dedup();
        assert_eq!(sorted, variants);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |groups: u32, queries: u32, block_n: u32| {
            let grid = Grid {
                headdims: &[D128],
                causal: &[false],
                dtypes: &["bf16"],
                groups: &[groups],
                queries: &[queries],
                blocks_n: &[block_n],
                stages: &[2],
            };
            grid.variants(&[]).unwrap_err().to_string()
        };
        assert_eq!(refused(2, 1, 100), "keys a block: 100; allowed: multiples of 16");
        assert_eq!(refused(1, 1, 128), "warpgroups: 1; allowed: 2 to 4");
        assert_eq!(refused(2, 3, 128), "tiles of Q: 3; allowed: 1, 2");
        assert_eq!(refused(3, 1, 256), "no combination fits a multiprocessor");
        let headdims = |text: &str| text.parse::<Headdims>().map_err(|error| error.to_string());
        assert_eq!(headdims("192/128"), Ok(Headdims { headdim: 192, headdim_v: 128 }));
        assert_eq!(headdims("100").unwrap_err(), "headdim 100; allowed: multiples of 16 up to 256, as 128 or 192/128");
        assert!(headdims("").is_err() && headdims("64/").is_err() && headdims("512").is_err());
    }

    #[test]
    fn names_and_generics() {
        let headdims = Headdims { headdim: 192, headdim_v: 128 };
        let variant = Variant { headdims, causal: true, ..variant(2, 4, 96, 3) };
        assert_eq!(variant.name(), "flash3_fwd_bf16_d192_v128_2x96x3q4_causal");
        assert_eq!(variant.generics(), "bf16, 192, 128, 2, 4, 96, 3, 6, 12, 16, true, 0");
    }
}
