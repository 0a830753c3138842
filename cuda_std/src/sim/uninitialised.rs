//! Reads of global memory that the reading block has not written.
use super::unit::{Actor, Use};

/// A read of bytes that were not written before the launch, nor by the block itself. Whether a block before it has
/// written them (which then is a race, unless atomics order it) is known when these have ended.
#[derive(Clone, Copy)]
pub(super) struct FirstRead {
    pub address: u64,
    /// Which pairs of bytes of the granule.
    pub mask: u8,
    pub usage: Use,
    pub actor: Actor,
}
