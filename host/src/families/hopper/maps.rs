//! The tensor maps of a problem: heads and batches are their outer dimensions.
use cuda_std::DType;
use cuda_std::tensor::TensorMapDescription;
use kernels::attention::Tensor;
use kernels::flash3::packing::Packing;

use crate::error::{Error, Result};
use crate::parameters::ALIGNMENT;
use crate::problem::Problem;

/// How many there are of what a tensor of tokens holds.
#[derive(Clone, Copy)]
pub struct Extents {
    batch: usize,
    tokens: usize,
    heads: usize,
    columns: usize,
}

impl Extents {
    /// Of Q, O and their gradients, with rows of so many columns.
    pub fn of_queries(problem: &Problem, columns: usize) -> Self {
        let (batch, tokens) = match &problem.varlen {
            None => (problem.batch, problem.seqlen_q),
            Some(varlen) => (1, varlen.total_q),
        };
        Extents { batch, tokens, heads: problem.nheads, columns }
    }

    /// Of K and V likewise.
    pub fn of_keys(problem: &Problem, columns: usize) -> Self {
        let (batch, tokens) = match &problem.varlen {
            None => (problem.batch, problem.seqlen_k),
            Some(varlen) => (1, varlen.total_k),
        };
        Extents { batch, tokens, heads: problem.nheads_k, columns }
    }
}

/// The map of a tensor for kernels that take tiles of so many rows and columns of it.
///
/// # Errors
/// [`Error::TensorMap`] if it has strides that no map has.
pub fn map<T>(
    argument: &'static str,
    tensor: &Tensor<T>,
    dtype: DType,
    tile: (u32, u32),
    Extents { batch, tokens, heads, columns }: Extents,
) -> Result<TensorMapDescription> {
    let address = tensor.data.address();
    let outer = [stride_of(heads, tensor.head_stride), stride_of(batch, tensor.batch_stride)];
    let (rows, row_stride) = stride_of(tokens, tensor.row_stride);
    TensorMapDescription::of_panels(dtype, tile, address, (rows, columns as u64), row_stride, &outer)
        .map_err(|reason| Error::TensorMap { argument, reason })
}

/// The map of Q for kernels whose tiles have so many rows and columns, where the rows of some heads come together: of each
/// query those of a pack, which is a tile of rows.
///
/// # Errors
/// As [`map`].
pub fn map_of_packs<T>(
    argument: &'static str,
    tensor: &Tensor<T>,
    dtype: DType,
    (rows, columns): (u32, u32),
    packing: Packing,
    extents: Extents,
) -> Result<TensorMapDescription> {
    let Extents { batch, tokens, heads, .. } = extents;
    let address = tensor.data.address();
    let outer = [stride_of(tokens, tensor.row_stride), stride_of(batch, tensor.batch_stride)];
    let (heads, head_stride) = stride_of(heads, tensor.head_stride);
    let tile = (packing.heads(), columns);
    TensorMapDescription::of_panels(dtype, tile, address, (heads, extents.columns as u64), head_stride, &outer)
        .and_then(|map| map.with_boxes(2, rows / packing.heads()))
        .map_err(|reason| Error::TensorMap { argument, reason })
}

/// A dimension of a map. The stride of a dimension of one element is never taken, and may be anything: here what every
/// dtype of Hopper's products can have.
fn stride_of(extent: usize, stride: u64) -> (u64, u64) {
    (extent as u64, if extent == 1 { ALIGNMENT as u64 } else { stride })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::Global;
    use cuda_std::element::bf16;

    #[test]
    fn maps_hold_heads_and_batches_and_no_stride_that_is_never_taken() {
        let x = Layout::contiguous(DType::BF16, &[1, 300, 4, 40]).expect("small");
        let problem = Problem::new(&x, &x, &x, &AttentionOptions::new()).expect("valid");
        let tensor = Tensor::<bf16> { data: Global::NULL, batch_stride: 7, row_stride: 192, head_stride: 48 };
        let q = map("q", &tensor, DType::BF16, (192, 64), Extents::of_queries(&problem, 40)).expect("valid");
        assert_eq!((q.dimensions, q.strides), ([40, 300, 4, 1, 1], [384, 96, 32, 0]));
        assert_eq!(q.tile, [64, 192, 1, 1, 1]);
        let packing = Packing::of_group(4, 64);
        let extents = Extents::of_queries(&problem, 40);
        let packed = map_of_packs("q", &tensor, DType::BF16, (64, 64), packing, extents).expect("valid");
        assert_eq!((packed.dimensions, packed.strides), ([40, 4, 300, 1, 1], [96, 384, 32, 0]));
        assert_eq!(packed.tile, [64, 4, 16, 1, 1]);
        let odd = Tensor { row_stride: 191, ..tensor };
        let refused = map("k", &odd, DType::BF16, (192, 64), Extents::of_keys(&problem, 40)).expect_err("odd");
        assert_eq!(refused.to_string(), "k: no tensor map: stride 0 is no multiple of 16 bytes, or 2^40 or more");
    }
}
