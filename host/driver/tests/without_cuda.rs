//! `cust` on a machine without CUDA, and on one with.
use cust::CudaFlags;
use cust::error::CudaError;
use driver::Status;

#[test]
fn init_returns_no_device_where_there_is_no_driver() {
    match driver::status() {
        Status::Missing { reason } => {
            assert_eq!(cust::init(CudaFlags::empty()), Err(CudaError::NoDevice));
            assert!(reason.contains("libcuda.so.1"), "{reason}");
        }
        Status::Loaded => {
            let result = cust::init(CudaFlags::empty());
            assert!(matches!(result, Ok(()) | Err(CudaError::NoDevice)), "{result:?}");
        }
    }
}

#[test]
fn many_threads_may_call_first() {
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(cust::device::Device::num_devices)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{results:?}");
}
