//! Errors as Python's exceptions.
use ferroflash::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};

/// `TypeError` for a tensor of the wrong dtype, `ValueError` for other arguments, `RuntimeError` for a machine that
/// cannot.
pub fn exception(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::DType { .. } => PyTypeError::new_err(message),
        Error::OutOfMemory { .. } => PyMemoryError::new_err(message),
        Error::NoDriver { .. }
        | Error::NoDevice { .. }
        | Error::UnsupportedArchitecture { .. }
        | Error::MissingKernel { .. }
        | Error::NoKernels
        | Error::NoSimulator
        | Error::BrokenKernel { .. }
        | Error::SharedMemory { .. }
        | Error::Driver { .. }
        | Error::Simulation { .. } => PyRuntimeError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}
