//! Loaded machine code and its launch.

use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys;

use super::device::WeakDevice;
use super::error::check;
use super::{CudaError, Device, Stream};

/// Shared memory that a kernel has without asking.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;

/// A module: the kernels of one source. Cheap to clone.
///
/// It does not keep its device alive, which owns it; its kernels do.
#[derive(Clone, Debug)]
pub struct Module(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    module: sys::CUmodule,
    /// It keeps its modules, so they do not keep it.
    device: WeakDevice,
}

// SAFETY: a module is a handle that any thread of the process may use.
unsafe impl Send for Loaded {}
// SAFETY: as above; it is never changed.
unsafe impl Sync for Loaded {}

impl Module {
    pub(super) fn load(device: &Device, cubin: &[u8]) -> Result<Self, CudaError> {
        device.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: `cubin` is machine code as NVRTC made it, `module` a valid place, the context is bound.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) })?;
        Ok(Self(Arc::new(Loaded { module, device: device.downgrade() })))
    }

    /// The entry point `name`.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        let device = self.0.device.upgrade();
        let device = device.ok_or_else(|| CudaError::Other("a module's device was closed".to_owned()))?;
        let c_name = CString::new(name).map_err(|_| CudaError::Other(format!("kernel name {name:?}")))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, the name NUL-terminated, `function` a valid place.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut function, self.0.module, c_name.as_ptr())
        })?;
        let shared = Arc::new(AtomicU32::new(SHARED_BYTES_DEFAULT));
        Ok(Kernel {
            name: name.into(),
            function,
            shared_bytes: shared,
            _module: self.clone(),
            _device: device,
        })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: loaded once and not used again. The device, which goes last, binds its context before.
        unsafe { sys::cuModuleUnload(self.module) };
    }
}

/// The one argument of a kernel, passed by value.
///
/// # Safety
/// `#[repr(C)]`, with the fields of the kernel's struct in the same order and of the same types.
pub unsafe trait Params: Copy {}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, along x; 1: none.
    pub cluster: u32,
    /// May start before the kernel ahead of it on the stream has ended; it then waits by itself.
    pub dependent: bool,
}

impl Launch {
    /// Blocks along x, without shared memory or cluster.
    pub fn new(grid: u32, block: u32) -> Self {
        Self { grid: [grid, 1, 1], block, shared_bytes: 0, cluster: 1, dependent: false }
    }
}

/// An entry point. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: Arc<str>,
    function: sys::CUfunction,
    /// What it was allowed so far.
    shared_bytes: Arc<AtomicU32>,
    // Unloaded before the device is closed.
    _module: Module,
    _device: Device,
}

// SAFETY: a function is a handle that any thread of the process may use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Queues it on `stream`. A grid without blocks does nothing.
    ///
    /// # Safety
    /// `P` is what the kernel takes, and whatever its addresses lead to is as large as the kernel assumes and lives
    /// until the launch has ended.
    ///
    /// # Errors
    /// The shape is impossible, or an earlier kernel broke the context.
    pub unsafe fn launch<P: Params>(
        &self,
        stream: &Stream,
        launch: &Launch,
        params: &P,
    ) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        stream.device().bind()?;
        self.allow_shared(launch.shared_bytes)?;
        let mut attributes = [attribute_cluster(launch.cluster), attribute_dependent()];
        let profiling = stream.is_profiling();
        let chosen = match (launch.cluster > 1, launch.dependent && !profiling) {
            (true, true) => &mut attributes[..],
            (true, false) => &mut attributes[..1],
            (false, true) => &mut attributes[1..],
            (false, false) => &mut [],
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.raw(),
            attrs: chosen.as_mut_ptr(),
            numAttrs: chosen.len() as u32,
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let before = profiling.then(|| stream.record()).transpose()?;
        // SAFETY: configuration and argument live through the call, which copies them; the rest is the caller's word.
        check("cuLaunchKernelEx", unsafe {
            sys::cuLaunchKernelEx(&config, self.function, arguments.as_mut_ptr(), std::ptr::null_mut())
        })?;
        if let Some(before) = before {
            stream.note(Arc::clone(&self.name), before, stream.record()?);
        }
        Ok(())
    }

    /// How many clusters of this shape the device holds at once.
    ///
    /// # Errors
    /// The shape is impossible.
    pub fn clusters_max(&self, device: &Device, launch: &Launch) -> Result<u32, CudaError> {
        device.bind()?;
        self.allow_shared(launch.shared_bytes)?;
        let mut attributes = [attribute_cluster(launch.cluster)];
        let config = sys::CUlaunchConfig {
            gridDimX: launch.cluster,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: std::ptr::null_mut(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: 1,
        };
        let mut clusters = 0;
        // SAFETY: the function is loaded, `clusters` is a valid place, the configuration lives through the call.
        check("cuOccupancyMaxActiveClusters", unsafe {
            sys::cuOccupancyMaxActiveClusters(&mut clusters, self.function, &config)
        })?;
        Ok(clusters as u32)
    }

    fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        if bytes <= self.shared_bytes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        check("cuFuncSetAttribute", unsafe {
            sys::cuFuncSetAttribute(self.function, attribute, bytes as i32)
        })?;
        self.shared_bytes.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

fn attribute_cluster(blocks: u32) -> sys::CUlaunchAttribute {
    let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: cluster },
    }
}

fn attribute_dependent() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}
