//! What the workspace's tests share: random inputs, the grid of shapes that every kernel must pass, and combinations of
//! all options.

pub mod arena;
mod backward;
pub mod beside;
pub mod combination;
pub mod everywhere;
pub mod far;
pub mod features;
pub mod grid;
pub mod guarded;
pub mod inputs;
pub mod passes;
pub mod peers;
pub mod placed;
pub mod pointers;
pub mod race;
pub mod reruns;
pub mod vast;
