//! One GPU: its context, its properties, its modules.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::error::check;
use super::kernel::Module;
use super::{Compiler, CudaError, Source};

/// Oldest driver that runs the kernels, as 1000 x major + 10 x minor.
const DRIVER_MIN: i32 = 13_000;

/// Where things are that a device needs.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Folders to search for NVIDIA's libraries before the usual ones.
    pub library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept; `None`: compiled anew in every process.
    pub kernel_cache: Option<PathBuf>,
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// As NVIDIA names it.
    pub name: String,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub total_bytes: u64,
    /// Bytes of shared memory that one block may ask for.
    pub shared_bytes_max: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: u64,
}

/// A GPU, opened. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

/// A device that this handle does not keep open.
#[derive(Debug)]
pub(super) struct WeakDevice(Weak<Inner>);

impl WeakDevice {
    pub(super) fn upgrade(&self) -> Option<Device> {
        self.0.upgrade().map(Device)
    }
}

#[derive(Debug)]
struct Inner {
    ordinal: i32,
    context: sys::CUcontext,
    properties: Properties,
    compiler: Compiler,
    /// Bytes of device memory that this process has allocated through it.
    allocated: AtomicU64,
    modules: Mutex<HashMap<Source, Module>>,
}

// SAFETY: a context is made for use by several threads; each binds it before its calls.
unsafe impl Send for Inner {}
// SAFETY: as above; `modules` has its own lock.
unsafe impl Sync for Inner {}

impl Device {
    /// How many GPUs this process may use.
    ///
    /// # Errors
    /// There is no driver, or it is too old.
    pub fn count() -> Result<u32, CudaError> {
        init()?;
        let mut count = 0;
        // SAFETY: the driver is loaded and initialised, `count` is a valid place.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        Ok(count as u32)
    }

    /// What GPU `ordinal` of those visible to the process is, without opening it.
    ///
    /// # Errors
    /// Driver or device are missing.
    pub fn describe(ordinal: u32) -> Result<Properties, CudaError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        read_properties(ordinal as i32)
    }

    /// Whether the kernels are written for it.
    ///
    /// # Errors
    /// They are not.
    pub fn check_chip(properties: &Properties) -> Result<(), CudaError> {
        match properties.capability {
            (9, 0) => Ok(()),
            capability => Err(CudaError::Chip { name: properties.name.clone(), capability }),
        }
    }

    /// Opens a GPU with default options.
    ///
    /// # Errors
    /// Those of [`Device::open_with`].
    pub fn open(ordinal: u32) -> Result<Self, CudaError> {
        Self::open_with(ordinal, DeviceOptions::default())
    }

    /// Opens GPU `ordinal` of those visible to the process.
    ///
    /// # Errors
    /// Driver, device or NVRTC are missing, or the chip is not one that the kernels are written for.
    pub fn open_with(ordinal: u32, options: DeviceOptions) -> Result<Self, CudaError> {
        let properties = Self::describe(ordinal)?;
        Self::check_chip(&properties)?;
        let compiler = Compiler::load("sm_90a", &options.library_dirs, options.kernel_cache)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device exists; `context` is a valid place.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, ordinal as i32)
        })?;
        let inner = Inner {
            ordinal: ordinal as i32,
            context,
            properties,
            compiler,
            allocated: AtomicU64::new(0),
            modules: Mutex::default(),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.0.properties
    }

    /// Its number among those visible to the process.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal as u32
    }

    /// Bytes free and in all. Other processes count too.
    ///
    /// # Errors
    /// The device is lost.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is bound and both places are valid.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Bytes of device memory that this process holds through this device and its clones.
    pub fn allocated(&self) -> u64 {
        self.0.allocated.load(Ordering::Relaxed)
    }

    pub(super) fn downgrade(&self) -> WeakDevice {
        WeakDevice(Arc::downgrade(&self.0))
    }

    pub(super) fn count_allocated(&self, bytes: u64) {
        self.0.allocated.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_freed(&self, bytes: u64) {
        self.0.allocated.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A module compiled from `source`, loaded once per device.
    ///
    /// # Errors
    /// The source does not compile, or the device does not take it.
    pub fn module(&self, source: &Source) -> Result<Module, CudaError> {
        let mut modules = self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(source) {
            return Ok(module.clone());
        }
        let module = Module::load(self, &self.0.compiler.compile(source)?)?;
        modules.insert(source.clone(), module.clone());
        Ok(module)
    }

    /// Waits for all work of all streams.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the context is bound.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Makes it the device of the calling thread's next driver calls.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.0.context) })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Modules are unloaded in their context.
        // SAFETY: it is released below and not before.
        unsafe { sys::cuCtxSetCurrent(self.context) };
        self.modules.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: retained once when it was opened. A failure leaves nothing to do.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.ordinal) };
    }
}

fn init() -> Result<(), CudaError> {
    // SAFETY: only looks for the library. Calls below are sound once it is there: a missing library is a panic.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: the library is present.
    let result = unsafe { sys::cuInit(0) };
    if result == sys::CUresult::CUDA_ERROR_NO_DEVICE {
        return Err(CudaError::NoDevice { ordinal: 0, count: 0 });
    }
    check("cuInit", result)?;
    let mut found = 0;
    // SAFETY: `found` is a valid place.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut found) })?;
    if found < DRIVER_MIN { Err(CudaError::OldDriver { found }) } else { Ok(()) }
}

fn read_properties(device: i32) -> Result<Properties, CudaError> {
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: the driver is initialised, the device exists, `value` is a valid place.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok::<u32, CudaError>(value as u32)
    };
    let mut name = [0u8; 128];
    // SAFETY: the buffer has the length that is passed, and room for the terminating NUL.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device) })?;
    let mut total = 0;
    // SAFETY: `total` is a valid place.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut total, device) })?;
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    Ok(Properties {
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        total_bytes: total as u64,
        shared_bytes_max: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
    })
}
