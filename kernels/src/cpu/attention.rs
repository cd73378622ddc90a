//! Causal attention over a paged cache, one implementation for prefill and decode.
//!
//! What a query row yields depends on its own query and on the cached positions up to its own, summed in order of
//! position: not on the block size, on how a prompt was cut into chunks, or on the other sequences of the batch.

use super::Cpu;
use super::gemm::stored::Stored;
use super::gemm::tile::{TILE_COLS, dot_stored, pack_rows};
use super::output::Output;
use super::simd::math::{exp_row, padded};
use super::simd::{Kernel, Line, Simd};
use crate::weight::Weight;

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

/// Sizes of latent attention on expanded keys and values: every head has its own, made from the latents.
#[derive(Clone, Copy, Debug)]
pub struct ExpandedShape {
    /// Query heads.
    pub heads: usize,
    /// Elements of a latent.
    pub kv_lora: usize,
    /// Elements of a key without position.
    pub nope: usize,
    /// Rotated elements, after the latent in a cache row; all heads share them.
    pub rope: usize,
    /// Elements of a value.
    pub v: usize,
    /// Factor of the scores.
    pub scale: f32,
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
        let MlaShape { heads, kv_lora, rope, scale } = shape;
        assert_eq!(cache.width, kv_lora + rope, "mla_attention: width of the cache");
        assert_eq!(query.latent.len(), out.len(), "mla_attention: length of out");
        assert_eq!(query.latent.len() / kv_lora * rope, query.rope.len(), "mla_attention: length of q_rope");
        let query = |at: usize, row: &mut Vec<f32>| {
            row.extend_from_slice(&query.latent[at * kv_lora..(at + 1) * kv_lora]);
            row.extend_from_slice(&query.rope[at * rope..(at + 1) * rope]);
        };
        let group = Heads { heads, kv_heads: 1, key_width: kv_lora + rope, value_width: kv_lora, scale };
        self.attend(group, query, KvPages { keys: cache, values: cache }, spans, out);
    }

    /// `out[t][heads][v] = softmax(scale * q . (key, rotated key)) value`, causal, where `up`, `[heads][nope + v][kv_lora]`,
    /// makes key and value of every head from a position's latent. `query`: `[t][heads][nope + rope]`.
    ///
    /// # Panics
    /// If the lengths do not fit, or a block table does not reach the last position.
    pub fn expanded_attention(
        &self,
        shape: ExpandedShape,
        (query, up): (&[f32], &Weight),
        cache: Pages<'_>,
        spans: &[Span<'_>],
        out: &mut [f32],
    ) {
        let ExpandedShape { heads, kv_lora, nope, rope, v, scale } = shape;
        assert_eq!(cache.width, kv_lora + rope, "expanded_attention: width of the cache");
        assert_eq!(
            (up.rows(), up.cols()),
            (heads * (nope + v), kv_lora),
            "expanded_attention: up-projections"
        );
        assert_eq!(query.len() / (nope + rope) * v, out.len(), "expanded_attention: length of out");
        let key = nope + rope;
        let query = |at: usize, row: &mut Vec<f32>| row.extend_from_slice(&query[at * key..(at + 1) * key]);
        let group = Heads { heads, kv_heads: heads, key_width: key, value_width: v, scale };
        for span in spans {
            let (keys, values) = self.expand(shape, up, cache, span);
            let block_size = span.context + span.len;
            let pages = |data, width| Pages { data, block_size, width };
            let pages = KvPages { keys: pages(&keys, heads * key), values: pages(&values, heads * v) };
            self.attend(group, query, pages, &[Span { block_table: &[0], ..*span }], out);
        }
    }

    /// Keys `[position][heads][nope + rope]` and values `[position][heads][v]` of all positions of a span.
    fn expand(
        &self,
        shape: ExpandedShape,
        up: &Weight,
        cache: Pages<'_>,
        span: &Span<'_>,
    ) -> (Vec<f32>, Vec<f32>) {
        let ExpandedShape { heads, kv_lora, nope, rope, v, .. } = shape;
        let positions = rows(cache, span.block_table, span.context + span.len);
        let latents: Vec<f32> = positions.iter().flat_map(|row| &row[..kv_lora]).copied().collect();
        let mut expanded = vec![0.0; positions.len() * up.rows()];
        self.matmul(&latents, up, &mut expanded);
        let mut keys = Vec::with_capacity(positions.len() * heads * (nope + rope));
        let mut values = Vec::with_capacity(positions.len() * heads * v);
        for (row, expanded) in positions.iter().zip(expanded.chunks_exact(up.rows())) {
            for head in expanded.chunks_exact(nope + v) {
                keys.extend_from_slice(&head[..nope]);
                keys.extend_from_slice(&row[kv_lora..]);
                values.extend_from_slice(&head[nope..]);
            }
        }
        (keys, values)
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
        let GqaShape { heads, kv_heads, head_dim, scale } = shape;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "gqa_attention: {heads} on {kv_heads} heads");
        let widths = (cache.keys.width, cache.values.width);
        assert_eq!(widths, (kv_heads * head_dim, kv_heads * head_dim), "gqa_attention: widths of the caches");
        assert_eq!(query.len(), out.len(), "gqa_attention: length of out");
        let query = |at: usize, row: &mut Vec<f32>| {
            row.extend_from_slice(&query[at * head_dim..(at + 1) * head_dim]);
        };
        let group = Heads { heads, kv_heads, key_width: head_dim, value_width: head_dim, scale };
        self.attend(group, query, cache, spans, out);
    }

    /// `query` appends the query of (token, head) `at` to a vector.
    fn attend(
        &self,
        shape: Heads,
        query: impl Fn(usize, &mut Vec<f32>) + Copy + Send + Sync,
        cache: KvPages<'_>,
        spans: &[Span<'_>],
        out: &mut [f32],
    ) {
        let tile = self.level.tile_rows();
        let per_kv_head = shape.heads / shape.kv_heads;
        let tiles_per_kv_head = per_kv_head.div_ceil(tile);
        let out = Output::new(out);
        for span in spans {
            let positions = span.context + span.len;
            let keys = rows(cache.keys, span.block_table, positions);
            let values = rows(cache.values, span.block_table, positions);
            let jobs_per_token = shape.kv_heads * tiles_per_kv_head;
            let work = span.len * positions * shape.heads * (shape.key_width + shape.value_width);
            self.for_each(span.len * jobs_per_token, work, |job| {
                let (token, job) = (job / jobs_per_token, job % jobs_per_token);
                let (kv_head, tile_index) = (job / tiles_per_kv_head, job % tiles_per_kv_head);
                let seen = span.context + token + 1;
                let first = tile_index * tile;
                let count = tile.min(per_kv_head - first);
                let at = (span.start + token) * shape.heads + kv_head * per_kv_head + first;
                let mut queries = Vec::with_capacity(count * shape.key_width);
                (at..at + count).for_each(|at| query(at, &mut queries));
                self.level.run(Attend {
                    queries: &queries,
                    keys: HeadRows::new(&keys[..seen], kv_head, shape.key_width),
                    values: HeadRows::new(&values[..seen], kv_head, shape.value_width),
                    scale: shape.scale,
                    out,
                    out_at: at * shape.value_width,
                });
            });
        }
    }
}

/// What both kinds of attention come down to.
#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    key_width: usize,
    value_width: usize,
    scale: f32,
}

/// The rows of positions `0..positions`.
fn rows<'a>(pages: Pages<'a>, block_table: &[u32], positions: usize) -> Vec<&'a [f32]> {
    let mut rows = Vec::with_capacity(positions.next_multiple_of(pages.block_size));
    let block_len = pages.block_size * pages.width;
    for &block in &block_table[..positions.div_ceil(pages.block_size)] {
        let at = block as usize * block_len;
        rows.extend(pages.data[at..at + block_len].chunks_exact(pages.width));
    }
    rows.truncate(positions);
    rows
}

/// The part of cache rows that belongs to one head.
#[derive(Clone, Copy)]
struct HeadRows<'a> {
    rows: &'a [&'a [f32]],
    from: usize,
    width: usize,
}

impl<'a> HeadRows<'a> {
    fn new(rows: &'a [&'a [f32]], head: usize, width: usize) -> HeadRows<'a> {
        HeadRows { rows, from: head * width, width }
    }
}

impl Stored for HeadRows<'_> {
    type Element = f32;

    #[inline(always)]
    fn cols(&self) -> usize {
        self.width
    }

    #[inline(always)]
    fn run_cols(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[f32] {
        &self.rows[row][self.from..self.from + self.width]
    }

    #[inline(always)]
    fn factor(&self, _row: usize, _run: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, step: &[f32; 16], _factor: S::V) -> S::V {
        simd.load(step)
    }
}

/// A few heads of one token, which share keys and values.
struct Attend<'a> {
    /// One row per head.
    queries: &'a [f32],
    keys: HeadRows<'a>,
    values: HeadRows<'a>,
    scale: f32,
    out: Output<'a>,
    out_at: usize,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.queries.len() / self.keys.width {
            1 => self.heads::<S, 1>(simd),
            2 => self.heads::<S, 2>(simd),
            3 => self.heads::<S, 3>(simd),
            4 => self.heads::<S, 4>(simd),
            5 => self.heads::<S, 5>(simd),
            _ => self.heads::<S, 6>(simd),
        }
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn heads<S: Simd, const M: usize>(&self, simd: S) {
        let positions = self.keys.rows.len();
        let mut packed = vec![Line::ZERO; M * self.keys.width.div_ceil(16)];
        pack_rows(self.queries.chunks_exact(self.keys.width), &mut packed);
        // Probabilities, `[head][position]`.
        let mut p = vec![0.0; M * positions];
        for first in (0..positions).step_by(TILE_COLS) {
            let last = positions - 1;
            let tile = [first, last.min(first + 1), last.min(first + 2), last.min(first + 3)];
            let scores = dot_stored::<S, _, M>(simd, &packed, &self.keys, tile);
            let count = TILE_COLS.min(positions - first);
            for (head, scores) in scores.iter().enumerate() {
                p[head * positions + first..][..count].copy_from_slice(&scores[..count]);
            }
        }
        let mut factors = [0.0; M];
        for (factor, p) in factors.iter_mut().zip(p.chunks_exact_mut(positions)) {
            *factor = 1.0 / exp_row(simd, p, self.scale);
        }
        let width = self.values.width;
        let mut column = 0;
        while column + 64 <= width {
            self.weighted_sum::<S, M, 4>(simd, &p, factors, column);
            column += 64;
        }
        while column < width {
            self.weighted_sum::<S, M, 1>(simd, &p, factors, column);
            column += 16;
        }
    }

    /// `C` steps of sixteen columns of the output, or what is left of them: the sum over positions in their order.
    #[inline(always)]
    fn weighted_sum<S: Simd, const M: usize, const C: usize>(
        &self,
        simd: S,
        p: &[f32],
        factors: [f32; M],
        column: usize,
    ) {
        let positions = self.values.rows.len();
        let cols = (C * 16).min(self.values.width - column);
        let mut acc = [[simd.zero(); C]; M];
        for position in 0..positions {
            let row = &self.values.row(position)[column..column + cols];
            let mut v = [simd.zero(); C];
            if cols == C * 16 {
                for (v, step) in v.iter_mut().zip(row.as_chunks::<16>().0) {
                    *v = simd.load(step);
                }
            } else {
                v[0] = simd.load(&padded(row, 0.0));
            }
            for (head, acc) in acc.iter_mut().enumerate() {
                let p = simd.splat(p[head * positions + position]);
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = simd.fma(p, v, *acc);
                }
            }
        }
        for (head, (acc, factor)) in acc.iter().zip(factors).enumerate() {
            for (step, acc) in acc.iter().enumerate() {
                let mut values = [0.0; 16];
                simd.store(simd.mul(*acc, simd.splat(factor)), &mut values);
                let at = self.out_at + head * self.values.width + column + step * 16;
                // SAFETY: only this job writes the output of its heads.
                unsafe { self.out.write(at, &values[..cols.min(16)]) }
            }
        }
    }
}
