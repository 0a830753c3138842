//! Which shapes are measured.
use super::defaults::Defaults;
use anyhow::{Result, bail};
use clap::value_parser;

/// Inputs of more elements take minutes to make, and no GPU has the memory for them.
const MOST_ELEMENTS: usize = 1 << 32;

/// The shape of Q, K, V and O.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
}

impl Shape {
    /// (batch, seqlen, nheads, headdim).
    pub fn dimensions(self) -> [usize; 4] {
        [self.batch, self.seqlen, self.nheads, self.headdim]
    }

    /// The elements of one tensor.
    pub fn elements(self) -> usize {
        self.dimensions().into_iter().fold(1, usize::saturating_mul)
    }
}

/// The shapes, as the user gives them.
#[derive(clap::Args)]
pub struct ShapeArguments {
    /// The sequence lengths [default: 1024,2048,4096,8192,16384 on a GPU; 256 to 2048 on the CPU, 64 to 256 on the
    /// simulator]
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = value_parser!(u32).range(1..))]
    seqlens: Option<Vec<u32>>,
    /// Tokens in all: there are N / seqlen sequences, one at least [default: the longest of the default lengths]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..), conflicts_with = "batch")]
    tokens: Option<u32>,
    /// Sequences, the same number at each length, instead of --tokens
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Heads [default: 2048 / headdim on a GPU, 512 / headdim on the CPU, 64 / headdim on the simulator]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    nheads: Option<u32>,
    /// Elements of one head's row
    #[arg(long, value_name = "D", default_value = "64", value_parser = value_parser!(u32).range(1..))]
    headdim: u32,
}

impl ShapeArguments {
    /// The shapes to measure, one for each length.
    pub fn or(self, defaults: &Defaults) -> Result<Vec<Shape>> {
        let tokens = self.tokens.unwrap_or(defaults.tokens);
        let nheads = self.nheads.unwrap_or(defaults.hidden / self.headdim).max(1);
        let shape = |seqlen: u32| {
            let batch = self.batch.unwrap_or(tokens / seqlen).max(1);
            let [batch, seqlen, nheads, headdim] = [batch, seqlen, nheads, self.headdim].map(|x| x as usize);
            Shape { batch, seqlen, nheads, headdim }
        };
        let shapes: Vec<_> = self.seqlens.as_deref().unwrap_or(defaults.seqlens).iter().map(|&n| shape(n)).collect();
        for shape in &shapes {
            if shape.elements() > MOST_ELEMENTS {
                bail!(
                    "shape {:?} has {} elements; allowed: at most {MOST_ELEMENTS}",
                    shape.dimensions(),
                    shape.elements()
                );
            }
        }
        Ok(shapes)
    }
}
