//! One rank's model on a GPU: what it owns, and the kernels of a step in their order.

use std::sync::Arc;

use half::bf16;
use heliostat_kernels::cpu::rope::RopeStyle;
use heliostat_kernels::cpu::router::Groups;
use heliostat_kernels::cuda::activation::Activation;
use heliostat_kernels::cuda::attention::{Gqa, Mla};
use heliostat_kernels::cuda::exchange::{Exchange, RowFormat};
use heliostat_kernels::cuda::gemm::{Gemm, Matrix, Output};
use heliostat_kernels::cuda::norm::{EmbedArgs, Norm, NormArgs, NormInput};
use heliostat_kernels::cuda::rope::{Angles, Rope};
use heliostat_kernels::cuda::router::{Routing, RoutingRule};
use heliostat_kernels::cuda::sample::Sampling;
use heliostat_kernels::cuda::{Buffer, CudaError, Device, StoredAs, Stream};

use super::buffers::{Activations, Buffers};
use super::draws::Draws;
use super::inputs::Inputs;
use super::layer::{FeedForward, Layer};
use super::pool::ExpertPool;
use super::prompts::Prompts;
use super::tables::Tables;
use crate::batch::Step;
use crate::config::{ModelConfig, MoeConfig};

/// Kernel families.
#[derive(Debug)]
pub(super) struct Ops {
    pub(super) norm: Norm,
    pub(super) rope: Rope,
    pub(super) activation: Activation,
    pub(super) routing: Routing,
    pub(super) sampling: Sampling,
    pub(super) gemm: Gemm,
}

impl Ops {
    pub(super) fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            norm: Norm::new(device)?,
            rope: Rope::new(device)?,
            activation: Activation::new(device)?,
            routing: Routing::new(device)?,
            sampling: Sampling::new(device)?,
            gemm: Gemm::new(device),
        })
    }
}

/// The attention kernel of a model.
#[derive(Debug)]
pub(super) enum AttentionKernel {
    Mla(Mla),
    Gqa(Gqa),
}

/// KV blocks of one layer.
#[derive(Debug)]
pub(super) enum Kv {
    /// `[blocks][64][kv_lora + rope]`.
    Latent(Buffer<bf16>),
    /// `[blocks][64][kv_heads * head_dim]` each.
    KeysValues(Buffer<bf16>, Buffer<bf16>),
}

/// What a rank with tokens owns.
#[derive(Debug)]
pub(super) struct Dp {
    pub(super) config: Arc<ModelConfig>,
    pub(super) ops: Ops,
    /// Runs beside the main stream, between marks in it.
    pub(super) side: Stream,
    pub(super) attention: AttentionKernel,
    /// Where rows of prompts attend to expanded keys and values.
    pub(super) prompts: Option<Prompts>,
    pub(super) angles: Angles,
    /// `[vocab][hidden]`.
    pub(super) embedding: Buffer<bf16>,
    pub(super) layers: Vec<Layer>,
    pub(super) kv: Vec<Kv>,
    pub(super) norm: Buffer<f32>,
    pub(super) head: Matrix,
    pub(super) rule: RoutingRule,
    pub(super) inputs: Inputs,
    pub(super) buffers: Buffers,
    /// Input of feed-forward layers: rows that experts read lie in the exchange's heap.
    pub(super) moe_input: Activations,
    pub(super) draws: Draws,
    /// Tokens routed since the start, `[experts]` per MoE layer; wraps.
    pub(super) loads: Vec<Buffer<u32>>,
    /// The same, of all layers.
    pub(super) all_loads: Buffer<u32>,
}

/// What a rank with experts owns.
#[derive(Debug)]
pub(super) struct Ep {
    pub(super) gemm: Gemm,
    pub(super) activation: Activation,
    pub(super) pool: ExpertPool,
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    /// `[rows][2 * width]`.
    pub(super) gate_up_out: Buffer<bf16>,
    pub(super) inner: Activations,
    /// `[rows][hidden]`, where NCCL carries them; else each row is written to where it belongs.
    pub(super) results: Option<Buffer<bf16>>,
}

/// One rank's model.
#[derive(Debug)]
pub(super) struct CudaModel {
    pub(super) config: Arc<ModelConfig>,
    pub(super) dp: Option<Dp>,
    pub(super) ep: Option<Ep>,
    pub(super) exchange: Exchange,
    pub(super) tables: Tables,
}

/// What a step is computed as.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepShape {
    /// Rows of this rank.
    pub(super) rows: usize,
    /// Those of them that get logits and are drawn from.
    pub(super) logit_rows: usize,
    /// Rows of every DP rank that NCCL carries: the same on all ranks, none with more tokens. Peer memory needs none.
    pub(super) carried: usize,
}

impl CudaModel {
    /// How rows travel to the experts, and so how the experts are stored.
    pub(super) fn experts_stored(&self) -> StoredAs {
        match self.exchange.shape().format {
            RowFormat::Fp8 => StoredAs::Fp8,
            RowFormat::Bf16 => StoredAs::Bf16,
        }
    }

    /// Queues a step. Without rows it still runs the experts, for the tokens of other ranks.
    pub(super) fn step(&self, stream: &Stream, shape: StepShape) -> Result<(), CudaError> {
        match &self.dp {
            Some(dp) if shape.rows > 0 => {
                self.layers(stream, dp, shape)?;
                dp.logits(stream, shape.logit_rows)
            }
            Some(dp) => dp
                .moe_layers()
                .try_for_each(|weights| self.moe(stream, weights.moe_layer, Some((dp, weights)), shape)),
            None => (0..self.config.moe_layers())
                .try_for_each(|moe_layer| self.moe(stream, moe_layer, None, shape)),
        }
    }

    fn layers(&self, stream: &Stream, dp: &Dp, shape: StepShape) -> Result<(), CudaError> {
        let rows = shape.rows;
        let (ops, buffers, eps) = (&dp.ops, &dp.buffers, self.config.rms_norm_eps);
        stream.label("embed");
        ops.sampling.next_tokens(stream, &dp.inputs.next_tokens(rows, dp.draws.drawn()))?;
        ops.norm.embed(
            stream,
            &EmbedArgs {
                rows,
                width: self.config.hidden_size,
                table: &dp.embedding,
                tokens: dp.inputs.tokens(),
                positions: dp.inputs.positions(),
                residual: &buffers.residual,
            },
        )?;
        dp.plan_attention(stream, rows)?;
        let experts = self.experts_stored();
        for (number, (layer, kv)) in dp.layers.iter().zip(&dp.kv).enumerate() {
            stream.label("norms");
            let branch = (number > 0).then_some(&buffers.branch);
            let out = buffers.normed.out(&layer.attention.inputs());
            let input = NormInput::Residual { residual: &buffers.residual, branch };
            ops.norm.run(stream, &NormArgs { rows, input, gamma: &layer.input_norm, eps, out })?;
            dp.attention(stream, &layer.attention, kv, rows)?;
            stream.label("norms");
            let input = NormInput::Residual { residual: &buffers.residual, branch: Some(&buffers.branch) };
            let out = dp.moe_input.out(&layer.feed_forward.inputs(experts));
            ops.norm.run(stream, &NormArgs { rows, input, gamma: &layer.post_attention_norm, eps, out })?;
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => {
                    stream.label("dense MLP");
                    dp.mlp(stream, mlp, &buffers.branch, rows)?;
                }
                FeedForward::Moe(moe) => self.moe(stream, moe.moe_layer, Some((dp, moe)), shape)?,
            }
        }
        Ok(())
    }
}

impl Dp {
    /// Queues what the kernels of a step must be told, from copy `copy` of the page-locked memory.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        copy: usize,
        step: &Step,
        StepShape { rows, logit_rows, .. }: StepShape,
    ) -> Result<(), CudaError> {
        self.inputs.send(stream, copy, step, (rows, logit_rows))?;
        if let Some(prompts) = &mut self.prompts {
            prompts.send(stream, copy, step, rows)?;
        }
        self.draws.send(stream, copy, step, logit_rows)
    }

    fn moe_layers(&self) -> impl Iterator<Item = &super::layer::MoeWeights> {
        self.layers.iter().filter_map(|layer| match &layer.feed_forward {
            FeedForward::Moe(moe) => Some(&**moe),
            FeedForward::Dense(_) => None,
        })
    }

    /// Logits of the wanted rows, and what is drawn from them.
    fn logits(&self, stream: &Stream, rows: usize) -> Result<(), CudaError> {
        if rows == 0 {
            return Ok(());
        }
        let (ops, buffers, head) = (&self.ops, &self.buffers, &self.head);
        stream.label("LM head and draws");
        let input = NormInput::Selected {
            residual: &buffers.residual,
            branch: Some(&buffers.branch),
            rows: self.inputs.wanted(),
        };
        let out = buffers.last.out(&[head.stored()]);
        let eps = self.config.rms_norm_eps;
        ops.norm.run(stream, &NormArgs { rows, input, gamma: &self.norm, eps, out })?;
        let vocab = self.config.vocab_size;
        let logits = Output::F32 { data: &buffers.logits, stride: vocab };
        ops.gemm.dense(stream, head, buffers.last.operand(head.stored(), head.k()), rows, logits)?;
        self.draws.sample(stream, &ops.sampling, (&buffers.logits, vocab), rows)
    }
}

/// The rule of a model's routers.
pub(super) fn routing_rule(moe: &MoeConfig) -> RoutingRule {
    let router = &moe.router;
    let groups = Groups { count: router.n_group, top: router.topk_group, score: router.group_score };
    RoutingRule {
        experts: moe.num_experts,
        scoring: router.scoring,
        groups: (router.topk_group < router.n_group).then_some(groups),
        top_k: moe.top_k,
        normalize: router.norm_topk_prob,
        scale: router.routed_scaling_factor,
    }
}

/// Angles for `positions` positions.
pub(super) fn angles(device: &Device, config: &ModelConfig, positions: usize) -> Result<Angles, CudaError> {
    let rope = &config.rope;
    let style = if rope.interleave { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
    Angles::new(device, style, &rope.inv_freq, rope.attention_factor, positions)
}
