//! Rows of a weight as the kernels read them: sixteen columns at a time, widened to f32 in registers.

use crate::cpu::simd::Simd;
use crate::weight::F8Elements;

/// A matrix in its storage type. The columns of a row come in runs that share a factor.
pub(in crate::cpu) trait Stored: Copy + Send + Sync {
    /// An element as it is stored.
    type Element: Copy + Default;

    /// Columns of a row.
    fn cols(&self) -> usize;
    /// Columns that share a factor: a multiple of 16, or no fewer than all.
    fn run_cols(&self) -> usize;
    /// A row.
    fn row(&self, row: usize) -> &[Self::Element];
    /// The factor of the run `run` of a row, as `widen` wants it.
    fn factor(&self, row: usize, run: usize) -> f32;
    /// Sixteen columns as f32.
    fn widen<S: Simd>(simd: S, step: &[Self::Element; 16], factor: S::V) -> S::V;
}

/// A matrix of f32.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32Matrix<'a>(pub(in crate::cpu) &'a [f32], pub(in crate::cpu) usize);

/// A matrix of bf16 bits.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Bf16Matrix<'a>(pub(in crate::cpu) &'a [u16], pub(in crate::cpu) usize);

/// A matrix of E4M3 codes with block scales.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F8Matrix<'a>(pub(in crate::cpu) F8Elements<'a>, pub(in crate::cpu) usize);

impl Stored for F32Matrix<'_> {
    type Element = f32;

    #[inline(always)]
    fn cols(&self) -> usize {
        self.1
    }

    #[inline(always)]
    fn run_cols(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[f32] {
        &self.0[row * self.1..(row + 1) * self.1]
    }

    #[inline(always)]
    fn factor(&self, _row: usize, _run: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, step: &[f32; 16], _factor: S::V) -> S::V {
        simd.load(step)
    }
}

impl Stored for Bf16Matrix<'_> {
    type Element = u16;

    #[inline(always)]
    fn cols(&self) -> usize {
        self.1
    }

    #[inline(always)]
    fn run_cols(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[u16] {
        &self.0[row * self.1..(row + 1) * self.1]
    }

    #[inline(always)]
    fn factor(&self, _row: usize, _run: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, step: &[u16; 16], _factor: S::V) -> S::V {
        simd.load_bf16(step)
    }
}

impl Stored for F8Matrix<'_> {
    type Element = u8;

    #[inline(always)]
    fn cols(&self) -> usize {
        self.1
    }

    #[inline(always)]
    fn run_cols(&self) -> usize {
        self.0.block.cols
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &[u8] {
        &self.0.codes[row * self.1..(row + 1) * self.1]
    }

    /// The scale times 256, exact because scales are at most 1e30: `widen` reads codes divided by 256, so the one
    /// rounding is that of `code * scale`.
    #[inline(always)]
    fn factor(&self, row: usize, run: usize) -> f32 {
        self.0.row_scales(row)[run] * 256.0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, step: &[u8; 16], factor: S::V) -> S::V {
        simd.mul(simd.load_e4m3_div_256(step), factor)
    }
}
