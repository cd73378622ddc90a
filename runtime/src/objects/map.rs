//! Shared memory: sealed memfds and their mappings. Besides `worker/code.rs` the only file outside of `kernels` with `unsafe`.
//!
//! It decides nothing: who may write when is the business of `pool`, who may read of `store`.

#![allow(unsafe_code, reason = "a mapping is a raw pointer; everything that leaves this file is a slice")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Memory that is mapped until it is dropped.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and has no tie to a thread.
unsafe impl Send for Mapping {}
// SAFETY: a shared reference gives out shared slices only.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, len: usize, access: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        assert!(len > 0, "nothing is mapped for an empty object");
        // SAFETY: a null address has the kernel choose a range that nothing else uses.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, flags, fd, 0) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no slice of it outlives this value.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.len) } {
            tracing::error!(%error, "cannot unmap an object");
        }
    }
}

/// Memory that this process alone may write. Others can read it once they have its descriptor: it is sealed against any
/// other writer and any change of its size.
pub(super) struct Segment {
    fd: OwnedFd,
    memory: Mapping,
}

impl Segment {
    /// Fresh memory of so many bytes, every page of it there and mapped. It takes as long as the kernel needs to clear
    /// them.
    pub(super) fn create(bytes: usize) -> io::Result<Self> {
        Self::over(memory_file(bytes as u64)?, bytes)
    }

    /// The same over memory of that size that is there already and that nobody else has mapped.
    pub(super) fn over(fd: OwnedFd, bytes: usize) -> io::Result<Self> {
        fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK)?;
        if fstat(&fd)?.st_size != i64::try_from(bytes).unwrap_or(i64::MAX) {
            return Err(io::Error::other("the memory is not of the size that was asked for"));
        }
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        let memory = Mapping::new(fd.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)?;
        // From here on nobody can map or open it for writing; the mapping that is there stays as it is.
        fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
        Ok(Self { fd, memory })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn capacity(&self) -> usize {
        self.memory.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as `self` lives, and this process writes to it only through
        // `bytes_mut`, which nobody can hold at the same time.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.memory.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; no other process can write (seals), and those that read have said that they do not any
        // more before a segment is written anew (OB-2).
        unsafe { std::slice::from_raw_parts_mut(self.memory.start.as_ptr(), self.memory.len) }
    }
}

/// An object of another process, mapped for reading.
pub(super) struct View {
    memory: Mapping,
    len: usize,
}

impl View {
    /// Maps the first `len` bytes.
    ///
    /// # Errors
    /// It is not sealed or not that long: whoever wrote it could take it away while it is read.
    pub(super) fn map(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let seals = fcntl_get_seals(fd)?;
        if !seals.contains(SealFlags::SHRINK) || !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
        {
            return Err(io::Error::other("the memory of the object is not sealed"));
        }
        if u64::try_from(fstat(fd)?.st_size).unwrap_or(0) < len as u64 {
            return Err(io::Error::other("the memory of the object is too short"));
        }
        let memory = Mapping::new(fd, len.max(1), ProtFlags::READ, MapFlags::SHARED)?;
        Ok(Self { memory, len })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as `self` lives. It cannot shrink (seal), and its owner does not write
        // to it before the store has heard that this view is gone (OB-2).
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr(), self.len) }
    }
}

/// Anonymous memory as a file, all of it allocated: where there is not enough this fails, not a later write.
pub(super) fn memory_file(bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create("heliostat-object", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fallocate(&fd, FallocateFlags::empty(), 0, bytes.max(1))?;
    Ok(fd)
}

/// The same with every page cleared, which the kernel puts off until a page is first used.
pub(super) fn cleared_file(bytes: usize) -> io::Result<OwnedFd> {
    let fd = memory_file(bytes as u64)?;
    let flags = MapFlags::SHARED | MapFlags::POPULATE;
    Mapping::new(fd.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)?;
    Ok(fd)
}

/// Closes a file that was filled: from here on nobody can change it.
pub(super) fn seal(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_add_seals(fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_shows_the_segment_itself_and_nobody_else_can_write() {
        let mut segment = Segment::create(1 << 20).unwrap();
        segment.bytes_mut()[..5].copy_from_slice(b"first");
        let view = View::map(segment.fd(), 5).unwrap();
        assert_eq!(view.bytes(), b"first");
        segment.bytes_mut()[..5].copy_from_slice(b"other");
        assert_eq!(view.bytes(), b"other", "no copy was made");
        assert!(rustix::io::pwrite(segment.fd(), b"x", 0).is_err(), "sealed against write");
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        assert!(Mapping::new(segment.fd(), 1, writable, MapFlags::SHARED).is_err(), "and against mapping");
        assert!(rustix::fs::ftruncate(segment.fd(), 0).is_err(), "and against shrinking");
    }

    #[test]
    fn what_is_not_sealed_or_too_short_is_not_mapped() {
        let open = memory_file(10).unwrap();
        assert!(View::map(open.as_fd(), 10).is_err());
        seal(open.as_fd()).unwrap();
        assert!(View::map(open.as_fd(), 11).is_err());
        assert_eq!(View::map(open.as_fd(), 10).unwrap().bytes(), [0; 10]);
    }
}
