//! What is to be learned: to copy. The second half of each sequence repeats the first, which is random and always new: no
//! text can be learned by heart, and all that says what comes next is what was read half a sequence ago.
use rand::Rng;

/// Some sequences of one length.
pub struct Batch {
    /// Tokens in a sequence.
    pub seqlen: usize,
    /// One sequence after the other.
    pub tokens: Vec<usize>,
    /// What follows each token, where that can be known: in the copy.
    pub targets: Vec<Option<usize>>,
}

/// Sequences of a text and its copy.
#[derive(Clone, Copy, Debug)]
pub struct Copying {
    /// How many sequences a batch has.
    pub batch: usize,
    /// Tokens in a sequence: an even number.
    pub seqlen: usize,
    pub vocabulary: usize,
}

impl Copying {
    /// New sequences.
    pub fn batch(&self, random: &mut impl Rng) -> Batch {
        let Copying { batch, seqlen, vocabulary } = *self;
        let half = seqlen / 2;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            let text: Vec<usize> = (0..half).map(|_| random.random_range(0..vocabulary)).collect();
            tokens.extend_from_slice(&text);
            tokens.extend_from_slice(&text);
            // The last token of the text is followed by the first of the copy; the last of the copy by nothing.
            targets.extend((1..=seqlen).map(|next| (half..seqlen).contains(&next).then(|| text[next - half])));
        }
        Batch { seqlen, tokens, targets }
    }
}
