//! Cosines and sines of a batch's positions, computed once per step for all layers.

use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cpu::rope::{RopeLayout, RopeStyle, RopeTable};

use crate::config::RopeConfig;

/// A table whose rows are those of the batch: row `i` holds the angles of the batch's token `i`.
#[derive(Debug, Default)]
pub(super) struct RopeRows {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    /// 0, 1, 2, ...: a token's row in this table.
    rows: Vec<u32>,
    interleave: bool,
}

impl RopeRows {
    /// Computes the table for `positions`. The angle is rounded to f32, as transformers does.
    pub(super) fn fill(&mut self, config: &RopeConfig, positions: &[u32]) {
        self.half = config.dim / 2;
        self.interleave = config.interleave;
        self.rows.clear();
        self.rows.extend(0..positions.len() as u32);
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &inv_freq in &config.inv_freq {
                let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                self.cos.push(cos as f32 * config.attention_factor);
                self.sin.push(sin as f32 * config.attention_factor);
            }
        }
    }

    /// Rotates every head of `x` in place.
    pub(super) fn rotate(&self, cpu: &Cpu, x: &mut [f32], layout: RopeLayout) {
        let style = if self.interleave { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
        let table = RopeTable { cos: &self.cos, sin: &self.sin, half: self.half };
        cpu.rope(style, x, layout, &self.rows, table);
    }
}
