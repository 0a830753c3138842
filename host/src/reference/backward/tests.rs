//! Gradients by finite differences, and equalities of what says the same in two ways, forward and backward.
use super::super::tests::{tensor_of, views, wave};
use super::super::{Plain, Reference, attention_with, plain_with};
use super::*;
use crate::tensor::Tensor;

/// Two sequences of three queries and five keys, in four heads that read two, of other widths of K and V.
fn batched() -> Inputs<Tensor> {
    Inputs::new(wave(&[2, 3, 4, 3], 0.37), wave(&[2, 5, 2, 3], 0.71), wave(&[2, 5, 2, 2], 1.3))
}

/// Four sequences of 2, 0, 3 and 1 queries and 3, 2, 2 and 0 keys, in heads as [`batched`].
fn varlen() -> Inputs<Tensor> {
    Inputs::new(wave(&[6, 4, 3], 0.37), wave(&[7, 2, 3], 0.71), wave(&[7, 2, 2], 1.3))
        .cu_seqlens(tensor_of([0, 2, 2, 5, 6], &[5]), tensor_of([0, 3, 5, 7, 7], &[5]))
}

/// Everything at once, of scores of this shape.
fn all_of(inputs: Inputs<Tensor>, [batch, nheads, seqlen_q, seqlen_k]: [usize; 4]) -> Inputs<Tensor> {
    let hides = |i| u8::from(i % 5 != 1);
    inputs
        .bias(wave(&[1, nheads, seqlen_q, seqlen_k], 2.3))
        .mask(tensor_of((0..batch * seqlen_q * seqlen_k).map(hides), &[batch, 1, seqlen_q, seqlen_k]))
        .alibi_slopes(tensor_of((0..batch * nheads).map(|i| 0.1 * i as f32), &[batch, nheads]))
        .sinks(wave(&[nheads], 1.9))
}

fn options() -> AttentionOptions {
    AttentionOptions::new().softmax_scale(0.7)
}

fn all_options() -> AttentionOptions {
    options().window_size(2, 1).softcap(0.8).dropout(0.3, 5, 6)
}

/// dO and dLSE.
fn of_loss(inputs: &Inputs<Tensor>, options: &AttentionOptions) -> (Tensor, Tensor) {
    let problem = problem(&views(inputs), options).expect("valid");
    (wave(&problem.out_shape(), 2.1), wave(&problem.lse_shape(), 1.7))
}

/// The loss Σ dO ∘ O + Σ dLSE ∘ LSE, whose gradients are dO and dLSE.
fn loss(inputs: &Inputs<Tensor>, (dout, dlse): &(Tensor, Tensor), options: &AttentionOptions) -> f64 {
    let Reference { out, softmax_lse } = attention_with(&views(inputs), options).expect("valid");
    let sum = |x: &[f64], gradient: &Tensor| -> f64 {
        let products = x.iter().zip(gradient.to_f32()).map(|(x, gradient)| x * f64::from(gradient));
        products.filter(|product| product.is_finite()).sum()
    };
    sum(&out, dout) + sum(&softmax_lse, dlse)
}

fn gradients(inputs: &Inputs<Tensor>, options: &AttentionOptions) -> Gradients<f64> {
    let (dout, dlse) = of_loss(inputs, options);
    attention_backward_with(&views(inputs), &dout.view(), Some(&dlse.view()), options).expect("valid")
}

fn named<'t>(inputs: &'t mut Inputs<Tensor>, name: &str) -> &'t mut Tensor {
    match name {
        "q" => &mut inputs.q,
        "k" => &mut inputs.k,
        "v" => &mut inputs.v,
        "bias" => inputs.bias.as_mut().expect("a gradient"),
        _ => inputs.sinks.as_mut().expect("a gradient"),
    }
}

/// Checks each element of each gradient.
fn check(what: &str, inputs: Inputs<Tensor>, options: &AttentionOptions) {
    // A power of two, so that a step up and one down are exact; the error is of the order of its square.
    const STEP: f32 = 1.0 / 1024.0;
    let of_loss = of_loss(&inputs, options);
    let Gradients { dq, dk, dv, dbias, dsinks, .. } = gradients(&inputs, options);
    assert_eq!((dbias.is_some(), dsinks.is_some()), (inputs.bias.is_some(), inputs.sinks.is_some()), "{what}");
    let gradients = [("q", Some(dq)), ("k", Some(dk)), ("v", Some(dv)), ("bias", dbias), ("sinks", dsinks)];
    let mut largest = 0f64;
    for (name, gradient) in gradients.into_iter().filter_map(|(name, gradient)| Some((name, gradient?))) {
        for (i, found) in gradient.into_iter().enumerate() {
            let at = |step: f32| {
                let mut moved = inputs.clone();
                let x = &mut named(&mut moved, name).as_mut_slice::<f32>().expect("f32")[i];
                let before = *x;
                *x += step;
                let step = f64::from(*x) - f64::from(before);
                (loss(&moved, &of_loss, options), step)
            };
            let ((above, up), (below, down)) = (at(STEP), at(-STEP));
            let expected = (above - below) / (up - down);
            assert!((found - expected).abs() < 1e-5, "{what}: {name}, element {i}: {found} {expected}");
            largest = largest.max(found.abs());
        }
    }
    assert!(largest > 0.1, "{what}: nothing but {largest}");
}

#[test]
fn gradients_are_what_finite_differences_say() {
    for (seqlen_q, seqlen_k, causal) in [(3, 5, false), (4, 4, true), (5, 3, true)] {
        let of_keys = |step| wave(&[2, seqlen_k, 2, 3], step);
        let inputs = Inputs::new(wave(&[2, seqlen_q, 4, 3], 0.37), of_keys(0.71), of_keys(1.3));
        check("no features", inputs, &options().causal(causal));
    }
}

#[test]
fn gradients_with_windows_and_caps() {
    check("widths", batched(), &options());
    check("window", batched(), &options().window_size(1, 0));
    check("window", batched(), &options().window_size(None, 1));
    check("softcap", batched(), &options().softcap(0.8));
    check("a scale below 0", batched(), &options().softmax_scale(-0.7));
}

#[test]
fn gradients_with_tensors_of_scores() {
    for shape in [[2, 4, 3, 5], [1, 4, 1, 5], [2, 1, 3, 5], [1, 1, 3, 5], [2, 1, 1, 5], [1, 1, 1, 5]] {
        check("bias", batched().bias(wave(&shape, 2.3)), &options());
    }
    check("ALiBi", batched().alibi_slopes(wave(&[4], 1.1)), &options());
    check("ALiBi", batched().alibi_slopes(wave(&[2, 4], 1.1)), &options());
    // The first query sees no key.
    let mask = tensor_of([0u8, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0], &[1, 1, 3, 5]);
    check("mask", batched().mask(mask.clone()), &options());
    check("sinks", batched().sinks(wave(&[4], 1.9)), &options());
    check("mask and sinks", batched().mask(mask).sinks(wave(&[4], 1.9)), &options());
}

#[test]
fn gradients_with_dropout() {
    check("dropout", batched(), &options().dropout(0.4, 5, 6));
    let inputs = batched().bias(wave(&[1, 4, 1, 5], 2.3)).sinks(wave(&[4], 1.9));
    check("dropout, bias and sinks", inputs, &options().dropout(0.4, 7, 8));
}

#[test]
fn gradients_with_everything_at_once() {
    check("varlen", varlen(), &options());
    check("varlen, causal", varlen().sinks(wave(&[4], 1.9)), &options().causal(true));
    check("everything", all_of(batched(), [2, 4, 3, 5]), &all_options());
    check("everything, varlen", all_of(varlen(), [4, 4, 3, 3]), &all_options());
}

#[test]
fn without_dlse_it_is_zero() {
    let inputs = all_of(batched(), [2, 4, 3, 5]);
    let (dout, dlse) = of_loss(&inputs, &all_options());
    let zeros = Tensor::zeros(dlse.dtype(), dlse.shape()).expect("small");
    let with = |dlse| attention_backward_with(&views(&inputs), &dout.view(), dlse, &all_options()).expect("valid");
    assert_eq!(with(None), with(Some(&zeros.view())));
}

#[test]
fn a_row_without_keys_has_no_part() {
    let mut dout = wave(&[1, 3, 1, 2], 0.37);
    dout.as_mut_slice::<f32>().expect("f32")[0] = f32::NAN;
    let (q, k) = (wave(&[1, 3, 1, 2], 0.71), wave(&[1, 1, 1, 2], 1.3));
    let gradients = attention_backward(&q, &k, &k, &dout, &AttentionOptions::new().causal(true)).expect("valid");
    assert_eq!(gradients.dq, [0.0; 6]);
    assert_eq!(gradients.dv, dout.to_f32()[4..].iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
}

#[test]
fn the_sink_that_is_all_of_a_row_has_the_gradient_of_its_lse() {
    let mask = tensor_of([0u8; 5], &[1, 1, 1, 5]);
    let inputs = batched().mask(mask).sinks(wave(&[4], 1.9));
    let (_, dlse) = of_loss(&inputs, &options());
    let Gradients { dq, dk, dv, dsinks, .. } = gradients(&inputs, &options());
    assert!(dq.into_iter().chain(dk).chain(dv).all(|x| x == 0.0));
    for (head, found) in dsinks.expect("sinks").into_iter().enumerate() {
        let of_head = dlse.to_f32().into_iter().enumerate().filter(|(i, _)| i / 3 % 4 == head);
        let expected: f64 = of_head.map(|(_, dlse)| f64::from(dlse)).sum();
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }
}

#[test]
fn hidden_keys_may_hold_anything() {
    let mask = tensor_of([1u8, 0, 1, 1, 0], &[1, 1, 1, 5]);
    let mut inputs = batched().mask(mask).bias(wave(&[1, 1, 1, 5], 2.3));
    let before = gradients(&inputs, &options());
    for (name, width) in [("k", 3), ("v", 2)] {
        // Key 1 of both sequences, in both heads.
        for row in [1, 6].map(|token| token * 2 * width..(token + 1) * 2 * width) {
            named(&mut inputs, name).as_mut_slice::<f32>().expect("f32")[row].fill(f32::NAN);
        }
    }
    named(&mut inputs, "bias").as_mut_slice::<f32>().expect("f32")[1] = f32::NAN;
    assert_eq!(gradients(&inputs, &options()), before);
}

/// Checks that two problems have the same results, forward and backward.
fn same(what: &str, [a, b]: [(&Inputs<Tensor>, &AttentionOptions); 2]) {
    let forward = |(inputs, options)| attention_with(&views(inputs), options).expect("valid");
    assert_eq!(forward(a), forward(b), "{what}");
    let [a, b] = [a, b].map(|(inputs, options)| gradients(inputs, options));
    assert_eq!((a.dq, a.dk, a.dv, a.dsinks), (b.dq, b.dk, b.dv, b.dsinks), "{what}");
}

#[test]
fn a_window_is_a_mask() {
    for (left, right) in [(None, Some(0)), (Some(1), Some(0)), (Some(0), Some(1)), (Some(2), None)] {
        let inputs = batched().sinks(wave(&[4], 1.9));
        let sees = |i: usize| {
            let (place, key) = (i / 5 + 2, i % 5);
            let (left, right) = (left.unwrap_or(9), right.unwrap_or(9));
            u8::from(place <= key + left && key <= place + right)
        };
        let mask = tensor_of((0..15).map(sees), &[1, 1, 3, 5]);
        let windowed = options().window_size(left, right);
        same("window", [(&inputs, &windowed), (&inputs.clone().mask(mask), &options())]);
    }
    same("causal", [(&batched(), &options().causal(true)), (&batched(), &options().window_size(None, 0))]);
}

#[test]
fn alibi_is_a_bias() {
    let slope = |head: usize| 0.25 * (head + 1) as f32;
    let alibi = batched().alibi_slopes(tensor_of((0..4).map(slope), &[4]));
    let bias = |i: usize| -slope(i / 15) * (i / 5 % 3 + 2).abs_diff(i % 5) as f32;
    let bias = batched().bias(tensor_of((0..60).map(bias), &[1, 4, 3, 5]));
    same("ALiBi", [(&alibi, &options().softcap(0.8)), (&bias, &options().softcap(0.8))]);
}

#[test]
fn a_mask_is_a_bias_of_minus_infinity() {
    // The second query sees no key.
    let hides = |i: usize| i / 5 == 1 || i.is_multiple_of(3);
    let mask = tensor_of((0..15).map(|i| u8::from(!hides(i))), &[1, 1, 3, 5]);
    let bias = tensor_of((0..15).map(|i| if hides(i) { f32::NEG_INFINITY } else { 0.0 }), &[1, 1, 3, 5]);
    for inputs in [batched(), batched().sinks(wave(&[4], 1.9))] {
        let (mask, bias) = (inputs.clone().mask(mask.clone()), inputs.bias(bias.clone()));
        same("mask", [(&mask, &options().dropout(0.2, 3, 4)), (&bias, &options().dropout(0.2, 3, 4))]);
    }
}

#[test]
fn sequences_of_one_length_are_a_batch() {
    let batch = all_of(batched(), [2, 4, 3, 5]);
    let reshaped = |tensor: &Tensor, shape: &[usize]| tensor_of(tensor.to_f32(), shape);
    let varlen = Inputs {
        q: reshaped(&batch.q, &[6, 4, 3]),
        k: reshaped(&batch.k, &[10, 2, 3]),
        v: reshaped(&batch.v, &[10, 2, 2]),
        ..batch.clone()
    }
    .cu_seqlens(tensor_of([0, 3, 6], &[3]), tensor_of([0, 5, 10], &[3]));
    let options = all_options();
    let of_batch = attention_with(&views(&batch), &options).expect("valid");
    let of_varlen = attention_with(&views(&varlen), &options).expect("valid");
    assert_eq!(of_batch.out, of_varlen.out);
    // (batch, nheads, seqlen_q) and (nheads, total_q).
    let transposed = |lse: &[f64]| (0..24).map(|i| lse[(i / 3 % 2 * 4 + i / 6) * 3 + i % 3]).collect::<Vec<_>>();
    assert_eq!(transposed(&of_batch.softmax_lse), of_varlen.softmax_lse);

    let (dout, dlse) = of_loss(&batch, &options);
    let wide: Vec<f64> = dlse.to_f32().into_iter().map(f64::from).collect();
    let dlse_varlen = tensor_of(transposed(&wide).into_iter().map(|x| x as f32), &[4, 6]);
    let dout_varlen = reshaped(&dout, &[6, 4, 2]);
    let of_batch = attention_backward_with(&views(&batch), &dout.view(), Some(&dlse.view()), &options);
    let of_varlen = attention_backward_with(&views(&varlen), &dout_varlen.view(), Some(&dlse_varlen.view()), &options);
    assert_eq!(of_batch.expect("valid"), of_varlen.expect("valid"));
}

#[test]
fn a_plain_implementation_in_f32_is_close() {
    for (inputs, scores) in [(batched(), [2, 4, 3, 5]), (varlen(), [4, 4, 3, 3])] {
        let (inputs, options) = (all_of(inputs, scores), all_options());
        let (dout, dlse) = of_loss(&inputs, &options);
        let reference = gradients(&inputs, &options);
        let plain = plain_backward_with(&views(&inputs), &dout.view(), Some(&dlse.view()), &options).expect("valid");
        let close = |plain: &[f32], reference: &[f64]| {
            let mut pairs = plain.iter().zip(reference);
            plain.len() == reference.len()
                && pairs.all(|(&plain, reference)| (f64::from(plain) - reference).abs() < 1e-5)
        };
        assert!(close(&plain.dq, &reference.dq) && close(&plain.dk, &reference.dk) && close(&plain.dv, &reference.dv));
        assert!(close(&plain.dbias.expect("a bias"), &reference.dbias.expect("a bias")));
        assert!(close(&plain.dsinks.expect("sinks"), &reference.dsinks.expect("sinks")));
        let Plain { out, .. } = plain_with(&views(&inputs), &options).expect("valid");
        assert!(close(&out, &attention_with(&views(&inputs), &options).expect("valid").out));
    }
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let inputs = batched();
    let (dout, dlse) = of_loss(&inputs, &options());
    let refused = |dout: &Tensor, dlse: &Tensor| {
        let dlse = dlse.view();
        let result = attention_backward_with(&views(&inputs), &dout.view(), Some(&dlse), &options());
        result.expect_err("bad").to_string()
    };
    assert_eq!(refused(&inputs.q, &dlse), "dout: headdim is 3; allowed: 2, as of q");
    assert_eq!(refused(&dout, &wave(&[2, 3, 4], 1.0)), "dlse: nheads is 3; allowed: 4, as of q");
}
