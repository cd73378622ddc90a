//! Grouped-query attention with norms on query and key heads (Qwen3).

use heliostat_kernels::cpu::attention::GqaShape;
use heliostat_kernels::cpu::rope::RopeLayout;
use heliostat_kernels::weight::Weight;

use super::KvPages;
use super::attention::{AttentionScratch, AttentionStep};
use super::scratch::rows;
use crate::checkpoint::{CheckpointError, Reader, layer_tensor};
use crate::config::{GqaConfig, ModelConfig};

/// Weights of one layer.
#[derive(Debug)]
pub(super) struct GqaLayer {
    config: GqaConfig,
    query: Weight,
    key: Weight,
    value: Weight,
    output: Weight,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    eps: f32,
}

impl GqaLayer {
    /// Reads decoder layer `layer`.
    pub(super) fn load(
        reader: &mut Reader<'_, '_>,
        config: &ModelConfig,
        gqa: &GqaConfig,
        layer: usize,
    ) -> Result<Self, CheckpointError> {
        let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
        let hidden = config.hidden_size;
        let (query, key) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
        Ok(Self {
            config: gqa.clone(),
            query: reader.linear(name("q_proj"), query, hidden)?,
            key: reader.linear(name("k_proj"), key, hidden)?,
            value: reader.linear(name("v_proj"), key, hidden)?,
            output: reader.linear(name("o_proj"), hidden, query)?,
            query_norm: reader.vector(name("q_norm"), gqa.head_dim)?,
            key_norm: reader.vector(name("k_norm"), gqa.head_dim)?,
            eps: config.rms_norm_eps,
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
        let (cpu, tokens) = (step.cpu, x.len() / self.query.cols());
        let GqaConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim } = self.config;
        let query = rows(&mut scratch.query, tokens * heads * head_dim);
        let keys = rows(&mut scratch.low, tokens * kv_heads * head_dim);
        let values = rows(&mut scratch.kv, tokens * kv_heads * head_dim);
        cpu.matmul(x, &self.query, query);
        cpu.matmul(x, &self.key, keys);
        cpu.matmul(x, &self.value, values);
        cpu.rms_norm_in_place(query, &self.query_norm, self.eps);
        cpu.rms_norm_in_place(keys, &self.key_norm, self.eps);
        step.rope.rotate(cpu, query, RopeLayout { heads, head_dim, offset: 0 });
        step.rope.rotate(cpu, keys, RopeLayout { heads: kv_heads, head_dim, offset: 0 });
        let width = kv_heads * head_dim;
        for seq in step.spans {
            for row in 0..seq.len {
                let at = (seq.start + row) * width..(seq.start + row + 1) * width;
                let (key, value) = kv.key_value_mut(step.layer, seq.block_table, seq.context + row);
                key.copy_from_slice(&keys[at.clone()]);
                value.copy_from_slice(&values[at]);
            }
        }
        let scale = (head_dim as f64).powf(-0.5) as f32;
        let shape = GqaShape { heads, kv_heads, head_dim, scale };
        let attended = rows(&mut scratch.attended, tokens * heads * head_dim);
        cpu.gqa_attention(shape, query, kv.keys_values(step.layer), step.spans, attended);
        cpu.matmul(attended, &self.output, out);
    }
}
