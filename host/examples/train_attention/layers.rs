//! The layers around attention: each with its gradient, which is the transposed Jacobian times the gradient of its result.
use ndarray::{Array1, Array2, Axis, Zip};

/// Tokens as rows, or weights.
pub type Matrix = Array2<f32>;

/// So that a row of zeros has a norm.
const EPSILON: f32 = 1e-6;

/// RMSNorm: y = x / rms(x) ∘ gain, where rms(x)² is the mean of x² of a row. Source: Zhang and Sennrich, 2019.
///
/// Gives y, and 1 / rms(x) of each row, which the gradient needs.
pub fn rms_norm(x: &Matrix, gain: &Matrix) -> (Matrix, Array1<f32>) {
    let inverse = x.map_axis(Axis(1), |row| (row.dot(&row) / row.len() as f32 + EPSILON).sqrt().recip());
    (x * &inverse.view().insert_axis(Axis(1)) * gain, inverse)
}

/// The gradients of x and of the gain.
pub fn rms_norm_backward(x: &Matrix, gain: &Matrix, inverse: &Array1<f32>, dy: &Matrix) -> (Matrix, Matrix) {
    let normalised = x * &inverse.view().insert_axis(Axis(1));
    let dgain = (dy * &normalised).sum_axis(Axis(0)).insert_axis(Axis(0));
    let mut dx = dy * gain;
    Zip::from(dx.rows_mut()).and(normalised.rows()).and(inverse).for_each(|mut dx, normalised, inverse| {
        // What makes a row longer or shorter changes nothing.
        let along = dx.dot(&normalised) / dx.len() as f32;
        dx.zip_mut_with(&normalised, |dx, normalised| *dx = (*dx - normalised * along) * inverse);
    });
    (dx, dgain)
}

/// SiLU: x · σ(x).
pub fn silu(x: &Matrix) -> Matrix {
    x.mapv(|x| x * sigmoid(x))
}

/// The gradient of x.
pub fn silu_backward(x: &Matrix, dy: &Matrix) -> Matrix {
    let mut dx = x.mapv(|x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))));
    dx *= dy;
    dx
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// How well logits say what comes next.
pub struct Prediction {
    /// The mean of -log p(target), in nats, over the rows that have a target.
    pub loss: f64,
    /// How many of these give their target the largest logit: 0 to 1.
    pub accuracy: f64,
    /// The gradient of the loss.
    pub dlogits: Matrix,
}

/// Cross-entropy of softmax(logits), a row a token. Rows whose target is `None` do not count.
pub fn cross_entropy(logits: &Matrix, targets: &[Option<usize>]) -> Prediction {
    let count = targets.iter().flatten().count().max(1) as f64;
    let (mut loss, mut correct) = (0.0, 0.0);
    let mut dlogits = Matrix::zeros(logits.raw_dim());
    for ((logits, mut dlogits), target) in logits.rows().into_iter().zip(dlogits.rows_mut()).zip(targets) {
        let &Some(target) = target else { continue };
        let max = logits.fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
        loss += sum.ln() - f64::from(logits[target] - max);
        correct += f64::from(u8::from(logits[target] == max));
        dlogits.zip_mut_with(&logits, |d, &x| *d = (f64::from(x - max).exp() / sum / count) as f32);
        dlogits[target] -= (1.0 / count) as f32;
    }
    Prediction { loss: loss / count, accuracy: correct / count, dlogits }
}
