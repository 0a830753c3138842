//! The tensor cores of Hopper: a warpgroup multiplies 64 rows at once, from shared memory or registers by shared
//! memory, while its threads do other things. PTX ISA: `wgmma`. sm_90a.
//!
//! A product contracts the vectors of its left factor with those of its right one. In shared memory the vectors of a
//! [`SmemTile`] are its rows ([`SmemTile::rows`]) or its columns ([`SmemTile::columns`]); in registers, those of an
//! [`Accumulator`] ([`Registers`]). With a tile Q of queries, K of keys and V of values:
//!
//! ```text
//! let s = wgmma::product(q.rows(0), k.rows(0));        // S = Q Kᵀ
//! let s = s.wait::<0>();
//! ..
//! let o = wgmma::add_product(o, p, v.columns(0));      // O += P V
//! ```
//!
//! What is multiplied is [in flight](InFlight) until it is waited for: no value then says its elements. Each word is
//! one group of products: groups end in their order.
//!
//! ```compile_fail
//! # use cuda_std::{SmemTile, fragment::Accumulator, element::bf16, wgmma};
//! fn too_early(q: SmemTile<bf16, 64, 64>, k: SmemTile<bf16, 64, 64>) -> f32 {
//!     let s: wgmma::InFlight<8> = wgmma::product(q.rows(0), k.rows(0));
//!     s.fold_row(0, 0, f32::max) // only `s.wait::<0>()` has elements
//! }
//! ```
//!
//! The 64 rows lie in the accumulators of the warpgroup's four warps, 16 each, as [`Accumulator<1, N>`](Accumulator)
//! says: row r of warp w of the warpgroup is row 16 w + r of the product.
use crate::fragment::Accumulator;
use crate::math::unknown;
use crate::matrix::{self, PackedElement};
use crate::{Element, SmemTile, machine, thread};

/// Rows of a product.
pub const ROWS: u32 = 64;

/// What one instruction contracts.
pub const DEPTH: usize = 16;

/// A left factor: 64 vectors.
pub trait Left<T: PackedElement>: Copy {
    /// Elements of a vector.
    const LENGTH: usize;

    #[doc(hidden)]
    #[track_caller]
    fn multiply<B: Right<T>, const N: usize>(self, to: machine::Sum<N>, b: B) -> machine::Flight<N>;
}

/// Vectors in shared memory: a left factor, or a right one of `8 N` vectors.
pub trait Right<T: PackedElement>: Copy {
    /// Elements of a vector.
    const LENGTH: usize;
    /// How many vectors there are.
    const COUNT: usize;
    /// Whether they are columns of a tile: "MN-major".
    const COLUMNS: bool;
    /// The upper half of a matrix descriptor: swizzle, and the stride from eight rows of the tile to the next.
    const DESCRIPTOR_HIGH: u32;

    /// The lower half of the descriptor for the 16 elements from `16 * step` on: its address, and the stride from panel
    /// to panel.
    #[doc(hidden)]
    fn descriptor_low(self, step: usize) -> u32;
}

/// Rows of a tile, from one on.
#[derive(Clone, Copy)]
pub struct Rows<T, const R: usize, const C: usize> {
    tile: SmemTile<T, R, C>,
    first: u32,
}

/// Columns of a tile, from one on.
#[derive(Clone, Copy)]
pub struct Columns<T, const R: usize, const C: usize> {
    tile: SmemTile<T, R, C>,
    first: u32,
}

impl<T: Element, const R: usize, const C: usize> SmemTile<T, R, C> {
    /// Its rows from `first` on, a multiple of 8, as vectors of a [product](crate::wgmma): "K-major".
    #[inline(always)]
    pub fn rows(self, first: u32) -> Rows<T, R, C> {
        Rows { tile: self, first }
    }

    /// Its columns from `first` on, a multiple of the columns of a panel (those of 128 bytes; all, if they are fewer),
    /// as vectors of a [product](crate::wgmma): "MN-major".
    #[inline(always)]
    pub fn columns(self, first: u32) -> Columns<T, R, C> {
        Columns { tile: self, first }
    }

    /// Bytes of a row in a panel: the swizzle.
    const PANEL_ROW: u32 = Self::PANEL_COLUMNS * size_of::<T>() as u32;

    /// Bytes of a panel.
    const PANEL: u32 = R as u32 * Self::PANEL_ROW;

    /// PTX ISA, "Matrix descriptor": bits 62 and 63 name the swizzle, bits 32 to 45 are the stride in 16 bytes.
    const DESCRIPTOR_HIGH: u32 = {
        let swizzle: u32 = match Self::PANEL_ROW {
            128 => 1,
            64 => 2,
            _ => 3,
        };
        swizzle << 30 | (8 * Self::PANEL_ROW) >> 4
    };
}

/// The address part of a descriptor. In a cluster the upper bits of an address name the block.
#[inline(always)]
fn address_bits(address: u32) -> u32 {
    (address & 0x3_ffff) >> 4
}

impl<T: PackedElement, const R: usize, const C: usize> Right<T> for Rows<T, R, C> {
    const LENGTH: usize = C;
    const COUNT: usize = R;
    const COLUMNS: bool = false;
    const DESCRIPTOR_HIGH: u32 = SmemTile::<T, R, C>::DESCRIPTOR_HIGH;

    #[inline(always)]
    fn descriptor_low(self, step: usize) -> u32 {
        let panel_row = SmemTile::<T, R, C>::PANEL_ROW;
        let bytes = (step * DEPTH * size_of::<T>()) as u32;
        let offset = bytes / panel_row * SmemTile::<T, R, C>::PANEL + bytes % panel_row;
        // Within a panel there is no stride from panel to panel: the field is not looked at.
        (address_bits(self.tile.chunk(self.first, 0).address()) + (offset >> 4)) | 1 << 16
    }
}

impl<T: PackedElement, const R: usize, const C: usize> Right<T> for Columns<T, R, C> {
    const LENGTH: usize = R;
    const COUNT: usize = C;
    const COLUMNS: bool = true;
    const DESCRIPTOR_HIGH: u32 = SmemTile::<T, R, C>::DESCRIPTOR_HIGH;

    #[inline(always)]
    fn descriptor_low(self, step: usize) -> u32 {
        let offset = (step * DEPTH) as u32 * SmemTile::<T, R, C>::PANEL_ROW;
        let first = self.tile.chunk(0, self.first / SmemTile::<T, R, C>::CHUNK).address();
        (address_bits(first) + (offset >> 4)) | (SmemTile::<T, R, C>::PANEL >> 4) << 16
    }
}

macro_rules! left_in_shared_memory {
    ($($vectors:ident)*) => {$(
        impl<T: PackedElement, const R: usize, const C: usize> Left<T> for $vectors<T, R, C> {
            const LENGTH: usize = <Self as Right<T>>::LENGTH;

            #[inline(always)]
            #[track_caller]
            fn multiply<B: Right<T>, const N: usize>(self, to: machine::Sum<N>, b: B) -> machine::Flight<N> {
                const { assert!(<Self as Right<T>>::COUNT >= ROWS as usize, "a left factor has 64 vectors") };
                machine::wgmma_shared::<T, Self, B, N>(to, self, b)
            }
        }
    )*};
}
left_in_shared_memory!(Rows Columns);

/// A left factor in the registers of a warpgroup: 64 vectors of `16 STEPS` elements.
#[derive(Clone, Copy)]
pub struct Registers<T, const STEPS: usize> {
    registers: [[u32; 4]; STEPS],
    of: core::marker::PhantomData<T>,
}

impl<T: PackedElement, const STEPS: usize> Registers<T, STEPS> {
    /// All zeros.
    #[inline(always)]
    pub fn zero() -> Self {
        // SAFETY: numbers; an array expression would be a loop that stays one, and keep the array in local memory.
        unsafe { core::mem::zeroed() }
    }

    /// The rows of a matrix of `16 STEPS` columns, rounded to T.
    #[inline(always)]
    pub fn of<const N: usize>(matrix: &Accumulator<1, N>) -> Self {
        const { assert!(N == 2 * STEPS, "two blocks of 8 columns a step") };
        // SAFETY: numbers; an array expression would be a loop that stays one, and keep the array in local memory.
        let mut registers: [[u32; 4]; STEPS] = unsafe { core::mem::zeroed() };
        for step in 0..STEPS {
            for i in 0..4 {
                let block = &matrix.0[0][2 * step + i / 2];
                registers[step][i] = T::pack(block[2 * (i % 2)], block[2 * (i % 2) + 1]);
            }
        }
        Registers { registers, of: core::marker::PhantomData }
    }

    /// A matrix of `16 STEPS` columns of which `f` makes two an element at a time, one of them rounded to T and the other in its
    /// own place: `f(row, column, x)` gives a pair of each, of a pair of a row.
    #[inline(always)]
    #[track_caller]
    pub fn apart<const N: usize>(
        matrix: &mut Accumulator<1, N>,
        f: impl Fn(u32, u32, [f32; 2]) -> [[f32; 2]; 2],
    ) -> Self {
        const { assert!(N == 2 * STEPS, "two blocks of 8 columns a step") };
        let mut rounded = Self::zero();
        for n in 0..N {
            for half in 0..2 {
                let pair = &mut matrix.0[0][n][2 * half..2 * half + 2];
                let (row, column) = (Accumulator::<1, N>::row(0, half), Accumulator::<1, N>::column(n, 0));
                let [made, stays] = f(row, column, [pair[0], pair[1]]);
                pair.copy_from_slice(&stays);
                rounded.registers[n / 2][2 * (n % 2) + half] = T::pack(made[0], made[1]);
            }
        }
        rounded
    }

    /// Two matrices of `16 STEPS` columns, rounded to T, that are made of two others an element at a time: `f(row, column, x, y)`
    /// gives an element of each. So one takes the registers of the other: of all four at once there may be too few.
    #[inline(always)]
    #[track_caller]
    pub fn pair_of<const N: usize>(
        x: &Accumulator<1, N>,
        y: &Accumulator<1, N>,
        f: impl Fn(u32, u32, [f32; 2], [f32; 2]) -> [[f32; 2]; 2],
    ) -> [Self; 2] {
        const { assert!(N == 2 * STEPS, "two blocks of 8 columns a step") };
        let mut both = [Self::zero(), Self::zero()];
        for n in 0..N {
            let column = Accumulator::<1, N>::column(n, 0);
            for half in 0..2 {
                let row = Accumulator::<1, N>::row(0, half);
                let of = |matrix: &Accumulator<1, N>| [matrix.0[0][n][2 * half], matrix.0[0][n][2 * half + 1]];
                let made = f(row, column, of(x), of(y));
                for i in 0..2 {
                    both[i].registers[n / 2][2 * (n % 2) + half] = T::pack(made[i][0], made[i][1]);
                }
            }
        }
        both
    }

    /// Writes the transpose of the matrix to shared memory: column c of the warp's 16 rows becomes row c of a tile,
    /// from a column on. Said by each warp for itself. PTX ISA: `stmatrix.sync.aligned.m8n8.x4.trans`.
    #[inline(always)]
    #[track_caller]
    pub fn store_transposed<const R: usize, const C: usize>(self, to: TransposedRows<T, R, C>) {
        let mut rows = [0; STEPS];
        for step in 0..STEPS {
            rows[step] = to.address + (DEPTH * step) as u32 * SmemTile::<T, R, C>::PANEL_ROW;
        }
        matrix::stmatrix_trans(rows, self.registers);
    }
}

/// Where a lane writes the transpose of 16 rows: [`Registers::store_transposed`].
#[derive(Clone, Copy)]
pub struct TransposedRows<T, const R: usize, const C: usize> {
    address: u32,
    of: core::marker::PhantomData<SmemTile<T, R, C>>,
}

impl<T: PackedElement, const R: usize, const C: usize> TransposedRows<T, R, C> {
    /// The columns from `column` on of `tile`, a multiple of 16.
    #[inline(always)]
    pub fn of(tile: SmemTile<T, R, C>, column: u32) -> Self {
        // Matrices 0 to 3: the upper and lower eight rows of eight columns, then of the next eight.
        let lane = thread::lane_id();
        let chunk = tile.chunk(lane / 16 * 8 + lane % 8, (column / 8) ^ (lane / 8 % 2));
        // One register, whatever the address is made of.
        TransposedRows { address: unknown(chunk.address()), of: core::marker::PhantomData }
    }

    /// The same in the tile `index` tiles on.
    #[inline(always)]
    pub fn stage(self, index: u32) -> Self {
        TransposedRows { address: self.address + index * SmemTile::<T, R, C>::BYTES, ..self }
    }
}

impl<T: PackedElement, const STEPS: usize> Left<T> for Registers<T, STEPS> {
    const LENGTH: usize = DEPTH * STEPS;

    #[inline(always)]
    #[track_caller]
    fn multiply<B: Right<T>, const N: usize>(self, to: machine::Sum<N>, b: B) -> machine::Flight<N> {
        machine::wgmma_registers::<T, STEPS, B, N>(to, self.registers, b)
    }
}

/// A sum of products that the tensor cores may still be computing: 64 rows, `8 N` columns.
#[must_use = "the tensor cores write its registers until it is waited for"]
pub struct InFlight<const N: usize>(machine::Flight<N>);

/// A Bᵀ, of the vectors of A and B as rows: element (i, j) is the dot product of vector i of A and vector j of B. Said
/// by a whole warpgroup, at the same place. PTX ISA: `wgmma.fence`, `wgmma.mma_async.sync.aligned.m64nNk16.f32`,
/// `wgmma.commit_group`.
#[inline(always)]
#[track_caller]
pub fn product<T: PackedElement, A: Left<T>, B: Right<T>, const N: usize>(a: A, b: B) -> InFlight<N> {
    add_to(machine::Sum::zero(), a, b)
}

/// `d` + A Bᵀ: as [`product`].
#[inline(always)]
#[track_caller]
pub fn add_product<T: PackedElement, A: Left<T>, B: Right<T>, const N: usize>(
    d: Accumulator<1, N>,
    a: A,
    b: B,
) -> InFlight<N> {
    add_to(machine::Sum::from_registers(d.0[0]), a, b)
}

#[inline(always)]
#[track_caller]
fn add_to<T: PackedElement, A: Left<T>, B: Right<T>, const N: usize>(sum: machine::Sum<N>, a: A, b: B) -> InFlight<N> {
    const { assert!(A::LENGTH == B::LENGTH, "both factors have vectors of the same length") };
    const { assert!(A::LENGTH.is_multiple_of(DEPTH), "a step contracts 16 elements") };
    const { assert!(N >= 1 && N <= 32 && 8 * N <= B::COUNT, "8 to 256 columns, and a vector of B for each") };
    InFlight(a.multiply(sum, b))
}

impl<const N: usize> InFlight<N> {
    /// Adds another product, without waiting in between.
    #[inline(always)]
    #[track_caller]
    pub fn add_product<T: PackedElement, A: Left<T>, B: Right<T>>(self, a: A, b: B) -> InFlight<N> {
        add_to(machine::Sum::from_flight(self.0), a, b)
    }

    /// Waits until all but the warp's last `PENDING` products have ended; this one is not among those.
    /// PTX ISA: `wgmma.wait_group.sync.aligned`.
    #[inline(always)]
    #[track_caller]
    pub fn wait<const PENDING: usize>(self) -> Accumulator<1, N> {
        Accumulator([machine::wgmma_wait::<PENDING, N>(self.0)])
    }
}

/// A place that the computation of `matrix` does not cross: what was said of it before is done before, and what is said
/// later, later. It keeps arithmetic under the products that it is to overlap with. No instruction.
#[inline(always)]
pub fn pin<const N: usize>(matrix: &mut Accumulator<1, N>) {
    machine::pin(&mut matrix.0[0]);
}
