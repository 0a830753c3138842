//! Boxes of tensors: which bytes of global memory belong to which bytes of shared memory.
use super::shadow::GRANULE;
use crate::tensor::{MOST_RANK, Swizzle, TensorMapDescription};
use std::ops::Range;

/// 16 bytes of a box.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where they are in shared memory.
    pub shared: u32,
    /// Where their first is in global memory, if it is there.
    pub global: u64,
    /// Which of them lie in the tensor.
    pub inside: Range<u32>,
}

/// The chunks of the box at coordinates `at`, in the order of shared memory without a swizzle, from `base` on.
pub(super) fn chunks(
    map: &TensorMapDescription,
    at: [i32; MOST_RANK],
    base: u32,
) -> impl Iterator<Item = Chunk> + use<'_> {
    let element = map.dtype.bytes() as i64;
    let row_chunks = map.tile_row_bytes() / GRANULE as u32;
    let rows: u32 = map.tile[1..map.rank].iter().product();
    (0..rows).flat_map(move |row| {
        let (mut address, mut is_inside, mut rest) = (map.address, true, row);
        for i in 1..map.rank {
            let index = at[i] as i64 + (rest % map.tile[i]) as i64;
            rest /= map.tile[i];
            is_inside &= (0..map.dimensions[i] as i64).contains(&index);
            address = address.wrapping_add_signed(index.wrapping_mul(map.strides[i - 1] as i64));
        }
        (0..row_chunks).map(move |chunk| {
            let first = at[0] as i64 * element + chunk as i64 * GRANULE as i64;
            let end = map.dimensions[0] as i64 * element;
            let inside = (-first).clamp(0, GRANULE as i64) as u32..(end - first).clamp(0, GRANULE as i64) as u32;
            Chunk {
                shared: swizzled(map.swizzle, base + (row * row_chunks + chunk) * GRANULE as u32),
                global: address.wrapping_add_signed(first),
                inside: if is_inside && inside.start < inside.end { inside } else { 0..0 },
            }
        })
    })
}

/// Where a swizzle puts what belongs at an address: bits 4 and up are changed by those of the row of 128 bytes.
pub(super) fn swizzled(swizzle: Swizzle, address: u32) -> u32 {
    let mask = swizzle.row_bytes().map_or(0, |bytes| bytes / GRANULE as u32 - 1);
    address ^ (address >> 7 & mask) << 4
}

/// What the address of a box in shared memory is a multiple of: eight rows of the swizzle, which then begins anew.
pub(super) fn alignment(swizzle: Swizzle) -> u32 {
    swizzle.row_bytes().map_or(128, |bytes| 8 * bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn what_lies_outside_is_told() {
        let map = TensorMapDescription {
            address: 0x1000,
            dtype: DType::F16,
            rank: 2,
            dimensions: [20, 3, 1, 1, 1],
            strides: [64, 0, 0, 0],
            tile: [16, 2, 1, 1, 1],
            swizzle: Swizzle::Bytes32,
        };
        let found: Vec<_> = chunks(&map, [16, 2, 0, 0, 0], 0x400).collect();
        assert_eq!(found[0], Chunk { shared: 0x400, global: 0x1000 + 2 * 64 + 32, inside: 0..8 });
        assert!(found[1..].iter().all(|chunk| chunk.inside.is_empty()));
        let found: Vec<_> = chunks(&map, [-3, 0, 0, 0, 0], 0).collect();
        assert_eq!((found[0].inside.clone(), found[1].inside.clone()), (6..16, 0..16));
    }
}
