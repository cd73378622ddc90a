//! Rows of activations as kernels take and give them.

use half::bf16;

use super::Buffer;

/// bf16 rows that begin `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Bf16Rows<'a> {
    /// Begins with the first row's first element of interest.
    pub data: &'a Buffer<bf16>,
    /// Elements from row to row.
    pub stride: usize,
}

/// FP8 rows, one scale per row and 128 columns.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Rows<'a> {
    /// E4M3, `[rows][width]`.
    pub codes: &'a Buffer<u8>,
    /// `[width / 128, rounded up][scale_stride]`.
    pub scales: &'a Buffer<f32>,
    /// Rows that `scales` has room for.
    pub scale_stride: usize,
}

/// Where rows go: to either or both.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowsOut<'a> {
    /// `[rows][width]`.
    pub bf16: Option<&'a Buffer<bf16>>,
    /// The same before rounding to bf16.
    pub fp8: Option<Fp8Rows<'a>>,
}

/// Addresses of [`RowsOut`], 0 for those that are not there.
#[derive(Clone, Copy)]
pub(super) struct OutAddresses {
    pub(super) y: u64,
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) scale_stride: u32,
}

impl Bf16Rows<'_> {
    /// # Panics
    /// If `rows` rows of `width` are not all there.
    pub(super) fn check(&self, rows: usize, width: usize) {
        assert!(width <= self.stride, "rows of {width} every {} elements", self.stride);
        let needed = if rows == 0 { 0 } else { (rows - 1) * self.stride + width };
        assert!(
            self.data.len() >= needed,
            "{rows} rows of {width}: {} of {needed} elements",
            self.data.len()
        );
    }
}

impl RowsOut<'_> {
    /// # Panics
    /// If `rows` rows of `width` do not fit, or nothing is asked for.
    pub(super) fn check(&self, rows: usize, width: usize) {
        assert!(self.bf16.is_some() || self.fp8.is_some(), "rows go nowhere");
        if let Some(bf16) = self.bf16 {
            assert!(bf16.len() >= rows * width, "{rows} rows of {width} into {} elements", bf16.len());
        }
        if let Some(Fp8Rows { codes, scales, scale_stride }) = self.fp8 {
            assert!(codes.len() >= rows * width, "{rows} rows of {width} into {} codes", codes.len());
            assert!(rows <= scale_stride, "scales of {rows} rows in columns of {scale_stride}");
            let needed = width.div_ceil(128) * scale_stride;
            assert!(scales.len() >= needed, "{} of {needed} scales", scales.len());
        }
    }

    pub(super) fn addresses(&self) -> OutAddresses {
        let fp8 = self.fp8;
        OutAddresses {
            y: address(self.bf16),
            codes: address(fp8.map(|fp8| fp8.codes)),
            scales: address(fp8.map(|fp8| fp8.scales)),
            scale_stride: fp8.map_or(0, |fp8| fp8.scale_stride as u32),
        }
    }
}

impl OutAddresses {
    /// Those that rows begin at.
    pub(super) fn rows(self) -> [u64; 2] {
        [self.y, self.codes]
    }
}

/// Where a buffer begins; 0 for none.
pub(super) fn address<T>(buffer: Option<&Buffer<T>>) -> u64
where
    T: super::Element,
{
    buffer.map_or(0, Buffer::address)
}

/// Whether pieces of eight elements can be moved whole: all strides are such pieces, all addresses fit.
pub(super) fn is_wide(strides: &[usize], addresses: &[u64]) -> bool {
    strides.iter().all(|stride| stride.is_multiple_of(8)) && addresses.iter().all(|at| at.is_multiple_of(16))
}
