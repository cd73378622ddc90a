//! Single operations at the shapes of one rank of an EP32 deployment of DeepSeek-R1, each beside what the chip allows.
//!
//! An operation is timed over replays of a recording of several calls. Weights and cache are walked over, so that they
//! come from memory and not from the second-level cache; activations stay in it, as they mostly do between the kernels
//! of a step, so that what only moves a few of them can beat its floor.

mod attention;
mod elementwise;
mod exchange;
mod gemm;
mod link;

use std::path::PathBuf;

use half::bf16;
use heliostat_kernels::cuda::cublaslt::CublasLt;
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, Priority, Stream};
use serde::Serialize;

use super::Options;
use super::floor::Cost;
use super::meeting::Meeting;
use super::slice::SliceError;

/// Elements of the residual stream.
const HIDDEN: usize = 7168;
/// Experts per token.
const TOP_K: usize = 8;
/// Routed experts.
const EXPERTS: usize = 256;
/// Expert slots of a rank.
const SLOTS: usize = super::slice::SLOTS;
/// Width of an expert.
const WIDTH: usize = 2048;
/// Tokens.
const VOCAB: usize = 129_280;
/// Query heads.
const HEADS: usize = 128;
/// Elements of a latent, and of the rotated part behind it.
const LATENT: usize = 512;
const ROPE: usize = 64;

/// Every operation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpsReport {
    /// The GPU's name.
    pub gpu: String,
    /// Why there are no times of the library; `None`: there are.
    pub no_library: Option<String>,
    /// One line per operation and number of rows.
    pub ops: Vec<OpReport>,
}

/// One operation on so many rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpReport {
    /// Its name.
    pub op: String,
    /// Rows of the step; experts share eight times as many.
    pub rows: usize,
    /// Microseconds, median.
    pub us: f64,
    /// Operations on matrices, where there are any.
    pub tflop_per_s: Option<f64>,
    /// Bytes that must move, by the time.
    pub gb_per_s: Option<f64>,
    /// The least that the chip allows; `None`: next to nothing must be done.
    pub floor_us: Option<f64>,
    /// `floor_us / us`.
    pub floor_share: Option<f64>,
    /// Microseconds of cuBLASLt, by the kernel that it proposes first, or of NCCL; `None`: it has none, or is not there.
    pub library_us: Option<f64>,
    /// `library_us / us`: above 1 where ours is faster.
    pub library_ratio: Option<f64>,
}

/// Measures every operation, and with several ranks what crosses between them; `progress` hears a line for each.
///
/// # Errors
/// The device is missing, full, or failed, or another rank is.
pub fn ops(
    options: &Options,
    mut meeting: Meeting,
    progress: &mut dyn FnMut(&str),
) -> Result<OpsReport, SliceError> {
    let device = options.open()?;
    let gpu = device.properties().name.clone();
    progress(&gpu);
    let mut bench = Bench {
        stream: device.stream(Priority::High)?,
        fill: Synthetic::new(&device)?,
        rounds: options.rounds,
        library_dirs: options.library_dirs.clone(),
        ops: Vec::new(),
        device,
        progress,
    };
    let mut no_library = None;
    // A guest is there for the exchange only.
    if meeting.rank() == 0 {
        let library = CublasLt::new(&bench.device, &options.library_dirs);
        let library = library.map_err(|why| no_library = Some(why.to_string())).ok();
        gemm::measure(&mut bench, &options.batch, library.as_ref())?;
        attention::measure(&mut bench, &options.batch, &options.context)?;
        for &rows in &options.batch {
            elementwise::measure(&mut bench, rows)?;
        }
        for &rows in &options.batch {
            exchange::measure(&mut bench, rows)?;
        }
    }
    for &rows in &options.batch {
        link::measure(&mut bench, rows, &mut meeting)?;
    }
    meeting.part()?;
    Ok(OpsReport { gpu, no_library, ops: bench.ops })
}

/// What every measurement needs.
struct Bench<'a> {
    device: Device,
    stream: Stream,
    fill: Synthetic,
    rounds: usize,
    library_dirs: Vec<PathBuf>,
    ops: Vec<OpReport>,
    progress: &'a mut dyn FnMut(&str),
}

impl Bench<'_> {
    /// Normally distributed numbers.
    fn bf16(&self, len: usize) -> Result<Buffer<bf16>, CudaError> {
        let buffer = self.device.alloc(len)?;
        self.fill.bf16(&self.stream, &buffer, Distribution { seed: 1, mean: 0.0, deviation: 1.0 })?;
        Ok(buffer)
    }

    fn f32(&self, len: usize) -> Result<Buffer<f32>, CudaError> {
        let buffer = self.device.alloc(len)?;
        self.fill.f32(&self.stream, &buffer, Distribution { seed: 2, mean: 0.0, deviation: 1.0 })?;
        Ok(buffer)
    }

    /// Normally distributed codes, and their scales.
    fn e4m3(&self, len: usize, scales: usize) -> Result<(Buffer<u8>, Buffer<f32>), CudaError> {
        let (codes, scales) = (self.device.alloc(len)?, self.device.alloc(scales)?);
        self.fill.e4m3(&self.stream, (&codes, &scales), (3, 1.0))?;
        Ok((codes, scales))
    }

    /// Microseconds of one call of `work`, by recordings of `calls` of them; `work` is told which.
    fn time_us(
        &self,
        calls: usize,
        mut work: impl FnMut(&Stream, usize) -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        const WARM: usize = 2;
        // Once outside, so that lazy set-up is not recorded.
        work(&self.stream, 0)?;
        self.stream.synchronize()?;
        let graph = self.stream.capture(|stream| (0..calls).try_for_each(|call| work(stream, call)))?;
        let mut times = Vec::new();
        for _ in 0..WARM + self.rounds {
            let before = self.stream.record()?;
            graph.launch(&self.stream)?;
            let after = self.stream.record()?;
            after.synchronize()?;
            times.push(f64::from(after.elapsed_ms(&before)?) * 1e3 / calls as f64);
        }
        times.drain(..WARM);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Times `work` and notes it under `op`.
    fn measure(
        &mut self,
        (op, rows): (&str, usize),
        cost: Option<Cost>,
        mut work: impl FnMut(&Stream) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        const CALLS: usize = 24;
        let us = self.time_us(CALLS, |stream, _| work(stream))?;
        self.note(OpReport::new((op, rows), us, cost));
        Ok(())
    }

    fn note(&mut self, op: OpReport) {
        (self.progress)(&format!("{} on {} rows: {:.1} us", op.op, op.rows, op.us));
        self.ops.push(op);
    }
}

impl OpReport {
    fn new((op, rows): (&str, usize), us: f64, cost: Option<Cost>) -> Self {
        let floor_us = cost.map(|cost| cost.floor_us());
        Self {
            op: op.to_owned(),
            rows,
            us,
            tflop_per_s: cost.filter(|cost| cost.flop > 0.0).map(|cost| cost.flop / us / 1e6),
            gb_per_s: cost.map(|cost| cost.bytes / us / 1e3),
            floor_us,
            floor_share: floor_us.map(|floor| floor / us),
            library_us: None,
            library_ratio: None,
        }
    }

    fn beside(mut self, library_us: Option<f64>) -> Self {
        self.library_us = library_us;
        self.library_ratio = library_us.map(|library| library / self.us);
        self
    }
}

/// Rows of an expert when the choices of `rows` tokens fall evenly.
fn rows_of_expert(rows: usize) -> usize {
    (rows * TOP_K).div_ceil(SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::floor::{Precision, Product};

    #[test]
    fn an_operation_stands_beside_its_floor_and_the_library() {
        let product =
            Product { matrices: 1, rows: 128, n: 7168, k: 16384, precision: Precision::Fp8, y_bytes: 2 };
        let op = OpReport::new(("o_proj", 128), 56.4, Some(Cost::product(product))).beside(Some(84.6));
        assert!((op.floor_share.unwrap() - 0.5).abs() < 0.002, "{op:?}");
        assert!((op.library_ratio.unwrap() - 1.5).abs() < 1e-9, "{op:?}");
        assert!((op.tflop_per_s.unwrap() - 533.0).abs() < 1.0, "{op:?}");
        let signal = OpReport::new(("signal", 128), 2.0, None);
        assert_eq!((signal.gb_per_s, signal.floor_share, signal.library_us), (None, None, None));
    }

    #[test]
    fn experts_share_the_choices() {
        assert_eq!(rows_of_expert(128), 114);
        assert_eq!(rows_of_expert(9), 8);
    }
}
