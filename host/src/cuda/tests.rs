//! What only a GPU can tell. Without one each test says so and passes.
use std::ptr::null_mut;

use cuda_std::DType;
use driver::calls::cuCtxGetCurrent;
use half::f16;

use super::{Device, DeviceTensor};
use crate::raw::{self, RawTensor};
use crate::{AttentionOptions, Backend, Error, Inputs, Kernel, Layout, Session, SoftmaxMethod, Tensor, accuracy};

fn gpu() -> Option<&'static Device> {
    Device::get(0).inspect_err(|reason| eprintln!("skipped: {reason}")).ok()
}

fn session(kernel: Kernel) -> Session {
    Session::new(Backend::Cuda).expect("there is a GPU").kernel(kernel)
}

fn wave(shape: &[usize], step: f32) -> Tensor {
    let data = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec::<f32>(data, shape).expect("as many").convert(DType::F16)
}

#[test]
fn host_tensors_keep_the_rule() {
    let Some(_) = gpu() else { return };
    for (kernel, dtype) in [
        (Kernel::Flash2, DType::F16),
        (Kernel::Flash2, DType::BF16),
        (Kernel::Flash1, DType::F32),
        (Kernel::Standard, DType::F32),
        (Kernel::Standard, DType::BF16),
    ] {
        for causal in [false, true] {
            let (q, k) = (wave(&[2, 113, 4, 64], 0.37).convert(dtype), wave(&[2, 257, 2, 64], 0.71).convert(dtype));
            let options = AttentionOptions::new().causal(causal);
            let result = session(kernel).attention(&q, &k, &k, &options).expect("runs");
            let accuracy = accuracy::check(&q, &k, &k, &options, &result).expect("of these inputs");
            assert!(accuracy.passed(), "{kernel} {} causal {causal}: {accuracy}", dtype.name());
            assert!(result.report.seconds > 0.0);
        }
    }
}

#[test]
fn softmax_keeps_the_rule() {
    let Some(_) = gpu() else { return };
    for &method in SoftmaxMethod::ALL {
        for shape in [[7, 1], [5, 1000], [3, 5000]] {
            let x = wave(&shape, 0.37);
            let softmax = session(Kernel::Auto).softmax(&x, method).expect("runs");
            let accuracy = accuracy::check_softmax(&x, &softmax).expect("of this x");
            assert!(accuracy.passed(), "{method} {shape:?}: {accuracy}");
        }
    }
}

#[test]
fn device_tensors_give_what_host_tensors_give() {
    let Some(device) = gpu() else { return };
    let (q, k) = (wave(&[1, 65, 2, 128], 0.37), wave(&[1, 130, 1, 128], 0.71));
    let options = AttentionOptions::new().causal(true);
    let [on_q, on_k] = [&q, &k].map(|tensor| DeviceTensor::<f16>::from_host(device, tensor).expect("room"));
    for kernel in [Kernel::Standard, Kernel::Flash1, Kernel::Flash2] {
        let there = device.attention(&on_q, &on_k, &on_k, &options, kernel).expect("runs");
        let here = session(kernel).attention(&q, &k, &k, &options).expect("runs");
        assert_eq!(there.out.to_host().expect("copies"), here.out, "{kernel}");
        assert_eq!(there.softmax_lse.to_host().expect("copies"), here.softmax_lse, "{kernel}");
    }
}

#[test]
fn gradients_of_device_tensors_are_those_of_host_tensors() {
    let Some(device) = gpu() else { return };
    let (q, k, dout) = (wave(&[1, 65, 2, 128], 0.37), wave(&[1, 130, 1, 128], 0.71), wave(&[1, 65, 2, 128], 1.3));
    let options = AttentionOptions::new().causal(true);
    let [on_q, on_k, on_dout] = [&q, &k, &dout].map(|x| DeviceTensor::<f16>::from_host(device, x).expect("room"));
    let forward = device.attention(&on_q, &on_k, &on_k, &options, Kernel::Auto).expect("runs");
    let (out, lse) = (&forward.out, &forward.softmax_lse);
    let there = device.attention_backward(&on_q, &on_k, &on_k, out, lse, &on_dout, &options, Kernel::Auto);
    let there = there.expect("runs");
    let (out, lse) = (out.to_host().expect("copies"), lse.to_host().expect("copies"));
    let here = session(Kernel::Auto).attention_backward(&q, &k, &k, &out, &lse, &dout, &options).expect("runs");
    let accuracy = accuracy::check_backward(&q, &k, &k, &dout, &options, &here).expect("of these inputs");
    assert!(accuracy.passed(), "{accuracy}");
    for (there, here) in [(there.dq, here.dq), (there.dk, here.dk), (there.dv, here.dv)] {
        assert_eq!(there.to_host().expect("copies"), here);
    }
    // Without keys dQ is 0.
    let none = DeviceTensor::<f16>::uninitialised(device, &[1, 0, 1, 128]).expect("no room needed");
    let (out, lse) = (&forward.out, &forward.softmax_lse);
    let empty = device.attention_backward(&on_q, &none, &none, out, lse, &on_dout, &options, Kernel::Auto);
    assert!(empty.expect("valid").dq.to_host().expect("copies").to_f32().iter().all(|&dq| dq == 0.0));
}

#[test]
fn sequences_of_different_lengths_are_checked_before_they_are_launched() {
    let Some(device) = gpu() else { return };
    let (x, starts) = (wave(&[70, 2, 64], 0.37), Tensor::from_vec(vec![0, 3, 3, 70], &[4]).expect("four"));
    let on_x = DeviceTensor::<f16>::from_host(device, &x).expect("room");
    let on_starts = DeviceTensor::<i32>::from_host(device, &starts).expect("room");
    let options = AttentionOptions::new().causal(true);
    let inputs = Inputs::new(&on_x, &on_x, &on_x).cu_seqlens(&on_starts, &on_starts);
    let there = device.attention_with::<f16>(&inputs, &options, Kernel::Auto).expect("runs");
    let inputs = Inputs::new(&x, &x, &x).cu_seqlens(&starts, &starts);
    let here = session(Kernel::Auto).attention_with(&inputs, &options).expect("runs");
    assert_eq!(there.out.to_host().expect("copies"), here.out);
    assert_eq!(there.softmax_lse.to_host().expect("copies"), here.softmax_lse);

    let beyond = Tensor::from_vec(vec![0, 3, 3, 71], &[4]).expect("four");
    let beyond = DeviceTensor::<i32>::from_host(device, &beyond).expect("room");
    let inputs = Inputs::new(&on_x, &on_x, &on_x).cu_seqlens(&on_starts, &beyond);
    let refused = device.attention_with::<f16>(&inputs, &options, Kernel::Auto).expect_err("beyond the end");
    assert_eq!(refused.to_string(), "cu_seqlens_k: 71 at index 3; allowed: 70, as many tokens as there are");
    let refused = device.attention_with::<half::bf16>(&Inputs::new(&on_x, &on_x, &on_x), &options, Kernel::Auto);
    assert_eq!(refused.expect_err("f16").to_string(), "q: dtype f16; allowed: bf16");
}

#[test]
fn pointers_may_have_any_aligned_strides_and_threads_no_context() {
    let Some(device) = gpu() else { return };
    // (batch, nheads, seqlen, headdim) in memory.
    let (shape, strides) = ([2, 50, 3, 64], [3 * 50 * 64, 64, 50 * 64, 1]);
    let transposed = wave(&[2, 3, 50, 64], 0.37);
    let x = DeviceTensor::<f16>::from_host(device, &transposed).expect("room");
    let out = DeviceTensor::<f16>::uninitialised(device, &[2, 3, 50, 64]).expect("room");
    let lse = DeviceTensor::<f32>::uninitialised(device, &[2, 3, 50]).expect("room");
    let layout = Layout::strided(DType::F16, &shape, &strides).expect("four strides");
    let tensor = |address| RawTensor { address, layout: layout.clone() };
    let of_rows = Layout::contiguous(DType::F32, &[2, 3, 50]).expect("small");
    let arguments = raw::Arguments {
        inputs: Inputs::new(tensor(x.address()), tensor(x.address()), tensor(x.address())),
        out: tensor(out.address()),
        softmax_lse: RawTensor { address: lse.address(), layout: of_rows },
        options: AttentionOptions::new(),
        kernel: Kernel::Flash2,
    };
    let call = raw::Call::new(&arguments).expect("valid");
    let current = || {
        let mut context = null_mut();
        // SAFETY: stores a handle.
        assert_eq!(unsafe { cuCtxGetCurrent(&mut context) }, driver::SUCCESS);
        context as usize
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let before = current();
            // SAFETY: the tensors outlive the copy below, which waits for the default stream.
            unsafe { call.launch(device, 0, null_mut()) }.expect("launches");
            assert_eq!((before, current()), (0, 0), "no context before, none after");
        });
    });

    let data = transposed.as_slice::<f16>().expect("f16");
    let view = crate::TensorRef::with_strides(data, &shape, &strides).expect("fits");
    let expected = session(Kernel::Flash2).attention(&view, &view, &view, &AttentionOptions::new()).expect("runs");
    let out = out.to_host().expect("copies");
    let out = crate::TensorRef::with_strides(out.as_slice::<f16>().expect("f16"), &shape, &strides).expect("fits");
    assert_eq!(out.to_tensor(), expected.out);
    assert_eq!(lse.to_host().expect("copies"), expected.softmax_lse);
}

#[test]
fn without_keys_the_output_is_zero() {
    let Some(device) = gpu() else { return };
    let tensor = |shape: &[usize]| DeviceTensor::<f16>::from_host(device, &wave(shape, 0.3)).expect("room");
    let (q, k) = (tensor(&[2, 5, 3, 64]), tensor(&[2, 0, 3, 64]));
    let result = device.attention(&q, &k, &k, &AttentionOptions::new(), Kernel::Auto).expect("runs");
    assert!(result.out.to_host().expect("copies").to_f32().iter().all(|&o| o == 0.0));
    assert!(result.softmax_lse.to_host().expect("copies").to_f32().iter().all(|&lse| lse == f32::NEG_INFINITY));
}

#[test]
fn too_little_memory_is_an_error_and_the_next_call_runs() {
    let Some(_) = gpu() else { return };
    // S of 3e5 x 3e5 in 16 bits: 180 GB.
    let x = Tensor::zeros(DType::F16, &[1, 300_000, 1, 32]).expect("small");
    let error = session(Kernel::Standard).attention(&x, &x, &x, &AttentionOptions::new()).expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory { what: "S", asked, free } if asked > free && free > 0), "{error}");
    let x = wave(&[1, 64, 1, 32], 0.1);
    session(Kernel::Standard).attention(&x, &x, &x, &AttentionOptions::new()).expect("runs");
}
