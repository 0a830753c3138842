//! Bad arguments: each gets an error that names the argument, its value and what is allowed, on every backend, and outputs
//! stay as they were.
use ferroflash::{
    AttentionOptions, Backend, DType, Error, Kernel, Session, SoftmaxMethod, Tensor, TensorMut, TensorRef,
};
use ferroflash_tests::inputs::normal;
use half::f16;

const BACKENDS: [Backend; 2] = [Backend::Cpu, Backend::Simulator];

fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
    Tensor::zeros(dtype, shape).expect("a valid shape")
}

/// The error of attention on each backend that runs everywhere; all say the same.
fn error(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> String {
    let [cpu, simulator] = BACKENDS.map(|backend| {
        let session = Session::new(backend).expect("runs everywhere");
        match session.attention(q, k, v, options) {
            Ok(_) => panic!("{backend} took it"),
            Err(error) => error.to_string(),
        }
    });
    assert_eq!(cpu, simulator);
    cpu
}

#[track_caller]
fn names(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

#[test]
fn dtypes_differ() {
    let q = zeros(DType::F16, &[1, 4, 2, 32]);
    let k = zeros(DType::BF16, &[1, 4, 2, 32]);
    names(&error(&q, &k, &q, &AttentionOptions::new()), &["k", "bf16", "f16"]);
}

#[test]
fn a_rank_other_than_four() {
    let q = zeros(DType::F32, &[4, 2, 32]);
    names(&error(&q, &q, &q, &AttentionOptions::new()), &["q", "3", "(batch, seqlen, nheads, headdim)"]);
}

#[test]
fn shapes_that_do_not_fit() {
    let tensor = |shape: [usize; 4]| zeros(DType::F32, &shape);
    let q = tensor([2, 4, 4, 32]);
    let options = AttentionOptions::new();
    names(&error(&q, &tensor([3, 4, 4, 32]), &tensor([3, 4, 4, 32]), &options), &["k", "3", "2"]);
    names(&error(&q, &tensor([2, 4, 4, 64]), &tensor([2, 4, 4, 64]), &options), &["k", "64", "32"]);
    names(&error(&q, &tensor([2, 5, 4, 32]), &tensor([2, 6, 4, 32]), &options), &["v", "6", "5"]);
}

#[test]
fn heads_that_do_not_divide() {
    let q = zeros(DType::F32, &[1, 4, 6, 32]);
    let k = zeros(DType::F32, &[1, 4, 4, 32]);
    names(&error(&q, &k, &k, &AttentionOptions::new()), &["nheads", "6", "4", "multiple"]);
}

#[test]
fn a_scale_that_is_no_scale() {
    let q = zeros(DType::F32, &[1, 4, 2, 32]);
    for scale in [f32::NAN, f32::INFINITY] {
        let error = error(&q, &q, &q, &AttentionOptions::new().softmax_scale(scale));
        names(&error, &["softmax_scale", &scale.to_string(), "finite"]);
    }
}

#[test]
fn a_head_dim_that_a_kernel_lacks() {
    for (kernel, headdim, allowed) in [(Kernel::Flash1, 48, "32, 64, 128"), (Kernel::Flash2, 264, "up to 256")] {
        let q = zeros(DType::F16, &[1, 4, 2, headdim]);
        let session = Session::new(Backend::Simulator).expect("runs everywhere").kernel(kernel);
        let error = session.attention(&q, &q, &q, &AttentionOptions::new()).map(|_| ()).unwrap_err().to_string();
        names(&error, &["headdim", &headdim.to_string(), allowed]);
    }
}

#[test]
fn a_dtype_that_attention_lacks() {
    let q = Tensor::from_vec(vec![0i32; 4 * 2 * 64], &[1, 4, 2, 64]).expect("as many");
    names(&error(&q, &q, &q, &AttentionOptions::new()), &["q", "i32", "f32", "f16", "bf16"]);
}

#[test]
fn options_that_an_elder_kernel_does_not_know() {
    let q = zeros(DType::F16, &[1, 4, 2, 64]);
    for (options, name) in [
        (AttentionOptions::new().softcap(5.0), "softcap"),
        (AttentionOptions::new().window_size(1, 1), "window"),
        (AttentionOptions::new().dropout(0.5, 1, 2), "dropout"),
        (AttentionOptions::new().softmax_scale(-1.0), "softmax_scale"),
    ] {
        let session = Session::new(Backend::Simulator).expect("runs everywhere").kernel(Kernel::Standard);
        let error = session.attention(&q, &q, &q, &options).map(|_| ()).unwrap_err().to_string();
        names(&error, &["standard", name]);
    }
}

#[test]
fn a_slice_too_short_for_its_shape_and_strides() {
    let data = vec![0f32; 100];
    names(&TensorRef::new(&data, &[1, 4, 2, 32]).unwrap_err().to_string(), &["100", "256"]);
    let strides = [256, 64, 32, 1];
    assert!(TensorRef::with_strides(&data, &[1, 4, 2, 32], &strides).is_err());
    // The last dimension must be contiguous.
    let data = vec![0f32; 1000];
    let q = TensorRef::with_strides(&data, &[1, 4, 2, 32], &[512, 128, 64, 2]);
    let refused =
        q.and_then(|q| Session::new(Backend::Cpu)?.attention(&q, &q, &q, &AttentionOptions::new()).map(|_| ()));
    names(&refused.unwrap_err().to_string(), &["stride", "2", "1"]);
}

#[test]
fn outputs_of_another_shape_are_refused_and_left_alone() {
    let q = normal(DType::F32, &[1, 4, 2, 32], 1.0, 1);
    for backend in BACKENDS {
        let session = Session::new(backend).expect("runs everywhere");
        let mut out = vec![7f32; 4 * 2 * 16];
        let mut lse = vec![7f32; 8];
        let view = TensorMut::new(&mut out, &[1, 4, 2, 16]).expect("as many as the shape says");
        let refused = session.attention_into(&q, &q, &q, &AttentionOptions::new(), view, &mut lse);
        names(&refused.unwrap_err().to_string(), &["out", "16", "32"]);
        let mut right = vec![7f32; 4 * 2 * 32];
        let view = TensorMut::new(&mut right, &[1, 4, 2, 32]).expect("as many as the shape says");
        let refused = session.attention_into(&q, &q, &q, &AttentionOptions::new(), view, &mut lse[..3]);
        names(&refused.unwrap_err().to_string(), &["softmax_lse", "3", "8"]);
        assert!(out.iter().chain(&lse).chain(&right).all(|&x| x == 7.0), "{backend}: a refused call wrote");
    }
}

#[test]
fn no_tokens_are_no_error() {
    for backend in BACKENDS {
        let session = Session::new(backend).expect("runs everywhere");
        let (some, none) = (normal(DType::F16, &[1, 3, 2, 32], 1.0, 1), zeros(DType::F16, &[1, 0, 2, 32]));
        let result = session.attention(&none, &some, &some, &AttentionOptions::new()).expect("no queries");
        assert_eq!(result.out.shape(), [1, 0, 2, 32]);
        let result = session.attention(&some, &none, &none, &AttentionOptions::new()).expect("no keys");
        assert!(result.out.to_f32().iter().all(|&o| o == 0.0), "{backend}");
        assert!(result.softmax_lse.to_f32().iter().all(|&lse| lse == f32::NEG_INFINITY), "{backend}");
        let result = session.softmax(&zeros(DType::F16, &[0, 5]), SoftmaxMethod::Online).expect("no rows");
        assert!(result.y.is_empty(), "{backend}");
    }
}

#[test]
fn a_gpu_that_is_not_there_is_said_to_be_missing() {
    // Without a GPU any is missing; with one or a few the thousandth is.
    let missing = Session::new(Backend::Cuda).and_then(|session| session.device(999)).map(|_| ());
    let error = missing.expect_err("nobody has a thousand GPUs");
    assert!(matches!(error, Error::NoDriver { .. } | Error::NoDevice { .. }), "{error:?}");
}

/// A strided view gives the same bits as a packed copy of it.
#[test]
fn strided_is_contiguous() {
    let (seqlen, nheads, headdim) = (37, 2, 64);
    let packed = normal(DType::F16, &[1, seqlen, nheads, headdim], 1.0, 5);
    // The same rows in a buffer (nheads, seqlen, headdim) with gaps that hold NaN.
    let row = headdim + 8;
    let mut gaps = vec![f16::NAN; nheads * seqlen * row];
    let elements = packed.as_slice::<f16>().expect("f16");
    for (i, element) in elements.iter().enumerate() {
        let (token, head, column) = (i / (nheads * headdim), i / headdim % nheads, i % headdim);
        gaps[(head * seqlen + token) * row + column] = *element;
    }
    let strides = [nheads * seqlen * row, row, seqlen * row, 1];
    let strided = TensorRef::with_strides(&gaps, &[1, seqlen, nheads, headdim], &strides).expect("it fits");
    for (backend, kernel) in [
        (Backend::Cpu, Kernel::Auto),
        (Backend::Simulator, Kernel::Standard),
        (Backend::Simulator, Kernel::Flash1),
        (Backend::Simulator, Kernel::Flash2),
    ] {
        let session = Session::new(backend).expect("runs everywhere").kernel(kernel);
        let options = AttentionOptions::new().causal(true);
        let from_packed = session.attention(&packed, &packed, &packed, &options).expect("valid");
        let from_strided = session.attention(&strided, &strided, &strided, &options).expect("valid");
        assert_eq!(from_packed.out.bytes(), from_strided.out.bytes(), "{backend}, {kernel}");
        assert_eq!(from_packed.softmax_lse.bytes(), from_strided.softmax_lse.bytes(), "{backend}, {kernel}");
    }
}
