//! The GPUs of this machine, as the driver shows them to this process: CUDA_VISIBLE_DEVICES counts.
//!
//! Only commands that start ranks or check a configuration ask. Nothing stays open.

use heliostat_kernels::cuda::{CudaError, Device, DeviceOptions};
use std::path::PathBuf;

/// A GPU that could be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// As NVIDIA names it.
    pub(crate) name: String,
    /// Bytes of its memory.
    pub(crate) bytes: u64,
}

/// How many GPUs the driver shows, at least one; or why there is none.
pub(crate) fn count() -> Result<u32, String> {
    match Device::count() {
        Ok(0) | Err(CudaError::NoDevice { .. }) => {
            Err("the driver shows none (see CUDA_VISIBLE_DEVICES)".into())
        }
        Ok(count) => Ok(count),
        Err(CudaError::NoDriver) => Err("there is no NVIDIA driver (libcuda.so.1 was not found)".into()),
        Err(why) => Err(why.to_string()),
    }
}

/// As `count`, and an error where the first GPU is not one that the kernels are written for.
/// What else is missing is said by the rank, or by `helio check`, and does not make it a machine without GPUs.
pub(crate) fn usable() -> Result<u32, String> {
    let count = count()?;
    let first = Device::describe(0).and_then(|first| Device::check_chip(&first));
    first.map_or_else(|why| Err(why.to_string()), |()| Ok(count))
}

/// Opens each of the GPUs as a rank would, and says what they are.
pub(crate) fn inspect(library_dirs: &[PathBuf]) -> Result<Vec<Gpu>, String> {
    (0..count()?)
        .map(|ordinal| open(ordinal, library_dirs).map_err(|why| format!("GPU {ordinal}: {why}")))
        .collect()
}

fn open(ordinal: u32, library_dirs: &[PathBuf]) -> Result<Gpu, CudaError> {
    let options = DeviceOptions { library_dirs: library_dirs.to_vec(), kernel_cache: None };
    let device = Device::open_with(ordinal, options)?;
    let properties = device.properties();
    Ok(Gpu { name: properties.name.clone(), bytes: properties.total_bytes })
}
