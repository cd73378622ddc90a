//! The weights of a decoder layer on a GPU.

use heliostat_kernels::cuda::Buffer;
use heliostat_kernels::cuda::gemm::Matrix;

use super::source::{KeyValueUp, LoadError, WeightSource};
use crate::batch::PrefillAttention;
use crate::checkpoint::layer_tensor;
use crate::config::{Attention, GqaConfig, MlaConfig, ModelConfig};

/// One decoder layer, but for its routed experts.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Buffer<f32>,
    pub(super) attention: AttentionWeights,
    pub(super) post_attention_norm: Buffer<f32>,
    pub(super) feed_forward: FeedForward,
}

#[derive(Debug)]
pub(super) enum AttentionWeights {
    Mla(Box<MlaWeights>),
    Gqa(Box<GqaWeights>),
}

/// Latent attention, absorbed as on the CPU.
#[derive(Debug)]
pub(super) struct MlaWeights {
    /// `[q_lora + kv_lora + rope][hidden]`, or without a low-rank query `[kv_lora + rope][hidden]`.
    pub(super) first: Matrix,
    pub(super) query: Query,
    pub(super) kv_a_norm: Buffer<f32>,
    /// `[heads * kv_lora][nope]`.
    pub(super) key_up: Matrix,
    /// `[heads * v][kv_lora]`.
    pub(super) value_up: Matrix,
    pub(super) expand: Option<Expand>,
    pub(super) output: Matrix,
}

/// What keys and values of all heads are made from latents by.
#[derive(Debug)]
pub(super) struct Expand {
    /// `[heads * nope][kv_lora]`.
    pub(super) keys: Matrix,
    /// The weights of `value_up` once more, as one product.
    pub(super) values: Matrix,
}

/// The query's projection to `[heads * (nope + rope)]`, from the hidden size or from what the first product made of it.
#[derive(Debug)]
pub(super) enum Query {
    Full(Matrix),
    LowRank { norm: Buffer<f32>, b: Matrix },
}

#[derive(Debug)]
pub(super) struct GqaWeights {
    /// `[heads * d + 2 * kv_heads * d][hidden]`: queries, keys, values.
    pub(super) query_key_value: Matrix,
    pub(super) query_norm: Buffer<f32>,
    pub(super) key_norm: Buffer<f32>,
    pub(super) output: Matrix,
}

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(Box<Mlp>),
    Moe(Box<MoeWeights>),
}

/// A gated feed-forward layer of one width.
#[derive(Debug)]
pub(super) struct Mlp {
    /// `[2 * width][hidden]`.
    pub(super) gate_up: Matrix,
    /// `[hidden][width]`.
    pub(super) down: Matrix,
    pub(super) width: usize,
}

#[derive(Debug)]
pub(super) struct MoeWeights {
    pub(super) moe_layer: usize,
    pub(super) router: Matrix,
    pub(super) correction_bias: Option<Buffer<f32>>,
    pub(super) shared: Option<Mlp>,
}

impl Layer {
    pub(super) fn load(
        source: &mut WeightSource<'_, '_>,
        config: &ModelConfig,
        layer: usize,
        prefill: PrefillAttention,
    ) -> Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let name = |part: &str| layer_tensor(layer, part);
        let attention = match &config.attention {
            Attention::Mla(mla) => {
                AttentionWeights::Mla(MlaWeights::load(source, (config, mla), layer, prefill)?.into())
            }
            Attention::Gqa(gqa) => {
                AttentionWeights::Gqa(GqaWeights::load(source, config, gqa, layer)?.into())
            }
        };
        let feed_forward = match config.moe_layer_of[layer] {
            Some(moe_layer) => FeedForward::Moe(MoeWeights::load(source, config, layer, moe_layer)?.into()),
            None => {
                let shape = (hidden, config.intermediate_size);
                FeedForward::Dense(Mlp::load(source, layer, "mlp", shape)?.into())
            }
        };
        Ok(Self {
            input_norm: source.vector(name("input_layernorm"), hidden)?,
            attention,
            post_attention_norm: source.vector(name("post_attention_layernorm"), hidden)?,
            feed_forward,
        })
    }
}

impl MlaWeights {
    fn load(
        source: &mut WeightSource<'_, '_>,
        (config, mla): (&ModelConfig, &MlaConfig),
        layer: usize,
        prefill: PrefillAttention,
    ) -> Result<Self, LoadError> {
        let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
        let (hidden, latent, rope) = (config.hidden_size, mla.kv_lora_rank, mla.qk_rope_head_dim);
        let head = mla.num_heads * (mla.qk_nope_head_dim + rope);
        let latent_rows = (name("kv_a_proj_with_mqa"), latent + rope);
        let (first, query) = match mla.q_lora_rank {
            Some(rank) => {
                let first = source.linear(&[(name("q_a_proj"), rank), latent_rows], hidden)?;
                let norm = source.vector(name("q_a_layernorm"), rank)?;
                (first, Query::LowRank { norm, b: source.linear(&[(name("q_b_proj"), head)], rank)? })
            }
            None => {
                let query = source.linear(&[(name("q_proj"), head)], hidden)?;
                (source.linear(&[latent_rows], hidden)?, Query::Full(query))
            }
        };
        let kv_a_norm = source.vector(name("kv_a_layernorm"), latent)?;
        let KeyValueUp { key_up, value_up, expand } = source.key_value_up(name("kv_b_proj"), mla, prefill)?;
        let output = source.linear(&[(name("o_proj"), hidden)], mla.num_heads * mla.v_head_dim)?;
        Ok(Self { first, query, kv_a_norm, key_up, value_up, expand, output })
    }
}

impl GqaWeights {
    fn load(
        source: &mut WeightSource<'_, '_>,
        config: &ModelConfig,
        gqa: &GqaConfig,
        layer: usize,
    ) -> Result<Self, LoadError> {
        let name = |part: &str| layer_tensor(layer, &format!("self_attn.{part}"));
        let (query, key) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
        let parts = [(name("q_proj"), query), (name("k_proj"), key), (name("v_proj"), key)];
        Ok(Self {
            query_key_value: source.linear(&parts, config.hidden_size)?,
            query_norm: source.vector(name("q_norm"), gqa.head_dim)?,
            key_norm: source.vector(name("k_norm"), gqa.head_dim)?,
            output: source.linear(&[(name("o_proj"), config.hidden_size)], query)?,
        })
    }
}

impl Mlp {
    fn load(
        source: &mut WeightSource<'_, '_>,
        layer: usize,
        prefix: &str,
        (hidden, width): (usize, usize),
    ) -> Result<Self, LoadError> {
        let name = |part: &str| layer_tensor(layer, &format!("{prefix}.{part}"));
        let gate_up = source.linear(&[(name("gate_proj"), width), (name("up_proj"), width)], hidden)?;
        Ok(Self { gate_up, down: source.linear(&[(name("down_proj"), hidden)], width)?, width })
    }
}

impl MoeWeights {
    fn load(
        source: &mut WeightSource<'_, '_>,
        config: &ModelConfig,
        layer: usize,
        moe_layer: usize,
    ) -> Result<Self, LoadError> {
        let (hidden, moe) = (config.hidden_size, &config.moe);
        let router = source.matrix(&layer_tensor(layer, "mlp.gate"), moe.num_experts, hidden)?;
        let bias = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        let wants_bias = moe.router.correction_bias;
        let correction_bias = wants_bias.then(|| source.vector(bias, moe.num_experts)).transpose()?;
        let width = moe.shared_intermediate_size;
        let shared = (width > 0).then(|| Mlp::load(source, layer, "mlp.shared_experts", (hidden, width)));
        Ok(Self { moe_layer, router, correction_bias, shared: shared.transpose()? })
    }
}
