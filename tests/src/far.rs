//! Tensors whose elements lie further apart than 32 bits can count: the same bits as of those that are packed.
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call};
use ferroflash::{BackwardInputs, DType, GradientOutputs, Inputs, Kernel, Layout, Tensor, TensorRef};

use crate::arena::{Arena, Placed};
use crate::combination::{Broken, Combination};
use crate::pointers::{Machine, same_bits};

/// The dimension of tensors of tokens and of scores that is spread out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// From sequence to sequence; those that are one after the other, from token to token.
    Batches,
    /// From token to token.
    Tokens,
    /// From head to head.
    Heads,
}

/// Bytes for what is small and not spread: LSE, slopes, sinks, and where sequences begin.
const NEAR: usize = 1 << 20;

/// Places in an arena, each after the one before.
struct Places {
    spread: Spread,
    /// Bytes from one element of the dimension that is spread to the next.
    stride: usize,
    near: usize,
    far: usize,
    end: usize,
    /// What is in the inputs.
    contents: Vec<(Placed, Tensor)>,
}

impl Places {
    fn new(spread: Spread, stride: usize) -> Self {
        Places { spread, stride, near: 0, far: 0, end: 0, contents: Vec::new() }
    }

    fn input(&mut self, name: &str, tensor: &TensorRef) -> Placed {
        let placed = self.place(name, tensor.dtype(), tensor.shape());
        self.contents.push((placed.clone(), tensor.to_tensor()));
        placed
    }

    fn output(&mut self, name: &str, like: &Tensor) -> Placed {
        self.place(name, like.dtype(), like.shape())
    }

    fn place(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Placed {
        let (rank, size) = (shape.len(), dtype.bytes());
        let spread = match (name, self.spread, rank) {
            ("q" | "k" | "v" | "out" | "dout" | "dq" | "dk" | "dv", Spread::Heads, _) => rank - 2,
            ("q" | "k" | "v" | "out" | "dout" | "dq" | "dk" | "dv", Spread::Tokens, _) => rank - 3,
            ("q" | "k" | "v" | "out" | "dout" | "dq" | "dk" | "dv", Spread::Batches, _) => 0,
            ("bias" | "mask" | "dbias", Spread::Heads, _) => 1,
            ("bias" | "mask" | "dbias", Spread::Tokens, _) => 2,
            ("bias" | "mask" | "dbias", Spread::Batches, _) => 0,
            _ => {
                let layout = Layout::contiguous(dtype, shape).expect("small");
                let at = self.near;
                self.near = (at + layout.len() * size).next_multiple_of(256);
                assert!(self.near <= NEAR, "{name}: {shape:?}");
                return Placed { at, layout };
            }
        };
        let mut strides = vec![0; rank];
        let mut beyond = 1;
        for dimension in (0..rank).rev() {
            strides[dimension] = beyond;
            if dimension == spread {
                strides[dimension] = self.stride / size;
            } else {
                // Rows begin at multiples of 16 bytes.
                let is_row = dimension + 1 == rank;
                beyond *= if is_row { shape[dimension].next_multiple_of(16) } else { shape[dimension].max(1) };
            }
        }
        let at = NEAR + self.far;
        self.far = (self.far + beyond * size).next_multiple_of(256);
        assert!(self.far <= self.stride, "{name} {shape:?} does not fit beside the others");
        self.end = self.end.max(at + shape[spread].saturating_sub(1) * self.stride + beyond * size);
        Placed { at, layout: Layout::strided(dtype, shape, &strides).expect("as many strides") }
    }
}

impl Combination {
    /// Runs it forward, and backward if the kernel can, with tensors so spread. Fails if results are not the bits that packed
    /// tensors give, where no order of additions is left open, and if they break the accuracy rule.
    ///
    /// # Errors
    /// Which of these it is.
    pub fn check_spread(
        &self,
        machine: Machine,
        kernel: Kernel,
        (spread, stride): (Spread, usize),
    ) -> Result<(), String> {
        let held = self.hold(|combination| combination.check_spread_once(machine, kernel, Places::new(spread, stride)));
        held.map_err(|reason| format!("{kernel}, {spread:?}: {reason}"))
    }

    fn check_spread_once(&self, machine: Machine, kernel: Kernel, mut places: Places) -> Result<(), Broken> {
        let (session, tensors) = (machine.session(kernel), self.tensors());
        let mut forward = self.forward(&session, &tensors)?;
        let packed = self.has_backward(kernel).then(|| self.backward(&session, &tensors, &forward)).transpose()?;

        let inputs = tensors.inputs().map(|name, tensor| places.input(name, tensor));
        let out = places.output("out", &forward.out);
        let softmax_lse = places.output("softmax_lse", &forward.softmax_lse);
        let backward = tensors.backward_inputs(&forward);
        let dout = places.input("dout", &backward.dout);
        let dlse = backward.dlse.as_ref().map(|dlse| places.input("dlse", dlse));
        let gradients = packed.as_ref().map(|packed| {
            let mut output = |name, like| places.output(name, like);
            let of_tokens = [("dq", &packed.dq), ("dk", &packed.dk), ("dv", &packed.dv)];
            let [dq, dk, dv] = of_tokens.map(|(name, like)| output(name, like));
            let mut gradients = GradientOutputs::new(dq, dk, dv);
            gradients.dbias = packed.dbias.as_ref().map(|like| output("dbias", like));
            gradients.dsinks = packed.dsinks.as_ref().map(|like| output("dsinks", like));
            gradients
        });
        let arena = Arena::new(machine, places.end, &places.contents)?;
        let raw_inputs: Inputs<_> = inputs.map(|_, placed| arena.raw(placed));

        arena.forward(&Call::new(&Arguments {
            inputs: raw_inputs.clone(),
            out: arena.raw(&out),
            softmax_lse: arena.raw(&softmax_lse),
            options: self.device_options(),
            kernel,
        })?)?;
        let [found_out, found_lse] = arena.read([&out, &softmax_lse]);
        same_bits("out", &found_out, &forward.out)?;
        same_bits("softmax_lse", &found_lse, &forward.softmax_lse)?;
        (forward.out, forward.softmax_lse) = (found_out, found_lse);
        Broken::unless(&self.accuracy(&tensors, &forward)?)?;

        let (Some(gradients), Some(mut packed)) = (gradients, packed) else { return Ok(()) };
        let mut inputs = BackwardInputs::new(raw_inputs, arena.raw(&out), arena.raw(&softmax_lse), arena.raw(&dout));
        inputs.dlse = dlse.as_ref().map(|dlse| arena.raw(dlse));
        let raw_gradients = gradients.map(|_, placed| arena.raw(placed));
        let arguments = BackwardArguments { inputs, gradients: raw_gradients, options: self.device_options(), kernel };
        arena.backward(&BackwardCall::new(&arguments)?)?;

        let all = [("dq", gradients.dq, &mut packed.dq), ("dk", gradients.dk, &mut packed.dk)].into_iter();
        let all = all.chain([("dv", gradients.dv, &mut packed.dv)]);
        let all =
            all.chain(gradients.dbias.zip(packed.dbias.as_mut()).map(|(placed, packed)| ("dbias", placed, packed)));
        let all =
            all.chain(gradients.dsinks.zip(packed.dsinks.as_mut()).map(|(placed, packed)| ("dsinks", placed, packed)));
        for (name, placed, packed) in all {
            let [found] = arena.read([&placed]);
            if self.options.deterministic {
                same_bits(name, &found, packed)?;
            }
            *packed = found;
        }
        Broken::unless_gradients(&self.backward_accuracy(&tensors, &packed)?)
    }
}
