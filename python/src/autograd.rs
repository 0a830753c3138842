//! What a `torch.autograd.Function` of attention does, where nobody has to see an operator: fewer steps than Python would
//! take.
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyTupleMethods};

use crate::attention::{self, InputTuple, Outputs};
use crate::options::{GivenNumbers, Options};
use crate::tensor::Optional;
use crate::torch::Torch;

/// O and LSE of a call that nothing has to be done for, as `Options::of_plain` says; None for every other call.
///
/// Where a gradient is wanted `differentiable`, the Function's `apply`, calls `forward`.
#[pyfunction]
pub fn attend<'py>(
    py: Python<'py>,
    tensors: InputTuple<'py>,
    numbers: GivenNumbers<'py>,
    differentiable: &Bound<'py, PyAny>,
) -> PyResult<Option<Outputs<'py>>> {
    let torch = Torch::get(py)?;
    let Some(options) = Options::of_plain(torch, &tensors, &numbers)? else { return Ok(None) };
    if torch.is_grad_enabled(py)? && needs_gradient(torch, &tensors)? {
        // Each argument of a Function costs time.
        let outputs = match tensors {
            (q, k, v, None, None, None, None, None, None) => differentiable.call1((options, q, k, v)),
            (q, k, v, bias, mask, alibi_slopes, sinks, cu_q, cu_k) => {
                differentiable.call1((options, q, k, v, bias, mask, alibi_slopes, sinks, cu_q, cu_k))
            }
        };
        return outputs?.extract().map(Some);
    }
    attention::attention(py, tensors, &options, None).map(Some)
}

/// Whether a gradient of one of them is wanted.
fn needs_gradient(torch: &Torch, (q, k, v, bias, _, _, sinks, _, _): &InputTuple) -> PyResult<bool> {
    for x in [Some(q), Some(k), Some(v), bias.as_ref(), sinks.as_ref()].into_iter().flatten() {
        if torch.requires_grad(x)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The optional inputs, of which not all are saved.
const OPTIONAL: usize = 6;

/// The Function's forward pass: O and LSE. What the backward pass takes is kept in `ctx`.
#[pyfunction]
#[pyo3(signature = (
    ctx, options, q, k, v, bias = None, mask = None, alibi_slopes = None, sinks = None, cu_seqlens_q = None,
    cu_seqlens_k = None
))]
#[expect(clippy::too_many_arguments, reason = "as many as the Function has")]
pub fn forward<'py>(
    py: Python<'py>,
    ctx: &Bound<'py, PyAny>,
    options: &Bound<'py, Options>,
    q: Bound<'py, PyAny>,
    k: Bound<'py, PyAny>,
    v: Bound<'py, PyAny>,
    bias: Optional<'py>,
    mask: Optional<'py>,
    alibi_slopes: Optional<'py>,
    sinks: Optional<'py>,
    cu_seqlens_q: Optional<'py>,
    cu_seqlens_k: Optional<'py>,
) -> PyResult<Outputs<'py>> {
    let tensors = (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k);
    let (out, softmax_lse) = attention::attention(py, tensors.clone(), options.get(), None)?;
    let (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k) = tensors;
    let optional: [Optional; OPTIONAL] = [bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k];
    let present = optional.each_ref().map(Option::is_some);
    // What `save_for_backward` and `set_materialize_grads` do.
    let saved = [&out, &softmax_lse, &q, &k, &v].into_iter().chain(optional.iter().flatten());
    let saved: Vec<_> = saved.collect();
    ctx.setattr(intern!(py, "to_save"), PyTuple::new(py, saved)?)?;
    ctx.setattr(intern!(py, "materialize_grads"), false)?;
    ctx.setattr(intern!(py, "options"), options)?;
    ctx.setattr(intern!(py, "present"), present)?;
    Ok((out, softmax_lse))
}

/// What the forward pass has kept: its outputs and its inputs.
#[pyfunction]
pub fn saved<'py>(ctx: &Bound<'py, PyAny>) -> PyResult<(Outputs<'py>, InputTuple<'py>)> {
    let py = ctx.py();
    let saved = ctx.getattr(intern!(py, "saved_tensors"))?.cast_into::<PyTuple>()?;
    let present: [bool; OPTIONAL] = ctx.getattr(intern!(py, "present"))?.extract()?;
    let mut saved = saved.iter();
    let mut next = || saved.next().ok_or_else(|| pyo3::exceptions::PyRuntimeError::new_err("a saved tensor is gone"));
    let outputs = (next()?, next()?);
    let (q, k, v) = (next()?, next()?, next()?);
    let mut optional = [const { None }; OPTIONAL];
    for (tensor, is_there) in optional.iter_mut().zip(present) {
        if is_there {
            *tensor = Some(next()?);
        }
    }
    let [bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k] = optional;
    Ok((outputs, (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)))
}

/// The gradients of the arguments of `forward` after `ctx`. Beyond the arguments that there were autograd takes none.
type Gradients<'py> = (
    Optional<'py>,
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

/// The Function's backward pass. None where dO or dLSE are no tensors of PyTorch's own, or not as they lie in memory.
#[pyfunction]
pub fn backward<'py>(
    py: Python<'py>,
    ctx: &Bound<'py, PyAny>,
    dout: Optional<'py>,
    dlse: Optional<'py>,
    deterministic: bool,
) -> PyResult<Option<Gradients<'py>>> {
    let torch = Torch::get(py)?;
    for gradient in [&dout, &dlse].into_iter().flatten() {
        if !torch.is_own_tensor(gradient) || torch.is_negated(gradient)? {
            return Ok(None);
        }
    }
    let ((out, softmax_lse), tensors) = saved(ctx)?;
    let options = ctx.getattr(intern!(py, "options"))?.cast_into::<Options>()?;
    let needs = |tensor: &Optional<'py>, place: usize| match tensor {
        Some(_) => ctx.getattr(intern!(py, "needs_input_grad"))?.get_item(place)?.is_truthy(),
        None => Ok(false),
    };
    let (needs_dbias, needs_dsinks) = (needs(&tensors.3, 4)?, needs(&tensors.6, 7)?);
    let results = (dout, dlse, out, softmax_lse);
    let (dq, dk, dv, dbias, dsinks) = attention::attention_backward(
        py,
        results,
        tensors,
        options.get(),
        deterministic,
        needs_dbias,
        needs_dsinks,
        None,
    )?;
    Ok(Some((None, dq, dk, dv, dbias, None, None, dsinks, None, None)))
}
