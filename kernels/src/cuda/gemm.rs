//! Matrix products `y[t][n] = sum_k x[t][k] w[n][k]`: dense, per head, and grouped by expert; BF16 and FP8.
//!
//! Sums are f32. FP8 is exact per 128 of K, where `x` has a scale per row and `w` one per 128 rows. The bits of a row
//! of y depend on that row of x and on the weights alone: not on the other rows, their number or their places.

use half::bf16;

use super::{Buffer, CudaError, Device, Launch, Stream};

mod job;
mod matrix;

use job::Job;
use matrix::{Fast, Form, THREADS, TILE_ROWS, step_elements};
pub use matrix::{Kind, Matrix, Plan, sources, sources_of};

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
    /// Rounded to nearest, each row to a place of its own, perhaps in a peer's memory. Of grouped products only.
    Scattered {
        /// Address of each row, a multiple of 16; those between segments are not looked at.
        addresses: &'a Buffer<u64>,
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
            None => prefers_registers(fast, w, job.rows),
            Some(segments) => segments.rows_typical > TILE_ROWS as usize,
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

/// Whether one CTA should take all slices of K: it does where clusters would take several tiles each, one after the
/// other. Adding slices up across a cluster costs as much as this many steps of K.
fn prefers_registers(fast: &Fast, w: &Matrix, rows: usize) -> bool {
    const REDUCTION_STEPS: f64 = 14.0;
    let splits = fast.in_cluster.plan.splits;
    if splits == 1 {
        return rows > TILE_ROWS as usize;
    }
    let rounds = |form: &Form| {
        let rounds = tiles(form, w, rows, TILE_ROWS).div_ceil(form.clusters_max);
        // A step copies rows of x and of weights.
        f64::from(rounds) * f64::from(TILE_ROWS + form.plan.columns) / 256.0
    };
    let steps = w.k.div_ceil(step_elements(w.stored())) as f64;
    let in_cluster = rounds(&fast.in_cluster) * (steps / f64::from(splits) + REDUCTION_STEPS);
    rounds(&fast.in_registers) * steps <= in_cluster
}

fn run_plain(stream: &Stream, w: &Matrix, job: &Job<'_>) -> Result<(), CudaError> {
    let grid = [w.n.div_ceil(4) as u32, job.matrices(w), job.rows.min(32) as u32];
    let launch = Launch { grid, dependent: true, ..Launch::new(0, 128) };
    // SAFETY: `PlainParams` is the kernel's argument; `check` saw that the buffers have the rows.
    unsafe { w.plain.launch(stream, &launch, &job.plain_params(w)) }
}
