//! Rotary position embedding.

use super::Cpu;

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
        let RopeLayout { heads, head_dim, offset } = layout;
        let half = table.half;
        assert!(offset + 2 * half <= head_dim, "rope: {half} pairs from {offset} in a head of {head_dim}");
        assert_eq!(x.len(), positions.len() * heads * head_dim, "rope: length of x");
        if x.is_empty() {
            return;
        }
        for (token, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
            let (cos, sin) = table.at(position);
            for head in token.chunks_exact_mut(head_dim) {
                let rotated = &mut head[offset..offset + 2 * half];
                match style {
                    RopeStyle::Interleaved => rotate_interleaved(rotated, cos, sin),
                    RopeStyle::HalfSplit => rotate_half_split(rotated, cos, sin),
                }
            }
        }
    }
}

fn rotate_interleaved(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let [a, b] = *pair;
        *pair = [a * cos - b * sin, b * cos + a * sin];
    }
}

fn rotate_half_split(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x.split_at_mut(cos.len());
    for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
