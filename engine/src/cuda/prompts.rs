//! Rows of prompts that attend to expanded keys and values: which rows of a step they are, and their kernels.
//!
//! Steps with such rows are never recorded: their plan is made by the host.

use std::ops::Range;

use heliostat_kernels::cuda::attention::{Chunk, Expanded, ExpandedDims, PromptLimits, PromptPlan};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Stream};

use super::inputs::{NONE, Section};
use crate::batch::Step;
use crate::config::MlaConfig;

/// The kernels, and what the step that is being queued asks of them.
#[derive(Debug)]
pub(super) struct Prompts {
    pub(super) kernel: Expanded,
    plan: PromptPlan,
    words: Section,
    /// Positions for absorbed attention: rows of prompts are idle there.
    positions: Section,
    /// The shortest run of rows that holds all that attend absorbed.
    absorbed: Range<usize>,
}

impl Prompts {
    pub(super) fn new(device: &Device, dims: ExpandedDims, limits: PromptLimits) -> Result<Self, CudaError> {
        let kernel = Expanded::new(device, dims, limits)?;
        Ok(Self {
            plan: PromptPlan::default(),
            words: Section::new(device, kernel.words_max())?,
            positions: Section::new(device, limits.rows)?,
            absorbed: 0..limits.rows,
            kernel,
        })
    }

    /// Plans `step`, computed as `rows` rows, and queues the inputs of its kernels.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        copy: usize,
        step: &Step,
        rows: usize,
    ) -> Result<(), CudaError> {
        let prompts = step.seqs.iter().filter(|seq| seq.expanded > 0);
        let chunks: Vec<Chunk<'_>> = prompts
            .map(|seq| Chunk {
                row0: seq.start,
                rows: seq.expanded,
                position0: seq.context,
                block_table: &seq.block_table,
            })
            .collect();
        self.plan = self.kernel.plan(&chunks);
        self.words.send(stream, copy, self.plan.words())?;
        let mut positions = step.positions.clone();
        positions.resize(rows, NONE);
        chunks.iter().for_each(|chunk| positions[chunk.row0..chunk.row0 + chunk.rows].fill(NONE));
        self.absorbed = absorbed(step, rows);
        self.positions.send(stream, copy, &positions)
    }

    /// The step's plan and its words on the device.
    pub(super) fn plan(&self) -> (&PromptPlan, &Buffer<u32>) {
        (&self.plan, self.words.device())
    }

    /// Positions for absorbed attention.
    pub(super) fn positions(&self) -> &Buffer<u32> {
        self.positions.device()
    }

    /// Of the step's `rows`, those from the first to the last that attends absorbed.
    pub(super) fn absorbed(&self, rows: usize) -> Range<usize> {
        if self.plan.is_empty() { 0..rows } else { self.absorbed.clone() }
    }
}

/// The rows from the first to the last that attends absorbed; all of them in a step without rows of prompts.
fn absorbed(step: &Step, rows: usize) -> Range<usize> {
    if step.seqs.iter().all(|seq| seq.expanded == 0) {
        return 0..rows;
    }
    let mut those = step.seqs.iter().filter(|seq| seq.expanded < seq.len);
    let first = those.next();
    let last = those.next_back().or(first);
    match (first, last) {
        (Some(first), Some(last)) => first.start + first.expanded..last.start + last.len,
        _ => 0..0,
    }
}

/// Sizes of expanded attention in a model.
pub(super) fn dims(mla: &MlaConfig, scale: f32) -> ExpandedDims {
    ExpandedDims {
        heads: mla.num_heads,
        kv_lora: mla.kv_lora_rank,
        nope: mla.qk_nope_head_dim,
        rope: mla.qk_rope_head_dim,
        v: mla.v_head_dim,
        scale,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, BatchSeq, LogitRows};

    #[test]
    fn absorbed_rows_are_bounded_by_rows_of_prompts() {
        let rows = |shares: &[(usize, usize)]| {
            let mut batch = Batch::default();
            for &(len, expanded) in shares {
                let start = batch.tokens.len();
                batch.tokens.resize(start + len, 0);
                let (context, block_table, logits) = (0, Vec::new(), LogitRows::None);
                batch.seqs.push(BatchSeq { start, len, context, block_table, logits, expanded });
            }
            let rows = batch.tokens.len() + 3;
            absorbed(&Step { batch, ..Step::default() }, rows)
        };
        assert_eq!(rows(&[(1, 0), (1, 0), (50, 50), (20, 20)]), 0..2);
        assert_eq!(rows(&[(1, 0), (30, 20)]), 0..31);
        assert_eq!(rows(&[(9, 9), (1, 1), (8, 3), (5, 5)]), 13..18);
        assert_eq!(rows(&[(9, 9), (4, 4)]), 0..0);
        assert_eq!(rows(&[(1, 0), (1, 0)]), 0..5, "padding is idle already");
    }
}
