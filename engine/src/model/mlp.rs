//! Gated feed-forward: `down(silu(gate x) * up x)`. Dense layers, shared experts and routed experts are all this.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::weight::Weight;

use super::scratch::rows;
use crate::checkpoint::{CheckpointError, Reader};

/// The three matrices.
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    /// `[width][hidden]`.
    pub(super) gate: Weight,
    /// `[width][hidden]`.
    pub(super) up: Weight,
    /// `[hidden][width]`.
    pub(super) down: Weight,
}

/// Buffers of [`Mlp::forward`].
#[derive(Debug, Default)]
pub(super) struct MlpScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Output of shared experts, `[t][hidden]`.
    pub(super) shared: Vec<f32>,
}

impl Mlp {
    /// Reads the matrices; `name` makes a tensor's name from that of a projection.
    pub(super) fn load(
        reader: &mut Reader<'_, '_>,
        name: impl Fn(&str) -> String,
        hidden: usize,
        width: usize,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            gate: reader.linear(name("gate_proj"), width, hidden)?,
            up: reader.linear(name("up_proj"), width, hidden)?,
            down: reader.linear(name("down_proj"), hidden, width)?,
        })
    }

    /// `out` is overwritten.
    pub(super) fn forward(&self, cpu: &Cpu, x: &[f32], scratch: &mut MlpScratch, out: &mut [f32]) {
        gated(cpu, [&self.gate, &self.up, &self.down], x, (&mut scratch.gate, &mut scratch.up), out);
    }
}

/// `out = down(silu(gate x) * up x)`.
pub(super) fn gated(
    cpu: &Cpu,
    [gate, up, down]: [&Weight; 3],
    x: &[f32],
    (gated, upped): (&mut Vec<f32>, &mut Vec<f32>),
    out: &mut [f32],
) {
    let len = x.len() / gate.cols() * gate.rows();
    let (gated, upped) = (rows(gated, len), rows(upped, len));
    cpu.matmul(x, gate, gated);
    cpu.matmul(x, up, upped);
    cpu.silu_mul(gated, upped);
    cpu.matmul(gated, down, out);
}
