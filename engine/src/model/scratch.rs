//! Buffers that live from step to step, so a step in steady state allocates nothing.

use super::attention::AttentionScratch;
use super::mlp::MlpScratch;
use super::moe::MoeScratch;
use super::rope::RopeRows;

/// All buffers of a model.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The residual stream, `[t][hidden]`.
    pub(super) residual: Vec<f32>,
    /// Input of attention or feed-forward, `[t][hidden]`.
    pub(super) normed: Vec<f32>,
    /// Output of attention or feed-forward, `[t][hidden]`, not yet added to the residual stream.
    pub(super) branch: Vec<f32>,
    /// Angles of the batch's positions.
    pub(super) rope: RopeRows,
    /// Attention's own.
    pub(super) attention: AttentionScratch,
    /// The router's own.
    pub(super) moe: MoeScratch,
    /// Dense layers' and shared experts' own.
    pub(super) mlp: MlpScratch,
}

/// The first `len` elements of `buffer`, which grows where it must. They hold whatever they held.
pub(super) fn rows<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
