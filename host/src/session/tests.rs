//! Sessions on the backends that every machine has.
use super::*;
use crate::accuracy;
use crate::inputs::{BackwardInputs, GradientOutputs};
use cuda_std::DType;

fn wave(dtype: DType, shape: &[usize], step: f32) -> Tensor {
    let data = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec::<f32>(data, shape).expect("as many").convert(dtype)
}

#[test]
fn every_kernel_runs_on_the_simulator() {
    let cases = [
        (Kernel::Flash2, DType::F16),
        (Kernel::Flash2, DType::BF16),
        (Kernel::Flash1, DType::F32),
        (Kernel::Flash1, DType::F16),
        (Kernel::Standard, DType::F32),
        (Kernel::Standard, DType::BF16),
    ];
    for (kernel, dtype) in cases {
        let q = wave(dtype, &[1, 33, 2, 32], 0.37);
        let k = wave(dtype, &[1, 70, 1, 32], 0.71);
        let options = AttentionOptions::new().causal(true);
        let session = Session::new(Backend::Simulator).expect("always there").kernel(kernel);
        let result = session.attention(&q, &k, &k, &options).expect("no fault");
        let accuracy = accuracy::check(&q, &k, &k, &options, &result).expect("of these inputs");
        assert!(accuracy.passed(), "{kernel} {}: {accuracy}", dtype.name());
        assert_eq!(result.report.algorithm, kernel.name());
    }
}

#[test]
fn softmax_runs_on_the_simulator() {
    let session = Session::new(Backend::Simulator).expect("always there");
    for &method in SoftmaxMethod::ALL {
        for shape in [[5, 40], [2, 1500]] {
            let x = wave(DType::F32, &shape, 0.37);
            let softmax = session.softmax(&x, method).expect("no fault");
            assert!(accuracy::check_softmax(&x, &softmax).expect("of this x").passed());
        }
    }
}

#[test]
fn softmax_is_written_to_a_tensor_that_is_there() {
    let session = Session::new(Backend::Cpu).expect("always there");
    let x = wave(DType::BF16, &[3, 7], 0.37);
    let mut y = Tensor::from_vec(vec![f32::NAN; 21], &[3, 7]).expect("as many").convert(DType::BF16);
    session.softmax_into(&x, SoftmaxMethod::Online, &mut y).expect("valid");
    assert_eq!(y, session.softmax(&x, SoftmaxMethod::Online).expect("valid").y);
    let refused = |y: &mut Tensor| session.softmax_into(&x, SoftmaxMethod::Online, y).expect_err("bad").to_string();
    assert_eq!(refused(&mut wave(DType::BF16, &[7, 3], 0.1)), "y: shape [7, 3]; allowed: [3, 7], as of x");
    assert_eq!(refused(&mut wave(DType::F16, &[3, 7], 0.1)), "y: dtype f16; allowed: bf16, as of x");
    let mut wide = [0.0f32; 24];
    let gaps = TensorMut::with_strides(&mut wide, &[3, 7], &[8, 1]).expect("fits");
    let refused = session.softmax_into(&x.convert(DType::F32), SoftmaxMethod::Online, gaps).expect_err("gaps");
    assert_eq!(refused.to_string(), "y: strides [8, 1]; allowed: those of a contiguous tensor");
}

#[test]
fn nothing_to_do_is_no_error() {
    for &backend in &[Backend::Cpu, Backend::Simulator] {
        let session = Session::new(backend).expect("always there");
        let (q, empty) = (wave(DType::F16, &[1, 3, 2, 64], 0.1), wave(DType::F16, &[1, 0, 2, 64], 0.1));
        let result = session.attention(&q, &empty, &empty, &AttentionOptions::new()).expect("valid");
        assert!(result.out.to_f32().iter().all(|&o| o == 0.0));
        assert!(result.softmax_lse.to_f32().iter().all(|&lse| lse == f32::NEG_INFINITY));
        assert!(session.attention(&empty, &q, &q, &AttentionOptions::new()).expect("valid").out.is_empty());
        let x = Tensor::zeros(DType::F32, &[4, 0]).expect("small");
        assert!(session.softmax(&x, SoftmaxMethod::Online).expect("valid").y.is_empty());
    }
}

#[test]
fn a_kernel_that_cannot_is_refused_with_its_reason() {
    let refused = |backend, kernel, dtype, headdim| {
        let q = wave(dtype, &[1, 4, 1, headdim], 0.1);
        let session = Session::new(backend).expect("always there").kernel(kernel);
        session.attention(&q, &q, &q, &AttentionOptions::new()).expect_err("unsupported").to_string()
    };
    assert_eq!(
        refused(Backend::Simulator, Kernel::Flash2, DType::F32, 264),
        "no flash2 kernel on the simulator backend for this problem: flash2: headdim 264; allowed: up to 256"
    );
    assert_eq!(
        refused(Backend::Simulator, Kernel::Flash1, DType::F16, 40),
        "no flash1 kernel on the simulator backend for this problem: flash1: headdim 40; allowed: 32, 64, 128"
    );
    let long = refused(Backend::Simulator, Kernel::Auto, DType::F16, 2048);
    assert!(
        long.contains("flash2: headdim 2048; allowed: up to ") && long.contains("standard: headdim 2048"),
        "{long}"
    );
    assert!(refused(Backend::Simulator, Kernel::Auto, DType::F32, 264).contains("standard: headdim 264"));
    assert!(refused(Backend::Cpu, Kernel::Flash2, DType::F16, 64).contains("the CPU backend has one algorithm"));
}

#[test]
fn elders_say_what_they_do_not_know() {
    let x = wave(DType::F16, &[6, 2, 32], 0.37);
    let starts = Tensor::from_vec(vec![0, 2, 6], &[3]).expect("three");
    let sinks = wave(DType::F32, &[2], 0.5);
    let inputs = Inputs::new(&x, &x, &x).cu_seqlens(&starts, &starts).sinks(&sinks);
    let options = AttentionOptions::new().window_size(1, 1).softcap(30.0).dropout(0.1, 1, 0);
    for kernel in [Kernel::Flash1, Kernel::Standard] {
        let session = Session::new(Backend::Simulator).expect("always there").kernel(kernel);
        let refused = session.attention_with(&inputs, &options).expect_err("unsupported").to_string();
        let asked = "window_size (1, 1), softcap 30, dropout_p 0.1, sinks, cu_seqlens of 2 sequences";
        let allowed = "no window_size, or causal, no softcap, dropout_p 0, no sinks, no cu_seqlens";
        let unknown = format!("no kernel of f16 and headdim 32 for {asked}; allowed: {allowed}");
        assert_eq!(
            refused,
            format!("no {kernel} kernel on the simulator backend for this problem: {kernel}: {unknown}")
        );
    }
}

#[test]
fn sequences_of_different_lengths_are_as_if_alone() {
    // One without queries, one without keys, one without both.
    let (starts_q, starts_k) = ([0, 3, 3, 20, 70, 70], [0, 9, 14, 14, 90, 90]);
    let (q, k) = (wave(DType::F16, &[70, 4, 32], 0.37), wave(DType::F16, &[90, 2, 32], 0.71));
    let [cu_seqlens_q, cu_seqlens_k] = [starts_q, starts_k].map(|s| Tensor::from_vec(s.to_vec(), &[6]).expect("six"));
    let session = Session::new(Backend::Simulator).expect("always there");
    let options = AttentionOptions::new().causal(true);
    let inputs = Inputs::new(&q, &k, &k).cu_seqlens(&cu_seqlens_q, &cu_seqlens_k);
    let together = session.attention_with(&inputs, &options).expect("no fault");
    let (out, lse) = (together.out.to_f32(), together.softmax_lse.to_f32());

    let slice = |tensor: &Tensor, [begin, end]: [i32; 2]| {
        let (tokens, shape) = ((end - begin) as usize, tensor.shape());
        let row = shape[1] * shape[2];
        let data = tensor.as_slice::<half::f16>().expect("f16")[begin as usize * row..end as usize * row].to_vec();
        Tensor::from_vec(data, &[1, tokens, shape[1], shape[2]]).expect("as many")
    };
    for i in 0..5 {
        let (of_q, of_k) = ([starts_q[i], starts_q[i + 1]], [starts_k[i], starts_k[i + 1]]);
        let (q, k) = (slice(&q, of_q), slice(&k, of_k));
        let alone = session.attention(&q, &k, &k, &options).expect("no fault");
        let [begin, end] = of_q.map(|token| token as usize);
        assert_eq!(out[begin * 4 * 32..end * 4 * 32], alone.out.to_f32());
        let of_heads: Vec<_> = (0..4).flat_map(|head| lse[head * 70 + begin..head * 70 + end].to_vec()).collect();
        assert_eq!(of_heads, alone.softmax_lse.to_f32());
    }
}

#[test]
fn repeated_heads_are_uploaded_once() {
    // One head of two sequences, for both and for four heads.
    let data = wave(DType::F16, &[33, 32], 0.37);
    let data = data.as_slice::<half::f16>().expect("f16");
    let x = TensorRef::with_strides(data, &[2, 33, 4, 32], &[0, 32, 0, 1]).expect("fits");
    let session = Session::new(Backend::Simulator).expect("always there");
    let options = AttentionOptions::new().causal(true);
    let repeated = session.attention(&x, &x, &x, &options).expect("no fault");
    let packed = x.to_tensor();
    let expected = session.attention(&packed, &packed, &packed, &options).expect("no fault");
    assert_eq!((repeated.out, repeated.softmax_lse), (expected.out, expected.softmax_lse));
}

#[test]
fn bad_lengths_and_gradients_are_refused() {
    let x = wave(DType::F16, &[6, 2, 32], 0.37);
    let starts = |starts: [i32; 3]| Tensor::from_vec(starts.to_vec(), &[3]).expect("three");
    let session = Session::new(Backend::Simulator).expect("always there");
    let refused = |q: [i32; 3], k: [i32; 3]| {
        let (q, k) = (starts(q), starts(k));
        let inputs = Inputs::new(&x, &x, &x).cu_seqlens(&q, &k);
        session.attention_with(&inputs, &AttentionOptions::new()).expect_err("bad").to_string()
    };
    let end = "cu_seqlens_k: 5 at index 2; allowed: 6, as many tokens as there are";
    assert_eq!(refused([0, 3, 6], [0, 3, 5]), end);
    assert!(refused([0, 4, 3], [0, 3, 6]).starts_with("cu_seqlens_q: 3 at index 2; allowed: 4 or more"));

    let x = wave(DType::F16, &[1, 6, 2, 32], 0.37);
    let lse = Tensor::zeros(DType::F32, &[1, 2, 6]).expect("small");
    let inputs = BackwardInputs::new(Inputs::new(&x, &x, &x), &x, &lse, &x);
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| wave(DType::F16, &[1, 6, 2, 32], 0.1));
    let mut dsinks = Tensor::zeros(DType::F32, &[2]).expect("small");
    let gradients = GradientOutputs::new(&mut dq, &mut dk, &mut dv).dsinks(&mut dsinks);
    let refused = session.attention_backward_into_with(&inputs, &AttentionOptions::new(), gradients);
    assert_eq!(refused.expect_err("bad").to_string(), "dsinks: a tensor; allowed: none, as there are no sinks");
}

#[test]
fn without_queries_the_gradients_of_keys_are_zero() {
    let (q, k) = (wave(DType::F16, &[1, 0, 2, 32], 0.1), wave(DType::F16, &[1, 3, 2, 32], 0.1));
    let lse = Tensor::zeros(DType::F32, &[1, 2, 0]).expect("small");
    for backend in [Backend::Cpu, Backend::Simulator] {
        let session = Session::new(backend).expect("always there");
        let options = AttentionOptions::new();
        let gradients = session.attention_backward(&q, &k, &k, &q, &lse, &q, &options).expect("valid");
        assert!(gradients.dq.is_empty());
        assert!(gradients.dk.to_f32().iter().chain(&gradients.dv.to_f32()).all(|&x| x == 0.0), "{backend}");
        let lse = Tensor::zeros(DType::F32, &[1, 2, 3]).expect("small");
        let gradients = session.attention_backward(&k, &q, &q, &k, &lse, &k, &options).expect("valid");
        assert!(gradients.dk.is_empty());
        assert!(gradients.dq.to_f32().iter().all(|&x| x == 0.0), "{backend}");
    }
}

#[test]
fn outputs_and_inputs_may_have_gaps() {
    // (batch, nheads, seqlen, headdim) in memory.
    let (shape, strides) = ([2, 5, 3, 8], [3 * 5 * 8, 8, 5 * 8, 1]);
    let data: Vec<f32> = (0..2 * 5 * 3 * 8).map(|i| (i as f32 * 0.3).sin()).collect();
    let q = TensorRef::with_strides(&data, &shape, &strides).expect("fits");
    let session = Session::new(Backend::Cpu).expect("always there");
    let options = AttentionOptions::new().causal(true);
    let (mut out, mut lse) = (vec![f32::NAN; data.len()], vec![0.0; 2 * 3 * 5]);
    let into = TensorMut::with_strides(&mut out, &shape, &strides).expect("fits");
    session.attention_into(&q, &q, &q, &options, into, &mut lse).expect("valid");
    let packed = q.to_tensor();
    let expected = session.attention(&packed, &packed, &packed, &options).expect("valid");
    let out = TensorRef::with_strides(&out, &shape, &strides).expect("fits").to_tensor();
    assert_eq!(out, expected.out);
    assert_eq!(Some(&lse[..]), expected.softmax_lse.as_slice::<f32>());
}

#[test]
fn gradients_of_tensors_with_gaps_are_those_of_packed_ones() {
    // (batch, nheads, seqlen, headdim) in memory.
    let (shape, strides) = ([2, 5, 3, 32], [3 * 5 * 32, 32, 5 * 32, 1]);
    let data: Vec<f32> = (0..2 * 5 * 3 * 32).map(|i| (i as f32 * 0.3).sin()).collect();
    let data = Tensor::from_vec(data, &[2, 3, 5, 32]).expect("fits").convert(DType::F16);
    let data = data.as_slice::<half::f16>().expect("f16");
    let x = TensorRef::with_strides(data, &shape, &strides).expect("fits");
    let (packed, options) = (x.to_tensor(), AttentionOptions::new().causal(true));
    for backend in [Backend::Cpu, Backend::Simulator] {
        let session = Session::new(backend).expect("always there");
        let Attention { out, softmax_lse, .. } = session.attention(&x, &x, &x, &options).expect("valid");
        let with_gaps = session.attention_backward(&x, &x, &x, &out, &softmax_lse, &x, &options).expect("valid");
        let p = &packed;
        let expected = session.attention_backward(p, p, p, &out, &softmax_lse, p, &options).expect("valid");
        assert_eq!((with_gaps.dq, with_gaps.dk, with_gaps.dv), (expected.dq, expected.dk, expected.dv), "{backend}");
    }
}
