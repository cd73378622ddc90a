//! Times of the CPU operations, and their ratio to the `gemm` crate on f32.
//!
//! `cargo bench -p heliostat-kernels [-- FILTER]`; one thread. GB/s counts each operand once, in its storage type.

use std::io::Write;
use std::time::{Duration, Instant};

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::attention::{MlaQuery, MlaShape, Pages, Span};
use heliostat_kernels::cpu::router::{GroupScore, Groups, Router, Scoring};
use heliostat_kernels::dtype::f32_to_bf16;
use heliostat_kernels::weight::{Block, Weight};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn main() -> std::io::Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let cpu = Cpu::single_threaded();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:?}, one thread", cpu.isa())?;
    writeln!(out, "{:36} {:>10} {:>9} {:>8} {:>8}", "op", "us", "GFLOP/s", "GB/s", "x gemm")?;
    for (n, k) in [(128, 256), (256, 128), (4096, 256), (2048, 2048)] {
        for m in [1, 8, 64, 512] {
            for row in products(&cpu, m, n, k, &filter) {
                writeln!(out, "{row}")?;
            }
        }
    }
    for row in attention(&cpu, &filter).into_iter().chain(small(&cpu, &filter)) {
        writeln!(out, "{row}")?;
    }
    Ok(())
}

/// The best of many: on a shared machine the least disturbed one.
fn time(mut call: impl FnMut()) -> Duration {
    call();
    let start = Instant::now();
    call();
    let once = start.elapsed().max(Duration::from_nanos(50));
    let repeats = (500_000 / once.as_nanos()).clamp(1, 10_000) as u32;
    let sample = |_| {
        let start = Instant::now();
        (0..repeats).for_each(|_| call());
        start.elapsed() / repeats
    };
    (0..25).map(sample).min().unwrap_or_default()
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn weights(n: usize, k: usize) -> [Weight; 3] {
    let values = random(1, n * k);
    let bf16 = values.iter().map(|&v| f32_to_bf16(v)).collect();
    let mut rng = StdRng::seed_from_u64(2);
    let codes = (0..n * k).map(|_| rng.random_range(0..0x7f) | (rng.random_range(0..2u8) << 7)).collect();
    let scales = vec![0.01; n.div_ceil(128) * k.div_ceil(128)];
    [
        Weight::from_f32(n, k, values).expect("lengths fit"),
        Weight::from_bf16(n, k, bf16).expect("lengths fit"),
        Weight::from_f8(n, k, codes, scales, Block::DEEPSEEK).expect("lengths fit"),
    ]
}

fn row(name: &str, took: Duration, flops: usize, bytes: usize, ratio: Option<f64>) -> String {
    let seconds = took.as_secs_f64();
    let (us, gflops, gb) = (seconds * 1e6, flops as f64 / seconds / 1e9, bytes as f64 / seconds / 1e9);
    let ratio = ratio.map(|ratio| format!("{ratio:8.2}")).unwrap_or_default();
    format!("{name:36} {us:10.2} {gflops:9.1} {gb:8.1} {ratio}")
}

/// One product in all storage types; the ratio is the speed relative to `gemm` on f32.
fn products(cpu: &Cpu, m: usize, n: usize, k: usize, filter: &str) -> Vec<String> {
    if !"matmul".contains(filter) {
        return Vec::new();
    }
    let (x, mut y, [f32, bf16, f8]) = (random(3, m * k), vec![0.0; m * n], weights(n, k));
    let dense = f32.dequantized();
    let reference = time(|| gemm_f32(m, n, k, (&x, &dense, &mut y)));
    let flops = 2 * m * n * k;
    let io = 4 * m * (n + k);
    let mut rows = vec![row(&format!("gemm {m}x{n}x{k}"), reference, flops, io + 4 * n * k, None)];
    for w in [f32, bf16, f8] {
        let took = time(|| cpu.matmul(&x, &w, &mut y));
        let name = format!("matmul {m}x{n}x{k} {}", w.dtype().name());
        let ratio = reference.as_secs_f64() / took.as_secs_f64();
        rows.push(row(&name, took, flops, io + w.size_bytes(), Some(ratio)));
    }
    rows
}

fn gemm_f32(m: usize, n: usize, k: usize, (x, w, y): (&[f32], &[f32], &mut [f32])) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    let (n_stride, k_stride) = (n as isize, k as isize);
    // SAFETY: the strides describe x[m][k], w[n][k] transposed and y[m][n], whose lengths are asserted above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n_stride,
            false,
            x.as_ptr(),
            1,
            k_stride,
            w.as_ptr(),
            k_stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Latent attention of the bundled model and of DeepSeek-V3, decode and prefill.
fn attention(cpu: &Cpu, filter: &str) -> Vec<String> {
    let mut rows = Vec::new();
    if !"mla".contains(filter) {
        return rows;
    }
    for (heads, kv_lora, rope) in [(8, 64, 16), (128, 512, 64)] {
        for (len, context) in [(1usize, 511usize), (1, 4095), (64, 0)] {
            let shape = MlaShape { heads, kv_lora, rope, scale: 0.1 };
            let blocks = (len + context).div_ceil(64);
            let table: Vec<u32> = (0..blocks as u32).rev().collect();
            let data = random(1, blocks * 64 * (kv_lora + rope));
            let cache = Pages { data: &data, block_size: 64, width: kv_lora + rope };
            let (latent, rotated) = (random(2, len * heads * kv_lora), random(3, len * heads * rope));
            let query = MlaQuery { latent: &latent, rope: &rotated };
            let spans = [Span { start: 0, len, context, block_table: &table }];
            let mut out = vec![0.0; latent.len()];
            let took = time(|| cpu.mla_attention(shape, query, cache, &spans, &mut out));
            let pairs = len * context + len * (len + 1) / 2;
            let name = format!("mla {heads}x({kv_lora}+{rope}) {len} after {context}");
            rows.push(row(&name, took, 2 * pairs * heads * (2 * kv_lora + rope), data.len() * 4, None));
        }
    }
    rows
}

/// What is left of a layer: norm, activation, router, in rows of the bundled model.
fn small(cpu: &Cpu, filter: &str) -> Vec<String> {
    let mut rows = Vec::new();
    for tokens in [1, 64].into_iter().filter(|_| "small".contains(filter)) {
        let (x, gamma, mut out) = (random(1, tokens * 256), random(2, 256), vec![0.0; tokens * 256]);
        let took = time(|| cpu.rms_norm(&x, &gamma, 1e-6, &mut out));
        rows.push(row(&format!("rms_norm {tokens}x256"), took, tokens * 256 * 4, tokens * 256 * 8, None));
        let took = time(|| cpu.silu_mul(&mut out, &x));
        rows.push(row(&format!("silu_mul {tokens}x256"), took, tokens * 256 * 20, tokens * 256 * 12, None));
        let bias = random(3, 32);
        let router = Router {
            scoring: Scoring::Sigmoid,
            bias: Some(&bias),
            groups: Some(Groups { count: 4, top: 2, score: GroupScore::TopTwo }),
            top_k: 4,
            normalize: true,
            scale: 2.5,
        };
        let logits = random(4, tokens * 32);
        let (mut ids, mut weights) = (vec![0; tokens * 4], vec![0.0; tokens * 4]);
        let took = time(|| cpu.route(&router, &logits, &mut ids, &mut weights));
        rows.push(row(&format!("route {tokens}x32"), took, tokens * 32, tokens * 32 * 4, None));
    }
    rows
}
