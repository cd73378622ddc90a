//! RMS normalisation.

use super::{Cpu, plain};

impl Cpu {
    /// `out = x / sqrt(mean(x^2) + eps) * gamma` for every row of `gamma.len()`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rms_norm(&self, x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
        plain::rms_norm(x, gamma, eps, out);
    }

    /// [`Cpu::rms_norm`] in place; also good for heads: rows are whatever `gamma.len()` says.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn rms_norm_in_place(&self, x: &mut [f32], gamma: &[f32], eps: f32) {
        let copy = x.to_vec();
        plain::rms_norm(&copy, gamma, eps, x);
    }

    /// `residual += x`, then `out = rms_norm(residual)`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn add_rms_norm(&self, residual: &mut [f32], x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
        self.add(residual, x);
        plain::rms_norm(residual, gamma, eps, out);
    }
}
