//! Tensors with bytes around and between their elements that nobody may write, and that show if somebody reads them.
use ferroflash::{DType, Layout, Tensor};

/// Bytes before the first element, and after the last.
const MARGIN: usize = 4096;

/// What lies between the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// Nothing: gaps are around the tensor alone.
    Around,
    /// After each row of a head, after each token and after each batch some bytes that keep rows at multiples of 16.
    Aligned,
    /// Likewise, but heads come before tokens in memory.
    HeadsFirst,
    /// Gaps that leave no row at a multiple of 16 bytes but by chance.
    Unaligned,
}

impl Gaps {
    /// All that tensors of tokens may have between their rows.
    pub const OF_TOKENS: [Gaps; 3] = [Gaps::Aligned, Gaps::HeadsFirst, Gaps::Unaligned];

    /// Bytes before the first element.
    fn margin(self, dtype: DType) -> usize {
        MARGIN + if self == Gaps::Unaligned { dtype.bytes() } else { 0 }
    }

    fn strides(self, shape: &[usize]) -> Vec<usize> {
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if self == Gaps::HeadsFirst && rank >= 3 {
            order.swap(rank - 3, rank - 2);
        }
        let mut strides = vec![1; rank];
        let mut beyond = 1;
        for &dimension in order.iter().rev() {
            strides[dimension] = beyond;
            let end = beyond * shape[dimension].max(1);
            beyond = match self {
                Gaps::Around => end,
                Gaps::Aligned | Gaps::HeadsFirst => end.next_multiple_of(8) + 8,
                Gaps::Unaligned => (end + 3) | 1,
            };
        }
        strides
    }
}

/// A tensor with its gaps, as bytes.
#[derive(Clone, Debug)]
pub struct Guarded {
    bytes: Vec<u8>,
    layout: Layout,
    /// The byte at which the first element begins.
    first: usize,
}

impl Guarded {
    /// A tensor to be read. All bits of its gaps are set: NaN in every dtype, a key that is seen in a mask.
    pub fn input(tensor: &Tensor, gaps: Gaps) -> Self {
        let mut guarded = Self::new(tensor.dtype(), tensor.shape(), gaps, |_| 0xff);
        let size = tensor.dtype().bytes();
        for (place, element) in guarded.places().zip(tensor.bytes().chunks(size)) {
            guarded.bytes[place..place + size].copy_from_slice(element);
        }
        guarded
    }

    /// A tensor to be written, which holds NaN. In its gaps no two bytes near each other are alike, so that not even a
    /// copy of a neighbour goes unnoticed.
    pub fn output(dtype: DType, shape: &[usize], gaps: Gaps) -> Self {
        let mut guarded = Self::new(dtype, shape, gaps, |i| (i * 167 + 13) as u8);
        let size = dtype.bytes();
        for place in guarded.places() {
            guarded.bytes[place..place + size].fill(0xff);
        }
        guarded
    }

    fn new(dtype: DType, shape: &[usize], gaps: Gaps, byte: fn(usize) -> u8) -> Self {
        let layout = Layout::strided(dtype, shape, &gaps.strides(shape)).expect("as many strides as dimensions");
        let (first, span) = (gaps.margin(dtype), layout.span().expect("small") * dtype.bytes());
        Guarded { bytes: (0..first + span + MARGIN).map(byte).collect(), layout, first }
    }

    /// Tensor and gaps.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The byte at which the first element begins.
    pub fn first(&self) -> usize {
        self.first
    }

    /// The tensor's dtype, shape and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The byte at which each element begins, in row-major order.
    fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let first = self.first;
        places(&self.layout).map(move |place| first + place)
    }

    /// The tensor that is in these bytes after a launch.
    ///
    /// # Errors
    /// Which byte of the gaps has changed.
    pub fn check(&self, after: &[u8]) -> Result<Tensor, String> {
        let size = self.layout.dtype().bytes();
        let mut expected = self.bytes.clone();
        let mut packed = Vec::with_capacity(self.layout.len() * size);
        for place in self.places() {
            let element = &after[place..place + size];
            expected[place..place + size].copy_from_slice(element);
            packed.extend_from_slice(element);
        }
        if let Some(changed) = expected.iter().zip(after).position(|(before, after)| before != after) {
            let distance = changed as isize - self.first as isize;
            return Err(format!("the gap {distance} bytes from the first element has changed: {:?}", self.layout));
        }
        Ok(Tensor::from_bytes(self.layout.dtype(), &packed, self.layout.shape()).expect("as many bytes"))
    }
}

/// The byte at which each element begins, counted from the first one, in row-major order.
pub fn places(layout: &Layout) -> impl Iterator<Item = usize> + use<> {
    let layout = layout.clone();
    (0..layout.len()).map(move |index| {
        let mut rest = index;
        let mut element = 0;
        for (&extent, &stride) in layout.shape().iter().zip(layout.strides()).rev() {
            element += rest % extent * stride;
            rest /= extent;
        }
        element * layout.dtype().bytes()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::normal;

    const SHAPE: [usize; 4] = [2, 3, 2, 5];

    #[test]
    fn elements_are_where_the_strides_say() {
        for gaps in [Gaps::Around, Gaps::Aligned, Gaps::HeadsFirst, Gaps::Unaligned] {
            let tensor = normal(DType::F16, &SHAPE, 1.0, 1);
            let guarded = Guarded::input(&tensor, gaps);
            assert!(guarded.layout().is_distinct(), "{gaps:?}");
            assert_eq!(guarded.check(guarded.bytes()), Ok(tensor), "{gaps:?}");
            let strides = &guarded.layout().strides()[..3];
            assert_eq!(strides.iter().all(|stride| stride % 8 == 0), matches!(gaps, Gaps::Aligned | Gaps::HeadsFirst));
        }
    }

    #[test]
    fn each_byte_outside_is_watched_and_each_element_is_not() {
        let guarded = Guarded::output(DType::F32, &SHAPE, Gaps::Unaligned);
        let elements = guarded.places().flat_map(|place| place..place + 4).collect::<Vec<_>>();
        for byte in 0..guarded.bytes().len() {
            let mut after = guarded.bytes().to_vec();
            after[byte] ^= 1;
            assert_eq!(guarded.check(&after).is_ok(), elements.contains(&byte), "byte {byte}");
        }
        assert!(guarded.check(guarded.bytes()).expect("untouched").to_f32().iter().all(|x| x.is_nan()));
    }
}
