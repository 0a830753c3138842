//! What the workspace's tests share: random inputs, and the grid of shapes that every kernel must pass.

pub mod grid;
pub mod inputs;
