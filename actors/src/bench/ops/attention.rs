//! Latent attention over a paged cache.

use half::bf16;
use heliostat_kernels::cuda::attention::{BatchMeta, Limits, Mla, MlaArgs, MlaDims, PAGE};
use heliostat_kernels::cuda::{Buffer, CudaError};

use super::{Bench, HEADS, LATENT, OpReport, ROPE};
use crate::bench::floor::{AttentionWidths, Cost};

/// Block tables that the calls take in turn: others' pages, so that no cache stays in the second-level cache.
const TABLES: usize = 4;

/// Measures decode at each batch and context.
pub(super) fn measure(bench: &mut Bench<'_>, batch: &[usize], contexts: &[usize]) -> Result<(), CudaError> {
    let (Some(&rows), Some(&context)) = (batch.iter().max(), contexts.iter().max()) else { return Ok(()) };
    let width = LATENT + ROPE;
    let dims = MlaDims { heads: HEADS, kv_lora: LATENT, rope: ROPE, scale: (width as f32).sqrt().recip() };
    let mla = Mla::new(&bench.device, dims, Limits { rows, positions: context })?;
    // Room for the largest step at least, and for all tables of the small ones.
    let pages = (rows * context.div_ceil(PAGE)).max(TABLES * 1024);
    let cache = bench.bf16(pages * PAGE * width)?;
    for &context in contexts {
        for &rows in batch {
            let decode = Decode::new(bench, (rows, context), pages)?;
            decode.measure(bench, &mla, &cache)?;
        }
    }
    Ok(())
}

struct Decode {
    rows: usize,
    context: usize,
    blocks_max: usize,
    positions: Buffer<u32>,
    seq_of_row: Buffer<u32>,
    tables: Vec<Buffer<u32>>,
    query: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl Decode {
    fn new(bench: &Bench<'_>, (rows, context): (usize, usize), pages: usize) -> Result<Self, CudaError> {
        let blocks_max = context.div_ceil(PAGE);
        let blocks = rows * blocks_max;
        // A fixed stride through all pages, so that neighbours in a sequence are none in memory.
        let page = |table: usize, block: usize| ((table * blocks + block) * 37 % pages) as u32;
        let table = |table: usize| {
            bench.device.upload(&(0..blocks).map(|block| page(table, block)).collect::<Vec<_>>())
        };
        Ok(Self {
            rows,
            context,
            blocks_max,
            positions: bench.device.upload(&vec![context as u32 - 1; rows])?,
            seq_of_row: bench.device.upload(&(0..rows as u32).collect::<Vec<_>>())?,
            tables: (0..TABLES).map(table).collect::<Result<_, _>>()?,
            query: bench.bf16(rows * HEADS * (LATENT + ROPE))?,
            out: bench.device.alloc(rows * HEADS * LATENT)?,
        })
    }

    fn meta(&self, call: usize) -> BatchMeta<'_> {
        BatchMeta {
            positions: &self.positions,
            seq_of_row: &self.seq_of_row,
            block_table: &self.tables[call % TABLES],
            blocks_max: self.blocks_max,
        }
    }

    fn measure(&self, bench: &mut Bench<'_>, mla: &Mla, cache: &Buffer<bf16>) -> Result<(), CudaError> {
        const CALLS: usize = 8;
        let Self { rows, context, query, out, .. } = self;
        let plan = bench.time_us(CALLS, |stream, call| mla.plan(stream, &self.meta(call), *rows))?;
        let us = bench.time_us(CALLS, |stream, call| {
            mla.run(stream, &MlaArgs { rows: *rows, query, cache, meta: self.meta(call), out })
        })?;
        let widths = AttentionWidths { query: LATENT + ROPE, value: LATENT, cached: LATENT + ROPE };
        let cost = Cost::attention(*rows, *context, HEADS, widths);
        bench.note(OpReport::new((&format!("MLA at {context}"), *rows), us, Some(cost)));
        bench.note(OpReport::new((&format!("MLA plan at {context}, once per step"), *rows), plan, None));
        Ok(())
    }
}
