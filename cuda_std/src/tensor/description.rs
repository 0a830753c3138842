//! What a tensor map says, as a host gives it to a driver's encoder, and as the simulated GPU reads it.
use super::TensorMap;
use crate::element::{DType, Element};

/// The most dimensions that a tensor has.
pub const MOST_RANK: usize = 5;

/// How the 16-byte chunks of rows are permuted in shared memory, by an exclusive-or with the row: see
/// [`SmemTile`](crate::SmemTile). The innermost dimension of a box is as wide as the swizzle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows as they are.
    None,
    /// Rows of 32 bytes.
    Bytes32,
    /// Rows of 64 bytes.
    Bytes64,
    /// Rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Of rows of so many bytes.
    pub const fn of_rows(bytes: u32) -> Option<Self> {
        match bytes {
            32 => Some(Swizzle::Bytes32),
            64 => Some(Swizzle::Bytes64),
            128 => Some(Swizzle::Bytes128),
            _ => None,
        }
    }

    /// The bytes of a row; nothing without a swizzle.
    pub const fn row_bytes(self) -> Option<u32> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }
}

/// A tensor in global memory, and the boxes of it that are copied. Dimensions are given from the innermost one on;
/// those from `rank` on are not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapDescription {
    /// The device address of the first element, a multiple of 16.
    pub address: u64,
    /// Of the elements.
    pub dtype: DType,
    /// How many dimensions there are: 2 to 5.
    pub rank: usize,
    /// Elements of each dimension.
    pub dimensions: [u64; MOST_RANK],
    /// Bytes from an index of dimension `i + 1` to the next, multiples of 16. The innermost dimension is dense.
    pub strides: [u64; MOST_RANK - 1],
    /// Elements of a box in each dimension: 1 to 256.
    pub tile: [u32; MOST_RANK],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
}

/// Why no tensor map says this: what the driver would refuse, and what a swizzled tile cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorMapError {
    /// Not 2 to 5 dimensions.
    Rank(usize),
    /// An address that is no multiple of 16.
    Address(u64),
    /// A dimension without elements, or with more than 2^32.
    Dimension(usize),
    /// A stride that is no multiple of 16, or 2^40 or more.
    Stride(usize),
    /// A box that is not 1 to 256 wide in a dimension.
    Tile(usize),
    /// The innermost dimension of a box is no multiple of 16 bytes, or not as wide as the swizzle.
    TileRow {
        /// Its bytes.
        bytes: u32,
        /// The swizzle.
        swizzle: Swizzle,
    },
}

impl std::fmt::Display for TensorMapError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TensorMapError::Rank(rank) => write!(f, "{rank} dimensions; 2 to {MOST_RANK} are allowed"),
            TensorMapError::Address(address) => write!(f, "address {address:#x} is no multiple of 16"),
            TensorMapError::Dimension(i) => write!(f, "dimension {i} has no elements, or more than 2^32"),
            TensorMapError::Stride(i) => write!(f, "stride {i} is no multiple of 16 bytes, or 2^40 or more"),
            TensorMapError::Tile(i) => write!(f, "a box has 1 to 256 elements in a dimension; not so in dimension {i}"),
            TensorMapError::TileRow { bytes, swizzle } => {
                write!(f, "rows of {bytes} bytes in a box, with swizzle {swizzle:?}")
            }
        }
    }
}

impl std::error::Error for TensorMapError {}

/// What words of a simulated map begin with: no encoder writes it.
const SIMULATED: u64 = 0x7369_6d75_6c61_7465;

impl TensorMapDescription {
    /// A map whose boxes are the panels of [`SmemTile`](crate::SmemTile)s of `R` rows and `C` columns: as
    /// [`of_panels`](Self::of_panels).
    pub fn of_tiles<T: Element, const R: usize, const C: usize>(
        address: u64,
        extents: (u64, u64),
        row_stride: u64,
        outer: &[(u64, u64)],
    ) -> Result<Self, TensorMapError> {
        Self::of_panels(T::DTYPE, (R as u32, C as u32), address, extents, row_stride, outer)
    }

    /// A map whose boxes are the panels of [`SmemTile`](crate::SmemTile)s of so many rows and columns, of matrices of
    /// `rows` rows that lie `row_stride` elements apart and of `columns` columns, at most those of a tile; of these there
    /// are as many as `outer` says, by up to three dimensions of `(count, stride in elements)`.
    pub fn of_panels(
        dtype: DType,
        (tile_rows, tile_columns): (u32, u32),
        address: u64,
        (rows, columns): (u64, u64),
        row_stride: u64,
        outer: &[(u64, u64)],
    ) -> Result<Self, TensorMapError> {
        let bytes = dtype.bytes() as u64;
        let panel = crate::tile::panel_columns(tile_columns, bytes as u32);
        if outer.len() > MOST_RANK - 2 {
            return Err(TensorMapError::Rank(2 + outer.len()));
        }
        if columns > u64::from(tile_columns) {
            return Err(TensorMapError::Dimension(0));
        }
        let mut map = TensorMapDescription {
            address,
            dtype,
            rank: 2 + outer.len(),
            dimensions: [columns, rows, 1, 1, 1],
            strides: [row_stride * bytes, 0, 0, 0],
            tile: [panel, tile_rows, 1, 1, 1],
            swizzle: Swizzle::of_rows(panel * bytes as u32).unwrap_or(Swizzle::None),
        };
        for (i, &(count, stride)) in outer.iter().enumerate() {
            map.dimensions[2 + i] = count;
            map.strides[1 + i] = stride * bytes;
        }
        map.check()?;
        Ok(map)
    }

    /// The same tensor in boxes that have so many elements of dimension `i`.
    pub fn with_boxes(self, i: usize, elements: u32) -> Result<Self, TensorMapError> {
        let mut map = self;
        if i >= self.rank {
            return Err(TensorMapError::Tile(i));
        }
        map.tile[i] = elements;
        map.check()?;
        Ok(map)
    }

    /// Whether a driver and the simulated GPU accept it.
    pub fn check(&self) -> Result<(), TensorMapError> {
        let rank = self.rank;
        if !(2..=MOST_RANK).contains(&rank) {
            return Err(TensorMapError::Rank(rank));
        }
        if !self.address.is_multiple_of(16) {
            return Err(TensorMapError::Address(self.address));
        }
        if let Some(i) = (0..rank).find(|&i| self.dimensions[i] == 0 || self.dimensions[i] > 1 << 32) {
            return Err(TensorMapError::Dimension(i));
        }
        if let Some(i) = (0..rank - 1).find(|&i| !self.strides[i].is_multiple_of(16) || self.strides[i] >= 1 << 40) {
            return Err(TensorMapError::Stride(i));
        }
        if let Some(i) = (0..rank).find(|&i| !(1..=256).contains(&self.tile[i])) {
            return Err(TensorMapError::Tile(i));
        }
        let (bytes, swizzle) = (self.tile_row_bytes(), self.swizzle);
        if !bytes.is_multiple_of(16) || swizzle.row_bytes().is_some_and(|row| row != bytes) {
            return Err(TensorMapError::TileRow { bytes, swizzle });
        }
        Ok(())
    }

    /// Bytes of a box: what a load brings to its barrier.
    pub fn tile_bytes(&self) -> u32 {
        self.tile[..self.rank].iter().product::<u32>() * self.dtype.bytes() as u32
    }

    /// Bytes of the innermost dimension of a box.
    pub fn tile_row_bytes(&self) -> u32 {
        self.tile[0] * self.dtype.bytes() as u32
    }

    /// The map for the simulated GPU.
    pub fn simulated(&self) -> Result<TensorMap, TensorMapError> {
        self.check()?;
        let dtypes = [DType::F32, DType::F16, DType::BF16, DType::I32, DType::U8];
        let dtype = dtypes.iter().position(|&dtype| dtype == self.dtype).expect("all of them");
        let mut bits = [0; 16];
        bits[0] = SIMULATED;
        bits[1] = self.address;
        bits[2] = self.rank as u64 | (dtype as u64) << 8 | (self.swizzle as u64) << 16;
        bits[3..8].copy_from_slice(&self.dimensions);
        bits[8..12].copy_from_slice(&self.strides);
        for (i, &elements) in self.tile.iter().enumerate() {
            bits[12 + i / 4] |= (elements as u64) << (16 * (i % 4));
        }
        Ok(TensorMap(bits))
    }

    /// What a map for the simulated GPU says; nothing if it is for a real one.
    pub(crate) fn of_simulated(map: &TensorMap) -> Option<Self> {
        let bits = map.bits();
        let field = |shift: u32| (bits[2] >> shift & 0xff) as usize;
        (bits[0] == SIMULATED).then(|| TensorMapDescription {
            address: bits[1],
            dtype: [DType::F32, DType::F16, DType::BF16, DType::I32, DType::U8][field(8)],
            rank: field(0),
            dimensions: std::array::from_fn(|i| bits[3 + i]),
            strides: std::array::from_fn(|i| bits[8 + i]),
            tile: std::array::from_fn(|i| (bits[12 + i / 4] >> (16 * (i % 4)) & 0xffff) as u32),
            swizzle: [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128][field(16)],
        })
    }
}
