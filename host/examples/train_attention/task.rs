//! What is to be learned: that a text repeats itself. After A B once, A is followed by B.
//!
//! The text of each sequence is new, and so is its length: neither tokens nor places can be learned by heart. It takes
//! an induction head: one block has each token look at the one before it, the next has a token look for what followed
//! where it was before. Source: Olsson et al., "In-context Learning and Induction Heads", 2022.
use rand::Rng;
use rand::seq::index;

/// Some sequences of one length.
pub struct Batch {
    /// Tokens in a sequence.
    pub seqlen: usize,
    /// One sequence after the other.
    pub tokens: Vec<usize>,
    /// What follows each token, where that can be known: in the repeated part.
    pub targets: Vec<Option<usize>>,
}

/// Sequences that repeat their beginning, a random choice of different tokens, half to a quarter as long as they are.
#[derive(Clone, Copy, Debug)]
pub struct Repetition {
    /// How many sequences a batch has.
    pub batch: usize,
    pub seqlen: usize,
    pub vocabulary: usize,
}

impl Repetition {
    /// New sequences.
    pub fn batch(&self, random: &mut impl Rng) -> Batch {
        let Repetition { batch, seqlen, vocabulary } = *self;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            let period = seqlen / 2;
            let text: Vec<usize> = (0..period).map(|_| random.random_range(0..vocabulary)).collect();
            tokens.extend((0..seqlen).map(|i| text[i % period]));
            targets.extend((0..seqlen).map(|i| (i + 1 > period).then_some(text[(i + 1) % period])));
        }
        Batch { seqlen, tokens, targets }
    }
}
