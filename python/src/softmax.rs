//! Softmax of torch's tensors.
use ferroflash::raw::{RawTensor, SoftmaxCall};
use ferroflash::{Backend, Session, SoftmaxMethod};
use pyo3::intern;
use pyo3::prelude::*;

use crate::error::exception;
use crate::place::Place;
use crate::tensor::{read, view, view_mut};

/// Writes softmax over the last dimension of `x`, which is contiguous, to `y`. Without a place on the CPU.
#[pyfunction]
pub fn softmax(py: Python, x: &Bound<PyAny>, y: &Bound<PyAny>, method: &str, place: Option<Place>) -> PyResult<()> {
    let method: SoftmaxMethod = method.parse().map_err(exception)?;
    let device = x.getattr(intern!(py, "device"))?;
    let (x, y) = (read("x", x, &device)?, read("y", y, &device)?);
    let Some(place) = place else { return py.detach(|| on_cpu(&x, &y, method)).map_err(exception) };
    let call = SoftmaxCall::new(&x, &y, method).map_err(exception)?;
    let device = place.device()?;
    // SAFETY: the tensors are of this device, as torch says; they are freed on the stream, which is torch's current
    // one.
    py.detach(|| unsafe { call.launch(device, place.stream()) }).map_err(exception)?;
    Ok(())
}

fn on_cpu(x: &RawTensor, y: &RawTensor, method: SoftmaxMethod) -> ferroflash::Result<()> {
    // SAFETY: the caller holds the tensors, and nobody writes to them meanwhile.
    let (x, y) = unsafe { (view(x)?, view_mut(y)?) };
    Session::new(Backend::Cpu)?.softmax_into(x, method, y).map(drop)
}
