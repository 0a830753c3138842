//! NaN and infinities go where the definition takes them, and nowhere else.
use ferroflash::{AttentionOptions, Backend, DType, Inputs, Kernel, Session, Tensor, accuracy};
use ferroflash_tests::everywhere;
use ferroflash_tests::inputs::{normal, tensor};

const SEQLEN: usize = 70;
const HEADDIM: usize = 32;

everywhere!(
    nan_in_a_query_spoils_its_row_alone,
    nan_in_a_key_spoils_the_rows_that_see_it,
    what_a_row_does_not_see_does_not_reach_it,
    an_infinity_that_a_row_sees_stays_infinite,
    what_a_row_does_not_see_does_not_reach_it_at_any_head_dimension,
    what_other_masks_hide_does_not_reach_a_row,
    what_a_row_does_not_see_does_not_reach_its_gradients,
    infinite_queries,
    rows_whose_scores_are_all_minus_infinity_are_zero,
    queries_before_the_first_key_see_nothing,
);

/// Of each kernel family; the CPU has none.
fn sessions(backends: &[Backend]) -> impl Iterator<Item = Session> {
    backends.iter().flat_map(|&backend| {
        let session = Session::new(backend).expect("it is there");
        let kernels = if backend == Backend::Cpu { vec![Kernel::Auto] } else { session.kernels() };
        kernels.into_iter().map(move |kernel| session.clone().kernel(kernel))
    })
}

/// Those that hide what is masked, whatever it holds.
fn sessions_of_flash2(backends: &[Backend]) -> impl Iterator<Item = Session> {
    backends.iter().map(|&backend| {
        let kernel = if backend == Backend::Cpu { Kernel::Auto } else { Kernel::Flash2 };
        Session::new(backend).expect("it is there").kernel(kernel)
    })
}

/// `like` with element `column` of row `row` replaced.
fn with(like: &Tensor, row: usize, column: usize, value: f32) -> Tensor {
    let mut data = like.to_f32();
    data[row * HEADDIM + column] = value;
    tensor(like.dtype(), data, like.shape())
}

fn check(backends: &[Backend], q: &Tensor, k: &Tensor, v: &Tensor, causal: bool, spoiled: impl Fn(usize) -> bool) {
    let options = AttentionOptions::new().causal(causal);
    for session in sessions(backends) {
        let result = session.attention(q, k, v, &options).unwrap_or_else(|e| panic!("{}: {e}", session.backend()));
        let accuracy = accuracy::check(q, k, v, &options, &result).expect("valid");
        assert!(accuracy.passed(), "{}, {}: {accuracy}", session.backend(), result.report.algorithm);
        for (row, o) in result.out.to_f32().chunks(HEADDIM).enumerate() {
            let has_nan = o.iter().any(|o| o.is_nan());
            assert_eq!(has_nan, spoiled(row), "{}, {}: row {row}", session.backend(), result.report.algorithm);
        }
    }
}

fn inputs() -> [Tensor; 3] {
    [1, 2, 3].map(|seed| normal(DType::F16, &[1, SEQLEN, 1, HEADDIM], 1.0, seed))
}

fn nan_in_a_query_spoils_its_row_alone(backends: &[Backend]) {
    let [q, k, v] = inputs();
    check(backends, &with(&q, 17, 3, f32::NAN), &k, &v, false, |row| row == 17);
}

fn nan_in_a_key_spoils_the_rows_that_see_it(backends: &[Backend]) {
    let [q, k, v] = inputs();
    check(backends, &q, &with(&k, 40, 0, f32::NAN), &v, true, |row| row >= 40);
}

/// 0 · NaN is NaN: a weight of 0 does not hide a value. Standard attention has P whole, zeros and all, and FlashAttention's first
/// version walks as it does: they are as the definition in matrices says.
fn what_a_row_does_not_see_does_not_reach_it(backends: &[Backend]) {
    let [q, k, v] = inputs();
    let options = AttentionOptions::new().causal(true);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        // Key 40 is in one block with keys that earlier rows see.
        let v = with(&v, 40, 5, value);
        for session in sessions_of_flash2(backends) {
            let result = session.attention(&q, &k, &v, &options).expect("valid");
            let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
            assert!(accuracy.passed(), "{}, {value}: {accuracy}", session.backend());
            let rows = result.out.to_f32();
            assert!(rows[..40 * HEADDIM].iter().all(|o| o.is_finite()), "{}, {value}", session.backend());
            assert!(rows[40 * HEADDIM..].chunks(HEADDIM).all(|o| !o[5].is_finite()), "{}, {value}", session.backend());
        }
    }
}

/// What a row does see stays what it is, beside something that it does not see.
fn an_infinity_that_a_row_sees_stays_infinite(backends: &[Backend]) {
    let [q, k, v] = inputs();
    let options = AttentionOptions::new().causal(true);
    let v = with(&with(&v, 10, 5, f32::INFINITY), 40, 5, f32::NAN);
    for session in sessions_of_flash2(backends) {
        let result = session.attention(&q, &k, &v, &options).expect("valid");
        let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
        assert!(accuracy.passed(), "{}: {accuracy}", session.backend());
        for (row, o) in result.out.to_f32().chunks(HEADDIM).enumerate() {
            let as_expected = match row {
                0..10 => o[5].is_finite(),
                10..40 => o[5] == f32::INFINITY,
                _ => o[5].is_nan(),
            };
            assert!(as_expected, "{}: row {row}: {}", session.backend(), o[5]);
        }
    }
}

fn what_a_row_does_not_see_does_not_reach_it_at_any_head_dimension(backends: &[Backend]) {
    let options = AttentionOptions::new().causal(true);
    // The first 20 rows see no key; the last rows are in another block of queries.
    let (seqlen_q, seqlen_k, spoiled) = (180, 160, 100);
    for headdim in [8, 40, 64, 96, 136, 256] {
        let q = normal(DType::BF16, &[1, seqlen_q, 2, headdim], 1.0, 1);
        let [k, v] = [2, 3].map(|seed| normal(DType::BF16, &[1, seqlen_k, 2, headdim], 1.0, seed));
        let mut values = v.to_f32();
        // The last element of the second head.
        values[(2 * spoiled + 2) * headdim - 1] = f32::NAN;
        let v = tensor(DType::BF16, values, v.shape());
        for session in sessions_of_flash2(backends) {
            let result = session.attention(&q, &k, &v, &options).expect("valid");
            let accuracy = accuracy::check(&q, &k, &v, &options, &result).expect("valid");
            assert!(accuracy.passed(), "{}, headdim {headdim}: {accuracy}", session.backend());
            for (row, o) in result.out.to_f32().chunks(2 * headdim).enumerate() {
                let nans = o.iter().filter(|o| o.is_nan()).count();
                let sees = row + seqlen_k >= seqlen_q + spoiled;
                assert_eq!(nans, usize::from(sees), "{}, headdim {headdim}: row {row}", session.backend());
            }
        }
    }
}

/// Hidden by a window or by a mask, each beside what else a score may take.
fn what_other_masks_hide_does_not_reach_a_row(backends: &[Backend]) {
    let [q, k, v] = inputs();
    let v = with(&with(&v, 40, 5, f32::NAN), 60, 31, f32::INFINITY);
    let bias = normal(DType::F16, &[1, 1, SEQLEN, SEQLEN], 1.0, 4);
    let bytes = (0..SEQLEN * SEQLEN).map(|i| u8::from((i / SEQLEN).is_multiple_of(2) || i % SEQLEN < 40)).collect();
    let mask = Tensor::from_vec::<u8>(bytes, &[1, 1, SEQLEN, SEQLEN]).expect("as many as the shape says");
    let options = [
        AttentionOptions::new().window_size(20, 5),
        AttentionOptions::new().softcap(3.0),
        AttentionOptions::new().causal(true).dropout(0.3, 1, 2),
    ];
    for (options, has_bias, has_mask) in
        options.iter().flat_map(|o| [(o, false, false), (o, true, false), (o, false, true), (o, true, true)])
    {
        let mut inputs = Inputs::new(q.view(), k.view(), v.view());
        inputs.bias = has_bias.then(|| bias.view());
        inputs.mask = has_mask.then(|| mask.view());
        for session in sessions_of_flash2(backends) {
            let result = session.attention_with(&inputs, options).expect("valid");
            let accuracy = accuracy::check_with(&inputs, options, &result).expect("valid");
            assert!(accuracy.passed(), "{}, {options:?}, {has_bias}, {has_mask}: {accuracy}", session.backend());
        }
    }
}

fn what_a_row_does_not_see_does_not_reach_its_gradients(backends: &[Backend]) {
    let [q, k, v] = inputs();
    let dout = normal(DType::F16, &[1, SEQLEN, 1, HEADDIM], 1.0, 4);
    let options = AttentionOptions::new().causal(true).deterministic(true);
    for value in [f32::NAN, f32::INFINITY] {
        for spoiled in 0..4 {
            let mut tensors = [&q, &k, &v, &dout].map(Clone::clone);
            tensors[spoiled] = with(&tensors[spoiled], 40, 5, value);
            let [q, k, v, dout] = &tensors;
            for session in sessions_of_flash2(backends) {
                let forward = session.attention(q, k, v, &options).expect("valid");
                let gradients = session
                    .attention_backward(q, k, v, &forward.out, &forward.softmax_lse, dout, &options)
                    .expect("valid");
                let accuracy = accuracy::check_backward(q, k, v, dout, &options, &gradients).expect("valid");
                assert!(accuracy.passed(), "{}, {value} in tensor {spoiled}: {accuracy}", session.backend());
            }
        }
    }
}

fn infinite_queries(backends: &[Backend]) {
    let [q, k, v] = inputs();
    // Scores of inf and -inf, by the sign of the key's element: an infinite maximum makes the row NaN.
    check(backends, &with(&q, 5, 1, f32::INFINITY), &k, &v, false, |row| row == 5);
}

fn rows_whose_scores_are_all_minus_infinity_are_zero(backends: &[Backend]) {
    let ones = tensor(DType::F16, vec![1.0; SEQLEN * HEADDIM], &[1, SEQLEN, 1, HEADDIM]);
    let [_, _, v] = inputs();
    let q = with(&ones, 9, 2, f32::NEG_INFINITY);
    check(backends, &q, &ones, &v, false, |_| false);
}

fn queries_before_the_first_key_see_nothing(backends: &[Backend]) {
    // seqlen_q > seqlen_k and causal: the first 30 rows see no key.
    let q = normal(DType::BF16, &[1, 70, 1, HEADDIM], 1.0, 1);
    let [k, v] = [2, 3].map(|seed| normal(DType::BF16, &[1, 40, 1, HEADDIM], 1.0, seed));
    let options = AttentionOptions::new().causal(true);
    for session in sessions(backends) {
        let result = session.attention(&q, &k, &v, &options).expect("valid");
        assert!(result.out.to_f32()[..30 * HEADDIM].iter().all(|&o| o == 0.0), "{}", session.backend());
        assert!(result.softmax_lse.to_f32()[..30].iter().all(|&lse| lse == f32::NEG_INFINITY));
        assert!(result.softmax_lse.to_f32()[30..].iter().all(|lse| lse.is_finite()));
    }
}
