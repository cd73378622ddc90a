//! Rotary embedding with the norms and the cache writes around it.

use half::bf16;
use heliostat_kernels::cpu::plain;
use heliostat_kernels::cpu::rope::{RopeLayout, RopeStyle, RopeTable};
use heliostat_kernels::cuda::Buffer;
use heliostat_kernels::cuda::rope::{Angles, GqaRopeArgs, MlaAppend, MlaQuery, MlaRopeArgs, PagedRows, Rope};
use heliostat_kernels::cuda::rows::Bf16Rows;

use crate::cuda_support::{assert_close, normal, rounded};
use crate::{Gpu, NONE, poison};

const EPS: f32 = 1e-6;
const FACTOR: f32 = 1.25;
const POSITIONS: usize = 300;
const BLOCKS: usize = 12;
const STYLES: [RopeStyle; 2] = [RopeStyle::Interleaved, RopeStyle::HalfSplit];

/// Heads, elements not rotated, rotated, of a latent, and before the latent in its row.
const MLA_SHAPES: [(usize, usize, usize, usize, usize); 5] =
    [(4, 16, 8, 24, 0), (6, 32, 16, 64, 136), (3, 10, 6, 21, 1), (8, 128, 64, 512, 1536), (5, 8, 4, 40, 8)];

/// Rows of three sequences, two of them idle, with the blocks of each.
struct Batch {
    positions: Vec<u32>,
    seqs: Vec<u32>,
    tables: Vec<u32>,
}

impl Batch {
    fn new() -> Self {
        let positions = vec![0, 1, 63, NONE, 64, 65, 128, 299, NONE, 7, 200];
        let seqs = vec![2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1];
        // Sequence 0 has blocks 4, 3, 9; 1 has 0, 11, 5, 7, 2; 2 has 8.
        let tables = vec![4, 3, 9, 0, 0, 0, 11, 5, 7, 2, 8, 0, 0, 0, 0];
        Self { positions, seqs, tables }
    }

    fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Rows that are not idle, with the place of each in the cache.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let live = self.positions.iter().zip(&self.seqs).enumerate();
        live.filter(|(_, (position, _))| **position != NONE).map(|(row, (&position, &seq))| {
            let (position, seq) = (position as usize, seq as usize);
            (row, self.tables[seq * 5 + position / 64] as usize * 64 + position % 64)
        })
    }
}

/// A batch on the device.
struct OnDevice([Buffer<u32>; 3]);

impl OnDevice {
    fn new(gpu: &Gpu, batch: &Batch) -> Self {
        Self([gpu.up(&batch.positions), gpu.up(&batch.seqs), gpu.up(&batch.tables)])
    }

    /// One row, or all.
    fn rows(&self, rows: usize) -> PagedRows<'_> {
        let Self([positions, seq_of_row, block_table]) = self;
        PagedRows { rows, positions, seq_of_row, block_table, blocks_max: 5 }
    }

    fn from(&self, row: usize) -> Self {
        let Self([positions, seqs, tables]) = self;
        Self([positions.slice(row..row + 1), seqs.slice(row..row + 1), tables.clone()])
    }
}

struct Turn {
    style: RopeStyle,
    half: usize,
    inv_freq: Vec<f32>,
}

impl Turn {
    fn new(style: RopeStyle, half: usize) -> Self {
        let inv_freq = (0..half).map(|pair| 10_000f32.powf(-(pair as f32) / half as f32)).collect();
        Self { style, half, inv_freq }
    }

    fn angles(&self, gpu: &Gpu) -> Angles {
        Angles::new(&gpu.device, self.style, &self.inv_freq, FACTOR, POSITIONS).unwrap()
    }

    /// Rotates every head; idle rows come out as nonsense.
    fn rotate(&self, x: &mut [f32], heads: usize, offset: usize, positions: &[u32]) {
        let angle = |position: usize, pair: usize| f64::from(position as f32 * self.inv_freq[pair]);
        let table: Vec<(f32, f32)> = (0..POSITIONS)
            .flat_map(|position| (0..self.half).map(move |pair| angle(position, pair).sin_cos()))
            .map(|(sin, cos)| (cos as f32 * FACTOR, sin as f32 * FACTOR))
            .collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = table.into_iter().unzip();
        let table = RopeTable { cos: &cos, sin: &sin, half: self.half };
        let layout = RopeLayout { heads, head_dim: x.len() / positions.len() / heads, offset };
        let positions: Vec<u32> = positions.iter().map(|&p| if p == NONE { 0 } else { p }).collect();
        plain::rope(self.style, x, layout, &positions, table);
    }
}

fn norm(x: &[f32], gamma: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    plain::rms_norm(x, gamma, EPS, &mut out);
    out
}

/// Live entries close, all others still poison. `want` holds the live ones and where they begin.
#[track_caller]
fn check(got: &[f32], width: usize, want: &[(usize, Vec<f32>)], what: &str) {
    let mut rest = got.to_vec();
    let mut live = Vec::new();
    for (at, values) in want {
        live.extend_from_slice(&got[*at..at + values.len()]);
        rest[*at..at + values.len()].fill(-77.0);
    }
    let want: Vec<f32> = want.iter().flat_map(|(_, values)| values.clone()).collect();
    assert_close(&live, &want, 5e-6, what);
    let other = rest.iter().position(|&x| x != -77.0);
    assert!(other.is_none(), "{what}: wrote at {:?} of rows of {width}", other);
}

#[test]
fn mla_queries_and_cache() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Rope::new(&gpu.device).unwrap();
    let batch = Batch::new();
    let on_device = OnDevice::new(&gpu, &batch);
    let rows = batch.rows();
    for (style, (heads, nope, rope, latent, before)) in
        STYLES.into_iter().flat_map(|style| MLA_SHAPES.map(|shape| (style, shape)))
    {
        let what = format!("{style:?}, {heads} heads of {nope} + {rope}, latent {latent}");
        let turn = Turn::new(style, rope / 2);
        let angles = turn.angles(&gpu);
        let width = latent + rope;
        let stride = before + width;
        let (query_bits, mut query) = rounded(&normal(1, rows * heads * (nope + rope)));
        let (fresh_bits, fresh) = rounded(&normal(2, rows * stride));
        let gamma = normal(3, latent);
        turn.rotate(&mut query, heads, nope, &batch.positions);
        let mut new: Vec<f32> = fresh.chunks(stride).flat_map(|row| row[before..].to_vec()).collect();
        turn.rotate(&mut new, 1, latent, &batch.positions);
        let want_query: Vec<(usize, Vec<f32>)> = batch
            .places()
            .flat_map(|(row, _)| (0..heads).map(move |head| row * heads + head))
            .map(|at| (at * width + latent, query[at * (nope + rope) + nope..][..rope].to_vec()))
            .collect();
        let want_cache: Vec<(usize, Vec<f32>)> = batch
            .places()
            .map(|(row, place)| {
                let new = &new[row * width..(row + 1) * width];
                (place * width, [norm(&new[..latent], &gamma), new[latent..].to_vec()].concat())
            })
            .collect();

        let (query, fresh) = (gpu.up(&query_bits), gpu.up(&fresh_bits));
        let gamma = gpu.up(&gamma);
        let run = |rows: PagedRows<'_>, from: usize, (absorbed, cache): (&Buffer<bf16>, &Buffer<bf16>)| {
            let row = heads * (nope + rope);
            let query = query.slice(from * row..(from + rows.rows) * row);
            let fresh = fresh.slice(from * stride + before..(from + rows.rows) * stride);
            let args = MlaRopeArgs {
                rows,
                angles: &angles,
                kv_lora: latent,
                query: Some(MlaQuery { heads, nope, query: &query, absorbed }),
                append: Some(MlaAppend {
                    fresh: Bf16Rows { data: &fresh, stride },
                    gamma: &gamma,
                    eps: EPS,
                    cache,
                }),
            };
            kernels.mla(&gpu.stream, &args).unwrap();
        };
        let absorbed = gpu.up(&vec![poison(); rows * heads * width]);
        let cache = gpu.up(&vec![poison(); BLOCKS * 64 * width]);
        run(on_device.rows(rows), 0, (&absorbed, &cache));
        let (got_query, got_cache) = (gpu.down_f32(&absorbed), gpu.down_f32(&cache));
        check(&got_query, width, &want_query, &format!("{what}: query"));
        check(&got_cache, width, &want_cache, &format!("{what}: cache"));
        // One row at a time, queries and cache: the same bits.
        let cache = gpu.up(&vec![poison(); BLOCKS * 64 * width]);
        for row in 0..rows {
            let alone = gpu.up(&vec![poison(); heads * width]);
            run(on_device.from(row).rows(1), row, (&alone, &cache));
            let at = row * heads * width;
            assert_eq!(gpu.down_f32(&alone), got_query[at..at + heads * width], "{what}: row {row}");
        }
        assert_eq!(gpu.down_f32(&cache), got_cache, "{what}: rows one at a time");
    }
}

#[test]
fn gqa_heads_and_cache() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Rope::new(&gpu.device).unwrap();
    let batch = Batch::new();
    let on_device = OnDevice::new(&gpu, &batch);
    let rows = batch.rows();
    // heads, key heads, elements of a head, of which rotated
    let shapes = [(4, 2, 16, 16), (8, 4, 24, 24), (6, 1, 30, 10), (16, 2, 128, 128), (4, 1, 256, 64)];
    for (style, (heads, kv_heads, head_dim, rope)) in
        STYLES.into_iter().flat_map(|style| shapes.map(|shape| (style, shape)))
    {
        let what = format!("{style:?}, {heads}/{kv_heads} heads of {head_dim}");
        let turn = Turn::new(style, rope / 2);
        let angles = turn.angles(&gpu);
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let stride = queries + 2 * keys;
        let (bits, x) = rounded(&normal(4, rows * stride));
        let (query_gamma, key_gamma) = (normal(5, head_dim), normal(6, head_dim));
        let part = |from: usize, len: usize| -> Vec<f32> {
            x.chunks(stride).flat_map(|row| row[from..from + len].to_vec()).collect()
        };
        let mut query = norm(&part(0, queries), &query_gamma);
        let mut key = norm(&part(queries, keys), &key_gamma);
        turn.rotate(&mut query, heads, 0, &batch.positions);
        turn.rotate(&mut key, kv_heads, 0, &batch.positions);
        let value = part(queries + keys, keys);
        let cached = |values: &[f32]| -> Vec<(usize, Vec<f32>)> {
            batch
                .places()
                .map(|(row, at)| (at * keys, values[row * keys..(row + 1) * keys].to_vec()))
                .collect()
        };
        let (data, query_gamma, key_gamma) = (gpu.up(&bits), gpu.up(&query_gamma), gpu.up(&key_gamma));
        let part = |from: usize| data.slice(from..data.len());
        let caches = [(); 2].map(|()| gpu.up(&vec![poison(); BLOCKS * 64 * keys]));
        let out = gpu.up(&vec![poison(); rows * queries]);
        let (query_in, key_in, value_in) = (part(0), part(queries), part(queries + keys));
        let mut args = GqaRopeArgs {
            rows: on_device.rows(rows),
            angles: &angles,
            heads,
            kv_heads,
            head_dim,
            query: Bf16Rows { data: &query_in, stride },
            key: Bf16Rows { data: &key_in, stride },
            value: Bf16Rows { data: &value_in, stride },
            query_gamma: &query_gamma,
            key_gamma: &key_gamma,
            eps: EPS,
            query_out: Bf16Rows { data: &out, stride: queries },
            keys: &caches[0],
            values: &caches[1],
        };
        kernels.gqa(&gpu.stream, &args).unwrap();
        let want: Vec<(usize, Vec<f32>)> = batch
            .places()
            .map(|(row, _)| (row * queries, query[row * queries..(row + 1) * queries].to_vec()))
            .collect();
        let got = gpu.down_f32(&out);
        check(&got, queries, &want, &format!("{what}: query"));
        check(&gpu.down_f32(&caches[0]), keys, &cached(&key), &format!("{what}: keys"));
        check(&gpu.down_f32(&caches[1]), keys, &cached(&value), &format!("{what}: values"));
        // In place: the same bits, and keys and values beside the queries stay.
        args.query_out = args.query;
        kernels.gqa(&gpu.stream, &args).unwrap();
        let all = gpu.down_f32(&data);
        for (row, _) in batch.places() {
            let (now, before) =
                (&all[row * stride..(row + 1) * stride], &x[row * stride..(row + 1) * stride]);
            assert_eq!(now[..queries], got[row * queries..(row + 1) * queries], "{what}: in place");
            assert_eq!(now[queries..], before[queries..], "{what}: beside the queries");
        }
    }
}
