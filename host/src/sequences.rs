//! Sequences of different lengths, one after the other in one tensor.
use std::borrow::Cow;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::options::WindowSize;
use crate::tensor::TensorRef;

/// Where each sequence begins, in Q and in K.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    starts_q: Vec<usize>,
    starts_k: Vec<usize>,
}

/// One sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Its number: what bias, mask, slopes and dropout know it by.
    pub index: usize,
    /// The batch of Q, K, V and O that it is in: 0, where sequences follow each other.
    pub batch: usize,
    /// Its first token in Q and O.
    pub first_q: usize,
    /// Its tokens in Q and O.
    pub seqlen_q: usize,
    /// Its first token in K and V.
    pub first_k: usize,
    /// Its tokens in K and V.
    pub seqlen_k: usize,
}

impl Sequence {
    /// The keys that query `row` sees through the window, counted from the first of the sequence.
    pub fn visible(&self, window: WindowSize, row: usize) -> Range<usize> {
        // Its place among the keys is row + seqlen_k - seqlen_q.
        let place = row + self.seqlen_k;
        let begin = window.left.map_or(0, |left| place.saturating_sub(left.saturating_add(self.seqlen_q)));
        let end = match window.right {
            None => self.seqlen_k,
            Some(right) => {
                place.saturating_add(right).saturating_add(1).saturating_sub(self.seqlen_q).min(self.seqlen_k)
            }
        };
        begin.min(end)..end
    }
}

impl Sequences {
    /// The sequences that begin where `cu_seqlens_q` and `cu_seqlens_k` say, in tensors of `total_q` and `total_k` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] if they do not begin at 0, fall, or end elsewhere than the tensors.
    pub fn new(cu_seqlens_q: &[i32], total_q: usize, cu_seqlens_k: &[i32], total_k: usize) -> Result<Self> {
        Ok(Sequences {
            starts_q: starts("cu_seqlens_q", cu_seqlens_q, total_q)?,
            starts_k: starts("cu_seqlens_k", cu_seqlens_k, total_k)?,
        })
    }

    /// Those of inputs in host memory, if they have any. Ranks and dtypes that are not as they should be are left for
    /// [`Problem::of`](crate::Problem::of) to name.
    pub(crate) fn read(inputs: &Inputs<TensorRef>) -> Result<Option<Self>> {
        fn starts<'a>(tensor: &Option<TensorRef<'a>>) -> Option<Cow<'a, [i32]>> {
            tensor.as_ref().and_then(TensorRef::packed::<i32>)
        }
        let total = |tensor: &TensorRef| tensor.shape().first().copied().unwrap_or(0);
        match (starts(&inputs.cu_seqlens_q), starts(&inputs.cu_seqlens_k)) {
            (Some(q), Some(k)) => Sequences::new(&q, total(&inputs.q), &k, total(&inputs.k)).map(Some),
            _ => Ok(None),
        }
    }

    /// The most tokens of a sequence, in Q and in K.
    pub fn longest(&self) -> (usize, usize) {
        let longest = |starts: &[usize]| starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        (longest(&self.starts_q), longest(&self.starts_k))
    }

    /// One after the other.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Sequence> {
        let pairs = self.starts_q.windows(2).zip(self.starts_k.windows(2));
        pairs.enumerate().map(|(index, (q, k))| Sequence {
            index,
            batch: 0,
            first_q: q[0],
            seqlen_q: q[1] - q[0],
            first_k: k[0],
            seqlen_k: k[1] - k[0],
        })
    }
}

fn starts(argument: &'static str, cu_seqlens: &[i32], total: usize) -> Result<Vec<usize>> {
    let bad = |i: usize, allowed: String| Error::Argument {
        argument,
        found: format!("{} at index {i}", cu_seqlens[i]),
        allowed,
    };
    for (i, &start) in cu_seqlens.iter().enumerate() {
        let least = if i == 0 { 0 } else { cu_seqlens[i - 1] };
        if start < least || (i == 0 && start != 0) {
            let allowed = if i == 0 { "0".to_owned() } else { format!("{least} or more, as the one before") };
            return Err(bad(i, allowed));
        }
    }
    let last = cu_seqlens.len().saturating_sub(1);
    if cu_seqlens.get(last).is_some_and(|&end| end as usize != total) {
        return Err(bad(last, format!("{total}, as many tokens as there are")));
    }
    Ok(cu_seqlens.iter().map(|&start| start as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(seqlen_q: usize, seqlen_k: usize) -> Sequence {
        Sequence { index: 0, batch: 0, first_q: 0, seqlen_q, first_k: 0, seqlen_k }
    }

    #[test]
    fn the_causal_mask_is_aligned_to_the_bottom_right_corner() {
        let causal = WindowSize { left: None, right: Some(0) };
        let ends = |seqlen_q, seqlen_k| {
            (0..seqlen_q).map(|row| sequence(seqlen_q, seqlen_k).visible(causal, row)).collect::<Vec<_>>()
        };
        assert_eq!(ends(5, 2), [0..0, 0..0, 0..0, 0..1, 0..2]);
        assert_eq!(ends(2, 5), [0..4, 0..5]);
    }

    #[test]
    fn a_window_slides() {
        let window = WindowSize { left: Some(1), right: Some(2) };
        let visible = |seqlen_q, seqlen_k, row| sequence(seqlen_q, seqlen_k).visible(window, row);
        assert_eq!([0, 1, 4].map(|row| visible(5, 5, row)), [0..3, 0..4, 3..5]);
        assert_eq!([0, 1, 2, 5].map(|row| visible(6, 2, row).len()), [0, 0, 1, 2]);
    }

    #[test]
    fn starts_begin_at_0_never_fall_and_end_with_the_tensor() {
        let refused = |q: &[i32]| Sequences::new(q, 7, &[0, 7], 7).expect_err("bad").to_string();
        assert_eq!(refused(&[1, 7]), "cu_seqlens_q: 1 at index 0; allowed: 0");
        assert_eq!(refused(&[0, 5, 4, 7]), "cu_seqlens_q: 4 at index 2; allowed: 5 or more, as the one before");
        assert_eq!(refused(&[0, 6]), "cu_seqlens_q: 6 at index 1; allowed: 7, as many tokens as there are");
        let sequences = Sequences::new(&[0, 0, 7], 7, &[0, 3, 7], 7).expect("valid");
        assert_eq!(sequences.longest(), (7, 4));
        assert_eq!(sequences.iter().map(|s| (s.seqlen_q, s.first_k)).collect::<Vec<_>>(), [(0, 0), (7, 3)]);
    }
}
