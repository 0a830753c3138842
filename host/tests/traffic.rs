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

/// Keys that are divided: into parts as many as asked for, of tiles with as few blocks as one.
#[test]
fn of_flash_attention_3_with_divided_keys() {
    let session = Session::new(Backend::Simulator).expect("the simulator runs everywhere").kernel(Kernel::Flash3);
    for (i, (batch, seqlen_q, seqlen_k, nheads, nheads_k)) in SHAPES.into_iter().chain([(1, 1, 1100, 4, 2)]).enumerate()
    {
        let q = Tensor::zeros(DType::F16, &[batch, seqlen_q, nheads, 64]).expect("small");
        let k = Tensor::zeros(DType::F16, &[batch, seqlen_k, nheads_k, 64]).expect("small");
        let options = AttentionOptions::default().causal(i % 2 == 1).num_splits(if seqlen_k > 1000 { 0 } else { 3 });
        let (of_q, of_k) = (q.view(), k.view());
        let problem = Problem::new(of_q.layout(), of_k.layout(), of_k.layout(), &options).expect("valid");
        let report = session.attention(&q, &k, &k, &options).expect("computed").report;
        assert_eq!(report.launches.len(), if seqlen_k > 64 { 2 } else { 1 }, "{problem}");
        assert_eq!(traffic::counted(&report), traffic::formula(Kernel::Flash3, &problem), "{problem}");
    }
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
