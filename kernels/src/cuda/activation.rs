//! Gated activation and FP8 quantisation of rows.
//!
//! Specification: [`crate::cpu::plain::silu_mul`] and [`crate::cpu::quant`]. A row's bits depend on that row only.

use super::rows::{Bf16Rows, RowsOut, address, is_wide};
use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};

/// Most segments that the kernels know.
const SEGMENTS_MAX: usize = 1024;

/// Blocks that run at once on a multiprocessor.
const BLOCKS_PER_SM: u32 = 8;

/// The kernels.
#[derive(Clone, Debug)]
pub struct Activation {
    silu_mul: [Kernel; 2],
    quantize: [Kernel; 2],
    blocks_max: u32,
}

/// Which rows there are.
#[derive(Clone, Copy, Debug)]
pub enum RowSet<'a> {
    /// The first so many.
    First(usize),
    /// Segments whose sizes only the device knows.
    Segments {
        /// First row of each segment and the end of the last, ascending from 0, `[segments + 1]`.
        start: &'a Buffer<u32>,
        /// Real rows of each segment, which come first in it, `[segments]`.
        rows: &'a Buffer<u32>,
        /// Rows that the buffers have room for: those behind are not touched.
        capacity: usize,
    },
}

/// Arguments of both kernels.
#[derive(Clone, Copy, Debug)]
pub struct ActivationArgs<'a> {
    /// Rows to compute; the others are not written.
    pub rows: RowSet<'a>,
    /// Elements of a row of output.
    pub width: usize,
    /// Rows of input: gate then up for [`Activation::silu_mul`], so twice the width.
    pub x: Bf16Rows<'a>,
    /// Where it goes.
    pub out: RowsOut<'a>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ActivationParams {
    x: u64,
    y: u64,
    codes: u64,
    scales: u64,
    segment_start: u64,
    segment_rows: u64,
    x_stride: u64,
    rows: u32,
    width: u32,
    scale_stride: u32,
    segments: u32,
}

// SAFETY: the fields of `ActivationParams` in cu/activation.cu.
unsafe impl Params for ActivationParams {}

impl Activation {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("activation", include_str!("cu/activation.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        Ok(Self {
            silu_mul: [module.kernel("silu_mul_wide")?, module.kernel("silu_mul_narrow")?],
            quantize: [module.kernel("quantize_wide")?, module.kernel("quantize_narrow")?],
            blocks_max: device.properties().sm_count * BLOCKS_PER_SM,
        })
    }

    /// `out = silu(gate) * up`.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn silu_mul(&self, stream: &Stream, args: &ActivationArgs<'_>) -> Result<(), CudaError> {
        self.launch(stream, &self.silu_mul, args, 2 * args.width)
    }

    /// `out = x`.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn quantize(&self, stream: &Stream, args: &ActivationArgs<'_>) -> Result<(), CudaError> {
        self.launch(stream, &self.quantize, args, args.width)
    }

    fn launch(
        &self,
        stream: &Stream,
        [wide, narrow]: &[Kernel; 2],
        args: &ActivationArgs<'_>,
        x_width: usize,
    ) -> Result<(), CudaError> {
        let ActivationArgs { rows, width, x, out } = *args;
        let (rows, start, counts) = match rows {
            RowSet::First(rows) => (rows, None, None),
            RowSet::Segments { start, rows, capacity } => {
                assert_eq!(start.len(), rows.len() + 1, "activation: segments");
                assert!((1..=SEGMENTS_MAX).contains(&rows.len()), "activation: {} segments", rows.len());
                (capacity, Some(start), Some(rows))
            }
        };
        assert!(width > 0, "activation: empty rows");
        x.check(rows, x_width);
        out.check(rows, width);
        let to = out.addresses();
        let params = ActivationParams {
            x: x.data.address(),
            y: to.y,
            codes: to.codes,
            scales: to.scales,
            segment_start: address(start),
            segment_rows: address(counts),
            x_stride: x.stride as u64,
            rows: rows as u32,
            width: width as u32,
            scale_stride: to.scale_stride,
            segments: counts.map_or(0, Buffer::len) as u32,
        };
        let [y, codes] = to.rows();
        let kernel = if is_wide(&[width, x.stride], &[params.x, y, codes]) { wide } else { narrow };
        let block = (width.div_ceil(8) as u32).next_multiple_of(32).min(256);
        let tiles = width.div_ceil(8 * block as usize);
        let grid = u32::try_from(rows * tiles).expect("rows and tiles fit 32 bits").min(self.blocks_max);
        let launch = Launch { dependent: true, ..Launch::new(grid, block) };
        // SAFETY: the lengths were checked above; the kernel touches no row from `rows` on, whatever the segments say.
        unsafe { kernel.launch(stream, &launch, &params) }
    }
}
