//! Reads the fields of each model family and says which of their values are supported.

use super::{
    Attention, ConfigError, FP8_BLOCK, Fields, GqaConfig, GroupScore, MlaConfig, ModelConfig, ModelType,
    MoeConfig, RopeConfig, RouterConfig, Scoring,
};

/// Reads a whole config.json.
pub(super) fn read(fields: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let model_type = model_type(fields)?;
    fields.one_of("hidden_act", &["silu"])?;
    fields.refuse_true("attention_bias")?;
    fields.refuse_true("mlp_bias")?;
    let num_layers = fields.dimension("num_hidden_layers")?;
    let (attention, rope, moe, moe_layer_of) = match model_type {
        ModelType::Qwen3Moe => {
            let (gqa, rope) = gqa(fields)?;
            (Attention::Gqa(gqa), rope, qwen3_moe(fields)?, qwen3_layers(fields, num_layers)?)
        }
        ModelType::DeepseekV2 | ModelType::DeepseekV3 | ModelType::KimiK2 => {
            let (mla, rope) = mla(fields, model_type)?;
            (
                Attention::Mla(mla),
                rope,
                deepseek_moe(fields, model_type)?,
                deepseek_layers(fields, num_layers)?,
            )
        }
    };
    let mut count = 0;
    let number = |is_moe: bool| {
        count += usize::from(is_moe);
        is_moe.then(|| count - 1)
    };
    Ok(ModelConfig {
        model_type,
        vocab_size: fields.dimension("vocab_size")?,
        hidden_size: fields.dimension("hidden_size")?,
        num_layers,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        tie_word_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        attention,
        rope,
        intermediate_size: fields.dimension("intermediate_size")?,
        moe,
        moe_layer_of: moe_layer_of.into_iter().map(number).collect(),
        fp8_blocks: fp8_blocks(fields)?,
        num_nextn_predict_layers: fields.count("num_nextn_predict_layers")?.unwrap_or(0),
    })
}

fn model_type(fields: &Fields<'_>) -> Result<ModelType, ConfigError> {
    match fields.string("model_type")? {
        Some("deepseek_v2") => Ok(ModelType::DeepseekV2),
        Some("deepseek_v3") => Ok(ModelType::DeepseekV3),
        Some("kimi_k2") => Ok(ModelType::KimiK2),
        Some("qwen3_moe") => Ok(ModelType::Qwen3Moe),
        _ => Err(fields.unsupported("model_type", "deepseek_v2, deepseek_v3, kimi_k2, qwen3_moe")),
    }
}

fn mla(fields: &Fields<'_>, model_type: ModelType) -> Result<(MlaConfig, RopeConfig), ConfigError> {
    let num_heads = fields.dimension("num_attention_heads")?;
    if fields.optional_dimension("num_key_value_heads")?.is_some_and(|kv_heads| kv_heads != num_heads) {
        return Err(
            fields.unsupported("num_key_value_heads", "num_attention_heads, as latent attention has it")
        );
    }
    let interleave = fields.bool_or("rope_interleave", true)?;
    if model_type == ModelType::DeepseekV2 && !interleave {
        return Err(fields.unsupported("rope_interleave", "true for deepseek_v2"));
    }
    let rope_dim = fields.dimension("qk_rope_head_dim")?;
    let mla = MlaConfig {
        num_heads,
        q_lora_rank: fields.optional_dimension("q_lora_rank")?,
        kv_lora_rank: fields.dimension("kv_lora_rank")?,
        qk_nope_head_dim: fields.dimension("qk_nope_head_dim")?,
        qk_rope_head_dim: rope_dim,
        v_head_dim: fields.dimension("v_head_dim")?,
    };
    Ok((mla, RopeConfig::read(fields, rope_dim, interleave, true)?))
}

fn gqa(fields: &Fields<'_>) -> Result<(GqaConfig, RopeConfig), ConfigError> {
    let num_heads = fields.dimension("num_attention_heads")?;
    let num_kv_heads = fields.optional_dimension("num_key_value_heads")?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let problem = format!("{num_kv_heads} does not divide num_attention_heads, {num_heads}");
        return Err(fields.error("num_key_value_heads", problem));
    }
    fields.refuse_true("use_sliding_window")?;
    let layer_types = fields.get("layer_types").and_then(|types| types.as_array());
    if layer_types.is_some_and(|types| types.iter().any(|kind| kind != "full_attention")) {
        return Err(fields.unsupported("layer_types", "full_attention in every layer"));
    }
    let head_dim = fields.optional_dimension("head_dim")?;
    let head_dim = head_dim.map_or_else(|| Ok(fields.dimension("hidden_size")? / num_heads), Ok)?;
    Ok((GqaConfig { num_heads, num_kv_heads, head_dim }, RopeConfig::read(fields, head_dim, false, false)?))
}

fn deepseek_moe(fields: &Fields<'_>, model_type: ModelType) -> Result<MoeConfig, ConfigError> {
    let num_experts = fields.dimension("n_routed_experts")?;
    let intermediate_size = fields.dimension("moe_intermediate_size")?;
    let top_k = top_k(fields, num_experts)?;
    let router = if model_type == ModelType::DeepseekV2 { v2_router(fields)? } else { v3_router(fields)? };
    check_groups(fields, &router, num_experts, top_k)?;
    Ok(MoeConfig {
        num_experts,
        top_k,
        intermediate_size,
        shared_intermediate_size: intermediate_size * fields.count("n_shared_experts")?.unwrap_or(0),
        router,
    })
}

fn v3_router(fields: &Fields<'_>) -> Result<RouterConfig, ConfigError> {
    fields.one_of("scoring_func", &["sigmoid"])?;
    fields.one_of("topk_method", &["noaux_tc"])?;
    Ok(RouterConfig {
        scoring: Scoring::Sigmoid,
        n_group: fields.optional_dimension("n_group")?.unwrap_or(1),
        topk_group: fields.optional_dimension("topk_group")?.unwrap_or(1),
        group_score: GroupScore::TopTwo,
        correction_bias: true,
        norm_topk_prob: fields.bool_or("norm_topk_prob", true)?,
        routed_scaling_factor: fields.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
    })
}

fn v2_router(fields: &Fields<'_>) -> Result<RouterConfig, ConfigError> {
    fields.one_of("scoring_func", &["softmax"])?;
    fields.refuse_true("norm_topk_prob")?;
    let grouped =
        fields.one_of("topk_method", &["greedy", "group_limited_greedy"])? == "group_limited_greedy";
    let groups =
        |field| Ok::<_, ConfigError>(fields.optional_dimension(field)?.filter(|_| grouped).unwrap_or(1));
    Ok(RouterConfig {
        scoring: Scoring::Softmax,
        n_group: groups("n_group")?,
        topk_group: groups("topk_group")?,
        group_score: GroupScore::Best,
        correction_bias: false,
        norm_topk_prob: false,
        routed_scaling_factor: fields.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
    })
}

fn check_groups(
    fields: &Fields<'_>,
    router: &RouterConfig,
    num_experts: usize,
    top_k: usize,
) -> Result<(), ConfigError> {
    let RouterConfig { n_group, topk_group, .. } = *router;
    if !num_experts.is_multiple_of(n_group) {
        return Err(
            fields.error("n_group", format!("{n_group} does not divide n_routed_experts, {num_experts}"))
        );
    }
    let group_size = num_experts / n_group;
    if router.group_score == GroupScore::TopTwo && group_size < 2 {
        return Err(
            fields.error("n_group", "a group is scored by its two best experts, so it needs two of them")
        );
    }
    if topk_group > n_group {
        return Err(fields.error("topk_group", format!("{topk_group} is more than n_group, {n_group}")));
    }
    if top_k > topk_group * group_size {
        let problem = format!("{top_k} experts do not fit into {topk_group} groups of {group_size}");
        return Err(fields.error("num_experts_per_tok", problem));
    }
    Ok(())
}

fn qwen3_moe(fields: &Fields<'_>) -> Result<MoeConfig, ConfigError> {
    let name = if fields.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let num_experts = fields.dimension(name)?;
    Ok(MoeConfig {
        num_experts,
        top_k: top_k(fields, num_experts)?,
        intermediate_size: fields.dimension("moe_intermediate_size")?,
        shared_intermediate_size: 0,
        router: RouterConfig {
            scoring: Scoring::Softmax,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::Best,
            correction_bias: false,
            norm_topk_prob: fields.bool_or("norm_topk_prob", false)?,
            routed_scaling_factor: 1.0,
        },
    })
}

fn top_k(fields: &Fields<'_>, num_experts: usize) -> Result<usize, ConfigError> {
    let top_k = fields.dimension("num_experts_per_tok")?;
    if top_k > num_experts {
        return Err(
            fields.error("num_experts_per_tok", format!("{top_k} is more than there are, {num_experts}"))
        );
    }
    Ok(top_k)
}

/// Which layers are MoE layers.
fn deepseek_layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    let first = fields.count("first_k_dense_replace")?.unwrap_or(0);
    let step = fields.optional_dimension("moe_layer_freq")?.unwrap_or(1);
    Ok((0..num_layers).map(|layer| layer >= first && layer.is_multiple_of(step)).collect())
}

/// Which layers are MoE layers.
fn qwen3_layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    let dense = fields.integers("mlp_only_layers")?;
    if let Some(layer) = dense.iter().find(|&&layer| layer as usize >= num_layers) {
        return Err(fields.error("mlp_only_layers", format!("there is no layer {layer} of {num_layers}")));
    }
    let step = fields.optional_dimension("decoder_sparse_step")?.unwrap_or(1);
    let is_moe = |layer: usize| (layer + 1).is_multiple_of(step) && !dense.contains(&(layer as u32));
    Ok((0..num_layers).map(is_moe).collect())
}

fn fp8_blocks(fields: &Fields<'_>) -> Result<bool, ConfigError> {
    let Some(quantization) = fields.object("quantization_config")? else { return Ok(false) };
    if quantization.string("quant_method")? != Some("fp8") {
        return Err(
            quantization.unsupported("quant_method", "fp8 (E4M3, 128x128 blocks), or no quantization_config")
        );
    }
    quantization.one_of("fmt", &["e4m3"])?;
    quantization.one_of("activation_scheme", &["dynamic"])?;
    if quantization.integers("weight_block_size")? != [FP8_BLOCK as u32, FP8_BLOCK as u32] {
        return Err(quantization.unsupported("weight_block_size", "[128, 128]"));
    }
    Ok(true)
}
