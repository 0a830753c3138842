//! What the workspace's tests share: random inputs, and the grid of shapes that every kernel must pass.

mod backward;
pub mod combination;
pub mod grid;
pub mod inputs;
pub mod placed;
