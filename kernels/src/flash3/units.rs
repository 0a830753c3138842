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

/// What a walker is dealt in a turn: the first one the first, and so on in each turn, or there and `back`.
pub const fn dealt(turn: u32, walker: u32, walkers: u32, back: bool) -> u32 {
    turn * walkers + if back && turn % 2 == 1 { walkers - 1 - walker } else { walker }
}
