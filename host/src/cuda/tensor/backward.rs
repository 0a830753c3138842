//! The backward pass of tensors on a device.
use super::{Device, DeviceTensor, DeviceTensorRef};
use crate::element::Element;
use crate::error::Result;
use crate::inputs::{BackwardInputs, GradientOutputs, Inputs};
use crate::options::{AttentionOptions, Kernel};
use crate::raw;
use crate::report::LaunchReport;

/// Gradients of attention on a device.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceGradients<T> {
    /// dQ: shaped like Q.
    pub dq: DeviceTensor<T>,
    /// dK: shaped like K.
    pub dk: DeviceTensor<T>,
    /// dV: shaped like V.
    pub dv: DeviceTensor<T>,
    /// The gradient of the bias, if there is one: of its shape.
    pub dbias: Option<DeviceTensor<T>>,
    /// The gradient of the sinks, if there are any: (nheads).
    pub dsinks: Option<DeviceTensor<f32>>,
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
        let inputs = BackwardInputs::new(Inputs::new(q, k, v), out, softmax_lse, dout);
        self.attention_backward_with(&inputs, options, kernel)
    }

    /// All gradients, as [`attention_backward_with`](crate::attention_backward_with()), of tensors on this device; T
    /// is the type of Q's elements. `cu_seqlens_q` and `cu_seqlens_k` are copied to the host, to be checked.
    ///
    /// # Errors
    /// As [`Device::attention_backward`], and as [`Device::attention_with`] for the inputs.
    pub fn attention_backward_with<T: Element>(
        &'static self,
        inputs: &BackwardInputs<DeviceTensorRef>,
        options: &AttentionOptions,
        kernel: Kernel,
    ) -> Result<DeviceGradients<T>> {
        let (problem, options) = self.posed::<T>(&inputs.forward, options)?;
        inputs.try_map(|argument, tensor| self.check_owns(argument, tensor))?;
        problem.check_backward(&inputs.map(|_, tensor| tensor.layout))?;
        let gradient = |shape: &[usize]| DeviceTensor::<T>::uninitialised(self, shape);
        let (dq, dk) = (gradient(&problem.q_shape())?, gradient(&problem.k_shape())?);
        let dv = gradient(&problem.v_shape())?;
        let dbias = problem.bias.map(|shape| gradient(&shape)).transpose()?;
        let dsinks = problem.sinks.then(|| DeviceTensor::<f32>::uninitialised(self, &[problem.nheads])).transpose()?;
        let call = raw::BackwardCall::new(&raw::BackwardArguments {
            inputs: inputs.map(|_, tensor| tensor.raw()),
            gradients: GradientOutputs {
                dbias: dbias.as_ref().map(DeviceTensor::raw),
                dsinks: dsinks.as_ref().map(DeviceTensor::raw),
                ..GradientOutputs::new(dq.raw(), dk.raw(), dv.raw())
            },
            options,
            kernel,
        })?;
        let launches = self.run(call.workspace_bytes(), |workspace, stream| {
            // SAFETY: as of the forward pass.
            unsafe { call.launch(self, workspace, stream) }
        })?;
        Ok(DeviceGradients { dq, dk, dv, dbias, dsinks, launches })
    }
}
