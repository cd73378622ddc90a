//! How long each kernel takes for the shapes of DeepSeek-R1: microseconds, and GB/s of what must be moved.
//!
//! Inputs stay in the cache between replays, as most of them do between the kernels of a step.

use half::bf16;
use heliostat_kernels::cpu::rope::RopeStyle;
use heliostat_kernels::cpu::router::{GroupScore, Groups, Scoring};
use heliostat_kernels::cuda::activation::{Activation, ActivationArgs, RowSet};
use heliostat_kernels::cuda::norm::{EmbedArgs, Norm, NormArgs, NormInput};
use heliostat_kernels::cuda::rope::{Angles, GqaRopeArgs, MlaAppend, MlaQuery, MlaRopeArgs, PagedRows, Rope};
use heliostat_kernels::cuda::router::{Routing, RoutingArgs, RoutingRule, slot_table};
use heliostat_kernels::cuda::rows::Bf16Rows;
use heliostat_kernels::cuda::sample::{LogprobsOut, SampleArgs, SampleRow, Sampling};
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic};
use heliostat_kernels::cuda::{Buffer, CudaError, Stream};

use crate::cuda_support::time_us;
use crate::{Gpu, Out};

const HIDDEN: usize = 7168;
const CALLS: (usize, usize) = (12, 24);

struct Bench {
    gpu: Gpu,
    fill: Synthetic,
    rows: usize,
}

impl Bench {
    fn bf16(&self, len: usize) -> Buffer<bf16> {
        let buffer = self.gpu.device.alloc(len).unwrap();
        self.fill
            .bf16(&self.gpu.stream, &buffer, Distribution { seed: 1, mean: 0.0, deviation: 1.0 })
            .unwrap();
        buffer
    }

    fn f32(&self, len: usize) -> Buffer<f32> {
        let buffer = self.gpu.device.alloc(len).unwrap();
        self.fill
            .f32(&self.gpu.stream, &buffer, Distribution { seed: 2, mean: 0.0, deviation: 1.0 })
            .unwrap();
        buffer
    }

    /// Times `work`, which moves `bytes`.
    fn time(&self, name: &str, bytes: usize, mut work: impl FnMut(&Stream) -> Result<(), CudaError>) {
        let us = time_us(&self.gpu.stream, CALLS, |stream, _| work(stream));
        println!("{name:<28} rows {:>4}  {us:>8.2} us  {:>7.0} GB/s", self.rows, bytes as f64 / us / 1e3);
    }
}

#[test]
#[ignore = "measures"]
fn bench() {
    let Some(gpu) = Gpu::open() else { return };
    let fill = Synthetic::new(&gpu.device).unwrap();
    println!("{}", gpu.device.properties().name);
    let mut bench = Bench { gpu, fill, rows: 0 };
    for rows in [8, 128, 256] {
        bench.rows = rows;
        bench_norm(&bench);
        bench_rope(&bench);
        bench_activation(&bench);
        bench_router(&bench);
        bench_sample(&bench);
    }
    let weights = bench.gpu.device.alloc::<u8>(1 << 30).unwrap();
    bench.rows = 0;
    let scales = bench.f32(1 << 16);
    bench.time("synthetic fp8, 1 GiB", 1 << 30, |stream| {
        bench.fill.e4m3(stream, (&weights, &scales), (1, 0.02))
    });
}

fn bench_norm(bench: &Bench) {
    let (gpu, rows) = (&bench.gpu, bench.rows);
    let norm = Norm::new(&gpu.device).unwrap();
    let (residual, branch) = (bench.f32(rows * HIDDEN), bench.bf16(rows * HIDDEN));
    let (gamma, out) = (bench.f32(HIDDEN), Out::new(gpu, rows, HIDDEN));
    let input = NormInput::Residual { residual: &residual, branch: Some(&branch) };
    let args = NormArgs { rows, input, gamma: &gamma, eps: 1e-6, out: out.both() };
    bench.time("add, norm, bf16 and fp8", rows * HIDDEN * 13, |stream| norm.run(stream, &args));

    let (low, gamma, out) = (bench.bf16(rows * 2112), bench.f32(1536), Out::new(gpu, rows, 1536));
    let input = NormInput::Rows(Bf16Rows { data: &low, stride: 2112 });
    let args = NormArgs { rows, input, gamma: &gamma, eps: 1e-6, out: out.both() };
    bench.time("norm of q_a, bf16 and fp8", rows * 1536 * 5, |stream| norm.run(stream, &args));

    let (table, zeros) = (bench.bf16(1000 * HIDDEN), gpu.up(&vec![0u32; rows]));
    let tokens = gpu.up(&(0..rows as u32).collect::<Vec<_>>());
    let args = EmbedArgs {
        rows,
        width: HIDDEN,
        table: &table,
        tokens: &tokens,
        positions: &zeros,
        residual: &residual,
    };
    bench.time("embed", rows * HIDDEN * 6, |stream| norm.embed(stream, &args));
}

fn bench_rope(bench: &Bench) {
    let (gpu, rows) = (&bench.gpu, bench.rows);
    let rope = Rope::new(&gpu.device).unwrap();
    let inv_freq: Vec<f32> = (0..32).map(|pair| 10_000f32.powf(-(pair as f32) / 32.0)).collect();
    let angles = Angles::new(&gpu.device, RopeStyle::Interleaved, &inv_freq, 1.0, 4096).unwrap();
    let positions = gpu.up(&(0..rows as u32).map(|row| row * 13).collect::<Vec<_>>());
    let seqs = gpu.up(&(0..rows as u32).collect::<Vec<_>>());
    let tables = gpu.up(&(0..rows as u32 * 64).map(|at| at / 64).collect::<Vec<_>>());
    let paged =
        PagedRows { rows, positions: &positions, seq_of_row: &seqs, block_table: &tables, blocks_max: 64 };
    let (query, absorbed) = (bench.bf16(rows * 128 * 192), bench.bf16(rows * 128 * 576));
    let (fresh, gamma, cache) = (bench.bf16(rows * 2112), bench.f32(512), bench.bf16(rows * 64 * 576));
    let fresh = fresh.slice(1536..fresh.len());
    let query = MlaQuery { heads: 128, nope: 128, query: &query, absorbed: &absorbed };
    let fresh = Bf16Rows { data: &fresh, stride: 2112 };
    let append = MlaAppend { fresh, gamma: &gamma, eps: 1e-6, cache: &cache };
    let args =
        MlaRopeArgs { rows: paged, angles: &angles, kv_lora: 512, query: Some(query), append: Some(append) };
    bench.time("mla query and append", rows * (128 * 64 + 576) * 4, |stream| rope.mla(stream, &args));
    let args = MlaRopeArgs { query: None, ..args };
    bench.time("mla append", rows * 576 * 4, |stream| rope.mla(stream, &args));

    let inv_freq: Vec<f32> = (0..64).map(|pair| 10_000f32.powf(-(pair as f32) / 64.0)).collect();
    let angles = Angles::new(&gpu.device, RopeStyle::HalfSplit, &inv_freq, 1.0, 4096).unwrap();
    let (fused, gamma) = (bench.bf16(rows * 72 * 128), bench.f32(128));
    let caches = [bench.bf16(rows * 64 * 512), bench.bf16(rows * 64 * 512)];
    let [query, key, value] = [0, 64, 68].map(|head| fused.slice(head * 128..fused.len()));
    let part = |data| Bf16Rows { data, stride: 72 * 128 };
    let args = GqaRopeArgs {
        rows: paged,
        angles: &angles,
        heads: 64,
        kv_heads: 4,
        head_dim: 128,
        query: part(&query),
        key: part(&key),
        value: part(&value),
        query_gamma: &gamma,
        key_gamma: &gamma,
        eps: 1e-6,
        query_out: part(&query),
        keys: &caches[0],
        values: &caches[1],
    };
    bench.time("gqa 64/4 heads of 128", rows * 72 * 128 * 4, |stream| rope.gqa(stream, &args));
}

fn bench_activation(bench: &Bench) {
    let (gpu, rows) = (&bench.gpu, bench.rows);
    let activation = Activation::new(&gpu.device).unwrap();
    let width = 2048;
    let x = bench.bf16(rows * 2 * width);
    let out = Out::new(gpu, rows, width);
    let x = Bf16Rows { data: &x, stride: 2 * width };
    let args = ActivationArgs { rows: RowSet::First(rows), width, x, out: out.both() };
    bench.time("silu of 2048, bf16 and fp8", rows * width * 7, |stream| activation.silu_mul(stream, &args));

    // Nine segments of 8/9 of the rows each, as on one of 32 ranks.
    let each = (rows * 8).div_ceil(9) as u32;
    let padded = each.next_multiple_of(128);
    let start = gpu.up(&(0..=9).map(|segment| segment * padded).collect::<Vec<u32>>());
    let counts = gpu.up(&[each; 9]);
    let capacity = 9 * padded as usize * 4;
    let x = bench.bf16(capacity * 2 * width);
    let out = Out::new(gpu, capacity, width);
    let x = Bf16Rows { data: &x, stride: 2 * width };
    let set = RowSet::Segments { start: &start, rows: &counts, capacity };
    let mut args = ActivationArgs { rows: set, width, x, out: out.both() };
    args.out.bf16 = None;
    bench.time("silu of 9 experts, fp8", each as usize * 9 * width * 5, |stream| {
        activation.silu_mul(stream, &args)
    });

    let x = bench.bf16(rows * 16384);
    let out = Out::new(gpu, rows, 16384);
    let mut args = ActivationArgs {
        rows: RowSet::First(rows),
        width: 16384,
        x: Bf16Rows { data: &x, stride: 16384 },
        out: out.both(),
    };
    args.out.bf16 = None;
    bench.time("quantise 16384", rows * 16384 * 3, |stream| activation.quantize(stream, &args));
}

fn bench_router(bench: &Bench) {
    let (gpu, rows, experts) = (&bench.gpu, bench.rows, 256);
    let routing = Routing::new(&gpu.device).unwrap();
    let rule = RoutingRule {
        experts,
        scoring: Scoring::Sigmoid,
        groups: Some(Groups { count: 8, top: 4, score: GroupScore::TopTwo }),
        top_k: 8,
        normalize: true,
        scale: 2.5,
    };
    let (logits, bias) = (bench.f32(rows * experts), bench.f32(experts));
    let table = gpu.up(&slot_table(experts, &(0..288).map(|slot| slot % 256).collect::<Vec<_>>()));
    let [positions, loads] = [rows, experts].map(|len| gpu.up(&vec![0u32; len]));
    let [ids, slots] = [(); 2].map(|()| gpu.up(&vec![0u32; rows * 8]));
    let args = RoutingArgs {
        rows,
        rule,
        logits: &logits,
        positions: &positions,
        bias: Some(&bias),
        slot_table: Some(&table),
        salt: 0,
        ids: &ids,
        slots: &slots,
        weights: &bench.f32(rows * 8),
        loads: Some(&loads),
    };
    bench.time("router", rows * (experts * 4 + 96), |stream| routing.run(stream, &args));
}

fn bench_sample(bench: &Bench) {
    let (gpu, rows, vocab) = (&bench.gpu, bench.rows, 129_280);
    let kernels = Sampling::new(&gpu.device).unwrap();
    let logits = bench.f32(rows * vocab);
    let plain =
        SampleRow { uniform: 0.4, temperature: 1.0, top_p: 1.0, min_p: 0.0, top_k: 0, logprobs: None };
    let settings = [
        ("greedy", SampleRow { temperature: 0.0, ..plain }),
        ("temperature", plain),
        ("top-p", SampleRow { top_p: 0.95, ..plain }),
        ("top-k and top-p", SampleRow { top_k: 50, top_p: 0.95, ..plain }),
        ("greedy, 5 logprobs", SampleRow { temperature: 0.0, logprobs: Some(5), ..plain }),
    ];
    for (name, row) in settings {
        let words: Vec<u32> = (0..rows).flat_map(|_| SampleRow::words(Some(&row))).collect();
        let [tokens, status, ranks] = [(); 3].map(|()| gpu.up(&vec![0u32; rows]));
        let args = SampleArgs {
            rows,
            vocab,
            logits: &logits,
            stride: vocab,
            params: &gpu.up(&words),
            tokens: &tokens,
            status: &status,
            logprobs: LogprobsOut {
                logprobs: &bench.f32(rows),
                ranks: &ranks,
                top_tokens: &gpu.up(&vec![0; rows * 20]),
                top_logprobs: &bench.f32(rows * 20),
                top_max: 20,
            },
        };
        bench.time(&format!("sample: {name}"), rows * vocab * 4, |stream| kernels.sample(stream, &args));
    }
}
