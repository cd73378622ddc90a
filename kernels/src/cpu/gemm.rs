//! Products of activations and weights: `y = x w^T`.

use super::{Cpu, plain};
use crate::weight::Weight;

impl Cpu {
    /// `y[m][n] = sum_k x[m][k] w[n][k]`; the number of rows is `x.len() / w.cols()`.
    ///
    /// # Panics
    /// If `x` is not whole rows of `w.cols()`, or `y` not as many rows of `w.rows()`.
    pub fn matmul(&self, x: &[f32], w: &Weight, y: &mut [f32]) {
        plain::matmul(x, w, y);
    }

    /// A product per head: `y[t][h][n] = sum_k x[t][h][k] w[h * n_per_head + n][k]`, where `w` holds the matrices of
    /// all heads one above the other.
    ///
    /// # Panics
    /// If `heads` does not divide `w.rows()`, or the lengths of `x` and `y` do not fit.
    pub fn matmul_heads(&self, x: &[f32], heads: usize, w: &Weight, y: &mut [f32]) {
        plain::matmul_heads(x, heads, w, y);
    }

    /// Copies rows of `w` as f32: `out[i] = w[ids[i]]`.
    ///
    /// # Panics
    /// If an id is not a row of `w`, or `out` is not `ids.len()` rows.
    pub fn gather(&self, w: &Weight, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * w.cols(), "gather: length of out");
        for (out, &id) in out.chunks_exact_mut(w.cols()).zip(ids) {
            w.read_row(id as usize, out);
        }
    }
}
