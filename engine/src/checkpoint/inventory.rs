//! The tensors that a model consists of: name, shape and role of each. Reads nothing.

use super::CheckpointError;
use crate::config::{Attention, FP8_BLOCK, GqaConfig, MlaConfig, ModelConfig};

/// What a tensor is used as, which decides the types it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Matrix of a linear layer; may be FP8.
    Linear,
    /// Embedding, head or router.
    Matrix,
    /// Norm or bias.
    Vector,
}

/// One tensor that a model needs.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// Its name in the checkpoint.
    pub(crate) name: String,
    /// What it is used as.
    pub(crate) role: Role,
    /// Outputs of a matrix, elements of a vector.
    pub(crate) rows: usize,
    /// Inputs of a matrix, 1 for a vector.
    pub(crate) cols: usize,
}

type Visit<'a> = dyn FnMut(Expected) -> Result<(), CheckpointError> + 'a;

impl Expected {
    /// Matrix of a linear layer.
    pub(crate) fn linear(name: String, rows: usize, cols: usize) -> Self {
        Self { name, role: Role::Linear, rows, cols }
    }

    /// Embedding, head or router.
    pub(crate) fn matrix(name: String, rows: usize, cols: usize) -> Self {
        Self { name, role: Role::Matrix, rows, cols }
    }

    /// Norm or bias.
    pub(crate) fn vector(name: String, rows: usize) -> Self {
        Self { name, role: Role::Vector, rows, cols: 1 }
    }

    /// The shape in the checkpoint.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self.role {
            Role::Linear | Role::Matrix => vec![self.rows, self.cols],
            Role::Vector => vec![self.rows],
        }
    }

    /// Name of the FP8 block scales.
    pub(super) fn scale_name(&self) -> String {
        format!("{}_scale_inv", self.name)
    }

    /// Shape of the FP8 block scales.
    pub(super) fn scale_shape(&self) -> Vec<usize> {
        vec![self.rows.div_ceil(FP8_BLOCK), self.cols.div_ceil(FP8_BLOCK)]
    }
}

/// Name of `part` of decoder layer `layer`.
pub(crate) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

/// Name of `part` of a routed expert.
pub(crate) fn expert_tensor(layer: usize, expert: usize, part: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight")
}

/// Visits every tensor of the model.
pub(super) fn for_each(config: &ModelConfig, visit: &mut Visit<'_>) -> Result<(), CheckpointError> {
    for_each_dense(config, visit)?;
    let (hidden, moe) = (config.hidden_size, &config.moe);
    for moe_layer in 0..config.moe_layers() {
        let layer = config.layer_of_moe(moe_layer);
        for expert in 0..moe.num_experts {
            mlp(|part| expert_tensor(layer, expert, part), hidden, moe.intermediate_size, visit)?;
        }
    }
    Ok(())
}

/// Visits every tensor but those of the routed experts.
pub(super) fn for_each_dense(config: &ModelConfig, visit: &mut Visit<'_>) -> Result<(), CheckpointError> {
    let hidden = config.hidden_size;
    visit(Expected::matrix("model.embed_tokens.weight".to_owned(), config.vocab_size, hidden))?;
    visit(Expected::vector("model.norm.weight".to_owned(), hidden))?;
    if !config.tie_word_embeddings {
        visit(Expected::matrix("lm_head.weight".to_owned(), config.vocab_size, hidden))?;
    }
    for layer in 0..config.num_layers {
        visit(Expected::vector(layer_tensor(layer, "input_layernorm"), hidden))?;
        visit(Expected::vector(layer_tensor(layer, "post_attention_layernorm"), hidden))?;
        match &config.attention {
            Attention::Mla(attention) => mla(layer, hidden, attention, visit)?,
            Attention::Gqa(attention) => gqa(layer, hidden, attention, visit)?,
        }
        match config.moe_layer_of[layer] {
            None => mlp(
                |part| layer_tensor(layer, &format!("mlp.{part}")),
                hidden,
                config.intermediate_size,
                visit,
            )?,
            Some(_) => moe(layer, config, visit)?,
        }
    }
    Ok(())
}

/// Whether a tensor that no served layer needs may be left out without changing a result.
pub(super) fn is_skipped(config: &ModelConfig, name: &str) -> bool {
    let layer =
        name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let predict = config.num_layers..config.num_layers + config.num_nextn_predict_layers;
    layer.is_some_and(|layer| predict.contains(&layer))
        || name.ends_with(".rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == "lm_head.weight")
}

fn mla(layer: usize, hidden: usize, mla: &MlaConfig, visit: &mut Visit<'_>) -> Result<(), CheckpointError> {
    let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
    let query = mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
    match mla.q_lora_rank {
        None => visit(Expected::linear(name("q_proj"), query, hidden))?,
        Some(rank) => {
            visit(Expected::linear(name("q_a_proj"), rank, hidden))?;
            visit(Expected::vector(name("q_a_layernorm"), rank))?;
            visit(Expected::linear(name("q_b_proj"), query, rank))?;
        }
    }
    let latent = mla.kv_lora_rank;
    visit(Expected::linear(name("kv_a_proj_with_mqa"), latent + mla.qk_rope_head_dim, hidden))?;
    visit(Expected::vector(name("kv_a_layernorm"), latent))?;
    let expanded = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim);
    visit(Expected::linear(name("kv_b_proj"), expanded, latent))?;
    visit(Expected::linear(name("o_proj"), hidden, mla.num_heads * mla.v_head_dim))
}

fn gqa(layer: usize, hidden: usize, gqa: &GqaConfig, visit: &mut Visit<'_>) -> Result<(), CheckpointError> {
    let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
    let (query, key) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
    visit(Expected::linear(name("q_proj"), query, hidden))?;
    visit(Expected::linear(name("k_proj"), key, hidden))?;
    visit(Expected::linear(name("v_proj"), key, hidden))?;
    visit(Expected::linear(name("o_proj"), hidden, query))?;
    visit(Expected::vector(name("q_norm"), gqa.head_dim))?;
    visit(Expected::vector(name("k_norm"), gqa.head_dim))
}

fn moe(layer: usize, config: &ModelConfig, visit: &mut Visit<'_>) -> Result<(), CheckpointError> {
    let (hidden, moe) = (config.hidden_size, &config.moe);
    visit(Expected::matrix(layer_tensor(layer, "mlp.gate"), moe.num_experts, hidden))?;
    if moe.router.correction_bias {
        let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        visit(Expected::vector(name, moe.num_experts))?;
    }
    if moe.shared_intermediate_size > 0 {
        let name = |part: &str| layer_tensor(layer, &format!("mlp.shared_experts.{part}"));
        mlp(name, hidden, moe.shared_intermediate_size, visit)?;
    }
    Ok(())
}

fn mlp(
    name: impl Fn(&str) -> String,
    hidden: usize,
    width: usize,
    visit: &mut Visit<'_>,
) -> Result<(), CheckpointError> {
    visit(Expected::linear(name("gate_proj"), width, hidden))?;
    visit(Expected::linear(name("up_proj"), width, hidden))?;
    visit(Expected::linear(name("down_proj"), hidden, width))
}
