//! What a call costs on the host, in microseconds, for each kernel family: to check its arguments and choose kernels, once,
//! and to put the prepared call on a stream, which is all that a program does that calls again and again. A launch is
//! timed whole: FlashAttention-3 encodes its tensor maps in it, and families of several kernels launch all of them.
//!
//! `cargo run --release --example launch_cost`
use comfy_table::{CellAlignment, Table, presets};
use ferroflash::cuda::{Device, DeviceTensor};
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call, RawTensor, WORKSPACE_ALIGNMENT};
use ferroflash::{
    AttentionOptions, BackwardInputs, DType, Error, GradientOutputs, Inputs, Kernel, Layout, Result, Tensor,
};
use half::bf16;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// (batch, seqlen, nheads, headdim): small, so that the GPU is done before the host has put more on its stream than fits.
const SHAPE: [usize; 4] = [1, 256, 4, 128];
/// Launches that are put on the stream before the host waits for the GPU, and how often so many are timed.
const LAUNCHES: usize = 100;
const ROUNDS: usize = 30;

fn main() -> Result<()> {
    let device = match Device::get(0) {
        Ok(device) => device,
        Err(error @ (Error::NoDriver { .. } | Error::NoDevice { .. })) => {
            println!("skipped: no GPU: {error}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let memory = Memory::new(device)?;
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["µs", "check", "p90", "launch", "p90", "kernels"]);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    for kernel in Kernel::ALL.iter().copied().filter(|&kernel| kernel != Kernel::Auto) {
        let arguments = memory.arguments(kernel)?;
        let prepare = || Call::new(&arguments);
        // SAFETY: the tensors and the workspace outlive the launches: each round ends with a wait for the default stream.
        let launch =
            |call: &Call, workspace| unsafe { call.launch(device, workspace, null_mut()) }.map(|all| all.len());
        let measured = memory.measure(&prepare, &Call::workspace_bytes, &launch)?;
        table.add_row(row(format!("{kernel} forward"), measured));
    }
    for kernel in Kernel::ALL.iter().copied().filter(|&kernel| kernel != Kernel::Auto && kernel.has_backward()) {
        let arguments = memory.backward_arguments(kernel)?;
        let prepare = || BackwardCall::new(&arguments);
        let launch = |call: &BackwardCall, workspace| {
            // SAFETY: as above.
            unsafe { call.launch(device, workspace, null_mut()) }.map(|all| all.len())
        };
        let measured = memory.measure(&prepare, &BackwardCall::workspace_bytes, &launch)?;
        table.add_row(row(format!("{kernel} backward"), measured));
    }
    let [batch, seqlen, nheads, headdim] = SHAPE;
    println!(
        "{}: batch {batch}, seqlen {seqlen}, nheads {nheads}, headdim {headdim}, bf16, causal",
        device.info().name
    );
    println!("the median and the 90th percentile of {} calls\n\n{}", ROUNDS * LAUNCHES, table.trim_fmt());
    Ok(())
}

/// What was measured of a family, or why it does not run here.
type Measured = std::result::Result<Cost, String>;

struct Cost {
    check: Vec<Duration>,
    launch: Vec<Duration>,
    /// Kernels that a launch puts on the stream.
    kernels: usize,
}

fn row(name: String, measured: Measured) -> Vec<String> {
    match measured {
        Ok(Cost { mut check, mut launch, kernels }) => {
            let [check, launch] = [&mut check, &mut launch].map(|times| {
                times.sort();
                [times.len() / 2, times.len() * 9 / 10].map(|at| format!("{:.1}", times[at].as_secs_f64() * 1e6))
            });
            [vec![name], check.to_vec(), launch.to_vec(), vec![kernels.to_string()]].concat()
        }
        Err(reason) => vec![name, format!("skipped: {reason}")],
    }
}

/// Tensors on the GPU.
struct Memory {
    device: &'static Device,
    /// Q, K, V, O, dO, dQ, dK and dV.
    tokens: [DeviceTensor<bf16>; 8],
    softmax_lse: DeviceTensor<f32>,
}

impl Memory {
    fn new(device: &'static Device) -> Result<Self> {
        let zeros = Tensor::zeros(DType::BF16, &SHAPE)?;
        let tokens: Vec<_> = (0..8).map(|_| DeviceTensor::from_host(device, &zeros)).collect::<Result<_>>()?;
        let Ok(tokens) = tokens.try_into() else { unreachable!("there are eight") };
        let lse = Tensor::zeros(DType::F32, &[SHAPE[0], SHAPE[2], SHAPE[1]])?;
        Ok(Memory { device, tokens, softmax_lse: DeviceTensor::from_host(device, &lse)? })
    }

    fn tokens(&self) -> Result<[RawTensor; 8]> {
        let layout = Layout::contiguous(DType::BF16, &SHAPE)?;
        Ok(self.tokens.each_ref().map(|tensor| RawTensor { address: tensor.address(), layout: layout.clone() }))
    }

    fn softmax_lse(&self) -> Result<RawTensor> {
        let layout = Layout::contiguous(DType::F32, self.softmax_lse.shape())?;
        Ok(RawTensor { address: self.softmax_lse.address(), layout })
    }

    fn arguments(&self, kernel: Kernel) -> Result<Arguments> {
        let [q, k, v, out, ..] = self.tokens()?;
        let (inputs, options) = (Inputs::new(q, k, v), AttentionOptions::new().causal(true));
        Ok(Arguments { inputs, out, softmax_lse: self.softmax_lse()?, options, kernel })
    }

    fn backward_arguments(&self, kernel: Kernel) -> Result<BackwardArguments> {
        let [q, k, v, out, dout, dq, dk, dv] = self.tokens()?;
        let inputs = BackwardInputs::new(Inputs::new(q, k, v), out, self.softmax_lse()?, dout);
        let (gradients, options) = (GradientOutputs::new(dq, dk, dv), AttentionOptions::new().causal(true));
        Ok(BackwardArguments { inputs, gradients, options, kernel })
    }

    /// Times `prepare`, and `launch` of what it gives, which says how many kernels it has put on the stream.
    fn measure<C>(
        &self,
        prepare: &dyn Fn() -> Result<C>,
        workspace_bytes: &dyn Fn(&C) -> u64,
        launch: &dyn Fn(&C, u64) -> Result<usize>,
    ) -> Result<Measured> {
        let call = prepare()?;
        let floats = workspace_bytes(&call).next_multiple_of(WORKSPACE_ALIGNMENT) as usize / size_of::<f32>();
        let workspace = DeviceTensor::<f32>::uninitialised(self.device, &[floats])?;
        // The first launch loads the kernels.
        let kernels = match launch(&call, workspace.address()) {
            Ok(kernels) => kernels,
            Err(error @ Error::Unsupported { .. }) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        let wait = || self.softmax_lse.to_host().map(drop);
        Ok(Ok(Cost {
            check: times(|| prepare().map(drop), wait)?,
            launch: times(|| launch(&call, workspace.address()).map(drop), wait)?,
            kernels,
        }))
    }
}

/// How long calls took to return.
fn times(call: impl Fn() -> Result<()>, wait: impl Fn() -> Result<()>) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(ROUNDS * LAUNCHES);
    for _ in 0..ROUNDS {
        wait()?;
        for _ in 0..LAUNCHES {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed());
        }
    }
    wait()?;
    Ok(times)
}
