//! Causal attention over a paged cache, one implementation for prefill and decode.
//!
//! What a query row yields depends on its own query and on the cached positions up to its own, summed in order of
//! position: not on the block size, on how a prompt was cut into chunks, or on the other sequences of the batch.

use super::{Cpu, plain};

/// A cache `[block][block_size][width]`: one row per position of a sequence, found through its block table.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    /// All blocks.
    pub data: &'a [f32],
    /// Positions per block.
    pub block_size: usize,
    /// Elements of a row.
    pub width: usize,
}

impl<'a> Pages<'a> {
    /// The row of a position.
    #[inline(always)]
    pub fn row(&self, block_table: &[u32], position: usize) -> &'a [f32] {
        let at = slot(block_table, self.block_size, position) * self.width;
        &self.data[at..at + self.width]
    }
}

/// Index of the row of `position` in a cache of blocks of `block_size` rows.
#[inline(always)]
pub fn slot(block_table: &[u32], block_size: usize, position: usize) -> usize {
    block_table[position / block_size] as usize * block_size + position % block_size
}

/// The rows of one sequence in a batch. Its rows, too, are in the cache already when attention runs.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// First query row of the sequence.
    pub start: usize,
    /// Query rows of the sequence.
    pub len: usize,
    /// Position of the first query row: how many positions precede it.
    pub context: usize,
    /// Blocks that hold the positions, in order.
    pub block_table: &'a [u32],
}

/// Sizes of absorbed multi-head latent attention: all heads read the same latent row.
#[derive(Clone, Copy, Debug)]
pub struct MlaShape {
    /// Query heads.
    pub heads: usize,
    /// Elements of a latent.
    pub kv_lora: usize,
    /// Rotated elements, after the latent in a cache row.
    pub rope: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Queries of multi-head latent attention.
#[derive(Clone, Copy, Debug)]
pub struct MlaQuery<'a> {
    /// `[t][heads][kv_lora]`: the part without position, through `W_UK`.
    pub latent: &'a [f32],
    /// `[t][heads][rope]`: the rotated part.
    pub rope: &'a [f32],
}

/// Sizes of grouped-query attention: `heads / kv_heads` neighbouring heads share a key and value head.
#[derive(Clone, Copy, Debug)]
pub struct GqaShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Keys and values, rows of `[kv_heads][head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct KvPages<'a> {
    /// Keys.
    pub keys: Pages<'a>,
    /// Values.
    pub values: Pages<'a>,
}

impl Cpu {
    /// `out[t][heads][kv_lora] = softmax(scale * (q_latent . latent + q_rope . rope)) latent`, causal.
    ///
    /// # Panics
    /// If the lengths do not fit, or a block table does not reach the last position.
    pub fn mla_attention(
        &self,
        shape: MlaShape,
        query: MlaQuery<'_>,
        cache: Pages<'_>,
        spans: &[Span<'_>],
        out: &mut [f32],
    ) {
        plain::mla_attention(shape, query, cache, spans, out);
    }

    /// `out[t][heads][head_dim] = softmax(scale * q . k) v`, causal.
    ///
    /// # Panics
    /// If the lengths do not fit, or a block table does not reach the last position.
    pub fn gqa_attention(
        &self,
        shape: GqaShape,
        query: &[f32],
        cache: KvPages<'_>,
        spans: &[Span<'_>],
        out: &mut [f32],
    ) {
        plain::gqa_attention(shape, query, cache, spans, out);
    }
}
