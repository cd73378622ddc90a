//! Devices: CPU operations, CUDA kernels and the links between ranks.
//!
//! The only crate with `unsafe`. It knows no actor, no HTTP and no model.

pub mod cpu;
pub mod cuda;
pub mod dtype;
pub mod fabric;
pub mod weight;
