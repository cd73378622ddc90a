//! All routed experts in this process: the reference for every exchange, and the one-rank case.

use std::sync::Arc;

use heliostat_kernels::cpu::Cpu;

use super::expert::{Expert, ExpertScratch, load_expert};
use super::scratch::rows;
use super::{ExchangeError, Experts};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;

/// Every expert of every MoE layer.
#[derive(Debug)]
pub struct LocalExperts {
    cpu: Cpu,
    /// `[moe layer][expert]`.
    layers: Vec<Vec<Arc<Expert>>>,
    hidden: usize,
    /// Choices by expert.
    by_expert: Vec<Vec<usize>>,
    input: Vec<f32>,
    output: Vec<f32>,
    /// Unweighted rows, `[t][k][hidden]`.
    chosen: Vec<f32>,
    scratch: ExpertScratch,
}

impl LocalExperts {
    /// Reads all experts.
    ///
    /// # Errors
    /// A tensor that is missing or damaged.
    pub fn load(checkpoint: &Checkpoint, config: &ModelConfig, cpu: Cpu) -> Result<Self, CheckpointError> {
        let num_experts = config.moe.num_experts;
        let layer = |moe_layer| {
            let expert = |expert| load_expert(checkpoint, config, moe_layer, expert).map(Arc::new);
            (0..num_experts).map(expert).collect()
        };
        Ok(Self {
            cpu,
            layers: (0..config.moe_layers()).map(layer).collect::<Result<_, _>>()?,
            hidden: config.hidden_size,
            by_expert: vec![Vec::new(); num_experts],
            input: Vec::new(),
            output: Vec::new(),
            chosen: Vec::new(),
            scratch: ExpertScratch::default(),
        })
    }
}

impl Experts for LocalExperts {
    fn forward(
        &mut self,
        moe_layer: usize,
        hidden: &[f32],
        ids: &[u32],
        weights: &[f32],
        out: &mut [f32],
    ) -> Result<(), ExchangeError> {
        let width = self.hidden;
        let top_k = ids.len().checked_div(hidden.len() / width).unwrap_or(0);
        self.by_expert.iter_mut().for_each(Vec::clear);
        for (choice, &expert) in ids.iter().enumerate() {
            self.by_expert[expert as usize].push(choice);
        }
        let chosen = rows(&mut self.chosen, ids.len() * width);
        let wanted = self.layers[moe_layer].iter().zip(&self.by_expert);
        for (expert, choices) in wanted.filter(|(_, choices)| !choices.is_empty()) {
            self.input.clear();
            for choice in choices {
                self.input.extend_from_slice(&hidden[choice / top_k * width..][..width]);
            }
            let output = rows(&mut self.output, self.input.len());
            expert.forward_with(&self.cpu, &self.input, &mut self.scratch, output);
            for (&choice, row) in choices.iter().zip(output.chunks_exact(width)) {
                chosen[choice * width..][..width].copy_from_slice(row);
            }
        }
        out.fill(0.0);
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            for choice in token * top_k..(token + 1) * top_k {
                self.cpu.scaled_add(out, weights[choice], &chosen[choice * width..][..width]);
            }
        }
        Ok(())
    }
}
