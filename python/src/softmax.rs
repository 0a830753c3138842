//! Softmax of torch's tensors.
use ferroflash::raw::{RawTensor, SoftmaxCall};
use ferroflash::{Backend, Session, SoftmaxMethod};
use pyo3::prelude::*;

use crate::error::exception;
use crate::place::{Device, Place};
use crate::tensor::{Reader, view, view_mut};
use crate::torch::Torch;

/// Softmax over the last dimension of `x`, which is contiguous.
#[pyfunction]
pub fn softmax<'py>(py: Python<'py>, x: &Bound<'py, PyAny>, method: &str) -> PyResult<Bound<'py, PyAny>> {
    let method: SoftmaxMethod = method.parse().map_err(exception)?;
    let torch = Torch::get(py)?;
    let mut reader = Reader::new(torch, "x", x)?;
    let raw_x = reader.contiguous("x", x)?;
    let (y, raw_y) = reader.empty("y", raw_x.layout.dtype(), raw_x.layout.shape())?;
    let Device::Cuda(ordinal) = reader.device() else {
        py.detach(|| on_cpu(&raw_x, &raw_y, method)).map_err(exception)?;
        return Ok(y);
    };
    let call = SoftmaxCall::new(&raw_x, &raw_y, method).map_err(exception)?;
    let place = Place::new(py, torch, ordinal)?;
    // SAFETY: the tensors are of this device, as torch says; they are freed on the stream, which is torch's current
    // one.
    py.detach(|| unsafe { call.launch(place.device, place.stream()) }).map_err(exception)?;
    Ok(y)
}

fn on_cpu(x: &RawTensor, y: &RawTensor, method: SoftmaxMethod) -> ferroflash::Result<()> {
    // SAFETY: the caller holds the tensors, and nobody writes to them meanwhile.
    let (x, y) = unsafe { (view(x)?, view_mut(y)?) };
    Session::new(Backend::Cpu)?.softmax_into(x, method, y).map(drop)
}
