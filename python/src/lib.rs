//! ferroflash for Python: the host crate's calls on PyTorch's tensors, whose addresses, shapes and strides it asks for.
//! Neither PyTorch nor CUDA is linked; the functions here check, allocate and launch, all else is in the Python package.
use ferroflash::cuda;
use pyo3::prelude::*;

mod allocator;
mod attention;
mod autograd;
mod error;
mod exchange;
mod options;
mod place;
mod softmax;
mod tensor;
mod torch;

/// A GPU: its name, its compute capability, and how many multiprocessors it has.
type Gpu = (String, (u32, u32), u32);

/// The GPUs that the driver finds; none, where there is no driver.
#[pyfunction]
fn devices() -> PyResult<Vec<Gpu>> {
    match cuda::devices() {
        Ok(devices) => {
            let facts = |device: cuda::DeviceInfo| (device.name, device.compute_capability, device.multiprocessors);
            Ok(devices.into_iter().map(facts).collect())
        }
        Err(ferroflash::Error::NoDriver { .. }) => Ok(Vec::new()),
        Err(error) => Err(error::exception(error)),
    }
}

/// Whether the PyTorch that is loaded describes its tensors, and allocates them, without a call into Python.
#[pyfunction]
fn shortcuts(py: Python) -> PyResult<(bool, bool)> {
    let torch = torch::Torch::get(py)?;
    Ok((torch.exchange.is_some(), torch.allocator.is_some()))
}

/// What the package calls; not for others.
#[pymodule]
fn _core(module: &Bound<PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<options::Options>()?;
    module.add_function(wrap_pyfunction!(attention::attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention::attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(autograd::attend, module)?)?;
    module.add_function(wrap_pyfunction!(autograd::forward, module)?)?;
    module.add_function(wrap_pyfunction!(autograd::saved, module)?)?;
    module.add_function(wrap_pyfunction!(autograd::backward, module)?)?;
    module.add_function(wrap_pyfunction!(softmax::softmax, module)?)?;
    module.add_function(wrap_pyfunction!(shortcuts, module)?)?;
    module.add_function(wrap_pyfunction!(devices, module)?)
}
