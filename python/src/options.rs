//! The numbers of a call.
use ferroflash::AttentionOptions;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyTuple};

use crate::attention::InputTuple;
use crate::tensor::Optional;
use crate::torch::Torch;

/// What a caller may choose, read once for both passes.
#[pyclass(frozen, module = "ferroflash._core")]
#[derive(Clone)]
pub struct Options {
    /// The same in the words of the host crate.
    pub attention: AttentionOptions,
    dropout_p: f64,
}

#[pymethods]
impl Options {
    #[new]
    #[pyo3(signature = (
        max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, dropout_p, deterministic,
        allow_tf32, num_splits, *, rng_state = (0, 0)
    ))]
    #[expect(clippy::too_many_arguments, reason = "as many as the operator has")]
    fn new(
        max_seqlen_q: Option<i64>,
        max_seqlen_k: Option<i64>,
        softmax_scale: Option<f64>,
        causal: bool,
        window_left: Option<i64>,
        window_right: Option<i64>,
        softcap: Option<f64>,
        dropout_p: f64,
        deterministic: bool,
        allow_tf32: bool,
        num_splits: i64,
        rng_state: (i64, i64),
    ) -> PyResult<Self> {
        let count = |argument: &str, found: Option<i64>| {
            let refuse = |found| PyValueError::new_err(format!("{argument}: {found}; allowed: 0 or more, or None"));
            found.map(|found| usize::try_from(found).map_err(|_| refuse(found))).transpose()
        };
        let numbers = (
            count("max_seqlen_q", max_seqlen_q)?,
            count("max_seqlen_k", max_seqlen_k)?,
            softmax_scale,
            causal,
            count("window_left", window_left)?,
            count("window_right", window_right)?,
            softcap,
            dropout_p,
            deterministic,
            allow_tf32,
            count("num_splits", Some(num_splits))?.unwrap_or_default(),
        );
        Ok(Options::of(numbers, rng_state))
    }

    /// The arguments of the operator that these are made of.
    fn numbers(&self) -> Numbers {
        let AttentionOptions { softmax_scale, causal, window_size, softcap, deterministic, allow_tf32, .. } =
            self.attention;
        let lengths = (self.attention.max_seqlen_q, self.attention.max_seqlen_k);
        let (scale, softcap) = (softmax_scale.map(f64::from), softcap.map(f64::from));
        let (left, right) = (window_size.left, window_size.right);
        let splits = self.attention.num_splits;
        (lengths.0, lengths.1, scale, causal, left, right, softcap, self.dropout_p, deterministic, allow_tf32, splits)
    }

    /// The seed and the offset of dropout.
    fn rng_state(&self) -> Option<(i64, i64)> {
        self.attention.dropout.map(|dropout| (dropout.seed as i64, dropout.offset as i64))
    }
}

/// The numbers of a call as its caller gives them: longest lengths, softmax_scale, causal, window_size, softcap,
/// dropout_p, deterministic, allow_tf32, num_splits.
pub type GivenNumbers<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
);

impl Options {
    fn of(numbers: Numbers, rng_state: (i64, i64)) -> Self {
        let (max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, dropout_p, deterministic, tf32, splits) =
            numbers;
        let mut attention = AttentionOptions::new().causal(causal).window_size(left, right);
        attention = attention.deterministic(deterministic).allow_tf32(tf32).num_splits(splits);
        attention = attention.dropout(dropout_p as f32, rng_state.0 as u64, rng_state.1 as u64);
        attention.softmax_scale = scale.map(|scale| scale as f32);
        attention.softcap = softcap.map(|softcap| softcap as f32);
        (attention.max_seqlen_q, attention.max_seqlen_k) = (max_seqlen_q, max_seqlen_k);
        Options { attention, dropout_p }
    }

    /// Those of a call that nothing has to be done for: all arguments are of the types that they should be, numbers are
    /// allowed, there is no dropout, and tensors are PyTorch's own, of the dtypes and shapes that kernels read. None for
    /// every other call.
    pub fn of_plain(torch: &Torch, tensors: &InputTuple, numbers: &GivenNumbers) -> PyResult<Option<Self>> {
        if !are_plain(torch, tensors)? {
            return Ok(None);
        }
        let (max_seqlen_q, max_seqlen_k, scale, causal, window_size, softcap, dropout_p, deterministic, tf32, splits) =
            numbers;
        let options = || {
            let (left, right) = window(window_size)?;
            let numbers = (
                optional(max_seqlen_q, length)?,
                optional(max_seqlen_k, length)?,
                optional(scale, number)?,
                flag(causal)?,
                left,
                right,
                optional(softcap, number)?,
                number(dropout_p).filter(|p| *p == 0.0)?,
                flag(deterministic)?,
                flag(tf32)?,
                length(splits)?,
            );
            Some(Options::of(numbers, (0, 0)))
        };
        Ok(options())
    }
}

/// The numbers of the operator, in its order.
type Numbers = (
    Option<usize>,
    Option<usize>,
    Option<f64>,
    bool,
    Option<usize>,
    Option<usize>,
    Option<f64>,
    f64,
    bool,
    bool,
    usize,
);

/// Whether kernels can read tensors as they are.
fn are_plain(torch: &Torch, tensors: &InputTuple) -> PyResult<bool> {
    let (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k) = tensors;
    let Some(exchange) = &torch.exchange else { return Ok(false) };
    let optional: [&Optional; 6] = [bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k];
    let all = || [q, k, v].into_iter().chain(optional.into_iter().flatten());
    if !all().all(|x| torch.is_own_tensor(x)) {
        return Ok(false);
    }
    let (Ok(described_q), Ok(described_k)) = (exchange.describe(q), exchange.describe(k)) else { return Ok(false) };
    for x in all() {
        // A negated view, which the dispatcher copies: the bits in memory are not those of its elements.
        if torch.is_negated(x)? {
            return Ok(false);
        }
        match exchange.describe(x) {
            Ok(x) if x.device == described_q.device => (),
            _ => return Ok(false),
        }
    }
    // What the others are cast or expanded to.
    let seqlen_k = described_k.shape.iter().nth_back(2);
    let has_keys = |shape: &[i64]| seqlen_k == Some(&1) || shape.last() != Some(&1);
    let is = |x: &Optional, fits: &dyn Fn(crate::exchange::Described) -> bool| match x {
        Some(x) => exchange.describe(x).is_ok_and(fits),
        None => true,
    };
    Ok(is(bias, &|x| x.dtype == described_q.dtype && has_keys(x.shape))
        && is(mask, &|x| x.is_bool && has_keys(x.shape))
        && is(sinks, &|x| x.dtype == Some(cuda_std::DType::F32))
        && alibi_slopes.as_ref().map_or(Ok(true), |x| torch.requires_grad(x).map(|requires| !requires))?)
}

fn optional<T>(x: &Bound<PyAny>, read: impl Fn(&Bound<PyAny>) -> Option<T>) -> Option<Option<T>> {
    if x.is_none() { Some(None) } else { read(x).map(Some) }
}

/// True or False.
fn flag(x: &Bound<PyAny>) -> Option<bool> {
    x.cast_exact::<PyBool>().ok().map(|x| x.is_true())
}

/// A float or a whole number.
fn number(x: &Bound<PyAny>) -> Option<f64> {
    let is_number = x.is_exact_instance_of::<PyFloat>() || x.is_exact_instance_of::<PyInt>();
    if is_number { x.extract().ok() } else { None }
}

/// A whole number of 0 or more.
fn length(x: &Bound<PyAny>) -> Option<usize> {
    if x.is_exact_instance_of::<PyInt>() { usize::try_from(x.extract::<i64>().ok()?).ok() } else { None }
}

/// Keys to the left and to the right; a negative number, too, is for all.
fn window(x: &Bound<PyAny>) -> Option<(Option<usize>, Option<usize>)> {
    let side = |i: usize| {
        let side = x.cast_exact::<PyTuple>().ok()?.get_item(i).ok()?;
        let signed = |x: &Bound<PyAny>| {
            if x.is_exact_instance_of::<PyInt>() { x.extract::<isize>().ok() } else { None }
        };
        Some(optional(&side, signed)?.and_then(|keys| usize::try_from(keys).ok()))
    };
    if x.cast_exact::<PyTuple>().ok()?.len() != 2 {
        return None;
    }
    Some((side(0)?, side(1)?))
}
