//! Attention and its gradients, of torch's tensors.
use cuda_std::DType;
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call, RawTensor};
use ferroflash::{Backend, BackwardInputs, Error, GradientOutputs, Inputs, Kernel, Session};
use pyo3::prelude::*;

use crate::error::exception;
use crate::options::Options;
use crate::place::{Device, Place};
use crate::tensor::{Optional, Reader, view, view_mut};
use crate::torch::Torch;

/// The inputs of a forward pass, in the order of `ferroflash::Inputs`.
pub type InputTuple<'py> = (
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

/// O and LSE.
pub type Outputs<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// O and LSE, of torch's allocator.
///
/// On the CPU they are computed when this returns; on CUDA the launches are on torch's current stream. All tensors are on
/// the device of Q; where kernels cannot read them as they lie, copies are made. O is written to `out`, if that is given.
#[pyfunction]
#[pyo3(signature = (tensors, options, out = None))]
pub fn attention<'py>(
    py: Python<'py>,
    tensors: InputTuple<'py>,
    options: &Options,
    out: Optional<'py>,
) -> PyResult<Outputs<'py>> {
    let torch = Torch::get(py)?;
    let tensors = inputs(tensors);
    let mut reader = Reader::new(torch, "q", &tensors.q)?;
    let inputs = tensors.try_map(|argument, tensor| reader.rows(argument, tensor))?;
    let (out_shape, lse_shape) = result_shapes(&inputs).map_err(exception)?;
    let (out, raw_out) = match out {
        None => reader.empty("out", inputs.q.layout.dtype(), &out_shape)?,
        Some(out) => reader.given("out", out)?,
    };
    let (softmax_lse, raw_lse) = reader.empty("softmax_lse", DType::F32, &lse_shape)?;
    let options = options.attention.clone();
    let arguments = Arguments { inputs, out: raw_out, softmax_lse: raw_lse, options, kernel: Kernel::Auto };
    let Device::Cuda(ordinal) = reader.device() else {
        py.detach(|| on_cpu(&arguments)).map_err(exception)?;
        return Ok((out, softmax_lse));
    };
    let place = Place::new(py, torch, ordinal)?;
    let call = Call::for_device(&arguments, place.device).map_err(exception)?;
    let workspace = Workspace::new(&reader, call.workspace_bytes())?;
    // SAFETY: the tensors are of this device, as torch says, and are kept until the launches are on the stream, which is
    // torch's current one: memory that is freed then is used again only after them.
    py.detach(|| unsafe { call.launch(place.device, workspace.address, place.stream()) }).map_err(exception)?;
    Ok((out, softmax_lse))
}

/// The shapes of O and of the LSE.
///
/// # Errors
/// For tensors that are not of tokens.
fn result_shapes(inputs: &Inputs<RawTensor>) -> ferroflash::Result<(Vec<usize>, Vec<usize>)> {
    let (rank, allowed) = match inputs.cu_seqlens_q {
        None => (4, "4: (batch, seqlen, nheads, headdim)"),
        Some(_) => (3, "3, with cu_seqlens: (total, nheads, headdim)"),
    };
    for (argument, tensor) in [("q", &inputs.q), ("v", &inputs.v)] {
        let found = tensor.layout.shape().len();
        if found != rank {
            return Err(Error::Rank { argument, found, allowed });
        }
    }
    let (q, v) = (inputs.q.layout.shape(), inputs.v.layout.shape());
    let mut out = q.to_vec();
    out[rank - 1] = v[rank - 1];
    let lse = match *q {
        [batch, seqlen, nheads, _] => vec![batch, nheads, seqlen],
        [total, nheads, ..] => vec![nheads, total],
        _ => Vec::new(),
    };
    Ok((out, lse))
}

fn on_cpu(arguments: &Arguments) -> ferroflash::Result<()> {
    let Arguments { inputs, out, softmax_lse, options, .. } = arguments;
    // SAFETY: the caller holds the tensors. That nobody writes to them meanwhile is asked of every user of torch.
    let (inputs, out) = unsafe { (inputs.try_map(|_, tensor| view(tensor))?, view_mut(out)?) };
    // SAFETY: likewise.
    let softmax_lse = unsafe { view_mut(softmax_lse)? }.into_slice().unwrap_or_default();
    Session::new(Backend::Cpu)?.attention_into_with(&inputs, options, out, softmax_lse).map(drop)
}

/// What a backward pass takes besides the inputs: dO and dLSE, where the loss depends on them, O and LSE.
pub type ResultTuple<'py> = (Optional<'py>, Optional<'py>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// dQ, dK, dV, and where they are wanted those of the bias and of the sinks.
pub type GradientTuple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Optional<'py>, Optional<'py>);

/// The gradients, of which the first three are written to `given`, if they are given. The rest as `attention`.
#[pyfunction]
#[pyo3(signature = (results, tensors, options, deterministic, needs_dbias, needs_dsinks, given = None))]
#[expect(clippy::too_many_arguments, reason = "as many as the operator has")]
pub fn attention_backward<'py>(
    py: Python<'py>,
    results: ResultTuple<'py>,
    tensors: InputTuple<'py>,
    options: &Options,
    deterministic: bool,
    needs_dbias: bool,
    needs_dsinks: bool,
    given: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)>,
) -> PyResult<GradientTuple<'py>> {
    let torch = Torch::get(py)?;
    let tensors = inputs(tensors);
    let (dout, dlse, out, softmax_lse) = results;
    let dout = dout.map_or_else(|| torch.zeros_like(&out), Ok)?;
    let mut tensors = BackwardInputs::new(tensors, out, softmax_lse, dout);
    tensors.dlse = dlse;
    let mut reader = Reader::new(torch, "q", &tensors.forward.q)?;
    let inputs = tensors.try_map(|argument, tensor| match argument {
        "softmax_lse" | "dlse" => reader.contiguous(argument, tensor),
        _ => reader.rows(argument, tensor),
    })?;
    let like = |argument, raw: &RawTensor| reader.empty(argument, raw.layout.dtype(), raw.layout.shape());
    let forward = &inputs.forward;
    let ((dq, raw_dq), (dk, raw_dk), (dv, raw_dv)) = match given {
        None => (like("dq", &forward.q)?, like("dk", &forward.k)?, like("dv", &forward.v)?),
        Some((dq, dk, dv)) => (reader.given("dq", dq)?, reader.given("dk", dk)?, reader.given("dv", dv)?),
    };
    let optional = |argument, raw: &Option<RawTensor>, wanted: bool| {
        raw.as_ref().filter(|_| wanted).map(|raw| like(argument, raw)).transpose().map(Option::unzip)
    };
    let (dbias, raw_dbias) = optional("dbias", &forward.bias, needs_dbias)?;
    let (dsinks, raw_dsinks) = optional("dsinks", &forward.sinks, needs_dsinks)?;
    let mut gradients = GradientOutputs::new(raw_dq, raw_dk, raw_dv);
    (gradients.dbias, gradients.dsinks) = (raw_dbias, raw_dsinks);
    let mut options = options.attention.clone();
    options.deterministic |= deterministic;
    let arguments = BackwardArguments { inputs, gradients, options, kernel: Kernel::Auto };
    let gradients = (dq, dk, dv, dbias, dsinks);
    let Device::Cuda(ordinal) = reader.device() else {
        py.detach(|| gradients_on_cpu(&arguments)).map_err(exception)?;
        return Ok(gradients);
    };
    let place = Place::new(py, torch, ordinal)?;
    let call = BackwardCall::for_device(&arguments, place.device).map_err(exception)?;
    let workspace = Workspace::new(&reader, call.workspace_bytes())?;
    // SAFETY: as in `attention`.
    py.detach(|| unsafe { call.launch(place.device, workspace.address, place.stream()) }).map_err(exception)?;
    Ok(gradients)
}

fn gradients_on_cpu(arguments: &BackwardArguments) -> ferroflash::Result<()> {
    let BackwardArguments { inputs, gradients, options, .. } = arguments;
    // SAFETY: as in `on_cpu`.
    let inputs = unsafe { inputs.try_map(|_, tensor| view(tensor))? };
    // SAFETY: likewise.
    let gradients = unsafe { gradients.try_map(|_, tensor| view_mut(tensor))? };
    Session::new(Backend::Cpu)?.attention_backward_into_with(&inputs, options, gradients).map(drop)
}

/// Device memory to work in, of torch's allocator.
struct Workspace<'py> {
    address: u64,
    /// Kept until the launches are on the stream.
    _tensor: Option<Bound<'py, PyAny>>,
}

impl<'py> Workspace<'py> {
    /// So many bytes where the tensors are.
    fn new(reader: &Reader<'_, 'py>, bytes: u64) -> PyResult<Self> {
        if bytes == 0 {
            return Ok(Workspace { address: 0, _tensor: None });
        }
        let (tensor, raw) = reader.empty("workspace", DType::U8, &[bytes as usize])?;
        Ok(Workspace { address: raw.address, _tensor: Some(tensor) })
    }
}
