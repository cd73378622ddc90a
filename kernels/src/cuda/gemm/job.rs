//! One product: its buffers, checked, as the arguments of the two kernels.

use super::matrix::{Form, Matrix, STEP_BYTES, TILE_ROWS, step_elements};
use super::{Operand, Output, Segments};
use crate::cuda::{CudaError, Params, StoredAs, Swizzle, TensorMap, TiledLayout, TmaElement};

/// One product, as both kernels know it.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) x: Operand<'a>,
    pub(super) x_head_stride: usize,
    pub(super) y: Output<'a>,
    pub(super) y_head_stride: usize,
    pub(super) rows: usize,
    pub(super) segments: Option<Segments<'a>>,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct FastParams {
    x: TensorMap,
    w: TensorMap,
    x_scales: TensorMap,
    w_scales: u64,
    y: u64,
    y_stride: u64,
    y_head_stride: u64,
    segment_start: u64,
    segment_rows: u64,
    pool_of_slot: u64,
    row_addresses: u64,
    pub(super) w_policy: u64,
    x_policy: u64,
    rows: u32,
    n: u32,
    k: u32,
    matrices: u32,
    y_is_f32: u32,
    y_vectors: u32,
    pub(super) tile_rows: u32,
}

// SAFETY: the fields of `Params` in cu/gemm_tiles.cuh.
unsafe impl Params for FastParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PlainParams {
    x: u64,
    x_scales: u64,
    w: u64,
    w_scales: u64,
    y: u64,
    x_stride: u64,
    x_head_stride: u64,
    y_stride: u64,
    y_head_stride: u64,
    segment_start: u64,
    segment_rows: u64,
    pool_of_slot: u64,
    row_addresses: u64,
    x_scales_stride: u32,
    rows: u32,
    n: u32,
    k: u32,
    matrices: u32,
    y_is_f32: u32,
}

// SAFETY: the fields of `Params` in cu/gemm_plain.cu.
unsafe impl Params for PlainParams {}

impl Job<'_> {
    pub(super) fn check(&self, w: &Matrix) {
        let (last_row, len) = match self.x {
            Operand::Bf16 { data, stride } => {
                assert_eq!(w.stored(), StoredAs::Bf16, "how x is stored");
                (stride * (self.rows - 1), data.len())
            }
            Operand::Fp8 { codes, scales, rows_stride } => {
                assert_eq!(w.stored(), StoredAs::Fp8, "how x is stored");
                assert!(rows_stride >= self.rows && rows_stride.is_multiple_of(4), "rows of scales");
                assert!(scales.len() >= w.k.div_ceil(128) * rows_stride, "scales of x");
                (w.k * (self.rows - 1), codes.len())
            }
        };
        let heads = if self.segments.is_none() { w.matrices } else { 1 };
        assert!(last_row + (heads - 1) * self.x_head_stride + w.k <= len, "length of x");
        let (len, stride) = match self.y {
            Output::Bf16 { data, stride } => (data.len(), stride),
            Output::F32 { data, stride } => (data.len(), stride),
            Output::Scattered { addresses } => {
                assert!(self.segments.is_some(), "only grouped products are scattered");
                assert!(addresses.len() >= self.rows && w.n.is_multiple_of(8), "addresses of rows of y");
                return;
            }
        };
        assert!(stride * (self.rows - 1) + (heads - 1) * self.y_head_stride + w.n <= len, "length of y");
    }

    pub(super) fn matrices(&self, w: &Matrix) -> u32 {
        self.segments.map_or(w.matrices, |segments| segments.rows.len()) as u32
    }

    /// Address, address of scales, stride of rows, stride of scales.
    fn x_parts(&self, w: &Matrix) -> (u64, u64, usize, usize) {
        match self.x {
            Operand::Bf16 { data, stride } => (data.address(), 0, stride, 0),
            Operand::Fp8 { codes, scales, rows_stride } => {
                (codes.address(), scales.address(), w.k, rows_stride)
            }
        }
    }

    /// Address, stride of rows, whether f32.
    fn y_parts(&self) -> (u64, usize, u32) {
        match self.y {
            Output::Bf16 { data, stride } => (data.address(), stride, 0),
            Output::F32 { data, stride } => (data.address(), stride, 1),
            Output::Scattered { .. } => (0, 0, 0),
        }
    }

    fn row_addresses(&self) -> u64 {
        match self.y {
            Output::Bf16 { .. } | Output::F32 { .. } => 0,
            Output::Scattered { addresses } => addresses.address(),
        }
    }

    fn segment_addresses(&self) -> [u64; 3] {
        self.segments.map_or([0; 3], |segments| {
            [segments.start.address(), segments.rows.address(), segments.pool_of_slot.address()]
        })
    }

    /// Whether the copy engine can read x. So it is or is not for all batches: strides and slices are the model's.
    pub(super) fn x_is_aligned(&self, w: &Matrix) -> bool {
        let (address, scales, stride, _) = self.x_parts(w);
        let bytes = STEP_BYTES as usize / step_elements(w.stored());
        address.is_multiple_of(16)
            && scales.is_multiple_of(16)
            && (stride * bytes).is_multiple_of(16)
            && (self.x_head_stride * bytes).is_multiple_of(16)
    }

    pub(super) fn fast_params(&self, w: &Matrix, form: &Form) -> Result<FastParams, CudaError> {
        let (y, y_stride, y_is_f32) = self.y_parts();
        let [segment_start, segment_rows, pool_of_slot] = self.segment_addresses();
        let (element_bytes, vector_bytes) = if y_is_f32 == 1 { (4, 8) } else { (2, 16) };
        let even = |elements: usize| (elements * element_bytes).is_multiple_of(vector_bytes);
        let y_vectors = y.is_multiple_of(vector_bytes as u64) && even(y_stride) && even(self.y_head_stride);
        let x = self.x_map(w, form.plan.pair)?;
        Ok(FastParams {
            x,
            w: form.map,
            x_scales: self.x_scales_map(w)?.unwrap_or(x),
            w_scales: w.scales_address(),
            y,
            y_stride: y_stride as u64,
            y_head_stride: self.y_head_stride as u64,
            segment_start,
            segment_rows,
            pool_of_slot,
            row_addresses: self.row_addresses(),
            w_policy: super::EVICT_NORMAL,
            x_policy: super::EVICT_NORMAL,
            rows: self.rows as u32,
            n: w.n as u32,
            k: w.k as u32,
            matrices: self.matrices(w),
            y_is_f32,
            y_vectors: u32::from(y_vectors),
            tile_rows: TILE_ROWS,
        })
    }

    /// The argument of the plain kernel.
    pub(super) fn plain_params(&self, w: &Matrix) -> PlainParams {
        let (x, x_scales, x_stride, x_scales_stride) = self.x_parts(w);
        let (y, y_stride, y_is_f32) = self.y_parts();
        let [segment_start, segment_rows, pool_of_slot] = self.segment_addresses();
        PlainParams {
            x,
            x_scales,
            w: w.stack.data().address(),
            w_scales: w.scales_address(),
            y,
            x_stride: x_stride as u64,
            x_head_stride: self.x_head_stride as u64,
            y_stride: y_stride as u64,
            y_head_stride: self.y_head_stride as u64,
            segment_start,
            segment_rows,
            pool_of_slot,
            row_addresses: self.row_addresses(),
            x_scales_stride: x_scales_stride as u32,
            rows: self.rows as u32,
            n: w.n as u32,
            k: w.k as u32,
            matrices: self.matrices(w),
            y_is_f32,
        }
    }

    fn x_map(&self, w: &Matrix, pair: u32) -> Result<TensorMap, CudaError> {
        // Every CTA of a pair copies as many boxes.
        let box_rows = if pair == 4 { 16 } else { 32 };
        let (address, _, stride, _) = self.x_parts(w);
        let (element, bytes) = match w.stored() {
            StoredAs::Bf16 => (TmaElement::Bf16, 2),
            StoredAs::Fp8 => (TmaElement::U8, 1),
        };
        let heads = if self.segments.is_none() { w.matrices } else { 1 };
        // Where there is one head, its stride means nothing but must not be 0.
        let head_stride = if heads == 1 { stride } else { self.x_head_stride };
        TensorMap::tiled(TiledLayout {
            element,
            address,
            dims: &[w.k as u64, heads as u64, self.rows as u64],
            strides_bytes: &[(head_stride * bytes) as u64, (stride * bytes) as u64],
            tile: &[STEP_BYTES / bytes as u32, 1, box_rows],
            swizzle: Swizzle::B128,
        })
    }

    fn x_scales_map(&self, w: &Matrix) -> Result<Option<TensorMap>, CudaError> {
        let Operand::Fp8 { scales, rows_stride, .. } = self.x else { return Ok(None) };
        TensorMap::tiled(TiledLayout {
            element: TmaElement::F32,
            address: scales.address(),
            dims: &[rows_stride as u64, w.k.div_ceil(128) as u64],
            strides_bytes: &[(rows_stride * size_of::<f32>()) as u64],
            tile: &[TILE_ROWS, 1],
            swizzle: Swizzle::None,
        })
        .map(Some)
    }
}
