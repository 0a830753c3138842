//! Reproducible inputs.
use ferroflash::{DType, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

/// A tensor of N(0, `deviation`²), rounded to `dtype`. The same seed gives the same tensor.
pub fn normal(dtype: DType, shape: &[usize], deviation: f32, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let count = shape.iter().product();
    let data = (0..count).map(|_| {
        let x: f32 = StandardNormal.sample(&mut rng);
        x * deviation
    });
    tensor(dtype, data.collect(), shape)
}

/// The tensor of these values, rounded to `dtype`.
pub fn tensor(dtype: DType, data: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(data, shape).expect("as many values as the shape says").convert(dtype)
}
