//! The models: one rank's forward pass over its own sequences, with the routed experts behind [`Experts`].
//!
//! The value of a row depends on its own sequence only: not on the other rows of the batch, on how a prompt was cut
//! into chunks, or on the block size. Whoever changes an operation here keeps that.

mod attention;
mod expert;
mod gqa;
mod kv;
mod local;
mod mla;
mod mlp;
mod moe;
mod rope;
mod scratch;

use std::sync::Arc;

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::weight::Weight;

use crate::batch::{Batch, LogitRows, PrefillAttention};
use crate::checkpoint::{Checkpoint, CheckpointError, Reader, layer_tensor};
use crate::config::ModelConfig;
use attention::{AttentionLayer, AttentionStep, parts, spans};
use mlp::Mlp;
use moe::MoeLayer;
use scratch::{Scratch, rows};

pub use expert::{Expert, ExpertError, ExpertScratch, expert_bytes, load_expert};
pub use kv::KvPages;
pub use local::LocalExperts;
pub(crate) use mla::{NORM_EPS, key_rows, split_kv_b};

/// Why rows did not come back from the experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The step was given up because the group's membership changed.
    #[error("the step was aborted")]
    Aborted,
    /// A rank of the group is gone.
    #[error("rank {rank} was lost")]
    PeerLost {
        /// The rank.
        rank: u32,
    },
    /// A rank of the group, though connected, said nothing for too long.
    #[error("rank {rank} was silent for too long")]
    Silent {
        /// The rank.
        rank: u32,
    },
    /// This rank's device failed; only a new process helps.
    #[error("the device failed: {0}")]
    Device(String),
    /// Anything else; says what.
    #[error("{0}")]
    Other(String),
}

/// Rows on their way to the experts.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// `[t][hidden]`.
    pub hidden: &'a [f32],
    /// Logical experts of each row, `[t][k]`, best first.
    pub ids: &'a [u32],
    /// Their weights, `[t][k]`.
    pub weights: &'a [f32],
}

/// The routed experts of all MoE layers, wherever they are.
///
/// `out = 0; for k in 0..top_k { out = w_k.mul_add(y_k, out) }`, element by element: every implementation sums in this
/// order, so where an expert runs changes no bit.
pub trait Experts {
    /// Computes the weighted sum of each row's experts. Called for every MoE layer of every step, with no rows where
    /// the batch is empty, because peers wait for it.
    ///
    /// # Errors
    /// The rows of other ranks did not arrive; `out` is then undefined.
    fn forward(
        &mut self,
        moe_layer: usize,
        hidden: &[f32],
        ids: &[u32],
        weights: &[f32],
        out: &mut [f32],
    ) -> Result<(), ExchangeError>;

    /// Like [`Experts::forward`]; runs `meanwhile` once, best while rows travel. It computes nothing that `out` needs.
    ///
    /// # Errors
    /// Those of [`Experts::forward`].
    fn forward_during(
        &mut self,
        moe_layer: usize,
        routed: Routed<'_>,
        out: &mut [f32],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), ExchangeError> {
        self.forward(moe_layer, routed.hidden, routed.ids, routed.weights, out)?;
        meanwhile();
        Ok(())
    }
}

/// Logits of the rows that asked for them, in the order of the batch's sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// `[n][vocab]`.
    pub rows: Vec<f32>,
    /// Tokens.
    pub vocab: usize,
}

/// All of a model but its routed experts.
#[derive(Debug)]
pub struct Model {
    config: Arc<ModelConfig>,
    cpu: Cpu,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Weight,
    scratch: Scratch,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    attention: AttentionLayer,
    post_attention_norm: Vec<f32>,
    feed_forward: FeedForward,
}

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Moe(MoeLayer),
}

impl Model {
    /// Reads everything but the routed experts. `progress` hears the bytes read so far and in all.
    ///
    /// # Errors
    /// A tensor that is missing or damaged.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &Arc<ModelConfig>,
        cpu: Cpu,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, CheckpointError> {
        Self::load_for(PrefillAttention::Absorbed, checkpoint, config, cpu, progress)
    }

    /// Like [`Model::load`], for batches in which rows of prompts attend in this way.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    ///
    /// # Panics
    /// If the model has no latents to expand: see [`PrefillAttention::check`].
    pub fn load_for(
        prefill: PrefillAttention,
        checkpoint: &Checkpoint,
        config: &Arc<ModelConfig>,
        cpu: Cpu,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, CheckpointError> {
        assert_eq!(prefill.check(config), Ok(()), "the caller checked");
        let mut reader = Reader::new(checkpoint, checkpoint.dense_bytes(config)?, progress);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = reader.matrix("model.embed_tokens.weight".to_owned(), vocab, hidden)?;
        let layer = |layer| Layer::load(&mut reader, config, layer, prefill);
        let layers = (0..config.num_layers).map(layer).collect::<Result<_, _>>()?;
        let norm = reader.vector("model.norm.weight".to_owned(), hidden)?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            reader.matrix("lm_head.weight".to_owned(), vocab, hidden)?
        };
        let (config, scratch) = (Arc::clone(config), Scratch::default());
        Ok(Self { config, cpu, embedding, layers, norm, head, scratch })
    }

    /// The model's shape.
    pub fn config(&self) -> &Arc<ModelConfig> {
        &self.config
    }

    /// Computes one step: writes keys and values of the batch's tokens into `kv` and returns the logits asked for.
    /// Doing the same batch again after an error writes and returns the same.
    ///
    /// # Errors
    /// The experts did not answer.
    ///
    /// # Panics
    /// On a batch that contradicts itself, a token beyond the vocabulary, or a block beyond `kv`.
    pub fn forward(
        &mut self,
        batch: &Batch,
        kv: &mut KvPages,
        experts: &mut dyn Experts,
    ) -> Result<Logits, ExchangeError> {
        let vocab = self.config.vocab_size;
        if batch.is_empty() {
            for moe_layer in 0..self.config.moe_layers() {
                experts.forward(moe_layer, &[], &[], &[], &mut [])?;
            }
            return Ok(Logits { rows: Vec::new(), vocab });
        }
        // The buffers leave `self` so that layers can borrow them while they borrow the weights.
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.layers(batch, kv, experts, &mut scratch);
        let logits = result.map(|()| Logits { rows: self.logits(batch, &mut scratch), vocab });
        self.scratch = scratch;
        logits
    }

    /// Runs all decoder layers; `scratch.residual` and `scratch.branch` are then the two terms of the last sum.
    fn layers(
        &self,
        batch: &Batch,
        kv: &mut KvPages,
        experts: &mut dyn Experts,
        scratch: &mut Scratch,
    ) -> Result<(), ExchangeError> {
        let (cpu, eps) = (&self.cpu, self.config.rms_norm_eps);
        let len = batch.tokens.len() * self.config.hidden_size;
        let Scratch { residual, normed, branch, rope, attention, moe, mlp } = scratch;
        let (residual, normed, branch) = (rows(residual, len), rows(normed, len), rows(branch, len));
        rope.fill(&self.config.rope, &batch.positions);
        let (spans, [expanded, absorbed]) = (spans(batch), parts(batch));
        cpu.gather(&self.embedding, &batch.tokens, residual);
        for (number, layer) in self.layers.iter().enumerate() {
            match number {
                0 => cpu.rms_norm(residual, &layer.input_norm, eps, normed),
                _ => cpu.add_rms_norm(residual, branch, &layer.input_norm, eps, normed),
            }
            let step = AttentionStep {
                cpu,
                spans: &spans,
                expanded: &expanded,
                absorbed: &absorbed,
                rope,
                layer: number,
            };
            layer.attention.forward(&step, normed, kv, attention, branch);
            cpu.add_rms_norm(residual, branch, &layer.post_attention_norm, eps, normed);
            match &layer.feed_forward {
                FeedForward::Dense(dense) => dense.forward(cpu, normed, mlp, branch),
                FeedForward::Moe(layer) => layer.forward(cpu, normed, experts, (moe, mlp), branch)?,
            }
        }
        Ok(())
    }

    /// The logits of the rows that asked for them.
    fn logits(&self, batch: &Batch, scratch: &mut Scratch) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let wanted: Vec<usize> = batch
            .seqs
            .iter()
            .flat_map(|seq| match seq.logits {
                LogitRows::None => 0..0,
                LogitRows::Last => seq.start + seq.len - 1..seq.start + seq.len,
                LogitRows::All => seq.start..seq.start + seq.len,
            })
            .collect();
        // Gathered to the front: the rows ascend, so none is overwritten before it was moved.
        for (to, &from) in wanted.iter().enumerate() {
            scratch.residual.copy_within(from * hidden..(from + 1) * hidden, to * hidden);
            scratch.branch.copy_within(from * hidden..(from + 1) * hidden, to * hidden);
        }
        let len = wanted.len() * hidden;
        let normed = rows(&mut scratch.normed, len);
        let (residual, branch) = (&mut scratch.residual[..len], &scratch.branch[..len]);
        self.cpu.add_rms_norm(residual, branch, &self.norm, self.config.rms_norm_eps, normed);
        let mut logits = vec![0.0; wanted.len() * self.config.vocab_size];
        self.cpu.matmul(normed, &self.head, &mut logits);
        logits
    }
}

impl Layer {
    fn load(
        reader: &mut Reader<'_, '_>,
        config: &ModelConfig,
        layer: usize,
        prefill: PrefillAttention,
    ) -> Result<Self, CheckpointError> {
        let hidden = config.hidden_size;
        let feed_forward = match config.moe_layer_of[layer] {
            Some(moe_layer) => FeedForward::Moe(MoeLayer::load(reader, config, layer, moe_layer)?),
            None => {
                let name = |part: &str| layer_tensor(layer, &format!("mlp.{part}"));
                FeedForward::Dense(Mlp::load(reader, name, hidden, config.intermediate_size)?)
            }
        };
        Ok(Self {
            input_norm: reader.vector(layer_tensor(layer, "input_layernorm"), hidden)?,
            attention: AttentionLayer::load(reader, config, layer, prefill)?,
            post_attention_norm: reader.vector(layer_tensor(layer, "post_attention_layernorm"), hidden)?,
            feed_forward,
        })
    }
}
