//! The tensors that `ferroflash run` computes on.
use super::alibi;
use crate::cli::files::TensorFile;
use anyhow::{Context, Result};
use clap::ValueEnum;
use ferroflash::{BackwardInputs, Inputs, Tensor, TensorRef};

/// Which tensors besides q, k and v take part.
#[derive(clap::Args)]
pub struct TensorArguments {
    /// Add the file's tensor bias to the scores: like q, of shape (batch, nheads, seqlen_q, seqlen_k), of which the
    /// first three may be 1
    #[arg(long)]
    bias: bool,
    /// Hide the keys for which the file's tensor mask is 0 or false: BOOL or U8, shaped as a bias; a key-padding mask
    /// is (batch, 1, 1, seqlen_k)
    #[arg(long)]
    mask: bool,
    /// Add -slope · distance to the scores; `standard`: slopes 2^(-8 i / nheads), `file`: the file's tensor
    /// alibi_slopes, F32, (nheads) or (batch, nheads)
    #[arg(long, value_name = "SLOPES")]
    alibi: Option<Slopes>,
    /// Let the file's tensor sinks, F32, (nheads), take part in the softmax of each row: a logit without a value
    #[arg(long)]
    sinks: bool,
    /// Take sequences of different lengths, which begin where the file's tensors cu_seqlens_q and cu_seqlens_k say:
    /// I32, (batch + 1). q, k, v and dout are then (tokens, nheads, headdim)
    #[arg(long)]
    varlen: bool,
    /// With --backward: the loss depends on the LSE too; its gradient is the file's tensor dlse, F32, shaped like the
    /// LSE
    #[arg(long, requires = "backward")]
    dlse: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Slopes {
    Standard,
    File,
}

/// What attention is computed on.
pub struct ForwardTensors(Inputs<Tensor>);

impl ForwardTensors {
    /// Reads what the arguments ask for.
    pub fn read(file: &TensorFile, arguments: &TensorArguments) -> Result<Self> {
        let given = |asked: bool, name| asked.then(|| file.tensor(name)).transpose();
        let [q, k, v] = [file.tensor("q")?, file.tensor("k")?, file.tensor("v")?];
        let nheads = q.shape().iter().rev().nth(1).copied().unwrap_or(0);
        let mut inputs = Inputs::new(q, k, v);
        inputs.bias = given(arguments.bias, "bias").context("--bias")?;
        inputs.mask = given(arguments.mask, "mask").context("--mask")?;
        inputs.alibi_slopes = match arguments.alibi {
            None => None,
            Some(Slopes::Standard) => Some(Tensor::from_vec(alibi::standard_slopes(nheads), &[nheads])?),
            Some(Slopes::File) => Some(file.tensor("alibi_slopes").context("--alibi file")?),
        };
        inputs.sinks = given(arguments.sinks, "sinks").context("--sinks")?;
        inputs.cu_seqlens_q = given(arguments.varlen, "cu_seqlens_q").context("--varlen")?;
        inputs.cu_seqlens_k = given(arguments.varlen, "cu_seqlens_k").context("--varlen")?;
        Ok(ForwardTensors(inputs))
    }

    /// To compute on.
    pub fn inputs(&self) -> Inputs<TensorRef<'_>> {
        self.0.map(|_, tensor| tensor.view())
    }
}

/// What gradients are computed from besides.
pub struct BackwardTensors {
    dout: Tensor,
    dlse: Option<Tensor>,
}

impl BackwardTensors {
    /// Reads what the arguments ask for.
    pub fn read(file: &TensorFile, arguments: &TensorArguments, forward: &ForwardTensors) -> Result<Self> {
        let q = &forward.0.q;
        let headdim_v = forward.0.v.shape().last().copied();
        let shape: Vec<_> = q.shape().iter().rev().skip(1).rev().copied().chain(headdim_v).collect();
        let needed = || format!("--backward needs dout, {} of shape {shape:?}, like out", q.dtype().name());
        Ok(BackwardTensors {
            dout: file.tensor("dout").with_context(needed)?,
            dlse: arguments.dlse.then(|| file.tensor("dlse")).transpose().context("--dlse")?,
        })
    }

    /// To compute on, after a forward pass of `forward`.
    pub fn inputs<'a>(
        &'a self,
        forward: Inputs<TensorRef<'a>>,
        result: &'a ferroflash::Attention,
    ) -> BackwardInputs<TensorRef<'a>> {
        let inputs = BackwardInputs::new(forward, &result.out, &result.softmax_lse, &self.dout);
        match &self.dlse {
            Some(dlse) => inputs.dlse(dlse),
            None => inputs,
        }
    }
}
