//! What both kinds of attention share: the choice between them, buffers and sequence spans.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::attention::Span;

use super::KvPages;
use super::gqa::GqaLayer;
use super::mla::MlaLayer;
use super::rope::RopeRows;
use crate::batch::{Batch, BatchSeq, PrefillAttention};
use crate::checkpoint::{CheckpointError, Reader};
use crate::config::{Attention, ModelConfig};

/// Attention of one layer.
#[derive(Debug)]
pub(super) enum AttentionLayer {
    Mla(MlaLayer),
    Gqa(GqaLayer),
}

/// What attention of one layer needs besides its input.
pub(super) struct AttentionStep<'a> {
    pub(super) cpu: &'a Cpu,
    /// The sequences of the batch.
    pub(super) spans: &'a [Span<'a>],
    /// Their rows that attend to expanded keys and values, and those that do not.
    pub(super) expanded: &'a [Span<'a>],
    pub(super) absorbed: &'a [Span<'a>],
    pub(super) rope: &'a RopeRows,
    /// Decoder layer.
    pub(super) layer: usize,
}

/// Buffers of attention.
#[derive(Debug, Default)]
pub(super) struct AttentionScratch {
    /// Queries, `[t][heads][...]`.
    pub(super) query: Vec<f32>,
    /// Low-rank query, or keys.
    pub(super) low: Vec<f32>,
    /// Latents with rotated keys, or values.
    pub(super) kv: Vec<f32>,
    /// Queries without position.
    pub(super) query_nope: Vec<f32>,
    /// Rotated queries.
    pub(super) query_rope: Vec<f32>,
    /// Queries against latents.
    pub(super) query_latent: Vec<f32>,
    /// Attention's result per head.
    pub(super) attended: Vec<f32>,
    /// Values per head.
    pub(super) values: Vec<f32>,
}

impl AttentionLayer {
    /// Reads decoder layer `layer`.
    pub(super) fn load(
        reader: &mut Reader<'_, '_>,
        config: &ModelConfig,
        layer: usize,
        prefill: PrefillAttention,
    ) -> Result<Self, CheckpointError> {
        match &config.attention {
            Attention::Mla(mla) => Ok(Self::Mla(MlaLayer::load(reader, (config, mla), layer, prefill)?)),
            Attention::Gqa(gqa) => Ok(Self::Gqa(GqaLayer::load(reader, config, gqa, layer)?)),
        }
    }

    /// Writes the rows' keys and values into `kv` and their attention, projected to the hidden size, into `out`.
    pub(super) fn forward(
        &self,
        step: &AttentionStep<'_>,
        x: &[f32],
        kv: &mut KvPages,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        match self {
            Self::Mla(layer) => layer.forward(step, x, kv, scratch, out),
            Self::Gqa(layer) => layer.forward(step, x, kv, scratch, out),
        }
    }
}

/// The sequences of a batch as the attention kernels take them.
pub(super) fn spans<'a>(batch: &'a Batch) -> Vec<Span<'a>> {
    let span = |seq: &'a BatchSeq| {
        let BatchSeq { start, len, context, .. } = *seq;
        Span { start, len, context, block_table: &seq.block_table }
    };
    batch.seqs.iter().map(span).collect()
}

/// The rows of each sequence that attend to expanded keys and values, and those that do not.
pub(super) fn parts<'a>(batch: &'a Batch) -> [Vec<Span<'a>>; 2] {
    let part = |seq: &'a BatchSeq, from: usize, to: usize| {
        let (start, context) = (seq.start + from, seq.context + from);
        (from < to).then_some(Span { start, len: to - from, context, block_table: &seq.block_table })
    };
    [
        batch.seqs.iter().filter_map(|seq| part(seq, 0, seq.expanded)).collect(),
        batch.seqs.iter().filter_map(|seq| part(seq, seq.expanded, seq.len)).collect(),
    ]
}
