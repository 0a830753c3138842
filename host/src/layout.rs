//! All of a tensor but its data: dtype, shape and strides.
use cuda_std::DType;

use crate::error::{Error, Result};

/// The dtype, the shape, and the strides (in elements) of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    dtype: DType,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Layout {
    /// Row-major and without gaps.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the elements are more than memory can hold.
    pub fn contiguous(dtype: DType, shape: &[usize]) -> Result<Self> {
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, &extent| bytes.checked_mul(extent.max(1)));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            let found = shape.iter().fold(dtype.bytes() as u128, |bytes, &extent| bytes.saturating_mul(extent as u128));
            return Err(Error::TooLarge { what: "bytes of a tensor", found, limit: isize::MAX as u128 });
        }
        let mut strides = vec![1; shape.len()];
        for dimension in (1..shape.len()).rev() {
            strides[dimension - 1] = strides[dimension] * shape[dimension].max(1);
        }
        Ok(Layout { dtype, shape: shape.to_vec(), strides })
    }

    /// With a stride for each dimension.
    ///
    /// # Errors
    /// [`Error::Rank`] if there are not as many strides as dimensions.
    pub fn strided(dtype: DType, shape: &[usize], strides: &[usize]) -> Result<Self> {
        if strides.len() != shape.len() {
            let allowed = "as many as the shape has";
            return Err(Error::Rank { argument: "strides", found: strides.len(), allowed });
        }
        Ok(Layout { dtype, shape: shape.to_vec(), strides: strides.to_vec() })
    }

    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The distance between neighbours along each dimension, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// The number of elements: the product of the extents, or as many as an index can count, where that is less.
    pub fn len(&self) -> usize {
        self.shape.iter().fold(1, |elements, &extent| elements.saturating_mul(extent))
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// How many elements of memory the tensor spans, from its first to its last; `None` if more than an index can count.
    pub fn span(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let last =
            |span: usize, (&extent, &stride): (&usize, &usize)| span.checked_add((extent - 1).checked_mul(stride)?);
        self.shape.iter().zip(&self.strides).try_fold(0, last)?.checked_add(1)
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut needed = 1usize;
        self.is_empty()
            || self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
                let fits = extent == 1 || stride == needed;
                needed = needed.saturating_mul(extent);
                fits
            })
    }

    /// Whether no two elements share memory, by the usual sufficient test: sorted by stride, each dimension steps over
    /// the whole of the smaller ones.
    pub fn is_distinct(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        let mut dimensions: Vec<_> = self.shape.iter().zip(&self.strides).filter(|&(&extent, _)| extent > 1).collect();
        dimensions.sort_by_key(|&(_, &stride)| stride);
        let mut span = 1usize;
        dimensions.into_iter().all(|(&extent, &stride)| {
            let distinct = stride >= span;
            span = span.saturating_add((extent - 1).saturating_mul(stride));
            distinct
        })
    }

    /// The same with an extent of 1 where a stride of 0 repeats the elements.
    pub(crate) fn without_repetitions(&self) -> Layout {
        let once = |(&extent, &stride): (&usize, &usize)| if stride == 0 { extent.min(1) } else { extent };
        let shape = self.shape.iter().zip(&self.strides).map(once).collect();
        Layout { dtype: self.dtype, shape, strides: self.strides.clone() }
    }

    /// Whether the last dimension is contiguous, as every kernel needs it.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        match (self.shape.last(), self.strides.last()) {
            (Some(&extent), Some(&stride)) => extent <= 1 || stride == 1,
            _ => true,
        }
    }

    /// Checks that this, the layout of `argument`, has the dtype and the shape of x, and no gaps.
    pub(crate) fn check_like_x(&self, argument: &'static str, x: &Layout) -> Result<()> {
        if self.dtype != x.dtype {
            let allowed = format!("{}, as of x", x.dtype.name());
            return Err(Error::DType { argument, found: self.dtype.name(), allowed });
        }
        if self.shape != x.shape {
            let (found, allowed) = (format!("shape {:?}", self.shape), format!("{:?}, as of x", x.shape));
            return Err(Error::Argument { argument, found, allowed });
        }
        if !self.is_contiguous() {
            let allowed = "those of a contiguous tensor";
            return Err(Error::Stride { argument, found: self.strides.clone(), allowed });
        }
        Ok(())
    }

    /// Checks that `found` elements of memory hold the tensor.
    pub(crate) fn check_length(&self, argument: &'static str, found: usize) -> Result<()> {
        let needed = self.span();
        if needed.is_some_and(|needed| needed <= found) {
            return Ok(());
        }
        let needed = needed.map_or_else(|| "more than an index can count".to_owned(), |needed| needed.to_string());
        Err(Error::Length { argument, found, shape: self.shape.clone(), strides: self.strides.clone(), needed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(shape: &[usize], strides: &[usize]) -> Layout {
        Layout::strided(DType::F32, shape, strides).expect("as many strides as dimensions")
    }

    #[test]
    fn contiguous_strides_are_row_major() {
        let layout = Layout::contiguous(DType::F16, &[2, 3, 4, 8]).expect("small");
        assert_eq!(layout.strides(), [96, 32, 8, 1]);
        assert_eq!(layout.span(), Some(192));
        assert!(layout.is_contiguous() && layout.is_distinct());
    }

    #[test]
    fn strides_may_leave_gaps_or_overlap() {
        let gaps = strided(&[2, 3], &[8, 1]);
        assert_eq!(gaps.span(), Some(11));
        assert!(gaps.is_distinct() && !gaps.is_contiguous() && gaps.has_contiguous_rows());
        assert!(!strided(&[2, 3], &[0, 1]).is_distinct());
        assert!(!strided(&[2, 3], &[2, 1]).is_distinct());
        assert!(strided(&[2, 3], &[1, 2]).is_distinct());
        assert_eq!(strided(&[usize::MAX, 3], &[usize::MAX, 1]).span(), None);
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(matches!(Layout::contiguous(DType::F32, &[usize::MAX, 2]), Err(Error::TooLarge { .. })));
        assert_eq!(Layout::contiguous(DType::F32, &[0, 7]).expect("empty").span(), Some(0));
    }
}
