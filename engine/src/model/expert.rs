//! One routed expert: its weights, how they are read, and how they travel between ranks.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::weight::{Weight, WeightError};
use xxhash_rust::xxh3::xxh3_64;

use super::mlp::gated;
use crate::checkpoint::{Checkpoint, CheckpointError, Expected, expert_tensor};
use crate::config::ModelConfig;

/// `down(silu(gate x) * up x)`.
#[derive(Clone, Debug)]
pub struct Expert {
    /// `[width][hidden]`.
    pub gate: Weight,
    /// `[width][hidden]`.
    pub up: Weight,
    /// `[hidden][width]`.
    pub down: Weight,
}

/// Bytes that are not an expert.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ExpertError {
    /// The bytes end within a matrix, or go on after the last.
    #[error("an expert of {0} bytes is cut off or too long")]
    Length(usize),
    /// A matrix is not one.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The matrices do not fit each other.
    #[error("gate {gate:?}, up {up:?} and down {down:?} do not make an expert")]
    Shape {
        /// Rows and columns.
        gate: (usize, usize),
        /// Rows and columns.
        up: (usize, usize),
        /// Rows and columns.
        down: (usize, usize),
    },
}

/// Buffers of [`Expert::forward_with`], worth keeping from call to call.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Expert {
    /// `x` and `out` are `[rows][hidden]`; `out` is overwritten.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn forward(&self, cpu: &Cpu, x: &[f32], rows: usize, out: &mut [f32]) {
        assert_eq!(x.len(), rows * self.gate.cols(), "expert: length of x");
        self.forward_with(cpu, x, &mut ExpertScratch::default(), out);
    }

    /// [`Expert::forward`] without allocating.
    pub fn forward_with(&self, cpu: &Cpu, x: &[f32], scratch: &mut ExpertScratch, out: &mut [f32]) {
        let matrices = [&self.gate, &self.up, &self.down];
        gated(cpu, matrices, x, (&mut scratch.gate, &mut scratch.up), out);
    }

    /// Bytes of the weights in memory.
    pub fn size_bytes(&self) -> usize {
        self.gate.size_bytes() + self.up.size_bytes() + self.down.size_bytes()
    }

    /// The expert as bytes; [`Expert::from_bytes`] is the inverse.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.size_bytes() + 256);
        for matrix in [&self.gate, &self.up, &self.down] {
            let matrix = matrix.to_bytes();
            bytes.extend((matrix.len() as u64).to_le_bytes());
            bytes.extend(matrix);
        }
        bytes
    }

    /// Reads what [`Expert::to_bytes`] wrote.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ExpertError> {
        let mut rest = bytes;
        let mut next = || {
            let (len, tail) = rest.split_first_chunk::<8>().ok_or(ExpertError::Length(bytes.len()))?;
            let len =
                usize::try_from(u64::from_le_bytes(*len)).map_err(|_| ExpertError::Length(bytes.len()))?;
            let (matrix, tail) = tail.split_at_checked(len).ok_or(ExpertError::Length(bytes.len()))?;
            rest = tail;
            Ok::<_, ExpertError>(Weight::from_bytes(matrix)?)
        };
        let expert = Self { gate: next()?, up: next()?, down: next()? };
        if !rest.is_empty() {
            return Err(ExpertError::Length(bytes.len()));
        }
        let [gate, up, down] =
            [&expert.gate, &expert.up, &expert.down].map(|matrix| (matrix.rows(), matrix.cols()));
        if gate == up && gate == (down.1, down.0) {
            Ok(expert)
        } else {
            Err(ExpertError::Shape { gate, up, down })
        }
    }

    /// Equal for equal weights on every rank.
    pub fn checksum(&self) -> u64 {
        let parts = [&self.gate, &self.up, &self.down].map(|matrix| matrix.checksum().to_le_bytes());
        xxh3_64(parts.as_flattened())
    }
}

/// Reads one routed expert, and nothing else, from the checkpoint.
///
/// # Errors
/// A tensor that is missing or damaged.
///
/// # Panics
/// If there is no such MoE layer.
pub fn load_expert(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    moe_layer: usize,
    expert: usize,
) -> Result<Expert, CheckpointError> {
    let [gate, up, down] = expert_parts(config, moe_layer, expert);
    Ok(Expert {
        gate: checkpoint.read_weight(&gate)?,
        up: checkpoint.read_weight(&up)?,
        down: checkpoint.read_weight(&down)?,
    })
}

/// Bytes that [`load_expert`] reads, for progress.
///
/// # Errors
/// A tensor that is missing.
pub fn expert_bytes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    moe_layer: usize,
    expert: usize,
) -> Result<u64, CheckpointError> {
    expert_parts(config, moe_layer, expert).iter().map(|part| checkpoint.stored_bytes(part)).sum()
}

fn expert_parts(config: &ModelConfig, moe_layer: usize, expert: usize) -> [Expected; 3] {
    let layer = config.layer_of_moe(moe_layer);
    let (hidden, width) = (config.hidden_size, config.moe.intermediate_size);
    let part = |name, rows, cols| Expected::linear(expert_tensor(layer, expert, name), rows, cols);
    [part("gate_proj", width, hidden), part("up_proj", width, hidden), part("down_proj", hidden, width)]
}
