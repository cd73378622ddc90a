//! Measurements of the engine on a GPU, for `helio bench`.
//!
//! Reports are plain data with their units in the names; how they look is the caller's.

pub mod floor;
pub mod meeting;
pub mod ops;
pub mod slice;

mod report;

use std::path::PathBuf;

use heliostat_engine::batch::PrefillAttention;
use heliostat_kernels::cuda::exchange::Transport;
use heliostat_kernels::cuda::{CudaError, Device, DeviceOptions};

pub use ops::{OpReport, OpsReport, ops};
pub use report::{DecodeReport, PartReport, PrefillReport, SliceReport, slice};
pub use slice::{RemapReport, SliceError};

/// What to measure, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ordinal of the GPU.
    pub device: u32,
    /// Folders to search for NVIDIA's libraries first.
    pub library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept.
    pub kernel_cache: Option<PathBuf>,
    /// Rows of a step, one measurement each.
    pub batch: Vec<usize>,
    /// Tokens that each sequence has already, one measurement each.
    pub context: Vec<usize>,
    /// Lengths of prompts to prefill, for the slice.
    pub prompt: Vec<usize>,
    /// Steps, or replays of a recorded operation, that are timed; at least 2.
    pub rounds: usize,
    /// Layers of the slice; `None`: all of the model's.
    pub layers: Option<usize>,
    /// Record the slice's decode steps.
    pub graphs: bool,
    /// Tokens of one prefill step of the slice.
    pub chunk: usize,
    /// How rows of prompts attend in the slice.
    pub prefill_attention: PrefillAttention,
    /// Decode once more while experts move.
    pub remap: bool,
    /// How the rows of a slice on several GPUs travel.
    pub transport: Transport,
}

impl Options {
    fn open(&self) -> Result<Device, CudaError> {
        let Self { library_dirs, kernel_cache, .. } = self.clone();
        Device::open_with(self.device, DeviceOptions { library_dirs, kernel_cache })
    }
}
