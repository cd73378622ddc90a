//! Attention over pages: parity, and independence of blocks, chunks and neighbours.

use heliostat_kernels::cpu::attention::{
    ExpandedShape, GqaShape, KvPages, MlaQuery, MlaShape, Pages, Span, slot,
};
use heliostat_kernels::cpu::{Cpu, plain};
use heliostat_kernels::weight::Weight;

use crate::{assert_close, bits, devices, random};

/// A paged cache of several sequences, their blocks interleaved and in descending order.
struct Cache {
    data: Vec<f32>,
    block_size: usize,
    width: usize,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    /// `rows[s]` are the rows of sequence s.
    fn new(rows: &[Vec<f32>], width: usize, block_size: usize) -> Cache {
        let blocks = rows.iter().map(|rows| (rows.len() / width).div_ceil(block_size)).max().unwrap_or(0);
        let table = |s| (0..blocks).map(|b| ((blocks - b) * rows.len() - 1 - s) as u32).collect::<Vec<u32>>();
        let tables: Vec<Vec<u32>> = (0..rows.len()).map(table).collect();
        let mut data = vec![f32::NAN; blocks * rows.len() * block_size * width];
        for (rows, table) in rows.iter().zip(&tables) {
            for (position, row) in rows.chunks_exact(width).enumerate() {
                let at = slot(table, block_size, position) * width;
                data[at..at + width].copy_from_slice(row);
            }
        }
        Cache { data, block_size, width, tables }
    }

    fn pages(&self) -> Pages<'_> {
        Pages { data: &self.data, block_size: self.block_size, width: self.width }
    }
}

/// Sequences of these lengths; of each, the last rows are queries.
const LENGTHS: [(usize, usize); 5] = [(1, 1), (5, 5), (37, 1), (64, 3), (70, 20)];

/// Rows of each sequence, of some width.
fn sequences(seed: u64, width: usize) -> Vec<Vec<f32>> {
    (0..).zip(LENGTHS).map(|(i, (len, _))| random(seed + i, len * width)).collect()
}

/// The spans of a batch that holds the queries of all sequences, or of each sequence cut into chunks.
fn spans(cache: &Cache, chunk: usize) -> Vec<Span<'_>> {
    let mut spans = Vec::new();
    let mut start = 0;
    for ((len, queries), block_table) in LENGTHS.into_iter().zip(&cache.tables) {
        let mut done = 0;
        while done < queries {
            let rows = chunk.min(queries - done);
            spans.push(Span { start, len: rows, context: len - queries + done, block_table });
            (start, done) = (start + rows, done + rows);
        }
    }
    spans
}

const QUERIES: usize = 30;

/// `run` by blocks of so many positions and chunks of so many queries agrees with `want`, and no device, block or chunk
/// changes a bit.
fn bits_depend_on_nothing_else(run: impl Fn(&Cpu, usize, usize) -> Vec<f32>, want: &[f32], what: &str) {
    let first = run(&Cpu::single_threaded(), 16, 99);
    assert_close(&first, want, 1e-5, what);
    for cpu in devices() {
        for (block_size, chunk) in [(16, 99), (1, 1), (64, 3), (5, 7)] {
            let got = run(&cpu, block_size, chunk);
            assert!(bits(&got) == bits(&first), "{what}, blocks of {block_size}, chunks of {chunk}, {cpu:?}");
        }
    }
}

#[test]
fn mla_attention_agrees_and_its_bits_depend_on_nothing_else() {
    for (heads, kv_lora, rope) in [(8, 64, 16), (1, 16, 4), (7, 100, 10), (16, 70, 8)] {
        let shape = MlaShape { heads, kv_lora, rope, scale: 0.2 };
        let rows = sequences(1, kv_lora + rope);
        let (latent, rope) = (random(20, QUERIES * heads * kv_lora), random(21, QUERIES * heads * rope));
        let query = MlaQuery { latent: &latent, rope: &rope };
        let run = |cpu: &Cpu, block_size: usize, chunk: usize| {
            let cache = Cache::new(&rows, kv_lora + shape.rope, block_size);
            let mut out = vec![f32::NAN; latent.len()];
            cpu.mla_attention(shape, query, cache.pages(), &spans(&cache, chunk), &mut out);
            out
        };
        let cache = Cache::new(&rows, kv_lora + shape.rope, 16);
        let mut want = vec![f32::NAN; latent.len()];
        plain::mla_attention(shape, query, cache.pages(), &spans(&cache, 99), &mut want);
        bits_depend_on_nothing_else(run, &want, &format!("{shape:?}"));
    }
}

#[test]
fn expanded_attention_agrees_and_its_bits_depend_on_nothing_else() {
    for [heads, kv_lora, nope, rope, v] in [[8, 64, 32, 16, 32], [1, 16, 8, 4, 8], [3, 100, 24, 10, 20]] {
        let shape = ExpandedShape { heads, kv_lora, nope, rope, v, scale: 0.2 };
        let rows = sequences(1, kv_lora + rope);
        let query = random(20, QUERIES * heads * (nope + rope));
        let up = Weight::from_f32(heads * (nope + v), kv_lora, random(21, heads * (nope + v) * kv_lora));
        let up = up.expect("the shape is right");
        let run = |cpu: &Cpu, block_size: usize, chunk: usize| {
            let cache = Cache::new(&rows, kv_lora + rope, block_size);
            let mut out = vec![f32::NAN; QUERIES * heads * v];
            cpu.expanded_attention(shape, (&query, &up), cache.pages(), &spans(&cache, chunk), &mut out);
            out
        };
        let cache = Cache::new(&rows, kv_lora + rope, 16);
        let mut want = vec![f32::NAN; QUERIES * heads * v];
        plain::expanded_attention(shape, (&query, &up), cache.pages(), &spans(&cache, 99), &mut want);
        bits_depend_on_nothing_else(run, &want, &format!("{shape:?}"));
    }
}

#[test]
fn gqa_attention_agrees_and_its_bits_depend_on_nothing_else() {
    for (heads, kv_heads, head_dim) in [(8, 2, 64), (4, 4, 16), (9, 1, 20), (16, 2, 128)] {
        let shape = GqaShape { heads, kv_heads, head_dim, scale: 0.3 };
        let width = kv_heads * head_dim;
        let (keys, values) = (sequences(1, width), sequences(11, width));
        let query = random(30, QUERIES * heads * head_dim);
        let caches =
            |block_size| (Cache::new(&keys, width, block_size), Cache::new(&values, width, block_size));
        let run = |cpu: &Cpu, block_size: usize, chunk: usize| {
            let (keys, values) = caches(block_size);
            let mut out = vec![f32::NAN; query.len()];
            let pages = KvPages { keys: keys.pages(), values: values.pages() };
            cpu.gqa_attention(shape, &query, pages, &spans(&keys, chunk), &mut out);
            out
        };
        let (k, v) = caches(16);
        let mut want = vec![f32::NAN; query.len()];
        let pages = KvPages { keys: k.pages(), values: v.pages() };
        plain::gqa_attention(shape, &query, pages, &spans(&k, 99), &mut want);
        bits_depend_on_nothing_else(run, &want, &format!("{shape:?}"));
    }
}

#[test]
fn threads_share_attention_that_is_large_enough() {
    let shape = MlaShape { heads: 8, kv_lora: 64, rope: 16, scale: 0.1 };
    let rows = [random(1, 300 * 80)];
    let cache = Cache::new(&rows, 80, 16);
    let (latent, rope) = (random(2, 40 * 8 * 64), random(3, 40 * 8 * 16));
    let run = |cpu: &Cpu| {
        let spans = [Span { start: 0, len: 40, context: 260, block_table: &cache.tables[0] }];
        let mut out = vec![0.0; latent.len()];
        cpu.mla_attention(shape, MlaQuery { latent: &latent, rope: &rope }, cache.pages(), &spans, &mut out);
        bits(&out)
    };
    let want = run(&Cpu::single_threaded());
    assert!(devices().iter().all(|cpu| run(cpu) == want));
}
