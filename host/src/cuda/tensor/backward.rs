//! The backward pass of tensors on a device.
use super::super::codes::through_cust;
use super::super::memory::DeviceMemory;
use super::{Device, DeviceTensor, Stream, StreamFlags};
use crate::element::Element;
use crate::error::Result;
use crate::inputs::{BackwardInputs, Inputs};
use crate::options::{AttentionOptions, Kernel};
use crate::problem::Problem;
use crate::raw;
use crate::report::LaunchReport;

/// Gradients of attention on a device.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceGradients<T> {
    /// dQ: (batch, seqlen_q, nheads, headdim).
    pub dq: DeviceTensor<T>,
    /// dK: (batch, seqlen_k, nheads_k, headdim).
    pub dk: DeviceTensor<T>,
    /// dV: (batch, seqlen_k, nheads_k, headdim).
    pub dv: DeviceTensor<T>,
    /// The launches, in order.
    pub launches: Vec<LaunchReport>,
}

impl Device {
    /// dQ, dK and dV, as [`attention_backward`](crate::attention_backward()), of tensors on this device; `out` and
    /// `softmax_lse` are those of the forward pass. Returns when it is done.
    ///
    /// # Errors
    /// Those of [`attention_backward`](crate::attention_backward());
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::Device`](crate::Error::Device) for a tensor of another
    /// device; [`Error::Driver`](crate::Error::Driver).
    #[expect(clippy::too_many_arguments, reason = "the tensors of FlashAttention's backward pass")]
    pub fn attention_backward<T: Element>(
        &'static self,
        q: &DeviceTensor<T>,
        k: &DeviceTensor<T>,
        v: &DeviceTensor<T>,
        out: &DeviceTensor<T>,
        softmax_lse: &DeviceTensor<f32>,
        dout: &DeviceTensor<T>,
        options: &AttentionOptions,
        kernel: Kernel,
    ) -> Result<DeviceGradients<T>> {
        for (argument, tensor) in [("q", q), ("k", k), ("v", v), ("out", out), ("dout", dout)] {
            self.check_owns(argument, tensor)?;
        }
        self.check_owns("softmax_lse", softmax_lse)?;
        let problem = Problem::new(&q.layout, &k.layout, &v.layout, options)?;
        let layouts = BackwardInputs::new(
            Inputs::new(&q.layout, &k.layout, &v.layout),
            &out.layout,
            &softmax_lse.layout,
            &dout.layout,
        );
        problem.check_backward(&layouts)?;
        let dq = DeviceTensor::uninitialised(self, &problem.out_shape())?;
        let dk = DeviceTensor::uninitialised(self, &problem.k_shape())?;
        let dv = DeviceTensor::uninitialised(self, &problem.k_shape())?;
        let arguments = raw::BackwardArguments {
            q: q.raw(),
            k: k.raw(),
            v: v.raw(),
            out: out.raw(),
            softmax_lse: softmax_lse.address(),
            dout: dout.raw(),
            dq: dq.raw(),
            dk: dk.raw(),
            dv: dv.raw(),
            options: options.clone(),
            kernel,
        };
        let call = raw::BackwardCall::new(&arguments)?;
        let workspace = DeviceMemory::allocate::<u8>(self, "the workspace", call.workspace_bytes() as usize)?;
        let _entered = self.enter()?;
        let stream = through_cust("cuStreamCreate", Stream::new(StreamFlags::DEFAULT, None))?;
        // SAFETY: all tensors are on this device and as large as their layouts say; the stream is waited for before any is
        // freed, also if a launch fails.
        let launched = unsafe { call.launch(self, workspace.address(), stream.as_inner().cast()) };
        through_cust("cuStreamSynchronize", stream.synchronize())?;
        Ok(DeviceGradients { dq, dk, dv, launches: launched? })
    }
}
