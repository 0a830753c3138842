//! Inputs to compute on where the user gives none.
use anyhow::Result;
use ferroflash::{DType, Tensor};

/// A tensor of independent, nearly normal numbers of mean 0 and variance 1: the same for the same seed, everywhere.
pub fn normal(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut random = SplitMix(seed);
    // The sum of twelve uniform numbers has variance 1.
    let data = (0..shape.iter().product()).map(|_| (0..12).map(|_| random.uniform()).sum::<f32>() - 6.0).collect();
    Ok(Tensor::from_vec::<f32>(data, shape)?.convert(dtype))
}

/// Puts items in a random order: the same for the same seed and order before. Source: Durstenfeld, "Algorithm 235", 1964.
pub fn shuffle<X>(items: &mut [X], seed: u64) {
    let mut random = SplitMix(seed);
    for last in (1..items.len()).rev() {
        items.swap(last, (random.next() % (last as u64 + 1)) as usize);
    }
}

/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1), a multiple of 2^-24.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}
