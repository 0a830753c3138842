//! What a call costs on the host: to check its arguments and choose kernels, and to put a prepared call on a stream.
use ferroflash::cuda::{Device, DeviceTensor};
use ferroflash::raw::{Arguments, Call, RawTensor};
use ferroflash::{AttentionOptions, DType, Inputs, Kernel, Layout, Result};
use half::bf16;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

const SHAPE: [usize; 4] = [1, 256, 4, 128];
/// Launches that the driver queues before it waits for the GPU, and how often so many are timed.
const LAUNCHES: usize = 100;
const ROUNDS: usize = 30;

fn main() -> Result<()> {
    let device = Device::get(0)?;
    let tensors: Vec<_> = (0..4).map(|_| DeviceTensor::<bf16>::uninitialised(device, &SHAPE)).collect::<Result<_>>()?;
    let lse = DeviceTensor::<f32>::uninitialised(device, &[SHAPE[0], SHAPE[2], SHAPE[1]])?;
    let layout = Layout::contiguous(DType::BF16, &SHAPE)?;
    let tensor = |i: usize| RawTensor { address: tensors[i].address(), layout: layout.clone() };
    for kernel in [Kernel::Flash2, Kernel::Auto] {
        let arguments = Arguments {
            inputs: Inputs::new(tensor(0), tensor(1), tensor(2)),
            out: tensor(3),
            softmax_lse: RawTensor { address: lse.address(), layout: Layout::contiguous(DType::F32, lse.shape())? },
            options: AttentionOptions::new().causal(true),
            kernel,
        };
        let call = Call::new(&arguments)?;
        let wait = || lse.to_host().map(drop);
        let new = median(|| Call::new(&arguments).map(drop), wait)?;
        // SAFETY: the tensors outlive the launches: each round ends with a copy that waits for the default stream.
        let launch = median(|| unsafe { call.launch(device, 0, null_mut()) }.map(drop), wait)?;
        println!("{}: Call::new {new:.2?}, Call::launch {launch:.2?}", call.algorithm(device)?);
    }
    Ok(())
}

/// The median time of a call that returns.
fn median(call: impl Fn() -> Result<()>, wait: impl Fn() -> Result<()>) -> Result<Duration> {
    let mut times = Vec::with_capacity(ROUNDS * LAUNCHES);
    for _ in 0..ROUNDS {
        for _ in 0..LAUNCHES {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed());
        }
        wait()?;
    }
    times.sort();
    Ok(times[times.len() / 2])
}
