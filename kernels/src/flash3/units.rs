//! Units of work that cost the same: a tile, or under a causal mask two of one head, the last and the first, the last but one
//! and the second, and so on. If there is one in the middle, it is a unit of its own.

/// Tiles of a head: `ceil(seqlen_q / block_m)`.
pub const fn tiles_of_head(seqlen_q: u32, block_m: u32) -> u32 {
    seqlen_q.div_ceil(block_m)
}

/// How many units the tiles of a head make.
pub const fn units_of_head(tiles: u32, causal: bool) -> u32 {
    if causal { tiles.div_ceil(2) } else { tiles }
}

/// Tiles of a unit.
pub const fn tiles_of_unit(causal: bool) -> u32 {
    if causal { 2 } else { 1 }
}
