//! The measurements.
use super::shapes::Shape;
use crate::cli::inputs;
use anyhow::Result;
use ferroflash::{AttentionOptions, Backend, DType, Kernel, Report, Session, Tensor, TensorRef};
use indicatif::{ProgressBar, ProgressStyle};
use std::thread::sleep;
use std::time::Duration;

/// How long a GPU rests before each measurement. Its clock falls under load, so without a rest the order would decide.
const REST: Duration = Duration::from_millis(100);

/// What all measurements have in common.
pub struct Setting {
    pub session: Session,
    pub dtype: DType,
    pub options: AttentionOptions,
    /// The gradients instead of the output.
    pub backward: bool,
    pub repetitions: usize,
}

/// One kernel at one shape.
pub struct Row {
    pub shape: Shape,
    pub kernel: Kernel,
    pub input_bytes: usize,
    /// What was measured, or why it could not be.
    pub outcome: ferroflash::Result<Report>,
}

impl Row {
    /// The name of what ran, or should have.
    pub fn name(&self) -> &'static str {
        self.outcome.as_ref().map_or(self.kernel.name(), |report| report.algorithm)
    }

    /// Extra memory as a multiple of the memory of Q, K and V.
    pub fn extra_per_input(&self, report: &Report) -> f64 {
        report.extra_bytes as f64 / self.input_bytes as f64
    }
}

/// Measures each kernel at each shape, in this order of rows. What a kernel cannot do stands in its row.
pub fn measure(setting: &Setting, shapes: &[Shape], kernels: &[Kernel]) -> Result<Vec<Row>> {
    let inputs = Inputs::random(shapes, setting.dtype)?;
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}, {elapsed}").expect("a valid template");
    let bar = ProgressBar::new((shapes.len() * kernels.len()) as u64).with_style(style);
    let mut rows = Vec::new();
    for (turn, &shape) in shapes.iter().enumerate() {
        // Another kernel is first at each shape.
        let first = turn % kernels.len();
        let mut of_shape = Vec::new();
        for &kernel in kernels[first..].iter().chain(&kernels[..first]) {
            bar.set_message(format!("{kernel} at {} tokens", shape.seqlen));
            of_shape.push(row(setting, &inputs, shape, kernel)?);
            bar.inc(1);
        }
        of_shape.rotate_right(first);
        rows.extend(of_shape);
    }
    bar.finish_and_clear();
    Ok(rows)
}

fn row(setting: &Setting, inputs: &Inputs, shape: Shape, kernel: Kernel) -> Result<Row> {
    let backend = setting.session.backend();
    if backend == Backend::Cuda {
        sleep(REST);
    }
    // A first run loads the kernel and touches its memory. The simulator has nothing to warm up.
    let warmup = if backend == Backend::Simulator { 0 } else { 1 };
    let session = setting.session.clone().kernel(kernel).repetitions(warmup, setting.repetitions);
    let tensors = inputs.of(shape)?;
    let input_bytes = 3 * shape.elements() * setting.dtype.bytes();
    let options = &setting.options;
    let outcome = match setting.backward {
        false => session.attention(&tensors[0], &tensors[1], &tensors[2], options).map(|result| result.report),
        true => backward(&setting.session, &session, tensors, options),
    };
    Ok(Row { shape, kernel, input_bytes, outcome })
}

/// The gradients, as `measured` repeats them, of one forward pass in `session`.
fn backward(
    session: &Session,
    measured: &Session,
    [q, k, v, dout]: [TensorRef; 4],
    options: &AttentionOptions,
) -> ferroflash::Result<Report> {
    let forward = session.attention(&q, &k, &v, options)?;
    let gradients = measured.attention_backward(&q, &k, &v, &forward.out, &forward.softmax_lse, &dout, options)?;
    Ok(gradients.report)
}

/// Q, K, V and dO of the largest shape. Smaller ones take their beginnings: random numbers are made once.
struct Inputs {
    dtype: DType,
    tensors: [Tensor; 4],
}

impl Inputs {
    fn random(shapes: &[Shape], dtype: DType) -> Result<Self> {
        let most = shapes.iter().map(|shape| shape.elements()).max().unwrap_or(0);
        let tensor = |seed| inputs::normal(&[most], dtype, seed);
        Ok(Inputs { dtype, tensors: [tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?] })
    }

    fn of(&self, shape: Shape) -> Result<[TensorRef<'_>; 4]> {
        let bytes = shape.elements() * self.dtype.bytes();
        let [q, k, v, dout] = self
            .tensors
            .each_ref()
            .map(|tensor| TensorRef::from_bytes(self.dtype, &tensor.bytes()[..bytes], &shape.dimensions()));
        Ok([q?, k?, v?, dout?])
    }
}
