//! RMS normalisation.

use super::Cpu;
use super::simd::math::sum_of_squares;
use super::simd::{Kernel, Simd};

impl Cpu {
    /// `out = x / sqrt(mean(x^2) + eps) * gamma` for every row of `gamma.len()`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn rms_norm(&self, x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "rms_norm: length of out");
        out.copy_from_slice(x);
        self.rms_norm_in_place(out, gamma, eps);
    }

    /// [`Cpu::rms_norm`] in place; also good for heads: rows are whatever `gamma.len()` says.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn rms_norm_in_place(&self, x: &mut [f32], gamma: &[f32], eps: f32) {
        assert!(
            !gamma.is_empty() && x.len().is_multiple_of(gamma.len()),
            "rms_norm: rows of {}",
            gamma.len()
        );
        self.level.run(RmsNorm { x, gamma, eps });
    }

    /// `residual += x`, then `out = rms_norm(residual)`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn add_rms_norm(&self, residual: &mut [f32], x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
        self.add(residual, x);
        self.rms_norm(residual, gamma, eps, out);
    }
}

struct RmsNorm<'a> {
    x: &'a mut [f32],
    gamma: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.x.chunks_exact_mut(self.gamma.len()) {
            let mean = sum_of_squares(simd, row) / row.len() as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            for (x, gamma) in row.iter_mut().zip(self.gamma) {
                *x = *x * scale * gamma;
            }
        }
    }
}
