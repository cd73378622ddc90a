//! Matrix products `y[t][n] = sum_k x[t][k] w[n][k]`: dense, per head, and grouped by expert; BF16 and FP8.
//!
//! Sums are f32. FP8 is exact per 128 of K, where `x` has a scale per row and `w` one per 128 rows. The bits of a row
//! of y depend on that row of x and on the weights alone: not on the other rows, their number or their places.

use half::bf16;

use super::{
    Buffer, CudaError, Device, Launch, Params, StoredAs, Stream, Swizzle, TensorMap, TiledLayout, TmaElement,
};

mod matrix;

use matrix::{Fast, Form, STEP_BYTES, THREADS, TILE_ROWS, step_elements};
pub use matrix::{Kind, Matrix, Plan, sources, sources_of};

/// Rows per expert from which on one CTA takes all slices of K.
const MANY_ROWS: usize = 512;
/// Weights that are read once leave the second-level cache first.
const EVICT_FIRST: u64 = 0x12f0_0000_0000_0000;
const EVICT_NORMAL: u64 = 0x1000_0000_0000_0000;

/// Rows to be multiplied, as the weights are stored.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// BF16 weights.
    Bf16 {
        /// `[rows][>= K]`.
        data: &'a Buffer<bf16>,
        /// Elements from one row to the next.
        stride: usize,
    },
    /// FP8 weights.
    Fp8 {
        /// E4M3, `[rows][K]`.
        codes: &'a Buffer<u8>,
        /// `[ceil(K / 128)][rows_stride]`.
        scales: &'a Buffer<f32>,
        /// Rows that the scales have room for, a multiple of 4.
        rows_stride: usize,
    },
}

/// Where the product goes.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Rounded to nearest.
    Bf16 {
        /// `[rows][>= N]`.
        data: &'a Buffer<bf16>,
        /// Elements from one row to the next.
        stride: usize,
    },
    /// As summed.
    F32 {
        /// `[rows][>= N]`.
        data: &'a Buffer<f32>,
        /// Elements from one row to the next.
        stride: usize,
    },
}

/// A tensor `[rows][heads][width]`, perhaps a slice of a wider one.
#[derive(Clone, Copy, Debug)]
pub struct HeadsView<'a> {
    /// From the first element of the slice on.
    pub data: &'a Buffer<bf16>,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

/// Which rows belong to which matrix of a pool. All of it lies on the device and may change between replays.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    /// First row of each slot, a multiple of 128; what follows the slots is ignored.
    pub start: &'a Buffer<u32>,
    /// Rows of each slot; its length is the number of slots.
    pub rows: &'a Buffer<u32>,
    /// Matrix of each slot.
    pub pool_of_slot: &'a Buffer<u32>,
    /// Rows that x and y have room for.
    pub rows_max: usize,
    /// Rows that a slot has when all is even. Decides what is fast and changes no bit.
    pub rows_typical: usize,
}

/// One product, as both kernels know it.
#[derive(Clone, Copy)]
struct Job<'a> {
    x: Operand<'a>,
    x_head_stride: usize,
    y: Output<'a>,
    y_head_stride: usize,
    rows: usize,
    segments: Option<Segments<'a>>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FastParams {
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
    w_policy: u64,
    x_policy: u64,
    rows: u32,
    n: u32,
    k: u32,
    matrices: u32,
    y_is_f32: u32,
    y_vectors: u32,
    tile_rows: u32,
}

// SAFETY: the fields of `Params` in cu/gemm_tiles.cuh.
unsafe impl Params for FastParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct PlainParams {
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
    x_scales_stride: u32,
    rows: u32,
    n: u32,
    k: u32,
    matrices: u32,
    y_is_f32: u32,
}

// SAFETY: the fields of `Params` in cu/gemm_plain.cu.
unsafe impl Params for PlainParams {}

/// Multiplies on one device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gemm {
    in_registers: Option<bool>,
}

impl Gemm {
    /// For `device`.
    pub fn new(_device: &Device) -> Self {
        Self { in_registers: None }
    }

    /// Always sums slices of K in registers, or never, for trials. Changes no bit.
    #[must_use]
    pub fn in_registers(mut self, always: bool) -> Self {
        self.in_registers = Some(always);
        self
    }

    /// `y[t][n] = sum_k x[t][k] w[n][k]` for `rows` rows.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If buffers are too short or x is not stored as `w` is.
    pub fn dense(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Operand<'_>,
        rows: usize,
        y: Output<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(w.kind, Kind::Dense);
        self.run(stream, w, &Job { x, x_head_stride: 0, y, y_head_stride: 0, rows, segments: None })
    }

    /// `y[t][h][n] = sum_k x[t][h][k] w[h][n][k]` for `rows` rows of all heads, in BF16.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If buffers are too short or `w` is not BF16.
    pub fn heads(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: HeadsView<'_>,
        rows: usize,
        y: HeadsView<'_>,
    ) -> Result<(), CudaError> {
        assert!(matches!(w.kind, Kind::Heads(_)), "{:?} is not of heads", w.kind);
        let job = Job {
            x: Operand::Bf16 { data: x.data, stride: x.row_stride },
            x_head_stride: x.head_stride,
            y: Output::Bf16 { data: y.data, stride: y.row_stride },
            y_head_stride: y.head_stride,
            rows,
            segments: None,
        };
        self.run(stream, w, &job)
    }

    /// `y[r][n] = sum_k x[r][k] w[m][n][k]` for the rows r of each slot's segment, where m is the slot's matrix in the
    /// pool. Other rows of y are left as they are.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If buffers are too short or x is not stored as `w` is.
    pub fn grouped(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Operand<'_>,
        segments: Segments<'_>,
        y: Output<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(w.kind, Kind::Pool);
        let slots = segments.rows.len();
        assert!(segments.start.len() >= slots && segments.pool_of_slot.len() >= slots, "{slots} slots");
        let (rows, segments) = (segments.rows_max, Some(segments));
        self.run(stream, w, &Job { x, x_head_stride: 0, y, y_head_stride: 0, rows, segments })
    }

    fn run(&self, stream: &Stream, w: &Matrix, job: &Job<'_>) -> Result<(), CudaError> {
        if job.rows == 0 {
            return Ok(());
        }
        job.check(w);
        match &w.fast {
            Some(fast) if job.x_is_aligned(w) => self.run_fast(stream, w, fast, job),
            Some(_) | None => run_plain(stream, w, job),
        }
    }

    fn run_fast(&self, stream: &Stream, w: &Matrix, fast: &Fast, job: &Job<'_>) -> Result<(), CudaError> {
        let in_registers = self.in_registers.unwrap_or_else(|| match &job.segments {
            None => rounds(&fast.in_registers, w, job.rows) <= rounds(&fast.in_cluster, w, job.rows),
            Some(segments) => segments.rows_typical >= MANY_ROWS,
        });
        let form = if in_registers { &fast.in_registers } else { &fast.in_cluster };
        let mut params = job.fast_params(w, form)?;
        let mut grid = form.clusters_max;
        if job.segments.is_none() {
            // Where multiprocessors would idle, lower tiles occupy twice as many.
            if tiles(form, w, job.rows, TILE_ROWS / 2) <= grid {
                params.tile_rows = TILE_ROWS / 2;
            }
            grid = grid.min(tiles(form, w, job.rows, params.tile_rows));
        }
        let rows_per_matrix = job.segments.map_or(job.rows, |segments| segments.rows_typical);
        let read_once = rows_per_matrix <= TILE_ROWS as usize;
        params.w_policy = if read_once { EVICT_FIRST } else { EVICT_NORMAL };
        let launch = Launch {
            grid: [grid * form.cluster, 1, 1],
            block: THREADS,
            shared_bytes: form.shared_bytes,
            cluster: form.cluster,
            dependent: true,
        };
        // SAFETY: `FastParams` is the kernel's argument; `check` saw that the buffers have the rows.
        unsafe { form.kernel.launch(stream, &launch, &params) }
    }
}

/// Tiles that clusters take.
fn tiles(form: &Form, w: &Matrix, rows: usize, tile_rows: u32) -> u32 {
    let Plan { columns, pair, .. } = form.plan;
    (rows.div_ceil(tile_rows as usize) * w.n.div_ceil((columns * pair) as usize) * w.matrices) as u32
}

/// About how long a dense product takes: tiles that a cluster takes one after the other, in columns of whole K.
fn rounds(form: &Form, w: &Matrix, rows: usize) -> f64 {
    let Plan { columns, pair, .. } = form.plan;
    let rounds = tiles(form, w, rows, TILE_ROWS).div_ceil(form.clusters_max);
    let slices = form.cluster / pair;
    // Adding slices up across a cluster costs about as much as a tenth of a round.
    let overhead = if slices > 1 { 0.1 } else { 0.0 };
    f64::from(rounds * columns) * (1.0 / f64::from(slices) + overhead)
}

fn run_plain(stream: &Stream, w: &Matrix, job: &Job<'_>) -> Result<(), CudaError> {
    let (x, x_scales, x_stride, x_scales_stride) = job.x_parts(w);
    let (y, y_stride, y_is_f32) = job.y_parts();
    let [segment_start, segment_rows, pool_of_slot] = job.segment_addresses();
    let params = PlainParams {
        x,
        x_scales,
        w: w.stack.data().address(),
        w_scales: w.scales_address(),
        y,
        x_stride: x_stride as u64,
        x_head_stride: job.x_head_stride as u64,
        y_stride: y_stride as u64,
        y_head_stride: job.y_head_stride as u64,
        segment_start,
        segment_rows,
        pool_of_slot,
        x_scales_stride: x_scales_stride as u32,
        rows: job.rows as u32,
        n: w.n as u32,
        k: w.k as u32,
        matrices: job.matrices(w),
        y_is_f32,
    };
    let grid = [w.n.div_ceil(4) as u32, job.matrices(w), job.rows.min(32) as u32];
    let launch = Launch { grid, dependent: true, ..Launch::new(0, 128) };
    // SAFETY: `PlainParams` is the kernel's argument; `check` saw that the buffers have the rows.
    unsafe { w.plain.launch(stream, &launch, &params) }
}

impl Job<'_> {
    fn check(&self, w: &Matrix) {
        let (x_len, y_len) = match self.x {
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
        assert!(x_len + (heads - 1) * self.x_head_stride + w.k <= y_len, "length of x");
        let (len, stride) = match self.y {
            Output::Bf16 { data, stride } => (data.len(), stride),
            Output::F32 { data, stride } => (data.len(), stride),
        };
        assert!(stride * (self.rows - 1) + (heads - 1) * self.y_head_stride + w.n <= len, "length of y");
    }

    fn matrices(&self, w: &Matrix) -> u32 {
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
        }
    }

    fn segment_addresses(&self) -> [u64; 3] {
        self.segments.map_or([0; 3], |segments| {
            [segments.start.address(), segments.rows.address(), segments.pool_of_slot.address()]
        })
    }

    /// Whether the copy engine can read x. So it is or is not for all batches: strides and slices are the model's.
    fn x_is_aligned(&self, w: &Matrix) -> bool {
        let (address, scales, stride, _) = self.x_parts(w);
        let bytes = STEP_BYTES as usize / step_elements(w.stored());
        address.is_multiple_of(16)
            && scales.is_multiple_of(16)
            && (stride * bytes).is_multiple_of(16)
            && (self.x_head_stride * bytes).is_multiple_of(16)
    }

    fn fast_params(&self, w: &Matrix, form: &Form) -> Result<FastParams, CudaError> {
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
            w_policy: EVICT_NORMAL,
            x_policy: EVICT_NORMAL,
            rows: self.rows as u32,
            n: w.n as u32,
            k: w.k as u32,
            matrices: self.matrices(w),
            y_is_f32,
            y_vectors: u32::from(y_vectors),
            tile_rows: TILE_ROWS,
        })
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
