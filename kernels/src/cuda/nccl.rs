//! NCCL communicators: grouped sends and receives between devices that cannot read each other's memory.
//!
//! The library is loaded when the first communicator or id is made. A communicator never blocks the host for longer
//! than its timeout; its kernels do wait for silent peers, until it is aborted. NCCL may use NVLink multicast for other
//! things than these transfers: set NCCL_NVLS_ENABLE=0 where that is unwanted.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys;
use libloading::os::unix::Library;

use super::library::{function, preload};
use super::{CudaError, Device, Stream};

/// Oldest version whose configuration is known here, as NCCL counts.
const VERSION_MIN: c_int = 22_800;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const BYTES: c_int = 1;

type Comm = sys::ncclComm_t;
type RawStream = *mut c_void;

/// The functions of the library. Results are plain numbers: a newer NCCL may know more of them than the bindings.
#[derive(Debug)]
struct Api {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut sys::ncclUniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Comm, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> c_int,
    async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, RawStream) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, RawStream) -> c_int,
    _library: Library,
}

impl Api {
    /// The library, loaded once for the process.
    fn load(dirs: &[PathBuf]) -> Result<&'static Self, CudaError> {
        static LOADED: OnceLock<Api> = OnceLock::new();
        if let Some(api) = LOADED.get() {
            return Ok(api);
        }
        let api = Self::open(preload("libnccl.so.2", "nvidia-nccl-cu13", dirs)?)?;
        let mut version = 0;
        // SAFETY: `version` is a valid place.
        api.check("ncclGetVersion", unsafe { (api.get_version)(&mut version) })?;
        if version < VERSION_MIN {
            let (major, minor) = (version / 10_000, version / 100 % 100);
            return Err(CudaError::Other(format!(
                "NCCL {major}.{minor} was found and 2.28 is needed: pip install -U nvidia-nccl-cu13"
            )));
        }
        Ok(LOADED.get_or_init(|| api))
    }

    fn open(library: Library) -> Result<Self, CudaError> {
        // The types of the fields are those of the functions in nccl.h.
        Ok(Self {
            get_version: function!(library, "libnccl.so.2", "ncclGetVersion"),
            get_unique_id: function!(library, "libnccl.so.2", "ncclGetUniqueId"),
            init: function!(library, "libnccl.so.2", "ncclCommInitRankConfig"),
            async_error: function!(library, "libnccl.so.2", "ncclCommGetAsyncError"),
            last_error: function!(library, "libnccl.so.2", "ncclGetLastError"),
            error_string: function!(library, "libnccl.so.2", "ncclGetErrorString"),
            abort: function!(library, "libnccl.so.2", "ncclCommAbort"),
            group_start: function!(library, "libnccl.so.2", "ncclGroupStart"),
            group_end: function!(library, "libnccl.so.2", "ncclGroupEnd"),
            send: function!(library, "libnccl.so.2", "ncclSend"),
            receive: function!(library, "libnccl.so.2", "ncclRecv"),
            _library: library,
        })
    }

    /// A communicator that works in the background is no error.
    fn check(&self, call: &'static str, result: c_int) -> Result<(), CudaError> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return static or thread-owned NUL-terminated strings; the last error needs no communicator.
        let (what, last) =
            unsafe { (c_text((self.error_string)(result)), c_text((self.last_error)(std::ptr::null_mut()))) };
        Err(CudaError::Other(format!("{call} failed: {what} {last}").trim_end().to_owned()))
    }
}

/// # Safety
/// `text` is null or a NUL-terminated string.
unsafe fn c_text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// What the ranks of one communicator agree on: one makes it, the others are sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NcclId(pub [u8; 128]);

impl NcclId {
    /// A new one. Its maker must live until all ranks have joined.
    ///
    /// # Errors
    /// The library is missing, or the network has no usable interface.
    pub fn new(dirs: &[PathBuf]) -> Result<Self, CudaError> {
        let api = Api::load(dirs)?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: `id` is a valid place.
        api.check("ncclGetUniqueId", unsafe { (api.get_unique_id)(&mut id) })?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }
}

/// One piece of memory on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// To `peer`.
    Send {
        /// Rank within the communicator.
        peer: u32,
        /// Device address.
        address: u64,
        /// Length.
        bytes: usize,
    },
    /// From `peer`, which sends as much in the same order.
    Receive {
        /// Rank within the communicator.
        peer: u32,
        /// Device address.
        address: u64,
        /// Length.
        bytes: usize,
    },
}

/// One rank of a communicator. Cheap to clone.
///
/// Recordings that hold its transfers must be dropped before it is aborted or dropped.
#[derive(Clone, Debug)]
pub struct Nccl(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    api: &'static Api,
    device: Device,
    /// `None` once it was aborted.
    comm: Mutex<Option<Handle>>,
    /// Tells a call under way to let go of it.
    aborting: AtomicBool,
    timeout: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Handle(Comm);

// SAFETY: a communicator may be used from any thread, by one at a time: it lies in a mutex.
unsafe impl Send for Handle {}

impl Nccl {
    /// Joins as `rank` of `size`; returns when all have joined. `timeout` bounds this and every later call.
    ///
    /// # Errors
    /// The library is missing, or somebody did not join in time.
    pub fn join(
        device: &Device,
        dirs: &[PathBuf],
        id: NcclId,
        (rank, size): (u32, u32),
        timeout: Duration,
    ) -> Result<Self, CudaError> {
        let api = Api::load(dirs)?;
        device.bind()?;
        let mut config = config();
        let id = sys::ncclUniqueId { internal: id.0.map(|byte| byte as c_char) };
        let mut comm = std::ptr::null_mut();
        // SAFETY: `comm` and `config` are valid places; the configuration is copied.
        let begun = unsafe { (api.init)(&mut comm, size as c_int, id, rank as c_int, &mut config) };
        api.check("ncclCommInitRankConfig", begun)?;
        let comm = Mutex::new(Some(Handle(comm)));
        let nccl = Self(Arc::new(Inner {
            api,
            device: device.clone(),
            comm,
            aborting: AtomicBool::new(false),
            timeout,
        }));
        nccl.with("ncclCommInitRankConfig", |_| Ok(()))?;
        Ok(nccl)
    }

    /// Queues all of `transfers` as one group: none waits for another of them.
    ///
    /// # Errors
    /// It was aborted, or NCCL failed.
    pub fn transfer(&self, stream: &Stream, transfers: &[Transfer]) -> Result<(), CudaError> {
        self.0.device.bind()?;
        let api = self.0.api;
        self.with("ncclGroupEnd", |comm| {
            // SAFETY: begins a group of this thread.
            api.check("ncclGroupStart", unsafe { (api.group_start)() })?;
            let queued = transfers.iter().try_for_each(|transfer| enqueue(api, comm, stream, *transfer));
            // SAFETY: ends the group that was begun above.
            let ended = api.check("ncclGroupEnd", unsafe { (api.group_end)() });
            queued.and(ended)
        })
    }

    /// Whether it still works.
    ///
    /// # Errors
    /// It was aborted, or a peer or the network failed.
    pub fn status(&self) -> Result<(), CudaError> {
        self.with("ncclCommGetAsyncError", |_| Ok(()))
    }

    /// Whether it was ended by [`Nccl::abort`].
    pub fn is_aborted(&self) -> bool {
        self.0.aborting.load(Ordering::Relaxed)
    }

    /// Ends it, on this rank: its kernels give up, and it does nothing more. From any thread.
    pub fn abort(&self) {
        self.0.aborting.store(true, Ordering::Relaxed);
        let Some(comm) = self.0.comm.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let (api, device) = (self.0.api, self.0.device.clone());
        let end = move || {
            // The whole handle is moved here, not the pointer in it.
            let Handle(comm) = { comm };
            if device.bind().is_ok() {
                // SAFETY: taken out, so that it is used no more. A failure leaves nothing to do.
                unsafe { (api.abort)(comm) };
            }
        };
        // NCCL tells its kernels to give up at once, and then waits until recordings that hold its transfers are dropped: not
        // here, for their owner may be who calls. Without a thread its memory is lost, and its kernels end by the time-out.
        drop(std::thread::Builder::new().name("nccl-abort".to_owned()).spawn(end));
    }

    /// Runs `call` and waits until the communicator has taken it in.
    fn with(
        &self,
        name: &'static str,
        call: impl FnOnce(Comm) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let comm = self.0.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Handle(comm)) = *comm else {
            return Err(aborted());
        };
        call(comm)?;
        let began = Instant::now();
        loop {
            let mut state = SUCCESS;
            // SAFETY: the communicator is alive and `state` a valid place.
            let asked = unsafe { (self.0.api.async_error)(comm, &mut state) };
            self.0.api.check(name, asked)?;
            self.0.api.check(name, state)?;
            if state == SUCCESS {
                return Ok(());
            }
            if self.0.aborting.load(Ordering::Relaxed) {
                return Err(aborted());
            }
            if began.elapsed() > self.0.timeout {
                return Err(CudaError::Other(format!("{name} took longer than {:?}", self.0.timeout)));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let comm = self.comm.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Handle(comm)) = comm
            && self.device.bind().is_ok()
        {
            // SAFETY: taken out and not used again. Unlike destroying, it never waits for peers.
            unsafe { (self.api.abort)(comm) };
        }
    }
}

fn aborted() -> CudaError {
    CudaError::Other("the NCCL communicator was aborted".to_owned())
}

/// Non-blocking, the rest as NCCL thinks best.
fn config() -> sys::ncclConfig_t {
    const UNSET: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: VERSION_MIN as u32,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: std::ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
    }
}

fn enqueue(api: &Api, comm: Comm, stream: &Stream, transfer: Transfer) -> Result<(), CudaError> {
    let stream = stream.raw().cast();
    match transfer {
        // SAFETY: the memory is the caller's, who keeps it; NCCL checks the rest.
        Transfer::Send { peer, address, bytes } => api.check("ncclSend", unsafe {
            (api.send)(address as *const c_void, bytes, BYTES, peer as c_int, comm, stream)
        }),
        // SAFETY: as above.
        Transfer::Receive { peer, address, bytes } => api.check("ncclRecv", unsafe {
            (api.receive)(address as *mut c_void, bytes, BYTES, peer as c_int, comm, stream)
        }),
    }
}
