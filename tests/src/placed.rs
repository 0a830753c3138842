//! Tensors that lie in memory as they please, with NaN in between.
use ferroflash::{DType, Tensor, TensorRef};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// How a tensor of tokens lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Row-major, without gaps.
    Packed,
    /// Heads before tokens: (batch, nheads, seqlen, headdim).
    HeadsFirst,
    /// As a part of each row of a larger tensor, aligned.
    Gaps,
    /// With rows that begin anywhere.
    Unaligned,
}

impl Placement {
    /// Any of them.
    pub fn any() -> impl Strategy<Value = Self> {
        select(&[Placement::Packed, Placement::HeadsFirst, Placement::Gaps, Placement::Unaligned][..])
    }

    /// The strides of a tensor of three or four dimensions, the last three of them tokens, heads and elements.
    fn strides(self, shape: &[usize]) -> Vec<usize> {
        let &[.., tokens, heads, headdim] = shape else { unreachable!("a tensor of tokens") };
        let head = match self {
            Placement::Packed | Placement::HeadsFirst => headdim,
            Placement::Gaps => headdim.next_multiple_of(8) + 16,
            Placement::Unaligned => headdim + 3,
        };
        let [token, head, all] = match self {
            Placement::HeadsFirst => [head, head * tokens, head * tokens * heads],
            _ => [head * heads, head, head * tokens * heads],
        };
        if shape.len() == 4 { vec![all, token, head, 1] } else { vec![token, head, 1] }
    }
}

/// A tensor in a place.
#[derive(Clone, Debug)]
pub struct Placed {
    memory: Memory,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

#[derive(Clone, Debug)]
enum Memory {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Placed {
    /// Puts a tensor of f32, f16 or bf16 there.
    pub fn new(tensor: &Tensor, placement: Placement) -> Self {
        let (shape, strides) = (tensor.shape().to_vec(), placement.strides(tensor.shape()));
        let memory = match tensor.dtype() {
            DType::F32 => Memory::F32(spread(tensor.as_slice().expect("f32"), f32::NAN, &shape, &strides)),
            DType::F16 => Memory::F16(spread(tensor.as_slice().expect("f16"), f16::NAN, &shape, &strides)),
            DType::BF16 => Memory::BF16(spread(tensor.as_slice().expect("bf16"), bf16::NAN, &shape, &strides)),
            other => panic!("a tensor of tokens has no {}", other.name()),
        };
        Placed { memory, shape, strides }
    }

    /// Element `index` of its memory, if that is of f32.
    pub fn element_mut(&mut self, index: usize) -> Option<&mut f32> {
        if let Memory::F32(data) = &mut self.memory { data.get_mut(index) } else { None }
    }

    /// The tensor.
    pub fn view(&self) -> TensorRef<'_> {
        match &self.memory {
            Memory::F32(data) => TensorRef::with_strides(data, &self.shape, &self.strides),
            Memory::F16(data) => TensorRef::with_strides(data, &self.shape, &self.strides),
            Memory::BF16(data) => TensorRef::with_strides(data, &self.shape, &self.strides),
        }
        .expect("the memory was made for these strides")
    }
}

/// The elements at their places, and `gap` everywhere else.
fn spread<T: Copy>(packed: &[T], gap: T, shape: &[usize], strides: &[usize]) -> Vec<T> {
    let span = shape.iter().zip(strides).map(|(&extent, &stride)| extent.saturating_sub(1) * stride).sum::<usize>() + 1;
    let mut memory = vec![gap; span];
    for (i, &x) in packed.iter().enumerate() {
        let mut rest = i;
        let mut at = 0;
        for (&extent, &stride) in shape.iter().zip(strides).rev() {
            at += rest % extent * stride;
            rest /= extent;
        }
        memory[at] = x;
    }
    memory
}
