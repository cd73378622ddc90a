//! What lies between the products: norms, rotation and cache writes, activation, quantisation, routing, draws.

use half::bf16;
use heliostat_kernels::cpu::rope::RopeStyle;
use heliostat_kernels::cpu::router::{GroupScore, Groups, Scoring};
use heliostat_kernels::cuda::activation::{Activation, ActivationArgs, RowSet};
use heliostat_kernels::cuda::norm::{EmbedArgs, Norm, NormArgs, NormInput};
use heliostat_kernels::cuda::rope::{Angles, MlaAppend, MlaQuery, MlaRopeArgs, PagedRows, Rope};
use heliostat_kernels::cuda::router::{Routing, RoutingArgs, RoutingRule, slot_table};
use heliostat_kernels::cuda::rows::{Bf16Rows, Fp8Rows, RowsOut};
use heliostat_kernels::cuda::sample::{LogprobsOut, SampleArgs, SampleRow, Sampling};
use heliostat_kernels::cuda::{Buffer, CudaError};

use super::{Bench, EXPERTS, HEADS, HIDDEN, LATENT, ROPE, SLOTS, TOP_K, VOCAB, WIDTH, rows_of_expert};
use crate::bench::floor::Cost;

const EPS: f32 = 1e-6;
/// Rank of the query's projection, and elements of a row in which it lies.
const QUERY_RANK: usize = 1536;
const FIRST: usize = QUERY_RANK + LATENT + ROPE;

/// Measures all of them on `rows` rows.
pub(super) fn measure(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    norms(bench, rows)?;
    rope(bench, rows)?;
    activations(bench, rows)?;
    router(bench, rows)?;
    draws(bench, rows)
}

/// Rows of output, in BF16 and FP8.
struct Out {
    bf16: Buffer<bf16>,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    scale_stride: usize,
}

impl Out {
    fn new(bench: &Bench<'_>, rows: usize, width: usize) -> Result<Self, CudaError> {
        let scale_stride = rows.next_multiple_of(4);
        Ok(Self {
            bf16: bench.device.alloc(rows * width)?,
            codes: bench.device.alloc(rows * width)?,
            scales: bench.device.alloc(width.div_ceil(128) * scale_stride)?,
            scale_stride,
        })
    }

    fn fp8(&self) -> RowsOut<'_> {
        let Self { codes, scales, scale_stride, .. } = self;
        RowsOut { bf16: None, fp8: Some(Fp8Rows { codes, scales, scale_stride: *scale_stride }) }
    }

    fn both(&self) -> RowsOut<'_> {
        RowsOut { bf16: Some(&self.bf16), ..self.fp8() }
    }
}

fn norms(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    let norm = Norm::new(&bench.device)?;
    let (residual, branch) = (bench.f32(rows * HIDDEN)?, bench.bf16(rows * HIDDEN)?);
    let (gamma, out) = (bench.f32(HIDDEN)?, Out::new(bench, rows, HIDDEN)?);
    let input = NormInput::Residual { residual: &residual, branch: Some(&branch) };
    for (name, out, bytes) in
        [("add and norm, FP8", out.fp8(), 11), ("add and norm, BF16 and FP8", out.both(), 13)]
    {
        let args = NormArgs { rows, input, gamma: &gamma, eps: EPS, out };
        let cost = Cost::moving(rows * HIDDEN * bytes);
        bench.measure((name, rows), Some(cost), |stream| norm.run(stream, &args))?;
    }

    let (first, gamma) = (bench.bf16(rows * FIRST)?, bench.f32(QUERY_RANK)?);
    let out = Out::new(bench, rows, QUERY_RANK)?;
    let input = NormInput::Rows(Bf16Rows { data: &first, stride: FIRST });
    let args = NormArgs { rows, input, gamma: &gamma, eps: EPS, out: out.fp8() };
    let cost = Cost::moving(rows * QUERY_RANK * 3);
    bench.measure(("q_a norm, FP8", rows), Some(cost), |stream| norm.run(stream, &args))?;

    let (table, positions) = (bench.bf16(4096 * HIDDEN)?, bench.device.alloc(rows)?);
    let tokens = bench.device.upload(&(0..rows as u32).map(|row| row * 13 % 4096).collect::<Vec<_>>())?;
    let args = EmbedArgs {
        rows,
        width: HIDDEN,
        table: &table,
        tokens: &tokens,
        positions: &positions,
        residual: &residual,
    };
    let cost = Cost::moving(rows * HIDDEN * 6);
    bench.measure(("embed", rows), Some(cost), |stream| norm.embed(stream, &args))
}

fn rope(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    const POSITIONS: u32 = 4096;
    let kernels = Rope::new(&bench.device)?;
    let inv_freq: Vec<f32> =
        (0..ROPE / 2).map(|pair| 10_000f32.powf(-(2.0 * pair as f32) / ROPE as f32)).collect();
    let angles = Angles::new(&bench.device, RopeStyle::Interleaved, &inv_freq, 1.0, POSITIONS as usize)?;
    let upload = |values: Vec<u32>| bench.device.upload(&values);
    let positions = upload((0..rows as u32).map(|row| row * 13 % POSITIONS).collect())?;
    let seq_of_row = upload((0..rows as u32).collect())?;
    // Each sequence has one block, at all its positions.
    let block_table = upload((0..rows as u32 * 64).map(|at| at / 64).collect())?;
    let paged = PagedRows {
        rows,
        positions: &positions,
        seq_of_row: &seq_of_row,
        block_table: &block_table,
        blocks_max: 64,
    };
    let query = bench.bf16(rows * HEADS * (128 + ROPE))?;
    let absorbed = bench.bf16(rows * HEADS * (LATENT + ROPE))?;
    let (first, gamma) = (bench.bf16(rows * FIRST)?, bench.f32(LATENT)?);
    let cache = bench.bf16(rows * 64 * (LATENT + ROPE))?;
    let fresh = first.slice(QUERY_RANK..first.len());
    let args = MlaRopeArgs {
        rows: paged,
        angles: &angles,
        kv_lora: LATENT,
        query: Some(MlaQuery { heads: HEADS, nope: 128, query: &query, absorbed: &absorbed }),
        append: Some(MlaAppend {
            fresh: Bf16Rows { data: &fresh, stride: FIRST },
            gamma: &gamma,
            eps: EPS,
            cache: &cache,
        }),
    };
    let cost = Cost::moving(rows * (HEADS * ROPE + LATENT + ROPE) * 4);
    bench.measure(("rope and append", rows), Some(cost), |stream| kernels.mla(stream, &args))
}

fn activations(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    let activation = Activation::new(&bench.device)?;
    let (x, out) = (bench.bf16(rows * 2 * WIDTH)?, Out::new(bench, rows, WIDTH)?);
    let x = Bf16Rows { data: &x, stride: 2 * WIDTH };
    let args = ActivationArgs { rows: RowSet::First(rows), width: WIDTH, x, out: out.fp8() };
    let cost = Cost::moving(rows * WIDTH * 5);
    bench.measure(("silu, shared expert", rows), Some(cost), |stream| activation.silu_mul(stream, &args))?;

    let padded = rows_of_expert(rows).next_multiple_of(128);
    let counts: Vec<u32> = (0..SLOTS).map(|slot| ((rows * TOP_K + slot) / SLOTS) as u32).collect();
    let starts: Vec<u32> = (0..=SLOTS).map(|slot| (slot * padded) as u32).collect();
    let (start, counts) = (bench.device.upload(&starts)?, bench.device.upload(&counts)?);
    let capacity = SLOTS * padded;
    let (x, out) = (bench.bf16(capacity * 2 * WIDTH)?, Out::new(bench, capacity, WIDTH)?);
    let segments = RowSet::Segments { start: &start, rows: &counts, capacity };
    let x = Bf16Rows { data: &x, stride: 2 * WIDTH };
    let args = ActivationArgs { rows: segments, width: WIDTH, x, out: out.fp8() };
    let cost = Cost::moving(rows * TOP_K * WIDTH * 5);
    bench.measure(("silu, experts", rows), Some(cost), |stream| activation.silu_mul(stream, &args))?;

    let width = HEADS * 128;
    let (x, out) = (bench.bf16(rows * width)?, Out::new(bench, rows, width)?);
    let x = Bf16Rows { data: &x, stride: width };
    let args = ActivationArgs { rows: RowSet::First(rows), width, x, out: out.fp8() };
    let cost = Cost::moving(rows * width * 3);
    bench.measure(("quantise for o_proj", rows), Some(cost), |stream| activation.quantize(stream, &args))
}

fn router(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    let routing = Routing::new(&bench.device)?;
    let rule = RoutingRule {
        experts: EXPERTS,
        scoring: Scoring::Sigmoid,
        groups: Some(Groups { count: 8, top: 4, score: GroupScore::TopTwo }),
        top_k: TOP_K,
        normalize: true,
        scale: 2.5,
    };
    let (logits, bias) = (bench.f32(rows * EXPERTS)?, bench.f32(EXPERTS)?);
    let physical: Vec<u32> = (0..288).map(|slot| slot % EXPERTS as u32).collect();
    let table = bench.device.upload(&slot_table(EXPERTS, &physical))?;
    let (positions, loads) = (bench.device.alloc(rows)?, bench.device.alloc(EXPERTS)?);
    let (ids, slots) = (bench.device.alloc(rows * TOP_K)?, bench.device.alloc(rows * TOP_K)?);
    let weights = bench.device.alloc(rows * TOP_K)?;
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
        weights: &weights,
        loads: Some(&loads),
    };
    let cost = Cost::moving(rows * (EXPERTS * 4 + TOP_K * 12));
    bench.measure(("choice of experts", rows), Some(cost), |stream| routing.run(stream, &args))
}

fn draws(bench: &mut Bench<'_>, rows: usize) -> Result<(), CudaError> {
    const TOP_MAX: usize = 20;
    let kernels = Sampling::new(&bench.device)?;
    let logits = bench.f32(rows * VOCAB)?;
    let plain =
        SampleRow { uniform: 0.4, temperature: 1.0, top_p: 1.0, min_p: 0.0, top_k: 0, logprobs: None };
    let greedy = SampleRow { temperature: 0.0, ..plain };
    let settings = [
        ("draw, greedy", greedy),
        ("draw, temperature", plain),
        ("draw, top-k 50 and top-p 0.95", SampleRow { top_k: 50, top_p: 0.95, ..plain }),
        ("draw, greedy with 5 log-probabilities", SampleRow { logprobs: Some(5), ..greedy }),
    ];
    let word = |len: usize| bench.device.alloc::<u32>(len);
    let (tokens, status, ranks, top_tokens) = (word(rows)?, word(rows)?, word(rows)?, word(rows * TOP_MAX)?);
    let (logprobs, top_logprobs) = (bench.device.alloc(rows)?, bench.device.alloc(rows * TOP_MAX)?);
    let logprobs = LogprobsOut {
        logprobs: &logprobs,
        ranks: &ranks,
        top_tokens: &top_tokens,
        top_logprobs: &top_logprobs,
        top_max: TOP_MAX,
    };
    for (name, row) in settings {
        let words: Vec<u32> = (0..rows).flat_map(|_| SampleRow::words(Some(&row))).collect();
        let params = bench.device.upload(&words)?;
        let args = SampleArgs {
            rows,
            vocab: VOCAB,
            logits: &logits,
            stride: VOCAB,
            params: &params,
            tokens: &tokens,
            status: &status,
            logprobs,
        };
        let cost = Cost::moving(rows * VOCAB * 4);
        bench.measure((name, rows), Some(cost), |stream| kernels.sample(stream, &args))?;
    }
    Ok(())
}
