//! Forward and backward passes of contiguous tensors in an [arena](crate::arena).
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call};
use ferroflash::{AttentionOptions, BackwardInputs, DType, Error, GradientOutputs, Inputs, Kernel, Layout};

use crate::arena::{Arena, Placed};

/// Of sequences of one length, whose heads of Q have each a head of K.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    /// The dtype of all but the LSE.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// (seqlen_q, seqlen_k).
    pub lengths: (usize, usize),
    /// Heads.
    pub nheads: usize,
    /// Elements of a row.
    pub headdim: usize,
}

/// Where the inputs lie.
pub struct Given {
    /// Q.
    pub q: Placed,
    /// K.
    pub k: Placed,
    /// V.
    pub v: Placed,
    /// dO.
    pub dout: Placed,
}

/// Where the results lie.
pub struct Results {
    /// O.
    pub out: Placed,
    /// LSE.
    pub softmax_lse: Placed,
    /// dQ.
    pub dq: Placed,
    /// dK.
    pub dk: Placed,
    /// dV.
    pub dv: Placed,
}

/// Contiguous tensors, one after the other.
#[derive(Default)]
pub struct Places {
    /// The bytes that they take.
    pub end: usize,
}

impl Places {
    fn place(&mut self, dtype: DType, shape: &[usize]) -> Placed {
        let layout = Layout::contiguous(dtype, shape).expect("below 2^63");
        let at = self.end.next_multiple_of(256);
        self.end = at + layout.len() * dtype.bytes();
        Placed { at, layout }
    }
}

impl Shapes {
    /// The inputs.
    pub fn given(&self, places: &mut Places) -> Given {
        let [q, dout] = [(); 2].map(|()| self.tokens(self.lengths.0, places));
        let [k, v] = [(); 2].map(|()| self.tokens(self.lengths.1, places));
        Given { q, k, v, dout }
    }

    /// The results.
    pub fn results(&self, places: &mut Places) -> Results {
        let [out, dq] = [(); 2].map(|()| self.tokens(self.lengths.0, places));
        let [dk, dv] = [(); 2].map(|()| self.tokens(self.lengths.1, places));
        let softmax_lse = places.place(DType::F32, &[self.batch, self.nheads, self.lengths.0]);
        Results { out, softmax_lse, dq, dk, dv }
    }

    fn tokens(&self, seqlen: usize, places: &mut Places) -> Placed {
        places.place(self.dtype, &[self.batch, seqlen, self.nheads, self.headdim])
    }
}

/// Runs both passes.
///
/// # Errors
/// What the machine says.
pub fn run(
    arena: &Arena,
    given: &Given,
    results: &Results,
    options: &AttentionOptions,
    kernel: Kernel,
) -> Result<(), Error> {
    let raw = |placed| arena.raw(placed);
    let inputs = Inputs::new(raw(&given.q), raw(&given.k), raw(&given.v));
    let (out, softmax_lse) = (raw(&results.out), raw(&results.softmax_lse));
    let arguments = Arguments {
        inputs: inputs.clone(),
        out: out.clone(),
        softmax_lse: softmax_lse.clone(),
        options: options.clone(),
        kernel,
    };
    arena.forward(&Call::new(&arguments)?)?;
    let inputs = BackwardInputs::new(inputs, out, softmax_lse, raw(&given.dout));
    let gradients = GradientOutputs::new(raw(&results.dq), raw(&results.dk), raw(&results.dv));
    arena.backward(&BackwardCall::new(&BackwardArguments { inputs, gradients, options: options.clone(), kernel })?)
}
