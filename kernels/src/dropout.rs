//! Dropout of P: which elements are dropped is a function of the seed, the offset, the head and the place, and never stored.
//!
//! Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011: Philox4x32-10, a generator
//! whose numbers are a function of a counter and a key.
//!
//! One call of it gives 128 bits: 16 for each of eight elements of P. These eight lie at the same place in eight 8 x 8
//! blocks, two below each other and four side by side, since of such elements a lane holds as many as there are in its
//! registers, of P (queries are rows) and of its transpose (keys are rows) alike.
use cuda_std::fragment::Accumulator;

/// Which elements of P are dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The key of the generator.
    pub seed: u64,
    /// Where in the generator's sequence to begin.
    pub offset: u64,
    /// An element whose 16 random bits are below this stays; [`KEEP_ALL`](Self::KEEP_ALL): all do.
    pub keep_below: u32,
    /// What those that stay are multiplied with: the inverse of the probability to stay.
    pub scale: f32,
}

/// Queries and keys whose eight elements a call of the generator is for, times their places in an 8 x 8 block.
const GROUP_ROWS: u32 = 16;
const GROUP_KEYS: u32 = 32;

impl Dropout {
    /// The threshold that all 16-bit numbers are below.
    pub const KEEP_ALL: u32 = 1 << 16;

    /// Nothing is dropped.
    pub const NONE: Self = Dropout { seed: 0, offset: 0, keep_below: Self::KEEP_ALL, scale: 1.0 };

    /// Each element is dropped with probability `p`, in [0, 1), to the next 1/65536; one element in 65536 stays at least.
    pub fn new(p: f32, seed: u64, offset: u64) -> Self {
        let keep = ((1.0 - p as f64) * Self::KEEP_ALL as f64 + 0.5) as u32;
        let keep_below = if keep == 0 { 1 } else { keep };
        Dropout { seed, offset, keep_below, scale: (Self::KEEP_ALL as f64 / keep_below as f64) as f32 }
    }

    /// Whether anything is dropped.
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.keep_below != Self::KEEP_ALL
    }

    /// The random bits of the eight elements of the group of query `row` and key `key` in head `head`, counted over all
    /// batches: batch * nheads + head. Element (row + 8 i, key + 8 j) of a group that begins at multiples of 16 and 32 has
    /// the half `(4 i + j) % 2` of word `(4 i + j) / 2`.
    #[inline(always)]
    pub fn bits(&self, head: u32, row: u32, key: u32) -> [u32; 4] {
        let counter = [row / GROUP_ROWS * 8 + row % 8, key / GROUP_KEYS * 8 + key % 8, head, self.offset as u32];
        let key = [self.seed as u32, ((self.seed >> 32) as u32).wrapping_add((self.offset >> 32) as u32)];
        philox(counter, key)
    }

    /// Whether an element stays, given the bits of its group.
    #[inline(always)]
    pub fn keeps(&self, bits: &[u32; 4], row: u32, key: u32) -> bool {
        half_word(bits, (row / 8 % 2 * 4 + key / 8 % 4) as usize) < self.keep_below
    }

    /// What P at query `row` and key `key` of a head is multiplied with: 0, or [`scale`](Self::scale). One call of the
    /// generator for each: for many, kernels use [`apply`](Self::apply).
    #[inline(always)]
    pub fn factor(&self, head: u32, row: u32, key: u32) -> f32 {
        if self.keeps(&self.bits(head, row, key), row, key) { self.scale } else { 0.0 }
    }

    /// Drops elements of P, or of dP, and scales the others. The matrix begins at query `first_row`, a multiple of 16, and key
    /// `first_key`, a multiple of 32; of 16 if it is no wider than that.
    #[inline(always)]
    pub fn apply<const M: usize, const N: usize>(
        &self,
        p: &mut Accumulator<M, N>,
        head: u32,
        first_row: u32,
        first_key: u32,
    ) {
        for m in 0..M {
            for group in 0..N.div_ceil(4) {
                for i in 0..2 {
                    let row = first_row + Accumulator::<M, N>::row(m, 0);
                    let key = first_key + Accumulator::<M, N>::column(4 * group, i);
                    let bits = self.bits(head, row, key);
                    let upper = N <= 2 && key / 16 % 2 == 1;
                    for half in 0..2 {
                        for n in 0..4 {
                            if 4 * group + n < N {
                                let index = 4 * half + n;
                                let bits = if upper { half_word(&bits, index + 2) } else { half_word(&bits, index) };
                                let keeps = bits < self.keep_below;
                                let x = p.element_mut(m, 4 * group + n, half, i);
                                *x = if keeps { *x * self.scale } else { 0.0 };
                            }
                        }
                    }
                }
            }
        }
    }

    /// As [`apply`](Self::apply) for a transposed matrix, whose rows are keys and whose columns are queries: it begins at key
    /// `first_key`, a multiple of 16, and query `first_row`, a multiple of 16.
    #[inline(always)]
    pub fn apply_transposed<const M: usize, const N: usize>(
        &self,
        p: &mut Accumulator<M, N>,
        head: u32,
        first_key: u32,
        first_row: u32,
    ) {
        for m in 0..M {
            for group in 0..N.div_ceil(2) {
                for i in 0..2 {
                    let key = first_key + Accumulator::<M, N>::row(m, 0);
                    let row = first_row + Accumulator::<M, N>::column(2 * group, i);
                    let bits = self.bits(head, row, key);
                    // Both halves of the lane's keys are in the same group, at its first two or its last two blocks.
                    let upper = key / 16 % 2 == 1;
                    for half in 0..2 {
                        for n in 0..2 {
                            if 2 * group + n < N {
                                let (low, high) = (half_word(&bits, 4 * n + half), half_word(&bits, 4 * n + 2 + half));
                                let keeps = (if upper { high } else { low }) < self.keep_below;
                                let x = p.element_mut(m, 2 * group + n, half, i);
                                *x = if keeps { *x * self.scale } else { 0.0 };
                            }
                        }
                    }
                }
            }
        }
    }
}

/// 16-bit number `index` of eight. Its word is chosen, since registers have no index.
#[inline(always)]
fn half_word(bits: &[u32; 4], index: usize) -> u32 {
    let pair = if index < 4 { [bits[0], bits[1]] } else { [bits[2], bits[3]] };
    let word = if index % 4 < 2 { pair[0] } else { pair[1] };
    word >> (16 * (index % 2)) & 0xffff
}

/// Philox4x32 with ten rounds.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    for _ in 0..10 {
        let product = [counter[0] as u64 * MULTIPLIERS[0] as u64, counter[2] as u64 * MULTIPLIERS[1] as u64];
        counter = [
            (product[1] >> 32) as u32 ^ counter[1] ^ key[0],
            product[1] as u32,
            (product[0] >> 32) as u32 ^ counter[3] ^ key[1],
            product[0] as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}
