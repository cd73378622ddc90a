//! A MoE layer: the router chooses, the experts compute wherever they are, the shared experts here.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::router::{Groups, Router};
use heliostat_kernels::weight::Weight;

use super::mlp::{Mlp, MlpScratch};
use super::scratch::rows;
use super::{ExchangeError, Experts, Routed};
use crate::checkpoint::{CheckpointError, Reader, layer_tensor};
use crate::config::{ModelConfig, MoeConfig};

/// Router and shared experts of one layer.
#[derive(Debug)]
pub(super) struct MoeLayer {
    moe_layer: usize,
    config: MoeConfig,
    router: Weight,
    correction_bias: Option<Vec<f32>>,
    /// All shared experts as one.
    shared: Option<Mlp>,
}

/// Buffers of [`MoeLayer::forward`].
#[derive(Debug, Default)]
pub(super) struct MoeScratch {
    logits: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl MoeLayer {
    /// Reads MoE layer `moe_layer`, which is decoder layer `layer`.
    pub(super) fn load(
        reader: &mut Reader<'_, '_>,
        config: &ModelConfig,
        layer: usize,
        moe_layer: usize,
    ) -> Result<Self, CheckpointError> {
        let (hidden, moe) = (config.hidden_size, &config.moe);
        let router = reader.matrix(layer_tensor(layer, "mlp.gate"), moe.num_experts, hidden)?;
        let correction_bias = if moe.router.correction_bias {
            let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
            Some(reader.vector(name, moe.num_experts)?)
        } else {
            None
        };
        let shared = if moe.shared_intermediate_size > 0 {
            let name = |part: &str| layer_tensor(layer, &format!("mlp.shared_experts.{part}"));
            Some(Mlp::load(reader, name, hidden, moe.shared_intermediate_size)?)
        } else {
            None
        };
        Ok(Self { moe_layer, config: moe.clone(), router, correction_bias, shared })
    }

    /// `out = routed experts + shared experts`, the routed sum complete before the shared one is added.
    pub(super) fn forward(
        &self,
        cpu: &Cpu,
        x: &[f32],
        experts: &mut dyn Experts,
        (scratch, mlp_scratch): (&mut MoeScratch, &mut MlpScratch),
        out: &mut [f32],
    ) -> Result<(), ExchangeError> {
        let tokens = x.len() / self.router.cols();
        let (num_experts, top_k) = (self.config.num_experts, self.config.top_k);
        let logits = rows(&mut scratch.logits, tokens * num_experts);
        let ids = rows(&mut scratch.ids, tokens * top_k);
        let weights = rows(&mut scratch.weights, tokens * top_k);
        cpu.matmul(x, &self.router, logits);
        cpu.route(&self.rule(), logits, ids, weights);
        let routed = Routed { hidden: x, ids, weights };
        let Some(shared) = &self.shared else {
            return experts.forward_during(self.moe_layer, routed, out, &mut || ());
        };
        let mut shared_out = std::mem::take(&mut mlp_scratch.shared);
        let into = rows(&mut shared_out, x.len());
        let result = experts
            .forward_during(self.moe_layer, routed, out, &mut || shared.forward(cpu, x, mlp_scratch, into));
        if result.is_ok() {
            cpu.add(out, into);
        }
        mlp_scratch.shared = shared_out;
        result
    }

    fn rule(&self) -> Router<'_> {
        let router = &self.config.router;
        let groups = Groups { count: router.n_group, top: router.topk_group, score: router.group_score };
        Router {
            scoring: router.scoring,
            bias: self.correction_bias.as_deref(),
            groups: (router.topk_group < router.n_group).then_some(groups),
            top_k: self.config.top_k,
            normalize: router.norm_topk_prob,
            scale: router.routed_scaling_factor,
        }
    }
}
