//! What can go wrong with a CUDA device, in words that name the fix.

use std::path::PathBuf;

use cudarc::driver::sys;

/// Why a CUDA device cannot do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no driver on this machine.
    #[error(
        "there is no NVIDIA driver here (libcuda.so.1 was not found): install one, or use device = \"cpu\""
    )]
    NoDriver,
    /// The driver is too old for the kernels.
    #[error("the NVIDIA driver supports CUDA {}.{} at most, and 13.0 is needed: update the driver", found / 1000, found % 1000 / 10)]
    OldDriver {
        /// What the driver supports, as 1000 x major + 10 x minor.
        found: i32,
    },
    /// There are fewer devices.
    #[error("there is no CUDA device {ordinal}: this machine shows {count} (see CUDA_VISIBLE_DEVICES)")]
    NoDevice {
        /// The one asked for.
        ordinal: u32,
        /// Those there are.
        count: u32,
    },
    /// The kernels are written for Hopper.
    #[error("{name} has compute capability {}.{}, and the kernels are written for 9.0 (H100, H200)", capability.0, capability.1)]
    Chip {
        /// The device's name.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// A library is missing.
    #[error(
        "{library} was not found in the loader's path nor in {}: install it (`pip install {package}`) and name its folder \
         in LD_LIBRARY_PATH",
        searched.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoLibrary {
        /// File name.
        library: &'static str,
        /// The Python package that carries it.
        package: &'static str,
        /// Folders searched.
        searched: Vec<PathBuf>,
    },
    /// A kernel does not compile: a bug here, or an NVRTC that is too old.
    #[error("kernel source {source_name} does not compile:\n{log}")]
    Compile {
        /// The kernel family.
        source_name: &'static str,
        /// The compiler's words.
        log: String,
    },
    /// The device's memory is full.
    #[error(
        "out of GPU memory: {} MiB were asked for, {} of {} MiB are free: lower gpu_memory_utilization, the batch \
         or the KV cache, or use more ranks",
        asked >> 20, free >> 20, total >> 20
    )]
    OutOfMemory {
        /// Bytes.
        asked: u64,
        /// Bytes.
        free: u64,
        /// Bytes.
        total: u64,
    },
    /// A call of the driver failed.
    #[error("{call} failed: {code} ({what})")]
    Call {
        /// The call.
        call: &'static str,
        /// The driver's name for the error.
        code: String,
        /// The driver's words.
        what: String,
        /// Whether the context is lost, so that only a new process helps.
        fatal: bool,
    },
    /// Anything else; says what.
    #[error("{0}")]
    Other(String),
}

impl CudaError {
    /// Whether the device can no longer be used by this process: an illegal address, an uncorrectable memory error, a
    /// device that fell off the bus.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Call { fatal: true, .. })
    }
}

/// Turns a driver's result into ours. `call` is the driver function's name.
pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<(), CudaError> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let words = |get: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: `text` is a valid place for the pointer; the driver returns static strings or leaves it null.
        if unsafe { get(result, &mut text) } != sys::CUresult::CUDA_SUCCESS || text.is_null() {
            return format!("{result:?}");
        }
        // SAFETY: on success it points to a static NUL-terminated string.
        unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    use sys::CUresult as R;
    let fatal = matches!(
        result,
        R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | R::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | R::CUDA_ERROR_DEVICE_UNAVAILABLE
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_CONTAINED
            | R::CUDA_ERROR_EXTERNAL_DEVICE
            | R::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | R::CUDA_ERROR_UNKNOWN
    );
    Err(CudaError::Call { call, code: words(sys::cuGetErrorName), what: words(sys::cuGetErrorString), fatal })
}
