//! Attention by hand, and equalities of what says the same in two ways.
use cuda_std::DType;

use super::*;
use crate::tensor::Tensor;

/// Numbers without a pattern, between -1 and 1.
pub fn wave(shape: &[usize], step: f32) -> Tensor {
    let data = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * step).sin()).collect();
    Tensor::from_vec::<f32>(data, shape).expect("as many")
}

/// A tensor of these elements.
pub fn tensor_of<T: Datum>(data: impl IntoIterator<Item = T>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(data.into_iter().collect(), shape).expect("as many")
}

/// Borrowed.
pub fn views(inputs: &Inputs<Tensor>) -> Inputs<TensorRef<'_>> {
    inputs.map(|_, tensor| tensor.view())
}

fn run(inputs: &Inputs<Tensor>, options: &AttentionOptions) -> Reference {
    attention_with(&views(inputs), options).expect("valid")
}

#[test]
fn two_keys_by_hand() {
    let q = Tensor::from_vec(vec![1.0f32, 0.0], &[1, 1, 1, 2]).expect("2 elements");
    let k = Tensor::from_vec(vec![1.0f32, 5.0, 3.0, 7.0], &[1, 2, 1, 2]).expect("4 elements");
    let options = AttentionOptions::new().softmax_scale(0.5);
    let reference = attention(&q, &k, &k, &options).expect("valid");
    // Scores 0.5 and 1.5.
    let p = 1.0 / (1.0 + 1f64.exp());
    assert!((reference.out[0] - (p + 3.0 * (1.0 - p))).abs() < 1e-12);
    assert!((reference.out[1] - (5.0 * p + 7.0 * (1.0 - p))).abs() < 1e-12);
    assert!((reference.softmax_lse[0] - (0.5f64.exp() + 1.5f64.exp()).ln()).abs() < 1e-12);
}

#[test]
fn a_row_without_keys_is_zero() {
    let q = Tensor::from_vec(vec![1.0f32; 6], &[1, 3, 1, 2]).expect("6 elements");
    let k = Tensor::from_vec(vec![f32::NAN; 2], &[1, 1, 1, 2]).expect("2 elements");
    let reference = attention(&q, &k, &k, &AttentionOptions::new().causal(true)).expect("valid");
    assert_eq!(reference.out[..4], [0.0; 4]);
    assert_eq!(reference.softmax_lse[..2], [f64::NEG_INFINITY; 2]);
    assert!(reference.out[4].is_nan() && reference.softmax_lse[2].is_nan());
}

#[test]
fn softmax_of_extremes() {
    let inf = f32::INFINITY;
    let x = Tensor::from_vec(vec![-inf, 0.0, -inf, -inf, inf, 0.0, 1e30, -1e30], &[4, 2]).expect("8 elements");
    let y = softmax(&x);
    assert_eq!(y[..4], [0.0, 1.0, 0.0, 0.0]);
    assert!(y[4].is_nan() && y[5].is_nan());
    assert_eq!(y[6..], [1.0, 0.0]);
}

const KEYS: [f64; 3] = [0.25, -0.5, 1.0];
const VALUES: [[f64; 2]; 3] = [[1.0, -1.0], [2.0, 0.5], [-3.0, 4.0]];

/// Two queries, 1 and 2, and three keys.
fn small() -> Inputs<Tensor> {
    let tensor = |data: Vec<f64>, shape: &[usize]| tensor_of(data.into_iter().map(|x| x as f32), shape);
    Inputs::new(
        tensor(vec![1.0, 2.0], &[1, 2, 1, 1]),
        tensor(KEYS.to_vec(), &[1, 3, 1, 1]),
        tensor(VALUES.concat(), &[1, 3, 1, 2]),
    )
}

/// Checks attention of [`small`] with what numbers e^score, dropped with `factor`, make of it; `sink`: e^sink.
fn check(
    inputs: &Inputs<Tensor>,
    options: AttentionOptions,
    exps: [[f64; 3]; 2],
    sink: f64,
    factor: impl Fn(usize, usize) -> f64,
) {
    let found = run(inputs, &options.softmax_scale(1.0));
    for (row, exps) in exps.into_iter().enumerate() {
        let sum = exps.iter().sum::<f64>() + sink;
        for (column, &found) in found.out[row * 2..row * 2 + 2].iter().enumerate() {
            let expected: f64 = (0..3).map(|key| exps[key] / sum * factor(row, key) * VALUES[key][column]).sum();
            assert!((found - expected).abs() < 1e-12, "row {row}: {found} {expected}");
        }
        assert!((found.softmax_lse[row] - sum.ln()).abs() < 1e-12);
    }
}

/// e^score of all pairs, from q · k.
fn exps(score: impl Fn(usize, usize, f64) -> f64) -> [[f64; 3]; 2] {
    [0, 1].map(|row| [0, 1, 2].map(|key| score(row, key, (row + 1) as f64 * KEYS[key]).exp()))
}

fn all(_: usize, _: usize) -> f64 {
    1.0
}

#[test]
fn a_cap_by_hand() {
    let options = AttentionOptions::new().softcap(0.75);
    check(&small(), options, exps(|_, _, s| 0.75 * (s / 0.75).tanh()), 0.0, all);
}

#[test]
fn alibi_by_hand() {
    // Query 0 is at the place of key 1, query 1 at that of key 2.
    let distances = [[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]];
    let inputs = small().alibi_slopes(tensor_of([0.5f32], &[1]));
    check(&inputs, AttentionOptions::new(), exps(|row, key, s| s - 0.5 * distances[row][key]), 0.0, all);
}

#[test]
fn alibi_is_not_capped_and_nor_is_a_bias() {
    let inputs = small().alibi_slopes(tensor_of([0.5f32], &[1, 1])).bias(tensor_of([8.0f32, 0.0, -8.0], &[1, 1, 1, 3]));
    let distances = [[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]];
    let capped = |s: f64| 0.75 * (s / 0.75).tanh();
    let score = |row: usize, key: usize, s| capped(s) - 0.5 * distances[row][key] + [8.0, 0.0, -8.0][key];
    check(&inputs, AttentionOptions::new().softcap(0.75), exps(score), 0.0, all);
}

#[test]
fn masks_and_windows_by_hand() {
    let mask = small().mask(tensor_of([1u8, 0, 1, 0, 255, 0], &[1, 1, 2, 3]));
    let sees = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]];
    let hidden = |sees: [[f64; 3]; 2]| {
        let exps = exps(|_, _, s| s);
        [0, 1].map(|row| [0, 1, 2].map(|key| exps[row][key] * sees[row][key]))
    };
    check(&mask, AttentionOptions::new(), hidden(sees), 0.0, all);
    let window = |left, right| AttentionOptions::new().window_size(left, right);
    check(&small(), window(Some(0), Some(1)), hidden([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), 0.0, all);
    check(&small(), window(Some(1), None).causal(true), hidden([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), 0.0, all);
    check(&mask, window(None, Some(0)), hidden([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 0.0, all);
}

#[test]
fn a_sink_by_hand() {
    let inputs = small().sinks(tensor_of([0.5f32], &[1]));
    check(&inputs, AttentionOptions::new(), exps(|_, _, s| s), 0.5f64.exp(), all);
    // The first query sees no key.
    let inputs = inputs.mask(tensor_of([0u8, 0, 0, 1, 1, 1], &[1, 1, 2, 3]));
    let exps = exps(|row, _, s| if row == 0 { f64::NEG_INFINITY } else { s });
    check(&inputs, AttentionOptions::new(), exps, 0.5f64.exp(), all);
}

#[test]
fn a_sink_of_nothing_is_none() {
    let with = small().sinks(tensor_of([f32::NEG_INFINITY], &[1]));
    let causal = AttentionOptions::new().window_size(None, Some(0));
    assert_eq!(run(&with, &causal), run(&small(), &causal));
    let hidden = with.mask(tensor_of([0u8; 3], &[1, 1, 1, 3]));
    let nothing = Reference { out: vec![0.0; 4], softmax_lse: vec![f64::NEG_INFINITY; 2] };
    assert_eq!(run(&hidden, &causal), nothing);
}

#[test]
fn dropout_by_hand() {
    let dropout = kernels::dropout::Dropout::new(0.4, 7, 3);
    let factor = |row, key| f64::from(dropout.factor(0, row as u32, key as u32));
    check(&small(), AttentionOptions::new().dropout(0.4, 7, 3), exps(|_, _, s| s), 0.0, factor);
}

#[test]
fn heads_of_all_sequences_are_dropped_differently() {
    // With a single key P is 1, and O is V times the factor.
    let ones = |seqlen| tensor_of(vec![1.0f32; 2 * seqlen * 3], &[2, seqlen, 3, 1]);
    let inputs = Inputs::new(ones(40), ones(1), ones(1));
    let found = run(&inputs, &AttentionOptions::new().dropout(0.5, 1, 2));
    let dropout = kernels::dropout::Dropout::new(0.5, 1, 2);
    for (i, found) in found.out.into_iter().enumerate() {
        let (batch, row, head) = (i / 120, i / 3 % 40, i % 3);
        assert_eq!(found, f64::from(dropout.factor((batch * 3 + head) as u32, row as u32, 0)));
    }
}

#[test]
fn hidden_keys_may_hold_anything() {
    let mut inputs = small().mask(tensor_of([1u8, 0, 1], &[1, 1, 1, 3])).bias(wave(&[1, 1, 2, 3], 0.9));
    let before = run(&inputs, &AttentionOptions::new());
    inputs.k.as_mut_slice::<f32>().expect("f32")[1] = f32::INFINITY;
    inputs.v.as_mut_slice::<f32>().expect("f32")[2..4].fill(f32::NAN);
    inputs.bias.as_mut().and_then(Tensor::as_mut_slice::<f32>).expect("f32")[1] = f32::NAN;
    assert_eq!(run(&inputs, &AttentionOptions::new()), before);

    // Hidden by the bias alone.
    inputs.mask = None;
    let bias = inputs.bias.as_mut().and_then(Tensor::as_mut_slice::<f32>).expect("f32");
    (bias[1], bias[4]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    assert_eq!(run(&inputs, &AttentionOptions::new()), before);
}

#[test]
fn scales_of_zero_and_below_are_scales() {
    let options = |scale| AttentionOptions::new().softmax_scale(scale);
    assert!((run(&small(), &options(0.0)).softmax_lse[0] - 3f64.ln()).abs() < 1e-12);
    let expected = exps(|_, _, s| -s)[1].iter().sum::<f64>().ln();
    assert!((run(&small(), &options(-1.0)).softmax_lse[1] - expected).abs() < 1e-12);
}

#[test]
fn a_plain_implementation_rounds_to_the_dtype() {
    let inputs = small().bias(wave(&[1, 1, 2, 3], 0.9)).sinks(tensor_of([0.5f32], &[1]));
    let options = AttentionOptions::new().softcap(0.75).dropout(0.25, 1, 0);
    let reference = run(&inputs, &options);
    let apart = |plain: &Plain| {
        let pairs = plain.out.iter().zip(&reference.out).chain(plain.softmax_lse.iter().zip(&reference.softmax_lse));
        pairs.map(|(&plain, reference)| (f64::from(plain) - reference).abs()).fold(0.0, f64::max)
    };
    assert!(apart(&plain_with(&views(&inputs), &options).expect("valid")) < 1e-6);
    let inputs = Inputs {
        q: inputs.q.convert(DType::BF16),
        k: inputs.k.convert(DType::BF16),
        v: inputs.v.convert(DType::BF16),
        bias: inputs.bias.map(|bias| bias.convert(DType::BF16)),
        ..inputs
    };
    let plain = plain_with(&views(&inputs), &options).expect("valid");
    assert!(plain.out.iter().all(|&x| half::bf16::from_f32(x).to_f32() == x));
    assert!((1e-4..0.05).contains(&apart(&plain)), "{}", apart(&plain));
}
