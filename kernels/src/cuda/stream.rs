//! Queues of work on a device, and marks in them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::error::check;
use super::{CudaError, Device};

/// Who goes first when both have blocks to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// The step.
    High,
    /// What may wait: weights on their way.
    Low,
}

/// A queue of work, in order. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: Device,
    raw: sys::CUstream,
    profiling: AtomicBool,
    profile: Mutex<Profile>,
}

/// Launches that are being timed one by one.
#[derive(Debug, Default)]
struct Profile {
    label: &'static str,
    launches: Vec<(&'static str, Arc<str>, Event, Event)>,
}

/// How long one kernel took.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The part of the work that it belongs to: see [`Stream::label`].
    pub label: &'static str,
    /// The kernel's name.
    pub kernel: Arc<str>,
    /// Microseconds of the device.
    pub us: f64,
}

// SAFETY: a stream is a handle that any thread may use.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver orders concurrent calls.
unsafe impl Sync for Inner {}

impl Device {
    /// A new queue, independent of all others.
    ///
    /// # Errors
    /// The device is lost.
    pub fn stream(&self, priority: Priority) -> Result<Stream, CudaError> {
        self.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is bound, both places are valid.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest)
        })?;
        let priority = match priority {
            Priority::High => greatest,
            Priority::Low => least,
        };
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is bound, `raw` is a valid place.
        check("cuStreamCreateWithPriority", unsafe {
            sys::cuStreamCreateWithPriority(&mut raw, flags, priority)
        })?;
        let (profiling, profile) = (AtomicBool::new(false), Mutex::default());
        Ok(Stream(Arc::new(Inner { device: self.clone(), raw, profiling, profile })))
    }
}

impl Stream {
    /// Its device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.0.raw
    }

    /// Times every kernel that `work` queues on this stream, each on its own: none starts before the one ahead of it has
    /// ended. Not to be used within a recording.
    ///
    /// # Errors
    /// `work` failed, or the device is lost.
    pub fn profile(
        &self,
        work: impl FnOnce(&Self) -> Result<(), CudaError>,
    ) -> Result<Vec<KernelTime>, CudaError> {
        self.0.profiling.store(true, Ordering::Relaxed);
        let worked = work(self);
        self.0.profiling.store(false, Ordering::Relaxed);
        self.synchronize()?;
        let Profile { launches, .. } = std::mem::take(&mut *self.profile_mut());
        worked?;
        let time = |(label, kernel, before, after): (_, _, Event, Event)| {
            let us = f64::from(after.elapsed_ms(&before)?) * 1e3;
            Ok(KernelTime { label, kernel, us })
        };
        launches.into_iter().map(time).collect()
    }

    /// Names the part of the work that the next kernels belong to, for [`Stream::profile`].
    pub fn label(&self, label: &'static str) {
        if self.is_profiling() {
            self.profile_mut().label = label;
        }
    }

    /// Whether kernels are being timed one by one.
    pub fn is_profiling(&self) -> bool {
        self.0.profiling.load(Ordering::Relaxed)
    }

    /// Notes a launch that ran between two events.
    pub(super) fn note(&self, kernel: Arc<str>, before: Event, after: Event) {
        let mut profile = self.profile_mut();
        let label = profile.label;
        profile.launches.push((label, kernel, before, after));
    }

    fn profile_mut(&self) -> MutexGuard<'_, Profile> {
        self.0.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the device still answers. Waits for nothing.
    ///
    /// # Errors
    /// It is lost, or something that was queued failed.
    pub fn check(&self) -> Result<(), CudaError> {
        self.device().bind()?;
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.raw()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            result => check("cuStreamQuery", result),
        }
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device().bind()?;
        // SAFETY: the stream is alive.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw()) })
    }

    /// Marks this place.
    ///
    /// # Errors
    /// The device is lost.
    pub fn record(&self) -> Result<Event, CudaError> {
        let event = Event::new(self.device())?;
        self.record_into(&event)?;
        Ok(event)
    }

    /// Moves a mark here.
    ///
    /// # Errors
    /// The device is lost.
    pub fn record_into(&self, event: &Event) -> Result<(), CudaError> {
        self.device().bind()?;
        // SAFETY: event and stream are alive and of one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.0.raw, self.raw()) })
    }

    /// Has what is queued from here on wait for `event`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.device().bind()?;
        // SAFETY: event and stream are alive.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw(), event.0.raw, 0) })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: created once; the driver ends it when its work is done.
        unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A mark in a stream. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Event(Arc<Mark>);

#[derive(Debug)]
struct Mark {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: an event is a handle that any thread may use.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Event {
    /// A mark that is nowhere yet.
    ///
    /// # Errors
    /// The device is lost.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is bound, `raw` is a valid place.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, 0) })?;
        Ok(Self(Arc::new(Mark { device: device.clone(), raw })))
    }

    /// Waits until the stream has come to the mark.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.0.device.bind()?;
        // SAFETY: the event is alive.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.0.raw) })
    }

    /// Whether the stream has come to the mark.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.0.device.bind()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.0.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Waits until the stream has come to the mark, by looking again and again: the least delay there is. False when
    /// `timeout` has passed first.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn wait_within(&self, timeout: Duration) -> Result<bool, CudaError> {
        let began = Instant::now();
        while !self.is_done()? {
            if began.elapsed() > timeout {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
        Ok(true)
    }

    /// The same for who is in no hurry: it sleeps between two looks, so that its core is others'. The driver is not asked to
    /// wait, so no lock of it is held meanwhile.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn wait_patiently(&self, timeout: Duration) -> Result<bool, CudaError> {
        const PAUSE: Duration = Duration::from_micros(50);
        let began = Instant::now();
        while !self.is_done()? {
            if began.elapsed() > timeout {
                return Ok(false);
            }
            std::thread::sleep(PAUSE);
        }
        Ok(true)
    }

    /// Milliseconds of the device between `earlier` and this one, both passed.
    ///
    /// # Errors
    /// One of them was not passed.
    pub fn elapsed_ms(&self, earlier: &Self) -> Result<f32, CudaError> {
        self.0.device.bind()?;
        let mut ms = 0.0;
        // SAFETY: both events are alive, `ms` is a valid place.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut ms, earlier.0.raw, self.0.raw)
        })?;
        Ok(ms)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: created once and not used again.
        unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}
