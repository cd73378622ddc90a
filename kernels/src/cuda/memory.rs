//! Memory of a device, and host memory that it can reach.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

use super::error::check;
use super::{CudaError, Device, Stream};

/// What device memory may hold: plain numbers of which every bit pattern is one.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Element for $t {})* };
}
elements!(u8, u16, u32, u64, i32, f32, half::bf16);

#[derive(Debug)]
struct Allocation {
    device: Device,
    address: u64,
    bytes: u64,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.count_freed(self.bytes);
        // SAFETY: allocated once and freed once; the driver waits for kernels that use it.
        let freed =
            self.device.bind().and_then(|()| check("cuMemFree", unsafe { sys::cuMemFree_v2(self.address) }));
        // A failure means that the context is broken: its owner hears that from its own calls.
        drop(freed);
    }
}

/// Device memory of `len` elements, or a part of some. Clones and slices share it; the last one frees it.
#[derive(Debug)]
pub struct Buffer<T> {
    allocation: Arc<Allocation>,
    /// Bytes from the start of the allocation.
    offset: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let allocation = Arc::clone(&self.allocation);
        Self { allocation, offset: self.offset, len: self.len, element: PhantomData }
    }
}

impl Device {
    /// Zeroed memory of `len` elements, aligned to 256 bytes at least. Blocks.
    ///
    /// # Errors
    /// The device is full.
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        self.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        let mut address = 0;
        // SAFETY: the context is bound and `address` is a valid place.
        let result = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            return Err(CudaError::OutOfMemory { asked: bytes as u64, free, total });
        }
        check("cuMemAlloc", result)?;
        self.count_allocated(bytes as u64);
        let allocation = Arc::new(Allocation { device: self.clone(), address, bytes: bytes as u64 });
        // SAFETY: the memory was just allocated with this length. The legacy stream orders it before what follows.
        check("cuMemsetD8", unsafe { sys::cuMemsetD8_v2(address, 0, bytes) })?;
        self.synchronize()?;
        Ok(Buffer { allocation, offset: 0, len, element: PhantomData })
    }

    /// Memory that holds `values`. Blocks.
    ///
    /// # Errors
    /// The device is full.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let buffer = self.alloc(values.len())?;
        // SAFETY: source and destination have the same length; the call returns when the source was read.
        check("cuMemcpyHtoD", unsafe {
            sys::cuMemcpyHtoD_v2(buffer.address(), values.as_ptr().cast(), size_of_val(values))
        })?;
        self.synchronize()?;
        Ok(buffer)
    }

    /// Page-locked host memory of `len` zeroed elements that kernels can read and write.
    ///
    /// # Errors
    /// The host is full.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<Pinned<T>, CudaError> {
        self.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        let mut host = std::ptr::null_mut();
        // Portable, and mapped into the device's address space.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is bound and `host` is a valid place.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut host, bytes, flags) })?;
        // SAFETY: just allocated with this length.
        unsafe { std::ptr::write_bytes(host.cast::<u8>(), 0, bytes) };
        let mut address = 0;
        // SAFETY: `host` is such memory and `address` a valid place.
        let mapped = check("cuMemHostGetDevicePointer", unsafe {
            sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0)
        });
        let pinned = Pinned { device: self.clone(), host: host.cast(), address, len };
        mapped.map(|()| pinned)
    }
}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it begins, as kernels know it.
    pub fn address(&self) -> u64 {
        self.allocation.address + self.offset
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.allocation.device
    }

    /// Elements `range` of it.
    ///
    /// # Panics
    /// If they are not all there.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "slice {range:?} of {} elements",
            self.len
        );
        let offset = self.offset + (range.start * size_of::<T>()) as u64;
        Self { offset, len: range.len(), ..self.clone() }
    }

    /// The same bytes as elements of another type; an incomplete last one is left out.
    #[must_use]
    pub fn cast<U: Element>(&self) -> Buffer<U> {
        let len = self.len * size_of::<T>() / size_of::<U>();
        let allocation = Arc::clone(&self.allocation);
        Buffer { allocation, offset: self.offset, len, element: PhantomData }
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Reads it back when `stream` has come this far. Blocks.
    ///
    /// # Errors
    /// Something on the stream failed.
    pub fn download(&self, stream: &Stream) -> Result<Vec<T>, CudaError> {
        stream.device().bind()?;
        let mut values: Vec<T> = Vec::with_capacity(self.len);
        // SAFETY: the vector has room for all; synchronising below ends the copy before it is read or freed.
        let copied = check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), self.address(), self.bytes(), stream.raw())
        });
        stream.synchronize()?;
        copied?;
        // SAFETY: all of it was written, and every bit pattern is an element.
        unsafe { values.set_len(self.len) };
        Ok(values)
    }

    /// Writes `values` to its front when `stream` has come this far. Blocks.
    ///
    /// # Errors
    /// Something on the stream failed.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, stream: &Stream, values: &[T]) -> Result<(), CudaError> {
        assert!(values.len() <= self.len, "{} values for {} elements", values.len(), self.len);
        stream.device().bind()?;
        // SAFETY: the lengths fit; synchronising below ends the copy before `values` can change.
        let copied = check("cuMemcpyHtoDAsync", unsafe {
            let bytes = size_of_val(values);
            sys::cuMemcpyHtoDAsync_v2(self.address(), values.as_ptr().cast(), bytes, stream.raw())
        });
        stream.synchronize()?;
        copied
    }

    /// Queues a copy of all of `from`, of the same length, into it.
    ///
    /// # Errors
    /// The stream is broken.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&self, stream: &Stream, from: &Self) -> Result<(), CudaError> {
        assert_eq!(self.len, from.len, "copy between lengths");
        stream.device().bind()?;
        // SAFETY: both are device memory of this length, kept alive by whoever owns the buffers.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(self.address(), from.address(), self.bytes(), stream.raw())
        })
    }

    /// Queues setting all bytes to `byte`.
    ///
    /// # Errors
    /// The stream is broken.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<(), CudaError> {
        stream.device().bind()?;
        // SAFETY: the memory has this length.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(self.address(), byte, self.bytes(), stream.raw())
        })
    }

    /// Queues a copy of the first `len` elements of `from` to the front of it. `from` must not change before the
    /// stream has come this far, or the device may see either value.
    ///
    /// # Errors
    /// The stream is broken.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_from_pinned(&self, stream: &Stream, from: &Pinned<T>, len: usize) -> Result<(), CudaError> {
        self.copy_from_pinned_at(stream, from, 0, len)
    }

    /// The same with the elements of `from` that begin at `offset`.
    ///
    /// # Errors
    /// The stream is broken.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_from_pinned_at(
        &self,
        stream: &Stream,
        from: &Pinned<T>,
        offset: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(len <= self.len, "{len} elements into {}", self.len);
        assert!(offset + len <= from.len, "{len} elements at {offset} of {}", from.len);
        stream.device().bind()?;
        // SAFETY: both have this length; page-locked memory lives until the device has caught up (see its `Drop`).
        check("cuMemcpyHtoDAsync", unsafe {
            let (bytes, first) = (len * size_of::<T>(), from.host.add(offset));
            sys::cuMemcpyHtoDAsync_v2(self.address(), first.cast(), bytes, stream.raw())
        })
    }

    /// Queues a copy of its first `len` elements to the front of `to`.
    ///
    /// # Errors
    /// The stream is broken.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_to_pinned(&self, stream: &Stream, to: &Pinned<T>, len: usize) -> Result<(), CudaError> {
        self.copy_to_pinned_at(stream, to, 0, len)
    }

    /// The same to where `offset` elements of `to` end.
    ///
    /// # Errors
    /// The stream is broken.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_to_pinned_at(
        &self,
        stream: &Stream,
        to: &Pinned<T>,
        offset: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(len <= self.len, "{len} of {} elements", self.len);
        assert!(offset + len <= to.len, "{len} elements at {offset} of {}", to.len);
        stream.device().bind()?;
        // SAFETY: as in `copy_from_pinned_at`.
        check("cuMemcpyDtoHAsync", unsafe {
            let (bytes, first) = (len * size_of::<T>(), to.host.add(offset));
            sys::cuMemcpyDtoHAsync_v2(first.cast(), self.address(), bytes, stream.raw())
        })
    }
}

/// Page-locked host memory that the device can read and write at any time. It is never borrowed: host accesses are
/// copies, of single elements volatile ones.
#[derive(Debug)]
pub struct Pinned<T> {
    device: Device,
    host: *mut T,
    address: u64,
    len: usize,
}

// SAFETY: it owns its memory, and all access is by volatile copies of plain numbers.
unsafe impl<T: Element> Send for Pinned<T> {}
// SAFETY: as above; concurrent writers can only mix their numbers.
unsafe impl<T: Element> Sync for Pinned<T> {}

impl<T: Element> Pinned<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it begins, as kernels know it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The element at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: within the memory, aligned, and every bit pattern is an element.
        unsafe { self.host.add(index).read_volatile() }
    }

    /// Sets the element at `index`.
    ///
    /// # Panics
    /// If there is none.
    pub fn set(&self, index: usize, value: T) {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: within the memory and aligned.
        unsafe { self.host.add(index).write_volatile(value) }
    }

    /// Writes `values` from `offset` on.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, offset: usize, values: &[T]) {
        assert!(offset + values.len() <= self.len, "{} values at {offset} of {}", values.len(), self.len);
        // SAFETY: within the memory; a slice of the caller's cannot overlap it, since none is ever lent out.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.host.add(offset), values.len()) }
    }

    /// Reads elements `range`.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn read(&self, range: Range<usize>) -> Vec<T> {
        assert!(range.start <= range.end && range.end <= self.len, "read {range:?} of {}", self.len);
        let mut values = Vec::with_capacity(range.len());
        // SAFETY: within the memory; the vector has room, is written whole, and every bit pattern is an element.
        unsafe {
            std::ptr::copy_nonoverlapping(self.host.add(range.start), values.as_mut_ptr(), range.len());
            values.set_len(range.len());
        }
        values
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // Copies that were queued may still be on their way.
        let _ = self.device.synchronize();
        // SAFETY: allocated once and freed once.
        unsafe { sys::cuMemFreeHost(self.host.cast()) };
    }
}
