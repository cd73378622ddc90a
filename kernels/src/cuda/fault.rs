//! A device that fails on purpose, to test what its owner makes of that. Nothing else uses it.

use super::{CudaError, Kernel, Launch, Params, Source, Stream};

#[repr(C)]
#[derive(Clone, Copy)]
struct FaultParams {
    unused: u32,
}

// SAFETY: the field of `FaultParams` in cu/fault.cu.
unsafe impl Params for FaultParams {}

/// The source of the kernel.
pub fn source() -> Source {
    Source::new("fault", include_str!("cu/fault.cu"))
}

/// Queues a kernel that traps. From then on the device fails every call of this process, with the driver's words for it, as
/// after an uncorrectable memory error.
///
/// # Errors
/// The device was lost before.
pub fn break_device(stream: &Stream) -> Result<(), CudaError> {
    let kernel: Kernel = stream.device().module(&source())?.kernel("fault")?;
    // SAFETY: the kernel of this struct; it touches no memory.
    unsafe { kernel.launch(stream, &Launch::new(1, 1), &FaultParams { unused: 0 }) }
}
