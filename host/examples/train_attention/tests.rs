//! The gradients that are written by hand, against differences of the loss; and the data.
use ferroflash::{Backend, Session};
use ndarray::Zip;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::attention::{CausalAttention, FlashAttention, StandardAttention};
use crate::model::{Size, Transformer};
use crate::task::{Batch, Copying};

const SIZE: Size = Size { vocabulary: 12, blocks: 2, nheads: 2, headdim: 8 };
const TASK: Copying = Copying { batch: 2, seqlen: 12, vocabulary: 12 };

fn model_and_batch() -> (Transformer, Batch, StdRng) {
    let mut random = StdRng::seed_from_u64(7);
    let model = Transformer::new(SIZE, &mut random);
    let batch = TASK.batch(&mut random);
    (model, batch, random)
}

/// Along the gradient, or any half of its elements, the loss rises as the length of that half says.
fn check_against_differences(attention: &mut impl CausalAttention) {
    const STEP: f32 = 5e-3;
    let (model, batch, mut random) = model_and_batch();
    let (_, gradients) = model.gradients(attention, &batch).expect("it computes");
    for (index, gradient) in gradients.all().enumerate() {
        for _ in 0..4 {
            let half = gradient.mapv(|x| if random.random() { x } else { 0.0 });
            let length = half.fold(0.0, |sum, x| sum + x * x).sqrt();
            assert!(length > 1e-4, "parameter {index} is of no influence");
            let mut loss_at = |step: f32| {
                let mut moved = model.clone();
                let weights = moved.parameters.all_mut().nth(index).expect("as many as there are gradients");
                weights.scaled_add(step / length, &half);
                moved.gradients(attention, &batch).expect("it computes").0.loss
            };
            let slope = (loss_at(STEP) - loss_at(-STEP)) / f64::from(2.0 * STEP);
            let error = (slope / f64::from(length) - 1.0).abs();
            assert!(error < 0.01, "parameter {index}: the loss rises by {slope}, its gradient is {length}");
        }
    }
}

#[test]
fn gradients_with_standard_attention_are_those_of_the_loss() {
    check_against_differences(&mut StandardAttention::default());
}

#[test]
fn gradients_with_ferroflash_are_those_of_the_loss() {
    check_against_differences(&mut FlashAttention::new(Session::new(Backend::Cpu).expect("a CPU is there")));
}

#[test]
fn both_attentions_give_the_same_gradients() {
    let (model, batch, _) = model_and_batch();
    let mut flash = FlashAttention::new(Session::new(Backend::Cpu).expect("a CPU is there"));
    let (expected, of_standard) = model.gradients(&mut StandardAttention::default(), &batch).expect("it computes");
    let (found, of_flash) = model.gradients(&mut flash, &batch).expect("it computes");
    assert!((expected.loss - found.loss).abs() < 1e-6, "{} and {}", expected.loss, found.loss);
    for (expected, found) in of_standard.all().zip(of_flash.all()) {
        Zip::from(expected).and(found).for_each(|a, b| assert!((a - b).abs() < 1e-6, "{a} and {b}"));
    }
}

#[test]
fn p_is_kept_or_the_lse_and_nothing_after_a_step() {
    let (model, batch, _) = model_and_batch();
    let mut standard = StandardAttention::default();
    let mut flash = FlashAttention::new(Session::new(Backend::Cpu).expect("a CPU is there"));
    for _ in 0..2 {
        model.gradients(&mut standard, &batch).expect("it computes");
        model.gradients(&mut flash, &batch).expect("it computes");
    }
    // P and LSE of two blocks, f32.
    let rows = (SIZE.blocks * TASK.batch * SIZE.nheads * TASK.seqlen * 4) as u64;
    assert_eq!((standard.costs().most_kept, flash.costs().most_kept), (rows * TASK.seqlen as u64, rows));
}

#[test]
fn targets_are_the_tokens_that_follow_in_the_copy() {
    let task = Copying { batch: 50, seqlen: 20, vocabulary: 11 };
    let Batch { tokens, targets, seqlen } = task.batch(&mut StdRng::seed_from_u64(3));
    assert_eq!((tokens.len(), targets.len()), (1000, 1000));
    for (tokens, targets) in tokens.chunks(seqlen).zip(targets.chunks(seqlen)) {
        assert_eq!(tokens[..10], tokens[10..]);
        for (i, target) in targets.iter().enumerate() {
            assert_eq!(*target, (9..19).contains(&i).then(|| tokens[i + 1]));
        }
    }
}
