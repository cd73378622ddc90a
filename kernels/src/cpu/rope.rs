//! Rotary position embedding.

use super::{Cpu, plain};

/// Which two elements are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements 2i and 2i + 1 (DeepSeek).
    Interleaved,
    /// Elements i and i + half (Qwen3, Llama: `rotate_half`).
    HalfSplit,
}

/// Cosines and sines by position: `[position][half]`.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Angles per position: half of the rotated elements.
    pub half: usize,
}

/// Where the rotated elements lie: `x[token][heads][head_dim]`, of every head `offset..offset + 2 * half`.
#[derive(Clone, Copy, Debug)]
pub struct RopeLayout {
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// First rotated element of a head.
    pub offset: usize,
}

impl RopeTable<'_> {
    /// The cosines and sines of a position.
    pub(crate) fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let at = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

impl Cpu {
    /// Rotates `x` in place: `(a, b) -> (a cos - b sin, b cos + a sin)` for each pair.
    ///
    /// # Panics
    /// If the lengths do not fit, or a position is beyond the table.
    pub fn rope(
        &self,
        style: RopeStyle,
        x: &mut [f32],
        layout: RopeLayout,
        positions: &[u32],
        table: RopeTable<'_>,
    ) {
        plain::rope(style, x, layout, positions, table);
    }
}
