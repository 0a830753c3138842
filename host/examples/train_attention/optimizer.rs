//! Adam. Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, Algorithm 1.
use ndarray::Zip;

use crate::model::Parameters;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.98;
const EPSILON: f32 = 1e-8;

/// The moments of the gradients.
pub struct Adam {
    learning_rate: f32,
    /// Steps in which the learning rate grows to what it is.
    warmup: i32,
    step: i32,
    mean: Parameters,
    square: Parameters,
}

impl Adam {
    pub fn new(parameters: &Parameters, learning_rate: f32, warmup: i32) -> Self {
        Adam { learning_rate, warmup, step: 0, mean: parameters.zeros(), square: parameters.zeros() }
    }

    /// Changes the parameters.
    pub fn step(&mut self, parameters: &mut Parameters, gradients: &Parameters) {
        self.step += 1;
        let learning_rate = self.learning_rate * (self.step as f32 / self.warmup as f32).min(1.0);
        let (unbiased_1, unbiased_2) = (1.0 - BETA_1.powi(self.step), 1.0 - BETA_2.powi(self.step));
        let moments = self.mean.all_mut().zip(self.square.all_mut());
        for ((x, gradient), (mean, square)) in parameters.all_mut().zip(gradients.all()).zip(moments) {
            Zip::from(x).and(gradient).and(mean).and(square).for_each(|x, &gradient, mean, square| {
                *mean = BETA_1 * *mean + (1.0 - BETA_1) * gradient;
                *square = BETA_2 * *square + (1.0 - BETA_2) * gradient * gradient;
                *x -= learning_rate * (*mean / unbiased_1) / ((*square / unbiased_2).sqrt() + EPSILON);
            });
        }
    }
}
