//! The driver's results as errors.
use cust::error::CudaResult;
use driver::calls::{Code, error_name};

use crate::error::{Error, Result};

/// The result of a call of the driver.
pub fn check(call: &'static str, code: Code) -> Result<()> {
    if code == driver::SUCCESS { Ok(()) } else { Err(error(call, code, String::new())) }
}

/// The result of a function of `cust`, which is that of one call of the driver.
pub fn through_cust<T>(call: &'static str, result: CudaResult<T>) -> Result<T> {
    // By its number: the `Display` of a `CudaError` fails where the driver does not know the code.
    result.map_err(|error_code| error(call, error_code as Code, String::new()))
}

/// A failed call, and what the driver's compiler had to say.
pub fn error(call: &'static str, code: Code, log: String) -> Error {
    Error::Driver { call, code, name: error_name(code), log }
}
