//! Multi-head latent attention (DeepSeek), absorbed: the cache holds one latent and one rotated key per position, all
//! heads read it, and the up-projections of keys and values are applied to queries and results instead. Rows of prompts
//! may attend to expanded keys and values: the batch says which.

use heliostat_kernels::cpu::attention::{ExpandedShape, MlaQuery, MlaShape};
use heliostat_kernels::cpu::rope::RopeLayout;
use heliostat_kernels::dtype::{DType, f32_to_bf16};
use heliostat_kernels::weight::Weight;

use super::KvPages;
use super::attention::{AttentionScratch, AttentionStep};
use super::scratch::rows;
use crate::batch::PrefillAttention;
use crate::checkpoint::{CheckpointError, Reader, layer_tensor};
use crate::config::{MlaConfig, ModelConfig};

/// The norms inside latent attention keep this, whatever `rms_norm_eps` says, as transformers does.
pub(crate) const NORM_EPS: f32 = 1e-6;

/// Weights of one layer.
#[derive(Debug)]
pub(super) struct MlaLayer {
    config: MlaConfig,
    query: Query,
    /// `[kv_lora + rope][hidden]`.
    kv_a: Weight,
    kv_a_norm: Vec<f32>,
    /// Key up-projections, transposed: `[heads][kv_lora][nope]`.
    key_up: Weight,
    /// Value up-projections: `[heads][v][kv_lora]`.
    value_up: Weight,
    /// Both as in the checkpoint, `[heads][nope + v][kv_lora]`, where rows of prompts attend to expanded keys and values.
    expand: Option<Weight>,
    output: Weight,
    softmax_scale: f32,
}

#[derive(Debug)]
enum Query {
    Full(Weight),
    LowRank { a: Weight, norm: Vec<f32>, b: Weight },
}

impl MlaLayer {
    /// Reads decoder layer `layer`.
    pub(super) fn load(
        reader: &mut Reader<'_, '_>,
        (config, mla): (&ModelConfig, &MlaConfig),
        layer: usize,
        prefill: PrefillAttention,
    ) -> Result<Self, CheckpointError> {
        let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
        let hidden = config.hidden_size;
        let (heads, latent, rope) = (mla.num_heads, mla.kv_lora_rank, mla.qk_rope_head_dim);
        let head = mla.qk_nope_head_dim + rope;
        let query = match mla.q_lora_rank {
            None => Query::Full(reader.linear(name("q_proj"), heads * head, hidden)?),
            Some(rank) => Query::LowRank {
                a: reader.linear(name("q_a_proj"), rank, hidden)?,
                norm: reader.vector(name("q_a_layernorm"), rank)?,
                b: reader.linear(name("q_b_proj"), heads * head, rank)?,
            },
        };
        let expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim);
        let kv_b = reader.linear(name("kv_b_proj"), expanded, latent)?;
        let (key_up, value_up) = split_kv_b(&kv_b, mla);
        Ok(Self {
            config: mla.clone(),
            query,
            kv_a: reader.linear(name("kv_a_proj_with_mqa"), latent + rope, hidden)?,
            kv_a_norm: reader.vector(name("kv_a_layernorm"), latent)?,
            key_up,
            value_up,
            expand: (prefill == PrefillAttention::Expanded).then_some(kv_b),
            output: reader.linear(name("o_proj"), hidden, heads * mla.v_head_dim)?,
            softmax_scale: (head as f64).powf(-0.5) as f32 * config.rope.softmax_factor,
        })
    }

    /// See [`super::attention::AttentionLayer::forward`].
    pub(super) fn forward(
        &self,
        step: &AttentionStep<'_>,
        x: &[f32],
        kv: &mut KvPages,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        self.write_cache(step, x, kv, scratch);
        self.queries(step, x, scratch);
        if !step.absorbed.is_empty() {
            self.attend_absorbed(step, x, kv, scratch);
        }
        let (cpu, tokens) = (step.cpu, x.len() / self.kv_a.cols());
        let values = rows(&mut scratch.values, tokens * self.value_up.rows());
        if !step.expanded.is_empty() {
            let MlaConfig { num_heads: heads, kv_lora_rank: kv_lora, .. } = self.config;
            let (nope, rope) = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim);
            let v = self.config.v_head_dim;
            let shape = ExpandedShape { heads, kv_lora, nope, rope, v, scale: self.softmax_scale };
            let up = self.expand.as_ref().expect("the model was loaded for expanded attention");
            let query = &scratch.query[..tokens * heads * (nope + rope)];
            cpu.expanded_attention(shape, (query, up), kv.latents(step.layer), step.expanded, values);
        }
        cpu.matmul(values, &self.output, out);
    }

    /// Computes `scratch.values`. Those of rows that attend to expanded keys and values are to be overwritten.
    fn attend_absorbed(
        &self,
        step: &AttentionStep<'_>,
        x: &[f32],
        kv: &KvPages,
        scratch: &mut AttentionScratch,
    ) {
        let (cpu, tokens) = (step.cpu, x.len() / self.kv_a.cols());
        let MlaConfig { num_heads: heads, kv_lora_rank: latent, qk_rope_head_dim: rope, .. } = self.config;
        let shape = MlaShape { heads, kv_lora: latent, rope, scale: self.softmax_scale };
        let attended = rows(&mut scratch.attended, tokens * heads * latent);
        let query = MlaQuery {
            latent: &scratch.query_latent[..tokens * heads * latent],
            rope: &scratch.query_rope[..tokens * heads * rope],
        };
        cpu.mla_attention(shape, query, kv.latents(step.layer), step.absorbed, attended);
        let values = rows(&mut scratch.values, tokens * self.value_up.rows());
        cpu.matmul_heads(attended, heads, &self.value_up, values);
    }

    /// Computes latent and rotated key of every row and writes them to their places.
    fn write_cache(
        &self,
        step: &AttentionStep<'_>,
        x: &[f32],
        kv: &mut KvPages,
        scratch: &mut AttentionScratch,
    ) {
        let (latent, width) = (self.config.kv_lora_rank, self.kv_a.rows());
        let new = rows(&mut scratch.kv, x.len() / self.kv_a.cols() * width);
        step.cpu.matmul(x, &self.kv_a, new);
        step.rope.rotate(step.cpu, new, RopeLayout { heads: 1, head_dim: width, offset: latent });
        for seq in step.spans {
            for (row, new) in new.chunks_exact(width).skip(seq.start).take(seq.len).enumerate() {
                let to = kv.latent_mut(step.layer, seq.block_table, seq.context + row);
                step.cpu.rms_norm(&new[..latent], &self.kv_a_norm, NORM_EPS, &mut to[..latent]);
                to[latent..].copy_from_slice(&new[latent..]);
            }
        }
    }

    /// Computes `scratch.query_latent` and `scratch.query_rope`.
    fn queries(&self, step: &AttentionStep<'_>, x: &[f32], scratch: &mut AttentionScratch) {
        let (cpu, tokens) = (step.cpu, x.len() / self.kv_a.cols());
        let MlaConfig { num_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: rope, .. } = self.config;
        let head = nope + rope;
        let query = rows(&mut scratch.query, tokens * heads * head);
        match &self.query {
            Query::Full(weight) => cpu.matmul(x, weight, query),
            Query::LowRank { a, norm, b } => {
                let low = rows(&mut scratch.low, tokens * a.rows());
                cpu.matmul(x, a, low);
                cpu.rms_norm_in_place(low, norm, NORM_EPS);
                cpu.matmul(low, b, query);
            }
        }
        step.rope.rotate(cpu, query, RopeLayout { heads, head_dim: head, offset: nope });
        let query_nope = rows(&mut scratch.query_nope, tokens * heads * nope);
        let query_rope = rows(&mut scratch.query_rope, tokens * heads * rope);
        let split = query_nope.chunks_exact_mut(nope).zip(query_rope.chunks_exact_mut(rope));
        for (query, (to_nope, to_rope)) in query.chunks_exact(head).zip(split) {
            to_nope.copy_from_slice(&query[..nope]);
            to_rope.copy_from_slice(&query[nope..]);
        }
        if step.absorbed.is_empty() {
            return;
        }
        let query_latent = rows(&mut scratch.query_latent, tokens * self.key_up.rows());
        cpu.matmul_heads(query_nope, heads, &self.key_up, query_latent);
    }
}

/// Takes `kv_b_proj` `[heads][nope + v][kv_lora]` apart into transposed key and value up-projections.
///
/// Keys need the transpose, whose FP8 blocks would not be those of the checkpoint: FP8 is dequantised here, exactly.
pub(crate) fn split_kv_b(kv_b: &Weight, mla: &MlaConfig) -> (Weight, Weight) {
    let (nope, v, latent) = (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
    let mut keys = vec![0.0; mla.num_heads * latent * nope];
    let mut values = Vec::with_capacity(mla.num_heads * v * latent);
    let mut row = vec![0.0; latent];
    for (head, keys) in keys.chunks_exact_mut(latent * nope).enumerate() {
        let first = head * (nope + v);
        for column in 0..nope {
            kv_b.read_row(first + column, &mut row);
            row.iter().enumerate().for_each(|(k, &value)| keys[k * nope + column] = value);
        }
        for from in first + nope..first + nope + v {
            kv_b.read_row(from, &mut row);
            values.extend_from_slice(&row);
        }
    }
    (pack(kv_b, nope, keys), pack(kv_b, latent, values))
}

/// The rows of `kv_b_proj` that make keys, `[heads][nope][kv_lora]`: those of the checkpoint, dequantised.
pub(crate) fn key_rows(kv_b: &Weight, mla: &MlaConfig) -> Weight {
    let (nope, v, latent) = (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
    let mut values = vec![0.0; mla.num_heads * nope * latent];
    for (index, row) in values.chunks_exact_mut(latent).enumerate() {
        kv_b.read_row(index / nope * (nope + v) + index % nope, row);
    }
    pack(kv_b, latent, values)
}

/// Values in rows of `cols`, in the storage type of the weight that they come from; FP8 becomes f32.
fn pack(from: &Weight, cols: usize, values: Vec<f32>) -> Weight {
    let rows = values.len() / cols;
    let packed = match from.dtype() {
        DType::Bf16 => Weight::from_bf16(rows, cols, values.into_iter().map(f32_to_bf16).collect()),
        DType::F32 | DType::F8E4M3 => Weight::from_f32(rows, cols, values),
    };
    packed.expect("the lengths were computed from the shape")
}
