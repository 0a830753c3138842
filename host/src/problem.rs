//! The problem that a call poses, checked once, before anything is allocated or launched.
use std::fmt;

use cuda_std::DType;

use crate::error::{Error, Result};
use crate::inputs::{BackwardInputs, GradientOutputs, Inputs};
use crate::layout::Layout;
use crate::options::{AttentionOptions, Dropout, WindowSize};
use crate::sequences::{Sequence, Sequences};

/// The most tokens, heads or sequences there may be: kernels count them in 32 bits, with room to add two of them.
pub(crate) const MOST: usize = i32::MAX as usize;

/// The most elements that a tensor may have: as many as can be addressed in any dtype.
const MOST_ELEMENTS: usize = isize::MAX as usize / size_of::<f64>();

/// An attention problem whose arguments fit together: O = softmax(softmax_scale · Q Kᵀ + bias + mask) V.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// The dtype of Q, K, V, O and the bias.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// Tokens of Q and O: of the longest sequence, where their lengths differ.
    pub seqlen_q: usize,
    /// Tokens of K and V, likewise.
    pub seqlen_k: usize,
    /// Heads of Q and O.
    pub nheads: usize,
    /// Heads of K and V: a divisor of `nheads`.
    pub nheads_k: usize,
    /// Elements of one head's row of Q and K.
    pub headdim: usize,
    /// Elements of one head's row of V and O.
    pub headdim_v: usize,
    /// What Q Kᵀ is multiplied with before the softmax. Finite.
    pub softmax_scale: f32,
    /// Which keys a query sees, the causal mask included. `None` on a side on which it hides nothing.
    pub window: WindowSize,
    /// The cap of the scores. Positive and finite.
    pub softcap: Option<f32>,
    /// Dropout of P, with a p above 0.
    pub dropout: Option<Dropout>,
    /// Whether gradients must be the same bits in every run.
    pub deterministic: bool,
    /// Whether products of f32 tensors may be computed in tf32.
    pub allow_tf32: bool,
    /// Into how many parts keys are divided; 0: into as many as seems best.
    pub num_splits: usize,
    /// The shape of the bias, if there is one: (batch, nheads, seqlen_q, seqlen_k), of which the first three may be 1.
    pub bias: Option<[usize; 4]>,
    /// The shape of the boolean mask, if there is one, likewise.
    pub mask: Option<[usize; 4]>,
    /// Whether there are ALiBi slopes.
    pub alibi: bool,
    /// Whether there are attention sinks.
    pub sinks: bool,
    /// The sequences, where their lengths differ.
    pub varlen: Option<Varlen>,
}

/// Sequences of different lengths, one after the other in one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Varlen {
    /// Tokens of Q and O of all sequences.
    pub total_q: usize,
    /// Tokens of K and V of all sequences.
    pub total_k: usize,
    /// Where each begins, if that is in host memory.
    pub sequences: Option<Sequences>,
}

impl Problem {
    /// The problem that Q (batch, seqlen_q, nheads, headdim), K (batch, seqlen_k, nheads_k, headdim) and V (batch, seqlen_k,
    /// nheads_k, headdim_v) of these layouts pose.
    ///
    /// # Errors
    /// As [`Problem::of`].
    pub fn new(q: &Layout, k: &Layout, v: &Layout, options: &AttentionOptions) -> Result<Self> {
        Self::of(&Inputs::new(q, k, v), None, options)
    }

    /// The problem that tensors of these layouts pose. `sequences` says where sequences of different lengths begin, if that
    /// is known here.
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::DType`], [`Error::Shape`], [`Error::HeadGroups`], [`Error::Stride`], [`Error::Argument`] or
    /// [`Error::TooLarge`], with the argument that is at fault.
    pub fn of(inputs: &Inputs<&Layout>, sequences: Option<Sequences>, options: &AttentionOptions) -> Result<Self> {
        let (q, k, v) = (inputs.q, inputs.k, inputs.v);
        let varlen = varlen(inputs, sequences)?;
        let [batch, seqlen_q, nheads, headdim] = dimensions("q", q, varlen.is_some())?;
        let [_, seqlen_k, nheads_k, _] = dimensions("k", k, varlen.is_some())?;
        let [_, _, _, headdim_v] = dimensions("v", v, varlen.is_some())?;
        if !matches!(q.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(crate::element::no_element("q", q.dtype()));
        }
        for (argument, layout) in [("k", k), ("v", v)] {
            same_dtype(argument, layout, q.dtype(), "q")?;
            if varlen.is_none() {
                same(argument, layout, 0, "batch", batch, "q")?;
            }
        }
        let rank = q.shape().len();
        same("k", k, rank - 1, "headdim", headdim, "q")?;
        same("v", v, rank - 3, "seqlen", seqlen_k, "k")?;
        same("v", v, rank - 2, "nheads", nheads_k, "k")?;
        for (argument, dimension, found) in
            [("q", "nheads", nheads), ("k", "nheads", nheads_k), ("q", "headdim", headdim), ("v", "headdim", headdim_v)]
        {
            if found == 0 {
                return Err(Error::Shape { argument, dimension, found, allowed: "1 or more".to_owned() });
            }
        }
        if !nheads.is_multiple_of(nheads_k) {
            return Err(Error::HeadGroups { nheads, nheads_k });
        }
        let (batch, varlen) = match varlen {
            None => (batch, None),
            Some((batch, sequences)) => (batch, Some(Varlen { total_q: seqlen_q, total_k: seqlen_k, sequences })),
        };
        let (seqlen_q, seqlen_k) = match &varlen {
            None => (seqlen_q, seqlen_k),
            Some(varlen) => longest(varlen, options)?,
        };
        let counts = [
            ("batch", batch),
            ("seqlen_q", seqlen_q),
            ("seqlen_k", seqlen_k),
            ("nheads", nheads),
            ("headdim", headdim),
            ("headdim_v", headdim_v),
        ];
        for (what, found) in counts {
            if found > MOST {
                return Err(Error::TooLarge { what, found: found as u128, limit: MOST as u128 });
            }
        }
        // Views with strides of 0 may claim more elements than memory holds.
        let extents = [batch, seqlen_q.max(seqlen_k), nheads, headdim.max(headdim_v)];
        let elements = extents.into_iter().fold(1u128, |n, extent| n * extent as u128);
        if elements > MOST_ELEMENTS as u128 {
            return Err(Error::TooLarge {
                what: "elements of a tensor",
                found: elements,
                limit: MOST_ELEMENTS as u128,
            });
        }

        let scores = [batch, nheads, seqlen_q, seqlen_k];
        let bias = inputs.bias.map(|bias| broadcast("bias", bias, q.dtype(), "q", scores)).transpose()?;
        let mask = inputs.mask.map(|mask| broadcast("mask", mask, DType::U8, "a mask", scores)).transpose()?;
        if let Some(slopes) = inputs.alibi_slopes {
            same_dtype("alibi_slopes", slopes, DType::F32, "slopes")?;
            match slopes.shape().len() {
                1 => same("alibi_slopes", slopes, 0, "nheads", nheads, "q")?,
                2 => {
                    same("alibi_slopes", slopes, 0, "batch", batch, "q")?;
                    same("alibi_slopes", slopes, 1, "nheads", nheads, "q")?;
                }
                found => {
                    let allowed = "1: (nheads), or 2: (batch, nheads)";
                    return Err(Error::Rank { argument: "alibi_slopes", found, allowed });
                }
            }
        }
        if let Some(sinks) = inputs.sinks {
            check_sinks("sinks", sinks, nheads)?;
        }

        let softmax_scale = options.softmax_scale.unwrap_or_else(|| 1.0 / (headdim as f32).sqrt());
        if !softmax_scale.is_finite() {
            return Err(argument("softmax_scale", softmax_scale, "finite"));
        }
        if let Some(softcap) = options.softcap.filter(|softcap| !(*softcap > 0.0 && softcap.is_finite())) {
            return Err(argument("softcap", softcap, "positive and finite"));
        }
        if let Some(Dropout { p, .. }) = options.dropout.filter(|dropout| !(0.0..1.0).contains(&dropout.p)) {
            return Err(argument("dropout_p", p, "at least 0, below 1"));
        }
        if options.num_splits > AttentionOptions::MOST_SPLITS {
            return Err(argument("num_splits", options.num_splits, "0 to 128"));
        }
        Ok(Problem {
            dtype: q.dtype(),
            batch,
            seqlen_q,
            seqlen_k,
            nheads,
            nheads_k,
            headdim,
            headdim_v,
            softmax_scale,
            window: window(options, seqlen_q, seqlen_k),
            softcap: options.softcap,
            dropout: options.dropout.filter(|dropout| dropout.p > 0.0),
            deterministic: options.deterministic,
            allow_tf32: options.allow_tf32,
            num_splits: options.num_splits,
            bias,
            mask,
            alibi: inputs.alibi_slopes.is_some(),
            sinks: inputs.sinks.is_some(),
            varlen,
        })
    }

    /// The shape of Q and dQ: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim).
    pub fn q_shape(&self) -> Vec<usize> {
        self.tokens_shape(self.varlen.as_ref().map(|varlen| varlen.total_q), self.seqlen_q, self.nheads, self.headdim)
    }

    /// The shape of K and dK: (batch, seqlen_k, nheads_k, headdim), or (total_k, nheads_k, headdim).
    pub fn k_shape(&self) -> Vec<usize> {
        self.tokens_shape(self.varlen.as_ref().map(|varlen| varlen.total_k), self.seqlen_k, self.nheads_k, self.headdim)
    }

    /// The shape of V and dV: (batch, seqlen_k, nheads_k, headdim_v), or (total_k, nheads_k, headdim_v).
    pub fn v_shape(&self) -> Vec<usize> {
        let total_k = self.varlen.as_ref().map(|varlen| varlen.total_k);
        self.tokens_shape(total_k, self.seqlen_k, self.nheads_k, self.headdim_v)
    }

    /// The shape of O and dO: (batch, seqlen_q, nheads, headdim_v), or (total_q, nheads, headdim_v).
    pub fn out_shape(&self) -> Vec<usize> {
        self.tokens_shape(self.varlen.as_ref().map(|varlen| varlen.total_q), self.seqlen_q, self.nheads, self.headdim_v)
    }

    fn tokens_shape(&self, total: Option<usize>, seqlen: usize, nheads: usize, headdim: usize) -> Vec<usize> {
        match total {
            None => vec![self.batch, seqlen, nheads, headdim],
            Some(total) => vec![total, nheads, headdim],
        }
    }

    /// The shape of the LSE: (batch, nheads, seqlen_q), or (nheads, total_q).
    pub fn lse_shape(&self) -> Vec<usize> {
        match &self.varlen {
            None => vec![self.batch, self.nheads, self.seqlen_q],
            Some(varlen) => vec![self.nheads, varlen.total_q],
        }
    }

    /// The rows of S, of all heads: as many as the LSE has elements.
    pub fn rows(&self) -> usize {
        self.lse_shape().iter().product()
    }

    /// Whether the mask is causal, and nothing else.
    pub fn is_causal(&self) -> bool {
        self.window == WindowSize { left: None, right: Some(0) }
    }

    /// The sequences; none, where only the device knows where they begin.
    pub(crate) fn sequences(&self) -> Vec<Sequence> {
        match &self.varlen {
            None => (0..self.batch).map(|index| self.sequence(index)).collect(),
            Some(varlen) => varlen.sequences.iter().flat_map(Sequences::iter).collect(),
        }
    }

    /// One of the sequences, all of which are of one length.
    fn sequence(&self, index: usize) -> Sequence {
        let Problem { seqlen_q, seqlen_k, .. } = *self;
        Sequence { index, batch: index, first_q: 0, seqlen_q, first_k: 0, seqlen_k }
    }

    /// Where the LSE of one row of one head of a sequence is.
    pub(crate) fn lse_index(&self, sequence: &Sequence, head: usize, row: usize) -> usize {
        match &self.varlen {
            None => (sequence.batch * self.nheads + head) * self.seqlen_q + row,
            Some(varlen) => head * varlen.total_q + sequence.first_q + row,
        }
    }

    /// Checks that a tensor has the dtype of the problem and this shape, which is that of `of`.
    pub(crate) fn check_like(
        &self,
        argument: &'static str,
        layout: &Layout,
        shape: &[usize],
        of: &'static str,
    ) -> Result<()> {
        dimensions(argument, layout, self.varlen.is_some())?;
        same_dtype(argument, layout, self.dtype, "q")?;
        let dimensions = &DIMENSIONS[4 - shape.len()..];
        dimensions
            .iter()
            .zip(shape)
            .enumerate()
            .try_for_each(|(i, (dimension, &extent))| same(argument, layout, i, dimension, extent, of))
    }

    /// Checks that a backward pass may begin with these: O, its gradient, the LSE, and the gradient of that.
    pub(crate) fn check_backward(&self, inputs: &BackwardInputs<&Layout>) -> Result<()> {
        self.check_like("out", inputs.out, &self.out_shape(), "q")?;
        self.check_like("dout", inputs.dout, &self.out_shape(), "q")?;
        self.check_rows("softmax_lse", inputs.softmax_lse)?;
        inputs.dlse.map_or(Ok(()), |dlse| self.check_rows("dlse", dlse))
    }

    /// Checks that gradients of these layouts take the result of a backward pass.
    pub(crate) fn check_gradients(&self, gradients: &GradientOutputs<&Layout>) -> Result<()> {
        self.check_like("dq", gradients.dq, &self.q_shape(), "q")?;
        self.check_like("dk", gradients.dk, &self.k_shape(), "k")?;
        self.check_like("dv", gradients.dv, &self.v_shape(), "v")?;
        if let Some(dbias) = gradients.dbias {
            let Some(shape) = self.bias else { return Err(argument("dbias", "a tensor", "none, as there is no bias")) };
            same_dtype("dbias", dbias, self.dtype, "q")?;
            same_scores("dbias", dbias, shape)?;
        }
        if let Some(dsinks) = gradients.dsinks {
            if !self.sinks {
                return Err(argument("dsinks", "a tensor", "none, as there are no sinks"));
            }
            check_sinks("dsinks", dsinks, self.nheads)?;
        }
        Ok(())
    }

    /// Checks that a tensor has the shape of the LSE.
    pub(crate) fn check_rows(&self, argument: &'static str, layout: &Layout) -> Result<()> {
        same_dtype(argument, layout, DType::F32, "an LSE")?;
        let shape = self.lse_shape();
        if layout.shape().len() != shape.len() {
            let allowed = if self.varlen.is_none() { "3: (batch, nheads, seqlen_q)" } else { "2: (nheads, total_q)" };
            return Err(Error::Rank { argument, found: layout.shape().len(), allowed });
        }
        let dimensions = if self.varlen.is_none() { &["batch", "nheads", "seqlen"][..] } else { &["nheads", "seqlen"] };
        dimensions
            .iter()
            .zip(shape)
            .enumerate()
            .try_for_each(|(i, (dimension, extent))| same(argument, layout, i, dimension, extent, "q"))
    }

    /// Checks that outputs of these sizes take the result.
    pub(crate) fn check_outputs(&self, out: &Layout, softmax_lse: Option<usize>) -> Result<()> {
        self.check_like("out", out, &self.out_shape(), "q")?;
        if let Some(found) = softmax_lse.filter(|&found| found != self.rows()) {
            let layout = Layout::contiguous(DType::F32, &self.lse_shape())?;
            let (shape, strides) = (layout.shape().to_vec(), layout.strides().to_vec());
            return Err(Error::Length {
                argument: "softmax_lse",
                found,
                shape,
                strides,
                needed: self.rows().to_string(),
            });
        }
        Ok(())
    }

    /// Pairs of a query and a key that it sees, of one head each, by the window alone. As the field counts, half of all
    /// pairs when causal; where only the device knows the sequences, as if all keys were as many as those of the longest.
    fn pairs(&self) -> u64 {
        let all = |sequence: &Sequence| (sequence.seqlen_q as u64).saturating_mul(sequence.seqlen_k as u64);
        let of = |sequence: &Sequence| match self.window {
            WindowSize { left: None, right: None } => all(sequence),
            _ if self.is_causal() => all(sequence) / 2,
            window => (0..sequence.seqlen_q).map(|row| sequence.visible(window, row).len() as u64).sum(),
        };
        match &self.varlen {
            Some(Varlen { sequences: None, total_q, .. }) => (*total_q as u64).saturating_mul(self.seqlen_k as u64),
            Some(Varlen { sequences: Some(sequences), .. }) => {
                sequences.iter().map(|sequence| of(&sequence)).fold(0, u64::saturating_add)
            }
            None => of(&self.sequence(0)).saturating_mul(self.batch as u64),
        }
    }

    /// Floating-point operations of the two products: 2 b h sq sk (d + d_v), half of it when causal, as the field counts.
    pub fn flops(&self) -> u64 {
        let products = 2 * (self.headdim + self.headdim_v) as u64;
        self.pairs().saturating_mul(self.nheads as u64).saturating_mul(products)
    }

    /// Floating-point operations of the backward pass: its five products, three of d columns and two of d_v, are 2.5 times
    /// the two of the forward pass.
    pub fn backward_flops(&self) -> u64 {
        let products = 2 * (3 * self.headdim + 2 * self.headdim_v) as u64;
        self.pairs().saturating_mul(self.nheads as u64).saturating_mul(products)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v, .. } = self;
        write!(f, "batch {batch}, seqlen_q {seqlen_q}, seqlen_k {seqlen_k}, ")?;
        write!(f, "nheads {nheads}, nheads_k {nheads_k}, headdim {headdim}")?;
        if headdim_v != headdim {
            write!(f, ", headdim_v {headdim_v}")?;
        }
        if let Some(Varlen { total_q, total_k, .. }) = &self.varlen {
            write!(f, ", total_q {total_q}, total_k {total_k}")?;
        }
        match self.window {
            WindowSize { left: None, right: None } => (),
            _ if self.is_causal() => write!(f, ", causal")?,
            WindowSize { left, right } => {
                let side = |keys: Option<usize>| keys.map_or_else(|| "all".to_owned(), |keys| keys.to_string());
                write!(f, ", window {} left {} right", side(left), side(right))?;
            }
        }
        if let Some(softcap) = self.softcap {
            write!(f, ", softcap {softcap}")?;
        }
        if let Some(Dropout { p, .. }) = self.dropout {
            write!(f, ", dropout {p}")?;
        }
        let tensors = [(self.bias.is_some(), "bias"), (self.mask.is_some(), "mask")];
        let tensors = tensors.into_iter().chain([(self.alibi, "ALiBi"), (self.sinks, "sinks")]);
        tensors.filter(|(there, _)| *there).try_for_each(|(_, name)| write!(f, ", {name}"))
    }
}

const DIMENSIONS: [&str; 4] = ["batch", "seqlen", "nheads", "headdim"];

/// The four extents of a tensor of tokens; of three, where sequences follow each other, the first is then 1.
fn dimensions(argument: &'static str, layout: &Layout, varlen: bool) -> Result<[usize; 4]> {
    let shape = match (layout.shape(), varlen) {
        (&[batch, seqlen, nheads, headdim], false) => [batch, seqlen, nheads, headdim],
        (&[total, nheads, headdim], true) => [1, total, nheads, headdim],
        (shape, _) => {
            let allowed = match varlen {
                false => "4: (batch, seqlen, nheads, headdim)",
                true => "3, with cu_seqlens: (total, nheads, headdim)",
            };
            return Err(Error::Rank { argument, found: shape.len(), allowed });
        }
    };
    contiguous_rows(argument, layout, "a last stride of 1: headdim is contiguous")?;
    Ok(shape)
}

fn contiguous_rows(argument: &'static str, layout: &Layout, allowed: &'static str) -> Result<()> {
    if layout.has_contiguous_rows() {
        return Ok(());
    }
    Err(Error::Stride { argument, found: layout.strides().to_vec(), allowed })
}

/// How many sequences of different lengths there are, and where they begin, if that is known here; `None` if all are alike.
fn varlen(inputs: &Inputs<&Layout>, sequences: Option<Sequences>) -> Result<Option<(usize, Option<Sequences>)>> {
    let (q, k) = match (inputs.cu_seqlens_q, inputs.cu_seqlens_k) {
        (None, None) => return Ok(None),
        (Some(q), Some(k)) => (q, k),
        (None, Some(_)) => return Err(argument("cu_seqlens_q", "none", "one, as there is cu_seqlens_k")),
        (Some(_), None) => return Err(argument("cu_seqlens_k", "none", "one, as there is cu_seqlens_q")),
    };
    for (name, layout) in [("cu_seqlens_q", q), ("cu_seqlens_k", k)] {
        same_dtype(name, layout, DType::I32, "indices")?;
        if layout.shape().len() != 1 {
            return Err(Error::Rank { argument: name, found: layout.shape().len(), allowed: "1: (batch + 1)" });
        }
        if layout.shape()[0] == 0 {
            let allowed = "batch + 1, so 1 or more".to_owned();
            return Err(Error::Shape { argument: name, dimension: "batch", found: 0, allowed });
        }
        contiguous_rows(name, layout, "1: contiguous")?;
    }
    same("cu_seqlens_k", k, 0, "batch", q.shape()[0], "cu_seqlens_q")?;
    Ok(Some((q.shape()[0] - 1, sequences)))
}

/// The longest sequences of Q and of K.
fn longest(varlen: &Varlen, options: &AttentionOptions) -> Result<(usize, usize)> {
    let known = varlen.sequences.as_ref().map(Sequences::longest);
    let of = |name, said: Option<usize>, known: Option<usize>, total| {
        let found = match (said, known) {
            (Some(said), Some(known)) if said < known => {
                return Err(argument(name, said, format!("{known} or more: the longest sequence")));
            }
            (Some(0), None) if total > 0 => {
                return Err(argument(name, 0, format!("1 or more: there are {total} tokens")));
            }
            (said, known) => known.or(said),
        };
        match found {
            None => Err(argument(name, "none", "a number: cu_seqlens is in device memory")),
            Some(longest) => Ok(longest.min(total)),
        }
    };
    Ok((
        of("max_seqlen_q", options.max_seqlen_q, known.map(|(q, _)| q), varlen.total_q)?,
        of("max_seqlen_k", options.max_seqlen_k, known.map(|(_, k)| k), varlen.total_k)?,
    ))
}

/// The window and the causal mask as one, without sides that hide nothing.
fn window(options: &AttentionOptions, seqlen_q: usize, seqlen_k: usize) -> WindowSize {
    let WindowSize { left, right } = options.window_size;
    let right = if options.causal { Some(0) } else { right };
    // A causal mask is one whatever the lengths.
    let right = right.filter(|&right| options.causal || right + 1 < seqlen_q);
    WindowSize { left: left.filter(|left| left + 1 < seqlen_k), right }
}

/// The dimensions of a tensor of scores.
const SCORES: [&str; 4] = ["batch", "nheads", "seqlen_q", "seqlen_k"];

/// The extents of a tensor of scores, whose rows are contiguous.
fn scores_shape(argument: &'static str, layout: &Layout) -> Result<[usize; 4]> {
    let shape = layout.shape().try_into().map_err(|_| Error::Rank {
        argument,
        found: layout.shape().len(),
        allowed: "4: (batch, nheads, seqlen_q, seqlen_k), of which the first three may be 1",
    })?;
    contiguous_rows(argument, layout, "a last stride of 1: keys are contiguous")?;
    Ok(shape)
}

/// Checks that a gradient of the bias has its shape.
fn same_scores(argument: &'static str, layout: &Layout, shape: [usize; 4]) -> Result<()> {
    scores_shape(argument, layout)?;
    (0..4).try_for_each(|i| same(argument, layout, i, SCORES[i], shape[i], "the bias"))
}

/// Checks the sinks, or their gradient: (nheads).
fn check_sinks(argument: &'static str, layout: &Layout, nheads: usize) -> Result<()> {
    same_dtype(argument, layout, DType::F32, "sinks")?;
    if layout.shape().len() != 1 {
        return Err(Error::Rank { argument, found: layout.shape().len(), allowed: "1: (nheads)" });
    }
    same(argument, layout, 0, "nheads", nheads, "q")
}

/// Checks a tensor of scores: (batch, nheads, seqlen_q, seqlen_k), of which the first three may be 1.
fn broadcast(
    argument: &'static str,
    layout: &Layout,
    dtype: DType,
    of: &str,
    scores: [usize; 4],
) -> Result<[usize; 4]> {
    same_dtype(argument, layout, dtype, of)?;
    let shape = scores_shape(argument, layout)?;
    for (i, (dimension, extent)) in SCORES.into_iter().zip(scores).enumerate() {
        let found = shape[i];
        if found != extent && (found != 1 || i == 3) {
            let allowed = if i == 3 { format!("{extent}") } else { format!("{extent} or 1") };
            return Err(Error::Shape { argument, dimension, found, allowed });
        }
    }
    Ok(shape)
}

fn argument(argument: &'static str, found: impl fmt::Display, allowed: impl Into<String>) -> Error {
    Error::Argument { argument, found: found.to_string(), allowed: allowed.into() }
}

fn same_dtype(argument: &'static str, layout: &Layout, dtype: DType, of: &str) -> Result<()> {
    if layout.dtype() == dtype {
        return Ok(());
    }
    Err(Error::DType { argument, found: layout.dtype().name(), allowed: format!("{}, as of {of}", dtype.name()) })
}

fn same(
    argument: &'static str,
    layout: &Layout,
    index: usize,
    dimension: &'static str,
    extent: usize,
    of: &str,
) -> Result<()> {
    let found = layout.shape()[index];
    if found == extent {
        return Ok(());
    }
    Err(Error::Shape { argument, dimension, found, allowed: format!("{extent}, as of {of}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(shape: &[usize]) -> Layout {
        Layout::contiguous(DType::F32, shape).expect("small")
    }

    fn problem(q: &[usize], k: &[usize], options: &AttentionOptions) -> Result<Problem> {
        Problem::new(&layout(q), &layout(k), &layout(k), options)
    }

    #[test]
    fn a_window_that_hides_nothing_is_none() {
        let window = |left: Option<usize>, right: Option<usize>, causal| {
            let options = AttentionOptions::new().window_size(left, right).causal(causal);
            problem(&[1, 5, 1, 8], &[1, 7, 1, 8], &options).expect("valid").window
        };
        assert_eq!(window(Some(6), Some(4), false), WindowSize { left: None, right: None });
        assert_eq!(window(Some(5), Some(3), false), WindowSize { left: Some(5), right: Some(3) });
        assert_eq!(window(Some(5), Some(3), true), WindowSize { left: Some(5), right: Some(0) });
    }

    #[test]
    fn each_bad_argument_is_named() {
        let options = AttentionOptions::new();
        let refused = |q: &[usize], k: &[usize]| problem(q, k, &options).expect_err("bad").to_string();
        assert_eq!(refused(&[1, 2, 8], &[1, 2, 1, 8]), "q: 3 dimensions; allowed: 4: (batch, seqlen, nheads, headdim)");
        assert_eq!(refused(&[2, 2, 1, 8], &[1, 2, 1, 8]), "k: batch is 1; allowed: 2, as of q");
        assert_eq!(refused(&[1, 2, 1, 8], &[1, 2, 1, 16]), "k: headdim is 16; allowed: 8, as of q");
        assert_eq!(refused(&[1, 2, 1, 0], &[1, 2, 1, 0]), "q: headdim is 0; allowed: 1 or more");
        assert!(refused(&[1, 2, 3, 8], &[1, 2, 2, 8]).starts_with("nheads is 3, which is no multiple of nheads_k = 2"));
        let refused =
            |options: AttentionOptions| problem(&[1, 2, 1, 8], &[1, 2, 1, 8], &options).expect_err("bad").to_string();
        for scale in [f32::NAN, f32::INFINITY] {
            let options = AttentionOptions::new().softmax_scale(scale);
            assert_eq!(refused(options), format!("softmax_scale: {scale}; allowed: finite"));
        }
        let softcap = refused(AttentionOptions::new().softcap(0.0));
        assert_eq!(softcap, "softcap: 0; allowed: positive and finite");
        let dropout = refused(AttentionOptions::new().dropout(1.0, 0, 0));
        assert_eq!(dropout, "dropout_p: 1; allowed: at least 0, below 1");
    }

    /// Views with strides of 0 claim more than any memory holds.
    #[test]
    fn what_cannot_be_counted_is_refused() {
        let posed = |q: [usize; 4], k: [usize; 4], headdim_v: usize| {
            let view = |shape: &[usize]| Layout::strided(DType::F16, shape, &[0, 0, 0, 1]).expect("four strides");
            let (q, k, v) = (view(&q), view(&k), view(&[k[0], k[1], k[2], headdim_v]));
            Problem::new(&q, &k, &v, &AttentionOptions::new()).map(|_| ())
        };
        let refused = |q, k, headdim_v| posed(q, k, headdim_v).expect_err("too many").to_string();
        let too_many = |what| format!("{what}: 2147483648; allowed: at most 2147483647");
        const N: usize = MOST + 1;
        assert_eq!(refused([N, 1, 1, 8], [N, 1, 1, 8], 8), too_many("batch"));
        assert_eq!(refused([1, N, 1, 8], [1, 1, 1, 8], 8), too_many("seqlen_q"));
        assert_eq!(refused([1, 1, 1, 8], [1, N, 1, 8], 8), too_many("seqlen_k"));
        assert_eq!(refused([1, 1, N, 8], [1, 1, 1, 8], 8), too_many("nheads"));
        assert_eq!(refused([1, 1, 1, N], [1, 1, 1, N], 8), too_many("headdim"));
        assert_eq!(refused([1, 1, 1, 8], [1, 1, 1, 8], N), too_many("headdim_v"));
        assert_eq!(posed([MOST, 1, 1, 8], [MOST, 1, 1, 8], 8), Ok(()));
        let elements = refused([1 << 30, 1 << 30, 1, 8], [1 << 30, 1, 1, 8], 8);
        let expected = format!("elements of a tensor: {}; allowed: at most {MOST_ELEMENTS}", 1u64 << 63);
        assert_eq!(elements, expected);
    }

    #[test]
    fn tensors_of_scores_broadcast() {
        let (q, options) = (layout(&[2, 3, 4, 8]), AttentionOptions::new());
        let with = |shape: &[usize]| {
            let bias = layout(shape);
            Problem::of(&Inputs::new(&q, &q, &q).bias(&bias), None, &options).map(|problem| problem.bias)
        };
        assert_eq!(with(&[1, 4, 1, 3]), Ok(Some([1, 4, 1, 3])));
        assert_eq!(with(&[2, 2, 3, 3]).expect_err("bad").to_string(), "bias: nheads is 2; allowed: 4 or 1");
        assert_eq!(with(&[2, 4, 3, 1]).expect_err("bad").to_string(), "bias: seqlen_k is 1; allowed: 3");
    }

    #[test]
    fn sequences_of_different_lengths() {
        let (q, starts, options) = (layout(&[7, 4, 8]), [0, 3, 7], AttentionOptions::new());
        let cu_seqlens = Layout::contiguous(DType::I32, &[3]).expect("small");
        let inputs = Inputs::new(&q, &q, &q).cu_seqlens(&cu_seqlens, &cu_seqlens);
        let sequences = Sequences::new(&starts, 7, &starts, 7).expect("valid");
        let problem = Problem::of(&inputs, Some(sequences), &options).expect("valid");
        assert_eq!((problem.batch, problem.seqlen_q, problem.out_shape()), (2, 4, vec![7, 4, 8]));
        assert_eq!(problem.lse_index(&problem.sequences()[1], 2, 1), 2 * 7 + 3 + 1);
        let unknown = Problem::of(&inputs, None, &options).expect_err("no lengths").to_string();
        assert_eq!(unknown, "max_seqlen_q: none; allowed: a number: cu_seqlens is in device memory");
        assert!(Problem::of(&inputs, None, &options.clone().max_seqlens(4, 4)).is_ok());
        let of_none = Problem::of(&inputs, None, &options.max_seqlens(4, 0)).expect_err("no keys").to_string();
        assert_eq!(of_none, "max_seqlen_k: 0; allowed: 1 or more: there are 7 tokens");
    }
}
