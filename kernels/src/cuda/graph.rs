//! Work that was recorded once and is replayed with one call.

use cudarc::driver::sys;

use super::error::check;
use super::{CudaError, Device, Stream};

/// Recorded launches and copies. The addresses in them are fixed: whoever replays it keeps their buffers.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
}

// SAFETY: a handle that any thread may use; the driver orders launches.
unsafe impl Send for Graph {}

impl Stream {
    /// Records what `work` queues on this stream instead of running it.
    ///
    /// # Errors
    /// `work` failed, or queued what cannot be recorded.
    pub fn capture(&self, work: impl FnOnce(&Self) -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.device().bind()?;
        // Other threads may allocate and free meanwhile: only this thread's calls are watched.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.raw(), mode) })?;
        let worked = work(self);
        let mut graph = std::ptr::null_mut();
        // SAFETY: capture was begun on this stream, `graph` is a valid place.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.raw(), &mut graph) });
        if let Err(why) = worked.and(ended) {
            if !graph.is_null() {
                // SAFETY: `graph` was just captured and is not used again.
                unsafe { sys::cuGraphDestroy(graph) };
            }
            return Err(why);
        }
        let mut executable = std::ptr::null_mut();
        // SAFETY: `graph` was just captured, `executable` is a valid place.
        let made = check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0)
        });
        // SAFETY: the executable graph holds its own copy.
        unsafe { sys::cuGraphDestroy(graph) };
        made.map(|()| Graph { device: self.device().clone(), executable })
    }
}

impl Graph {
    /// Queues all of it on `stream`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: graph and stream are alive.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once and not used again; the driver waits for a launch under way.
        unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}
