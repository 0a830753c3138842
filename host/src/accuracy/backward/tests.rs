//! What keeps the rule for gradients, and what does not.
use cuda_std::DType;
use kernels::dropout::Dropout;

use super::*;
use crate::backend::Backend;
use crate::element::Element;
use crate::report::Report;

/// A problem of one sequence, with a bias for all queries and heads, sinks and dropout.
struct Case {
    inputs: Inputs<Tensor>,
    dout: Tensor,
    dlse: Tensor,
    options: AttentionOptions,
}

const NHEADS: usize = 2;
const HEADDIM: usize = 16;

impl Case {
    fn new(dtype: DType, seqlen_q: usize, seqlen_k: usize, dropout: f32, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut tensor = |dtype, shape: &[usize]| {
            let data = (0..shape.iter().product()).map(|_| next() + next() + next()).collect::<Vec<_>>();
            Tensor::from_vec(data, shape).expect("as many").convert(dtype)
        };
        let (of_queries, of_keys) = ([1, seqlen_q, NHEADS, HEADDIM], [1, seqlen_k, NHEADS, HEADDIM]);
        let inputs = Inputs::new(tensor(dtype, &of_queries), tensor(dtype, &of_keys), tensor(dtype, &of_keys))
            .bias(tensor(dtype, &[1, 1, 1, seqlen_k]))
            .sinks(tensor(DType::F32, &[NHEADS]));
        let (dout, dlse) = (tensor(dtype, &of_queries), tensor(DType::F32, &[1, NHEADS, seqlen_q]));
        Case { inputs, dout, dlse, options: AttentionOptions::new().dropout(dropout, seed, 0) }
    }

    fn check(&self, gradients: &Gradients) -> Result<BackwardAccuracy> {
        let inputs = self.inputs.map(|_, tensor| tensor.view());
        check_backward_with(&inputs, &self.dout.view(), Some(&self.dlse.view()), &self.options, gradients)
    }

    /// Gradients as a fused kernel has them in the dtype: f32 but for O, from which D is, and for the factors of
    /// products, P of two of them and dS of the others.
    fn fused<T: Element>(&self) -> Gradients {
        let round = |x: f32| T::from_f32(x).to_f32();
        let wide = |tensor: &Tensor| tensor.to_f32();
        let (q, k, v, dout, dlse) =
            (wide(&self.inputs.q), wide(&self.inputs.k), wide(&self.inputs.v), wide(&self.dout), wide(&self.dlse));
        let (bias, sinks) = (self.inputs.bias.as_ref().map(wide), self.inputs.sinks.as_ref().map(wide));
        let (bias, sinks) = (bias.expect("a bias"), sinks.expect("sinks"));
        let dropout = self.options.dropout.expect("dropout");
        let dropout = Dropout::new(dropout.p, dropout.seed, dropout.offset);
        let (seqlen_q, seqlen_k) = (dlse.len() / NHEADS, bias.len());
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let (mut dbias, mut dsinks) = (vec![0.0; seqlen_k], vec![0.0; NHEADS]);
        let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let add = |sums: &mut [f32], weight: f32, row: &[f32]| {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        };
        let scale = 1.0 / (HEADDIM as f32).sqrt();
        for head in 0..NHEADS {
            let of = |row: usize| (row * NHEADS + head) * HEADDIM..(row * NHEADS + head + 1) * HEADDIM;
            for row in 0..seqlen_q {
                let score = |key: usize| scale * dot(&q[of(row)], &k[of(key)]) + bias[key];
                let factor = |key: usize| dropout.factor(head as u32, row as u32, key as u32);
                let lse = ((0..seqlen_k).map(|key| score(key).exp()).sum::<f32>() + sinks[head].exp()).ln();
                let p = |key: usize| (score(key) - lse).exp();
                let mut out = [0.0; HEADDIM];
                (0..seqlen_k).for_each(|key| add(&mut out, round(p(key) * factor(key)), &v[of(key)]));
                let d = dot(&out.map(round), &dout[of(row)]) - dlse[head * seqlen_q + row];
                dsinks[head] -= (sinks[head] - lse).exp() * d;
                for key in 0..seqlen_k {
                    let d_s = p(key) * (factor(key) * dot(&dout[of(row)], &v[of(key)]) - d);
                    dbias[key] += d_s;
                    add(&mut dq[of(row)], round(d_s) * scale, &k[of(key)]);
                    add(&mut dk[of(key)], round(d_s) * scale, &q[of(row)]);
                    add(&mut dv[of(key)], round(p(key) * factor(key)), &dout[of(row)]);
                }
            }
        }
        let narrow = |data: Vec<f32>, like: &Tensor| {
            let tensor = Tensor::from_vec(data, like.shape()).expect("as many");
            tensor.convert(like.dtype())
        };
        let Inputs { q, k, v, bias, sinks, .. } = &self.inputs;
        Gradients {
            dq: narrow(dq, q),
            dk: narrow(dk, k),
            dv: narrow(dv, v),
            dbias: bias.as_ref().map(|bias| narrow(dbias, bias)),
            dsinks: sinks.as_ref().map(|sinks| narrow(dsinks, sinks)),
            report: Report {
                backend: Backend::Cpu,
                device: String::new(),
                algorithm: "",
                reason: String::new(),
                dtype: q.dtype(),
                shape: String::new(),
                seconds: 0.0,
                flops: 0,
                extra_bytes: 0,
                launches: Vec::new(),
            },
        }
    }

    /// The same in the dtype of Q.
    fn gradients(&self) -> Gradients {
        match self.inputs.q.dtype() {
            DType::F32 => self.fused::<f32>(),
            DType::F16 => self.fused::<half::f16>(),
            _ => self.fused::<half::bf16>(),
        }
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const DROPOUT: [f32; 3] = [0.0, 0.1, 0.5];

#[test]
fn what_a_fused_kernel_rounds_is_allowed() {
    for dtype in DTYPES {
        for (seqlen_q, seqlen_k) in [(64, 70), (300, 40)] {
            for seed in 0..12 {
                let case = Case::new(dtype, seqlen_q, seqlen_k, DROPOUT[seed as usize % 3], seed);
                let accuracy = case.check(&case.gradients()).expect("of these inputs");
                assert!(accuracy.passed(), "{} {seqlen_q} {seqlen_k} {seed}: {accuracy}", dtype.name());
                assert_eq!(accuracy.gradients().len(), 5);
            }
        }
    }
}

#[test]
fn sums_of_few_terms_need_no_luck() {
    for dtype in DTYPES {
        for (seqlen_q, seqlen_k) in [(1, 1), (3, 2), (2, 9), (40, 1), (40, 3)] {
            for seed in 0..60 {
                let case = Case::new(dtype, seqlen_q, seqlen_k, DROPOUT[seed as usize % 3], seed);
                let accuracy = case.check(&case.gradients()).expect("of these inputs");
                let sums = [accuracy.dbias.as_ref(), accuracy.dsinks.as_ref()];
                let passed = sums.into_iter().flatten().all(GradientAccuracy::passed);
                assert!(passed, "{} {seqlen_q} {seqlen_k} {seed}: {accuracy}", dtype.name());
            }
        }
    }
}

#[test]
fn what_is_wrong_is_found() {
    for dtype in DTYPES {
        let case = Case::new(dtype, 300, 40, 0.1, 5);
        let right = case.gradients();
        let zeros = |tensor: &Tensor| Tensor::zeros(tensor.dtype(), tensor.shape()).expect("small");
        let without_dbias = Gradients { dbias: right.dbias.as_ref().map(zeros), ..right.clone() };
        let accuracy = case.check(&without_dbias).expect("of these inputs");
        assert!(!accuracy.passed() && accuracy.dsinks.is_some_and(|dsinks| dsinks.passed()), "{}", dtype.name());
        let without_dsinks = Gradients { dsinks: right.dsinks.as_ref().map(zeros), ..right.clone() };
        let accuracy = case.check(&without_dsinks).expect("of these inputs");
        assert!(!accuracy.passed() && accuracy.dbias.is_some_and(|dbias| dbias.passed()), "{}", dtype.name());
        // A loss that does not depend on the LSE.
        let other = Case { dlse: zeros(&case.dlse), ..case };
        let accuracy = other.check(&right).expect("of these inputs");
        for (name, gradient) in accuracy.gradients().into_iter().filter(|(name, _)| *name != "dv") {
            assert!(!gradient.passed(), "{}: {name}", dtype.name());
        }
    }
}

#[test]
fn gradients_that_are_not_there_are_missed() {
    let case = Case::new(DType::F32, 3, 2, 0.0, 1);
    let without = Gradients { dsinks: None, ..case.gradients() };
    let missed = case.check(&without).expect_err("no dsinks").to_string();
    assert_eq!(missed, "dsinks: none; allowed: 2 elements");
}
