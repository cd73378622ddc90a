//! Measurements of the engine on a GPU, for `helio bench`.

pub mod slice;
