//! Attention and its gradients, of torch's tensors.
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call, RawTensor};
use ferroflash::{AttentionOptions, Backend, BackwardInputs, GradientOutputs, Inputs, Kernel, Session};
use pyo3::intern;
use pyo3::prelude::*;

use crate::error::exception;
use crate::options::Options;
use crate::place::{Place, Workspace};
use crate::tensor::{Optional, read, view, view_mut};

/// The inputs of a forward pass, in the order of `ferroflash::Inputs`.
type InputTuple<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Optional<'py>,
    Optional<'py>,
    Optional<'py>,
    Optional<'py>,
    Optional<'py>,
    Optional<'py>,
);

fn inputs<'py>((q, k, v, bias, mask, alibi_slopes, sinks, cu_q, cu_k): InputTuple<'py>) -> Inputs<Bound<'py, PyAny>> {
    let mut inputs = Inputs::new(q, k, v);
    (inputs.bias, inputs.mask, inputs.alibi_slopes, inputs.sinks) = (bias, mask, alibi_slopes, sinks);
    (inputs.cu_seqlens_q, inputs.cu_seqlens_k) = (cu_q, cu_k);
    inputs
}

/// Writes O to `out` and the LSE to `softmax_lse`.
///
/// Without a place on the CPU, where the call waits for the result; else on its stream, where `allocate` gives memory
/// to work in. All tensors are on the device of Q.
#[pyfunction]
pub fn attention<'py>(
    py: Python<'py>,
    tensors: InputTuple<'py>,
    out: &Bound<'py, PyAny>,
    softmax_lse: &Bound<'py, PyAny>,
    options: Options,
    place: Option<Place>,
    allocate: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let inputs = inputs(tensors);
    let device = inputs.q.getattr(intern!(py, "device"))?;
    let arguments = Arguments {
        inputs: inputs.try_map(|argument, tensor| read(argument, tensor, &device))?,
        out: read("out", out, &device)?,
        softmax_lse: read("softmax_lse", softmax_lse, &device)?,
        options: options.attention(),
        kernel: Kernel::Auto,
    };
    let Some(place) = place else { return py.detach(|| on_cpu(&arguments)).map_err(exception) };
    let call = Call::new(&arguments).map_err(exception)?;
    let workspace = Workspace::new(allocate, call.workspace_bytes())?;
    let address = workspace.address()?;
    let device = place.device()?;
    // SAFETY: the tensors are of this device, as torch says, and the caller keeps them until the launches are on the
    // stream, which is torch's current one: memory that it frees then is used again only after them.
    py.detach(|| unsafe { call.launch(device, address, place.stream()) }).map_err(exception)?;
    Ok(())
}

fn on_cpu(arguments: &Arguments) -> ferroflash::Result<()> {
    let Arguments { inputs, out, softmax_lse, options, .. } = arguments;
    // SAFETY: the caller holds the tensors. That nobody writes to them meanwhile is asked of every user of torch.
    let (inputs, out) = unsafe { (inputs.try_map(|_, tensor| view(tensor))?, view_mut(out)?) };
    // SAFETY: likewise.
    let softmax_lse = unsafe { view_mut(softmax_lse)? }.into_slice().unwrap_or_default();
    Session::new(Backend::Cpu)?.attention_into_with(&inputs, options, out, softmax_lse).map(drop)
}

/// What a backward pass takes besides the inputs: O, the LSE, dO and dLSE.
type ResultTuple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Optional<'py>);

/// dQ, dK, dV, and where they are wanted those of the bias and of the sinks.
type GradientTuple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Optional<'py>, Optional<'py>);

/// Writes gradients. The rest as `attention`.
#[pyfunction]
pub fn attention_backward<'py>(
    py: Python<'py>,
    tensors: InputTuple<'py>,
    results: ResultTuple<'py>,
    gradients: GradientTuple<'py>,
    options: Options,
    place: Option<Place>,
    allocate: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let ((out, softmax_lse, dout, dlse), (dq, dk, dv, dbias, dsinks)) = (results, gradients);
    let mut inputs = BackwardInputs::new(inputs(tensors), out, softmax_lse, dout);
    inputs.dlse = dlse;
    let mut gradients = GradientOutputs::new(dq, dk, dv);
    (gradients.dbias, gradients.dsinks) = (dbias, dsinks);
    let device = inputs.forward.q.getattr(intern!(py, "device"))?;
    let arguments = BackwardArguments {
        inputs: inputs.try_map(|argument, tensor| read(argument, tensor, &device))?,
        gradients: gradients.try_map(|argument, tensor| read(argument, tensor, &device))?,
        options: options.attention(),
        kernel: Kernel::Auto,
    };
    let Some(place) = place else {
        let BackwardArguments { inputs, gradients, options, .. } = &arguments;
        return py.detach(|| gradients_on_cpu(inputs, gradients, options)).map_err(exception);
    };
    let call = BackwardCall::new(&arguments).map_err(exception)?;
    let workspace = Workspace::new(allocate, call.workspace_bytes())?;
    let address = workspace.address()?;
    let device = place.device()?;
    // SAFETY: as in `attention`.
    py.detach(|| unsafe { call.launch(device, address, place.stream()) }).map_err(exception)?;
    Ok(())
}

fn gradients_on_cpu(
    inputs: &BackwardInputs<RawTensor>,
    gradients: &GradientOutputs<RawTensor>,
    options: &AttentionOptions,
) -> ferroflash::Result<()> {
    // SAFETY: as in `on_cpu`.
    let inputs = unsafe { inputs.try_map(|_, tensor| view(tensor))? };
    // SAFETY: likewise.
    let gradients = unsafe { gradients.try_map(|_, tensor| view_mut(tensor))? };
    Session::new(Backend::Cpu)?.attention_backward_into_with(&inputs, options, gradients).map(drop)
}
