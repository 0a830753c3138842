//! Backward passes of the grid's cases.
use crate::grid::Case;
use crate::inputs::normal;
use ferroflash::accuracy::{self, BackwardAccuracy};
use ferroflash::{Gradients, Session, Tensor};

impl Case {
    /// Its dO.
    pub fn dout(&self) -> Tensor {
        normal(self.dtype, &[self.batch, self.seqlen_q, self.nheads, self.headdim], self.deviation, 4)
    }

    /// Runs it forward and backward.
    pub fn gradients(&self, session: &Session) -> Gradients {
        let ([q, k, v], options) = (self.inputs(), self.options());
        let forward = session.attention(&q, &k, &v, &options).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let gradients =
            session.attention_backward(&q, &k, &v, &forward.out, &forward.softmax_lse, &self.dout(), &options);
        gradients.unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    /// Runs it forward and backward, and compares the gradients with f64.
    pub fn run_backward(&self, session: &Session) -> (Gradients, BackwardAccuracy) {
        let [q, k, v] = self.inputs();
        let gradients = self.gradients(session);
        let accuracy = accuracy::check_backward(&q, &k, &v, &self.dout(), &self.options(), &gradients);
        (gradients, accuracy.unwrap_or_else(|e| panic!("{self:?}: {e}")))
    }

    /// Runs it forward and backward, and fails where the accuracy rule is broken.
    pub fn check_backward(&self, session: &Session) {
        let (_, accuracy) = self.run_backward(session);
        assert!(accuracy.passed(), "{self:?}: {accuracy}");
    }
}
