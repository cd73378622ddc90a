//! Model shape, read from a checkpoint's config.json.
//!
//! Whatever would change the arithmetic and is not implemented is refused here by name, so nothing is served wrongly.

mod family;
mod fields;
mod generation;
mod rope;

use std::path::Path;

pub use heliostat_kernels::cpu::router::{GroupScore, Scoring};

pub use fields::ConfigError;
pub use generation::GenerationDefaults;
pub use rope::RopeConfig;

use fields::{Fields, read_object};

/// Rows and columns of one FP8 weight scale.
pub const FP8_BLOCK: usize = 128;

/// Architectures that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// `deepseek_v2`: DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// `deepseek_v3`: DeepSeek-V3, V3.1, R1.
    DeepseekV3,
    /// `kimi_k2`: the architecture of `deepseek_v3` under another name.
    KimiK2,
    /// `qwen3_moe`.
    Qwen3Moe,
}

/// Everything the forward pass and the checkpoint check need to know. All dimensions are validated and at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Architecture.
    pub model_type: ModelType,
    /// Tokens.
    pub vocab_size: usize,
    /// Elements of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, multi-token-prediction layers not counted.
    pub num_layers: usize,
    /// Positions a sequence may have.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms over the residual stream.
    pub rms_norm_eps: f32,
    /// The head reuses the embedding.
    pub tie_word_embeddings: bool,
    /// Attention of every layer.
    pub attention: Attention,
    /// Rotary position embedding of every layer.
    pub rope: RopeConfig,
    /// Width of dense feed-forward layers.
    pub intermediate_size: usize,
    /// Experts of every MoE layer.
    pub moe: MoeConfig,
    /// For each layer its index among the MoE layers, or `None` for a dense one.
    pub moe_layer_of: Vec<Option<usize>>,
    /// Linear weights may be FP8 E4M3 with 128x128 block scales.
    pub fp8_blocks: bool,
    /// Layers for multi-token prediction that follow the decoder layers in the checkpoint; not served.
    pub num_nextn_predict_layers: usize,
}

/// Attention of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Multi-head latent attention (DeepSeek).
    Mla(MlaConfig),
    /// Grouped-query attention with norms on query and key heads (Qwen3).
    Gqa(GqaConfig),
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct MlaConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Rank of the query's low-rank projection; `None`: one full projection.
    pub q_lora_rank: Option<usize>,
    /// Elements of the latent that is cached.
    pub kv_lora_rank: usize,
    /// Elements of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Elements of a head's query and of the shared key with position.
    pub qk_rope_head_dim: usize,
    /// Elements of a head's value.
    pub v_head_dim: usize,
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct GqaConfig {
    /// Query heads, a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// Experts of a MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Routed experts.
    pub num_experts: usize,
    /// Routed experts per token.
    pub top_k: usize,
    /// Width of a routed expert.
    pub intermediate_size: usize,
    /// Width of all shared experts together; 0: none.
    pub shared_intermediate_size: usize,
    /// How experts are chosen.
    pub router: RouterConfig,
}

/// How a router turns scores into experts and weights.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterConfig {
    /// Function from logits to scores.
    pub scoring: Scoring,
    /// Groups of experts, as DeepSeek's EPLB knows them; 1: none.
    pub n_group: usize,
    /// Groups a token may use.
    pub topk_group: usize,
    /// How a group is scored.
    pub group_score: GroupScore,
    /// A learnt bias is added for the choice, not for the weight.
    pub correction_bias: bool,
    /// Weights of a token are divided by their sum.
    pub norm_topk_prob: bool,
    /// Multiplies the weights.
    pub routed_scaling_factor: f32,
}

impl ModelConfig {
    /// Reads config.json of the checkpoint directory `dir`.
    ///
    /// # Errors
    /// A missing or unreadable file, or a field that is missing, out of range or not supported.
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        let file = dir.join("config.json");
        let object = read_object(&file)?;
        family::read(&Fields::new(&file, &object))
    }

    /// Reads the text of a config.json that `name` names in errors.
    ///
    /// # Errors
    /// Those of [`ModelConfig::from_dir`].
    pub fn from_json(name: &str, text: &str) -> Result<Self, ConfigError> {
        let file = Path::new(name);
        let object = serde_json::from_str(text)
            .map_err(|source| ConfigError::Json { file: file.to_owned(), source })?;
        family::read(&Fields::new(file, &object))
    }

    /// Number of MoE layers. MoE layers count from 0 in the order of the decoder layers.
    pub fn moe_layers(&self) -> usize {
        self.moe_layer_of.iter().flatten().count()
    }

    /// Decoder layer of MoE layer `moe_layer`.
    ///
    /// # Panics
    /// Where there is no such MoE layer.
    pub fn layer_of_moe(&self, moe_layer: usize) -> usize {
        let layer = self.moe_layer_of.iter().position(|&of| of == Some(moe_layer));
        layer.expect("the caller counts MoE layers by moe_layers()")
    }

    /// f32 elements that the KV cache holds per token and layer.
    pub fn kv_elements_per_token(&self) -> usize {
        match &self.attention {
            Attention::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
            Attention::Gqa(gqa) => 2 * gqa.num_kv_heads * gqa.head_dim,
        }
    }
}
