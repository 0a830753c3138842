//! The backward pass on a machine: host tensors in, host tensors out.
use cuda_std::Global;
use kernels::attention::Attention;
use kernels::flash2_backward::Params;

use super::{Machine, Repetitions, arguments, contiguous, nowhere};
use crate::dispatch::BackwardPlan;
use crate::element::Element;
use crate::error::Result;
use crate::problem::Problem;
use crate::report::LaunchReport;

/// What gradients are computed from, in host memory, in row-major order without gaps.
#[derive(Clone, Copy)]
pub(crate) struct BackwardInputs<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub out: &'a [T],
    pub softmax_lse: &'a [f32],
    pub dout: &'a [T],
}

/// Where gradients go, in the same order.
pub(crate) struct GradientsMut<'a, T> {
    pub dq: &'a mut [T],
    pub dk: &'a mut [T],
    pub dv: &'a mut [T],
}

/// Computes gradients. No extent of the problem is 0; the slices have the problem's sizes.
pub(crate) fn attention_backward<M: Machine, T: Element>(
    machine: &M,
    problem: &Problem,
    plan: &BackwardPlan,
    repetitions: Repetitions,
    inputs: BackwardInputs<T>,
    gradients: GradientsMut<T>,
) -> Result<(Vec<LaunchReport>, f64)> {
    let (q, k, v) = (machine.upload("Q", inputs.q)?, machine.upload("K", inputs.k)?, machine.upload("V", inputs.v)?);
    let (o, d_o) = (machine.upload("O", inputs.out)?, machine.upload("dO", inputs.dout)?);
    let lse = machine.upload("LSE", inputs.softmax_lse)?;
    let d_q = machine.output::<T>("dQ", gradients.dq.len())?;
    let d_k = machine.output::<T>("dK", gradients.dk.len())?;
    let d_v = machine.output::<T>("dV", gradients.dv.len())?;
    let workspace = plan.workspace(problem);
    let row_sums = machine.allocate::<f32>(workspace.name, workspace.len as usize)?;

    let Problem { seqlen_q, seqlen_k, nheads, nheads_k, headdim, .. } = *problem;
    let of_queries = |data: Global<T>| contiguous(data, seqlen_q, nheads, headdim);
    let of_keys = |data: Global<T>| contiguous(data, seqlen_k, nheads_k, headdim);
    let attention = Attention {
        q: of_queries(machine.global(&q)),
        k: of_keys(machine.global(&k)),
        v: of_keys(machine.global(&v)),
        o: of_queries(machine.global(&o)),
        ..arguments(problem, machine.global(&lse))
    };
    let parameters = Params {
        attention,
        d_o: of_queries(machine.global(&d_o)),
        d_q: of_queries(machine.global(&d_q)),
        d_k: of_keys(machine.global(&d_k)),
        d_v: of_keys(machine.global(&d_v)),
        d_lse: Global::NULL,
        row_sums: machine.global(&row_sums),
        d_bias: nowhere(),
        bias_batch: 1,
        bias_heads: 1,
        bias_rows: 1,
        d_sinks: Global::NULL,
    };
    let launches = plan.launches(problem, parameters)?;
    let done = repetitions.run(|| machine.run(&launches))?;
    machine.download(&d_q, gradients.dq)?;
    machine.download(&d_k, gradients.dk)?;
    machine.download(&d_v, gradients.dv)?;
    Ok(done)
}
