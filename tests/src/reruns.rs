//! Results that are the same bits in every run: which problems, and how that is seen.
use ferroflash::{Attention, DType, Gradients, Kernel, Session, Tensor};

use crate::combination::Combination;
use crate::features::plain;

/// Problems of two heads of K and four of Q in each of `batch` sequences, whose gradients are to be the same bits in every
/// run: for each way in which kernels of the family sum them one. They are with and without a mask, of both 16-bit dtypes, of
/// sequences in a batch and one after the other; flash2's also of f32 and tf32, with dropout, with the gradients of a bias and
/// of sinks.
pub fn problems(kernel: Kernel, batch: usize, lengths: (usize, usize), headdim: usize) -> Vec<Combination> {
    let of = |dtype, change: fn(&mut Combination)| {
        let mut problem = plain(dtype, lengths, (headdim, headdim));
        problem.lengths = vec![lengths; batch];
        problem.options.deterministic = true;
        change(&mut problem);
        problem
    };
    let causal = of(DType::BF16, |problem| problem.options.causal = true);
    let whole = of(DType::F16, |_| ());
    let varlen = of(DType::BF16, |problem| {
        (problem.varlen, problem.options.causal) = (true, true);
        problem.lengths.extend([(3, 0), (17, 40), (0, 9)]);
    });
    let mut problems = vec![causal, whole, varlen];
    if kernel != Kernel::Flash3 {
        problems.extend([
            of(DType::F16, |problem| {
                problem.bias = Some([true, false, false]);
                problem.options = problem.options.clone().causal(true).dropout(0.17, 7, 3);
            }),
            of(DType::BF16, |problem| {
                (problem.sinks, problem.varlen) = (true, true);
                problem.options = problem.options.clone().dropout(0.17, 7, 3);
            }),
            of(DType::F32, |problem| problem.options.causal = true),
            of(DType::F32, |problem| {
                (problem.bias, problem.sinks) = (Some([true, true, false]), true);
                problem.options.allow_tf32 = true;
            }),
        ]);
    }
    problems
}

/// All that a forward and a backward pass give, by name.
pub fn results<'a>(forward: &'a Attention, gradients: &'a Gradients) -> Vec<(&'static str, &'a Tensor)> {
    let all = [
        ("out", Some(&forward.out)),
        ("softmax_lse", Some(&forward.softmax_lse)),
        ("dq", Some(&gradients.dq)),
        ("dk", Some(&gradients.dk)),
        ("dv", Some(&gradients.dv)),
        ("dbias", gradients.dbias.as_ref()),
        ("dsinks", gradients.dsinks.as_ref()),
    ];
    all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
}

impl Combination {
    /// Runs it forward and backward in session 0, which keeps the accuracy rule with kernels of this family, and then in as many
    /// others as is said, which all give the same bits.
    ///
    /// # Errors
    /// What is broken, or what the backend says.
    pub fn check_reruns(
        &self,
        session: impl Fn(u64) -> Session,
        times: u64,
        family: &'static str,
    ) -> Result<(), String> {
        let tensors = self.tensors();
        let run = |session: &Session| {
            let forward = self.forward(session, &tensors)?;
            let gradients = self.backward(session, &tensors, &forward)?;
            ferroflash::Result::Ok((forward, gradients))
        };
        let named = |reason: String| format!("{family}, {self:?}: {reason}");
        let failed = |error: ferroflash::Error| named(error.to_string());
        let first = session(0);
        let (forward, gradients) = run(&first).map_err(failed)?;
        if gradients.report.algorithm != family {
            return Err(named(gradients.report.reason));
        }
        let accuracy = self.accuracy(&tensors, &forward).map_err(failed)?;
        if !accuracy.passed() {
            return Err(named(accuracy.to_string()));
        }
        let accuracy = self.backward_accuracy(&tensors, &gradients).map_err(failed)?;
        if !accuracy.passed() {
            return Err(named(accuracy.to_string()));
        }
        for time in 1..=times {
            let (again, gradients_again) = run(&session(time)).map_err(failed)?;
            let (first, again) = (results(&forward, &gradients), results(&again, &gradients_again));
            for ((name, first), (_, again)) in first.into_iter().zip(again) {
                if first.bytes() != again.bytes() {
                    return Err(named(format!("{name}: other bits in run {time}")));
                }
            }
        }
        Ok(())
    }
}
