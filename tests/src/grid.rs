//! The grid: every kernel, dtype, head dimension and mask, at lengths around the edges of tiles.
use crate::inputs::normal;
use ferroflash::accuracy::{self, Accuracy};
use ferroflash::{Attention, AttentionOptions, DType, Kernel, Session, Tensor};

/// (seqlen_q, seqlen_k): one token, the edges of 16 and 64, several blocks, and lengths unlike each other both ways.
pub const LENGTHS: [(usize, usize); 14] = [
    (1, 1),
    (15, 15),
    (16, 16),
    (17, 17),
    (63, 63),
    (64, 64),
    (65, 65),
    (113, 113),
    (257, 257),
    (113, 203),
    (203, 113),
    (1, 257),
    (257, 1),
    (64, 129),
];

/// Head dimensions that every kernel has.
pub const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// Dtypes that every kernel has.
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// One problem of the grid.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The dtype of all tensors.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// Tokens of Q.
    pub seqlen_q: usize,
    /// Tokens of K and V.
    pub seqlen_k: usize,
    /// Heads of Q.
    pub nheads: usize,
    /// Heads of K and V.
    pub nheads_k: usize,
    /// Elements of a head's row.
    pub headdim: usize,
    /// Whether the mask is causal.
    pub causal: bool,
    /// Standard deviation of the inputs.
    pub deviation: f32,
}

impl Case {
    /// One head of one sequence, N(0, 1).
    pub fn single(dtype: DType, (seqlen_q, seqlen_k): (usize, usize), headdim: usize, causal: bool) -> Self {
        Case { dtype, batch: 1, seqlen_q, seqlen_k, nheads: 1, nheads_k: 1, headdim, causal, deviation: 1.0 }
    }

    /// Its Q, K and V.
    pub fn inputs(&self) -> [Tensor; 3] {
        let tensor = |seqlen, nheads, seed| {
            normal(self.dtype, &[self.batch, seqlen, nheads, self.headdim], self.deviation, seed)
        };
        [
            tensor(self.seqlen_q, self.nheads, 1),
            tensor(self.seqlen_k, self.nheads_k, 2),
            tensor(self.seqlen_k, self.nheads_k, 3),
        ]
    }

    /// Its options.
    pub fn options(&self) -> AttentionOptions {
        AttentionOptions::new().causal(self.causal)
    }

    /// Runs it, and compares with f64.
    pub fn run(&self, session: &Session) -> (Attention, Accuracy) {
        let [q, k, v] = self.inputs();
        let result = session.attention(&q, &k, &v, &self.options()).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let accuracy =
            accuracy::check(&q, &k, &v, &self.options(), &result).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        (result, accuracy)
    }

    /// Runs it, and fails where the accuracy rule is broken.
    pub fn check(&self, session: &Session) {
        let (_, accuracy) = self.run(session);
        assert!(accuracy.passed(), "{self:?}: {accuracy}");
    }
}

/// Those of them that a kernel family takes: Hopper's products are of 16 bits.
pub fn of_kernel(cases: impl Iterator<Item = Case>, kernel: Kernel) -> impl Iterator<Item = Case> {
    cases.filter(move |case| kernel != Kernel::Flash3 || case.dtype != DType::F32)
}

/// One head of one sequence each.
pub fn cases() -> impl Iterator<Item = Case> {
    DTYPES.into_iter().flat_map(|dtype| {
        HEAD_DIMS.into_iter().flat_map(move |headdim| {
            [false, true].into_iter().flat_map(move |causal| {
                LENGTHS.into_iter().map(move |lengths| Case::single(dtype, lengths, headdim, causal))
            })
        })
    })
}

/// Several sequences and heads, with K and V of their own and shared; and large inputs, whose softmax is almost one key
/// (less large in f32, where the bound is absolute and scores of hundreds are rounded by more than it allows).
pub fn batches() -> impl Iterator<Item = Case> {
    DTYPES.into_iter().flat_map(|dtype| {
        let large = if dtype == DType::F32 { 4.0 } else { 8.0 };
        [(2, 3, 3, 1.0), (2, 4, 2, 1.0), (3, 2, 1, 1.0), (1, 2, 2, large)].into_iter().map(
            move |(batch, nheads, nheads_k, deviation)| Case {
                batch,
                nheads,
                nheads_k,
                deviation,
                ..Case::single(dtype, (70, 90), 64, batch == 2)
            },
        )
    })
}
