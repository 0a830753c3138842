//! The bytes that the simulator counts are those that the formulas say, tensor by tensor.
use ferroflash::{AttentionOptions, Backend, DType, Kernel, Problem, Session, Tensor, traffic};

/// (batch, seqlen_q, seqlen_k, nheads, nheads_k): around the edges of tiles, unequal lengths, shared heads.
const SHAPES: [(usize, usize, usize, usize, usize); 8] = [
    (1, 1, 1, 1, 1),
    (1, 64, 64, 1, 1),
    (1, 65, 65, 2, 1),
    (1, 70, 300, 12, 3),
    (1, 130, 130, 1, 1),
    (2, 17, 129, 1, 1),
    (1, 129, 17, 1, 1),
    (1, 200, 70, 2, 2),
];

fn assert_counted_equals_formula(kernel: Kernel, dtype: DType, headdim: usize) {
    let session = Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(kernel);
    for (batch, seqlen_q, seqlen_k, nheads, nheads_k) in SHAPES {
        for causal in [false, true] {
            let q = Tensor::zeros(dtype, &[batch, seqlen_q, nheads, headdim]).expect("small");
            let k = Tensor::zeros(dtype, &[batch, seqlen_k, nheads_k, headdim]).expect("small");
            let options = AttentionOptions::default().causal(causal);
            let layouts = (q.view(), k.view());
            let problem =
                Problem::new(layouts.0.layout(), layouts.1.layout(), layouts.1.layout(), &options).expect("valid");
            let report = session.attention(&q, &k, &k, &options).expect("computed").report;
            assert_eq!(traffic::counted(&report), traffic::formula(kernel, &problem), "{kernel}, {problem}");
        }
    }
}

#[test]
fn of_standard_attention() {
    assert_counted_equals_formula(Kernel::Standard, DType::F16, 32);
    assert_counted_equals_formula(Kernel::Standard, DType::F32, 64);
}

#[test]
fn of_flash_attention() {
    assert_counted_equals_formula(Kernel::Flash1, DType::BF16, 32);
    assert_counted_equals_formula(Kernel::Flash1, DType::F32, 64);
}

#[test]
fn of_flash_attention_2() {
    assert_counted_equals_formula(Kernel::Flash2, DType::F16, 32);
    assert_counted_equals_formula(Kernel::Flash2, DType::BF16, 128);
}

#[test]
fn of_flash_attention_3() {
    assert_counted_equals_formula(Kernel::Flash3, DType::F16, 64);
    assert_counted_equals_formula(Kernel::Flash3, DType::BF16, 128);
}

#[test]
fn of_the_backward_pass() {
    let session = Session::new(Backend::Simulator).expect("the simulator runs everywhere");
    for (dtype, headdim) in [(DType::F16, 32), (DType::BF16, 64), (DType::F16, 128)] {
        for (batch, seqlen_q, seqlen_k, nheads, nheads_k) in SHAPES {
            for causal in [false, true] {
                let q = Tensor::zeros(dtype, &[batch, seqlen_q, nheads, headdim]).expect("small");
                let k = Tensor::zeros(dtype, &[batch, seqlen_k, nheads_k, headdim]).expect("small");
                let lse = Tensor::zeros(DType::F32, &[batch, nheads, seqlen_q]).expect("small");
                let options = AttentionOptions::default().causal(causal).deterministic(true);
                let (of_q, of_k) = (q.view(), k.view());
                let problem = Problem::new(of_q.layout(), of_k.layout(), of_k.layout(), &options).expect("valid");
                let gradients = session.attention_backward(&q, &k, &k, &q, &lse, &q, &options).expect("computed");
                assert_eq!(traffic::counted(&gradients.report), traffic::backward(&problem), "{problem}");
            }
        }
    }
}
