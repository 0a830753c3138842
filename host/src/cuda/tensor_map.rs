//! Tensor maps, as the driver encodes them.
use std::ffi::c_void;

use cuda_std::DType;
use cuda_std::tensor::{Swizzle, TensorMap, TensorMapDescription};
use driver::calls::{
    Code, TENSOR_MAP_BFLOAT16, TENSOR_MAP_FLOAT16, TENSOR_MAP_FLOAT32, TENSOR_MAP_INT32, TENSOR_MAP_L2_PROMOTION_256B,
    TENSOR_MAP_UINT8, cuTensorMapEncodeTiled,
};

use super::codes::error;
use crate::error::Result;

/// Where the driver writes a map.
#[repr(align(64))]
struct Encoded([u64; 16]);

/// The map for a GPU.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver): the driver refuses it, or is older than CUDA 12.
pub fn encode(map: &TensorMapDescription) -> Result<TensorMap> {
    let dtype = match map.dtype {
        DType::F32 => TENSOR_MAP_FLOAT32,
        DType::F16 => TENSOR_MAP_FLOAT16,
        DType::BF16 => TENSOR_MAP_BFLOAT16,
        DType::I32 => TENSOR_MAP_INT32,
        DType::U8 => TENSOR_MAP_UINT8,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => 0,
        Swizzle::Bytes32 => 1,
        Swizzle::Bytes64 => 2,
        Swizzle::Bytes128 => 3,
    };
    let mut encoded = Encoded([0; 16]);
    // SAFETY: the map is as large and as aligned as the driver wants it, each list has `rank` elements, that of strides one
    // less, and the driver copies them. It reads no tensor.
    let code: Code = unsafe {
        cuTensorMapEncodeTiled(
            encoded.0.as_mut_ptr().cast::<c_void>(),
            dtype,
            map.rank as u32,
            map.address as *mut c_void,
            map.dimensions.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            [1; 5].as_ptr(),
            0,
            swizzle,
            TENSOR_MAP_L2_PROMOTION_256B,
            0,
        )
    };
    match code {
        driver::SUCCESS => Ok(TensorMap::from_encoded(encoded.0)),
        driver::NOT_FOUND => {
            let log = "the driver is older than CUDA 12, from which on it encodes the tensor maps of Hopper's kernels";
            Err(error("cuTensorMapEncodeTiled", code, log.to_owned()))
        }
        code => Err(error("cuTensorMapEncodeTiled", code, format!("of {map:?}"))),
    }
}
