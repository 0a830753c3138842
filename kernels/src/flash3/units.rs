//! Units of work that cost the same: a tile, or two of one pack of heads, the last and the first, the last but one and the
//! second, and so on. If there is one in the middle, it is a unit of its own.

/// Tiles of a pack of heads: `ceil(rows / block_m)`.
pub const fn tiles_of_pack(rows: u32, block_m: u32) -> u32 {
    rows.div_ceil(block_m)
}

/// How many units the tiles of a pack make.
pub const fn units_of_pack(tiles: u32, paired: bool) -> u32 {
    if paired { tiles.div_ceil(2) } else { tiles }
}
