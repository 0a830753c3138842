//! Attention of random-looking tensors, on the GPU where there is one.
use ferroflash::{AttentionOptions, DType, Tensor, attention};

fn main() -> ferroflash::Result<()> {
    // (batch, seqlen, nheads, headdim)
    let shape = [1, 1024, 8, 64];
    let tensor = |seed: f32| {
        let data: Vec<f32> = (0..1024 * 8 * 64).map(|i| (seed * i as f32).sin()).collect();
        Ok::<_, ferroflash::Error>(Tensor::from_vec(data, &shape)?.convert(DType::F16))
    };
    let result = attention(&tensor(0.1)?, &tensor(0.2)?, &tensor(0.3)?, &AttentionOptions::new().causal(true))?;
    println!("out {:?}, softmax_lse {:?}", result.out.shape(), result.softmax_lse.shape());
    println!("{} on {}: {:.1} ms", result.report.algorithm, result.report.device, result.report.seconds * 1e3);
    Ok(())
}
