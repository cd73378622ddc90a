//! RMS norms of whole rows, with the sum before them and the quantisation behind them, and the embedding.
//!
//! Specification: [`crate::cpu::plain::rms_norm`] and [`crate::cpu::quant`]. A row's bits depend on that row only.

use half::bf16;

use super::rows::{Bf16Rows, RowsOut, address, is_wide};
use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};

/// Most elements of a row: 512 threads of four pieces of eight.
const WIDTH_MAX: usize = 512 * 4 * 8;

/// The kernels.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Wide and narrow, of 1, 2 and 4 pieces per thread.
    norm: [[Kernel; 3]; 2],
    embed: [Kernel; 2],
}

/// What is normalised.
#[derive(Clone, Copy, Debug)]
pub enum NormInput<'a> {
    /// `residual += branch` first, both `[rows][width]`.
    Residual {
        /// Residual stream; written only where there is a branch.
        residual: &'a Buffer<f32>,
        /// What the last layer adds.
        branch: Option<&'a Buffer<bf16>>,
    },
    /// Some rows of `residual + branch`, which stay as they are.
    Selected {
        /// Residual stream, `[..][width]`.
        residual: &'a Buffer<f32>,
        /// What the last layer adds, `[..][width]`.
        branch: Option<&'a Buffer<bf16>>,
        /// Which, `[rows]`; `u32::MAX`: zeros. An index beyond the buffers reads whatever lies there.
        rows: &'a Buffer<u32>,
    },
    /// These rows.
    Rows(Bf16Rows<'a>),
}

/// Arguments of [`Norm::run`].
#[derive(Clone, Copy, Debug)]
pub struct NormArgs<'a> {
    /// Rows of output.
    pub rows: usize,
    /// What is normalised.
    pub input: NormInput<'a>,
    /// `[width]`.
    pub gamma: &'a Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Where it goes.
    pub out: RowsOut<'a>,
}

/// Arguments of [`Norm::embed`].
#[derive(Clone, Copy, Debug)]
pub struct EmbedArgs<'a> {
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// `[vocab][width]`.
    pub table: &'a Buffer<bf16>,
    /// `[rows]`; one beyond the vocabulary gives zeros.
    pub tokens: &'a Buffer<u32>,
    /// `[rows]`; idle rows (`u32::MAX`) give zeros.
    pub positions: &'a Buffer<u32>,
    /// `[rows][width]`.
    pub residual: &'a Buffer<f32>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormParams {
    residual: u64,
    x: u64,
    rows: u64,
    gamma: u64,
    y: u64,
    codes: u64,
    scales: u64,
    x_stride: u64,
    width: u32,
    scale_stride: u32,
    store_residual: u32,
    eps: f32,
}

// SAFETY: the fields of `NormParams` in cu/norm.cu.
unsafe impl Params for NormParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbedParams {
    table: u64,
    tokens: u64,
    positions: u64,
    residual: u64,
    vocab: u32,
    width: u32,
}

// SAFETY: the fields of `EmbedParams` in cu/norm.cu.
unsafe impl Params for EmbedParams {}

impl Norm {
    /// The source of the kernels.
    pub fn source() -> Source {
        Source::new("norm", include_str!("cu/norm.cu"))
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// They do not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let module = device.module(&Self::source())?;
        let norm = |kind: &str| -> Result<[Kernel; 3], CudaError> {
            let kernel = |pieces| module.kernel(&format!("norm_{kind}_{pieces}"));
            Ok([kernel(1)?, kernel(2)?, kernel(4)?])
        };
        Ok(Self {
            norm: [norm("wide")?, norm("narrow")?],
            embed: [module.kernel("embed_wide")?, module.kernel("embed_narrow")?],
        })
    }

    /// `out = x / sqrt(mean(x^2) + eps) * gamma` for every row of the input.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit, or a row is longer than 16384.
    pub fn run(&self, stream: &Stream, args: &NormArgs<'_>) -> Result<(), CudaError> {
        let width = args.gamma.len();
        assert!((1..=WIDTH_MAX).contains(&width), "norm: rows of {width}");
        args.out.check(args.rows, width);
        let out = args.out.addresses();
        let (residual, x, rows) = match args.input {
            NormInput::Residual { residual, branch } => (Some(residual), branch, None),
            NormInput::Selected { residual, branch, rows } => (Some(residual), branch, Some(rows)),
            NormInput::Rows(rows) => (None, Some(rows.data), None),
        };
        let x_stride = match args.input {
            NormInput::Rows(rows) => {
                rows.check(args.rows, width);
                rows.stride
            }
            NormInput::Residual { .. } | NormInput::Selected { .. } => width,
        };
        match rows {
            Some(rows) => assert!(rows.len() >= args.rows, "norm: {} of {} rows", rows.len(), args.rows),
            None => {
                let needed = args.rows * width;
                assert!(residual.is_none_or(|residual| residual.len() >= needed), "norm: length of residual");
                let branch = residual.and(x);
                assert!(branch.is_none_or(|branch| branch.len() >= needed), "norm: length of branch");
            }
        }
        let params = NormParams {
            residual: address(residual),
            x: address(x),
            rows: address(rows),
            gamma: args.gamma.address(),
            y: out.y,
            codes: out.codes,
            scales: out.scales,
            x_stride: x_stride as u64,
            width: width as u32,
            scale_stride: out.scale_stride,
            store_residual: u32::from(rows.is_none() && residual.is_some() && x.is_some()),
            eps: args.eps,
        };
        let [y, codes] = out.rows();
        let wide = is_wide(&[width, x_stride], &[params.residual, params.x, params.gamma, y, codes]);
        // Few elements per thread hide latency worst, many registers fill the chip first.
        let (kernel, pieces) = match width {
            0..=4096 => (0, 1),
            4097..=8192 => (1, 2),
            _ => (2, 4),
        };
        let block = (width.div_ceil(8).div_ceil(pieces) as u32).next_multiple_of(32);
        let launch = Launch { dependent: true, ..Launch::new(args.rows as u32, block) };
        // SAFETY: the lengths were checked above; rows that are selected are the caller's word, as documented.
        unsafe { self.norm[usize::from(!wide)][kernel].launch(stream, &launch, &params) }
    }

    /// Gathers the embeddings of tokens into the residual stream.
    ///
    /// # Errors
    /// The launch failed.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn embed(&self, stream: &Stream, args: &EmbedArgs<'_>) -> Result<(), CudaError> {
        let EmbedArgs { rows, width, table, tokens, positions, residual } = *args;
        assert!(width > 0 && table.len().is_multiple_of(width), "embed: a table of {}", table.len());
        assert!(tokens.len() >= rows && positions.len() >= rows, "embed: {rows} tokens and positions");
        assert!(residual.len() >= rows * width, "embed: length of residual");
        let params = EmbedParams {
            table: table.address(),
            tokens: tokens.address(),
            positions: positions.address(),
            residual: residual.address(),
            vocab: (table.len() / width) as u32,
            width: width as u32,
        };
        let wide = is_wide(&[width], &[params.table, params.residual]);
        let block = (width.div_ceil(8) as u32).next_multiple_of(32).min(512);
        let launch = Launch { dependent: true, ..Launch::new(rows as u32, block) };
        // SAFETY: the lengths were checked above, and the kernel checks tokens against the vocabulary.
        unsafe { self.embed[usize::from(!wide)].launch(stream, &launch, &params) }
    }
}
