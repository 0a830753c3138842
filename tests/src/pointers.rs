//! Combinations by plain pointers: tensors in the memory of a GPU, or of a simulated one, with [gaps](crate::guarded).
use std::ptr::null_mut;

use ferroflash::cuda::{Device, DeviceTensor};
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call, RawTensor};
use ferroflash::{
    Attention, AttentionOptions, Backend, BackwardInputs, DType, Error, GradientOutputs, Gradients, Inputs, Kernel,
    Session, SimulatorOptions, Tensor, TensorRef, WindowSize, sim,
};

use crate::combination::{Broken, Combination};
use crate::guarded::{Gaps, Guarded};

/// Where kernels run.
#[derive(Clone, Copy, Debug)]
pub enum Machine {
    /// On a GPU.
    Gpu(&'static Device),
    /// On the simulated one.
    Simulator,
}

impl Machine {
    /// GPU 0.
    ///
    /// # Errors
    /// Why there is none.
    pub fn gpu() -> Result<Self, Error> {
        Device::get(0).map(Machine::Gpu)
    }

    /// What takes host tensors there.
    pub fn session(self, kernel: Kernel) -> Session {
        let backend = match self {
            Machine::Gpu(_) => Backend::Cuda,
            Machine::Simulator => Backend::Simulator,
        };
        Session::new(backend).expect("it is there").kernel(kernel)
    }
}

/// Device memory, and kernels that run in it.
trait Memory {
    type Allocation;

    fn upload(&self, name: &'static str, bytes: &[u8]) -> Self::Allocation;

    fn address(&self, allocation: &Self::Allocation) -> u64;

    fn read(&self, allocation: &Self::Allocation) -> Result<Vec<u8>, Error>;

    /// Runs a pass in a workspace of its own.
    fn run(&self, pass: Pass) -> Result<(), String>;
}

enum Pass<'a> {
    Forward(&'a Call),
    Backward(&'a BackwardCall),
}

impl Memory for &'static Device {
    type Allocation = DeviceTensor<u8>;

    fn upload(&self, _name: &'static str, bytes: &[u8]) -> DeviceTensor<u8> {
        let tensor = Tensor::from_bytes(DType::U8, bytes, &[bytes.len()]).expect("as many");
        DeviceTensor::from_host(self, &tensor).expect("room")
    }

    fn address(&self, allocation: &DeviceTensor<u8>) -> u64 {
        allocation.address()
    }

    fn read(&self, allocation: &DeviceTensor<u8>) -> Result<Vec<u8>, Error> {
        Ok(allocation.to_host()?.bytes().to_vec())
    }

    /// The workspace holds anything, and nothing around it may change.
    fn run(&self, pass: Pass) -> Result<(), String> {
        let bytes = match pass {
            Pass::Forward(call) => call.workspace_bytes(),
            Pass::Backward(call) => call.workspace_bytes(),
        };
        let workspace = Placed::new(self, "workspace", Guarded::output(DType::U8, &[bytes as usize], Gaps::Around));
        let (address, stream) = (workspace.raw().address, null_mut());
        // SAFETY: all tensors were placed on this device, as large as their layouts say and with their sequences in
        // order; reading any of them waits for the default stream.
        let launched = unsafe {
            match pass {
                Pass::Forward(call) => call.launch(self, address, stream),
                Pass::Backward(call) => call.launch(self, address, stream),
            }
        };
        launched.map_err(|error| error.to_string())?;
        workspace.check().map(drop)
    }
}

impl Memory for sim::Memory {
    type Allocation = sim::Buffer<u8>;

    fn upload(&self, name: &'static str, bytes: &[u8]) -> sim::Buffer<u8> {
        self.upload(name, bytes)
    }

    fn address(&self, allocation: &sim::Buffer<u8>) -> u64 {
        allocation.global().address()
    }

    fn read(&self, allocation: &sim::Buffer<u8>) -> Result<Vec<u8>, Error> {
        Ok(self.read(allocation))
    }

    /// Nobody has written the workspace: to read from it before, or around it, is a fault that the simulator reports.
    fn run(&self, pass: Pass) -> Result<(), String> {
        let workspace = |bytes: u64| self.allocate::<u8>("workspace", bytes as usize).global().address();
        let options = SimulatorOptions::default();
        let ran = match pass {
            Pass::Forward(call) => call.simulate(self, workspace(call.workspace_bytes()), &options),
            Pass::Backward(call) => call.simulate(self, workspace(call.workspace_bytes()), &options),
        };
        ran.map(drop).map_err(|error| error.to_string())
    }
}

/// A tensor in device memory, with its gaps.
struct Placed<'m, M: Memory> {
    memory: &'m M,
    name: &'static str,
    guarded: Guarded,
    allocation: M::Allocation,
}

impl<'m, M: Memory> Placed<'m, M> {
    fn new(memory: &'m M, name: &'static str, guarded: Guarded) -> Self {
        let allocation = memory.upload(name, guarded.bytes());
        Placed { memory, name, guarded, allocation }
    }

    /// Where kernels find it.
    fn raw(&self) -> RawTensor {
        let address = self.memory.address(&self.allocation) + self.guarded.first() as u64;
        RawTensor { address, layout: self.guarded.layout().clone() }
    }

    /// What it holds, if nothing has been written around it.
    fn check(&self) -> Result<Tensor, String> {
        let after = self.memory.read(&self.allocation).map_err(|error| error.to_string())?;
        self.guarded.check(&after).map_err(|reason| format!("{}: {reason}", self.name))
    }

    /// Checks that nothing has been written, neither around it nor to it.
    fn check_untouched(&self) -> Result<(), String> {
        let after = self.memory.read(&self.allocation).map_err(|error| error.to_string())?;
        if after == self.guarded.bytes() { Ok(()) } else { Err(format!("{} has changed", self.name)) }
    }
}

/// The gaps that an argument may have: those of heads' rows in tensors of tokens, and in tensors of scores those of
/// keys.
fn allowed(argument: &str, gaps: Gaps) -> Gaps {
    match (argument, gaps) {
        ("q" | "k" | "v" | "out" | "dout" | "dq" | "dk" | "dv", gaps) => gaps,
        ("bias" | "mask" | "dbias", Gaps::HeadsFirst) => Gaps::Aligned,
        ("bias" | "mask" | "dbias", gaps) => gaps,
        _ => Gaps::Around,
    }
}

impl Combination {
    /// Runs it forward, and backward if the kernel can, by plain pointers with these gaps. Fails if anything is written
    /// around an output or to an input; if the results are not the bits that host tensors give, where the gaps leave
    /// both to the same kernel and no order of additions is left open; and if they break the accuracy rule.
    ///
    /// # Errors
    /// Which of these it is.
    pub fn check_pointers(&self, machine: Machine, kernel: Kernel, gaps: Gaps) -> Result<(), String> {
        let session = machine.session(kernel);
        let held = self.hold(|combination| match machine {
            Machine::Gpu(device) => combination.check_in(&device, &session, kernel, gaps),
            Machine::Simulator => combination.check_in(&sim::Memory::new(), &session, kernel, gaps),
        });
        held.map_err(|reason| format!("{kernel}, {gaps:?}: {reason}"))
    }

    /// Whether this kernel computes gradients of it. Those of flash3 are of heads of V as long as those of K, of none of the
    /// features that its general kernels have forward.
    pub fn has_backward(&self, kernel: Kernel) -> bool {
        let AttentionOptions { softmax_scale, window_size, softcap, dropout, .. } = self.options;
        let is_plain = window_size == WindowSize::default()
            && softmax_scale.is_none_or(|scale| scale > 0.0)
            && softcap.is_none()
            && dropout.is_none()
            && self.alibi.is_none()
            && self.bias.is_none()
            && self.mask.is_none()
            && !self.sinks;
        let has_flash3 = is_plain && self.headdim == self.headdim_v;
        kernel.has_backward() && (kernel != Kernel::Flash3 || has_flash3)
    }

    fn check_in<M: Memory>(&self, memory: &M, session: &Session, kernel: Kernel, gaps: Gaps) -> Result<(), Broken> {
        let same_kernel = gaps != Gaps::Unaligned;
        let tensors = self.tensors();
        // The same by host tensors: what to compare with, and the frame that the accuracy rule takes results in.
        let mut forward = self.forward(session, &tensors)?;
        let gradients = self.has_backward(kernel).then(|| self.backward(session, &tensors, &forward)).transpose()?;

        let inputs = place_all(memory, &tensors.inputs(), gaps);
        let (out, softmax_lse) = self.forward_pass(memory, &inputs, &forward, kernel, gaps)?;
        if same_kernel {
            same_bits("out", &out, &forward.out)?;
            same_bits("softmax_lse", &softmax_lse, &forward.softmax_lse)?;
        }
        (forward.out, forward.softmax_lse) = (out, softmax_lse);
        Broken::unless(&self.accuracy(&tensors, &forward)?)?;

        let Some(mut gradients) = gradients else { return Ok(()) };
        let backward = tensors.backward_inputs(&forward);
        let found = self.backward_pass(memory, &inputs, &backward, &gradients, kernel, gaps)?;
        let all = [("dq", &mut gradients.dq), ("dk", &mut gradients.dk), ("dv", &mut gradients.dv)].into_iter();
        let all = all.chain(gradients.dbias.as_mut().map(|dbias| ("dbias", dbias)));
        let all = all.chain(gradients.dsinks.as_mut().map(|dsinks| ("dsinks", dsinks)));
        for ((name, expected), found) in all.zip(found) {
            if same_kernel && self.options.deterministic {
                same_bits(name, &found, expected)?;
            }
            *expected = found;
        }
        Broken::unless_gradients(&self.backward_accuracy(&tensors, &gradients)?)
    }

    /// O and LSE, shaped like those of `like`.
    fn forward_pass<M: Memory>(
        &self,
        memory: &M,
        inputs: &Inputs<Placed<M>>,
        like: &Attention,
        kernel: Kernel,
        gaps: Gaps,
    ) -> Result<(Tensor, Tensor), String> {
        let (out, softmax_lse) = (
            place_output(memory, "out", &like.out, gaps),
            place_output(memory, "softmax_lse", &like.softmax_lse, gaps),
        );
        let call = Call::new(&Arguments {
            inputs: inputs.map(|_, placed| placed.raw()),
            out: out.raw(),
            softmax_lse: softmax_lse.raw(),
            options: self.device_options(),
            kernel,
        });
        memory.run(Pass::Forward(&call.map_err(|error| error.to_string())?))?;
        inputs.try_map(|_, placed| placed.check_untouched())?;
        Ok((out.check()?, softmax_lse.check()?))
    }

    /// The gradients, shaped like those of `like` and in their order.
    fn backward_pass<M: Memory>(
        &self,
        memory: &M,
        forward: &Inputs<Placed<M>>,
        inputs: &BackwardInputs<TensorRef>,
        like: &Gradients,
        kernel: Kernel,
        gaps: Gaps,
    ) -> Result<Vec<Tensor>, String> {
        let place = |name, tensor: &TensorRef| {
            Placed::new(memory, name, Guarded::input(&tensor.to_tensor(), allowed(name, gaps)))
        };
        let [out, softmax_lse, dout] =
            [("out", &inputs.out), ("softmax_lse", &inputs.softmax_lse), ("dout", &inputs.dout)]
                .map(|(name, tensor)| place(name, tensor));
        let dlse = inputs.dlse.as_ref().map(|dlse| place("dlse", dlse));
        let mut raw =
            BackwardInputs::new(forward.map(|_, placed| placed.raw()), out.raw(), softmax_lse.raw(), dout.raw());
        raw.dlse = dlse.as_ref().map(Placed::raw);

        let output = |name, like| place_output(memory, name, like, gaps);
        let [dq, dk, dv] =
            [("dq", &like.dq), ("dk", &like.dk), ("dv", &like.dv)].map(|(name, like)| output(name, like));
        let dbias = like.dbias.as_ref().map(|like| output("dbias", like));
        let dsinks = like.dsinks.as_ref().map(|like| output("dsinks", like));
        let mut gradients = GradientOutputs::new(dq.raw(), dk.raw(), dv.raw());
        gradients.dbias = dbias.as_ref().map(Placed::raw);
        gradients.dsinks = dsinks.as_ref().map(Placed::raw);

        let call =
            BackwardCall::new(&BackwardArguments { inputs: raw, gradients, options: self.device_options(), kernel });
        memory.run(Pass::Backward(&call.map_err(|error| error.to_string())?))?;
        forward.try_map(|_, placed| placed.check_untouched())?;
        [&out, &softmax_lse, &dout].into_iter().chain(&dlse).try_for_each(|placed| placed.check_untouched())?;
        [&dq, &dk, &dv].into_iter().chain(&dbias).chain(&dsinks).map(|placed| placed.check()).collect()
    }
}

fn place_all<'m, M: Memory>(memory: &'m M, inputs: &Inputs<TensorRef>, gaps: Gaps) -> Inputs<Placed<'m, M>> {
    inputs.map(|name, tensor| Placed::new(memory, name, Guarded::input(&tensor.to_tensor(), allowed(name, gaps))))
}

fn place_output<'m, M: Memory>(memory: &'m M, name: &'static str, like: &Tensor, gaps: Gaps) -> Placed<'m, M> {
    Placed::new(memory, name, Guarded::output(like.dtype(), like.shape(), allowed(name, gaps)))
}

pub(crate) fn same_bits(name: &str, found: &Tensor, expected: &Tensor) -> Result<(), String> {
    if found.bytes() == expected.bytes() { Ok(()) } else { Err(format!("{name}: other bits than by host tensors")) }
}
