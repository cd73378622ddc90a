//! Device memory that other ranks reach: exported and opened by CUDA IPC, or by plain address within one process.
//!
//! A handle is bytes that the caller carries to its peers. Who opens a handle may read and write all of the heap.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::error::check;
use super::{Buffer, CudaError, Device, Stream};

/// The driver exports whole pages of this size.
const PAGE_BYTES: usize = 2 << 20;

/// Names a heap to any process of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeapHandle {
    /// Who owns it: drawn at random by each process.
    process: u64,
    /// Where it lies in that process.
    address: u64,
    /// Its size.
    bytes: u64,
    /// The device it lies on, as that process counts them.
    device: u64,
    /// For other processes; zeros where the driver exports nothing.
    ipc: [u8; 64],
}

impl HeapHandle {
    /// Length of its bytes.
    pub const LEN: usize = 96;

    /// As bytes, to be sent.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.process, self.address, self.bytes, self.device];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes[32..].copy_from_slice(&self.ipc);
        bytes
    }

    /// From bytes that arrived; `None` if they are not as long as a handle.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let word = |at: usize| Some(u64::from_le_bytes(bytes[at..at + 8].try_into().ok()?));
        let ipc = bytes[32..].try_into().ok()?;
        Some(Self { process: word(0)?, address: word(8)?, bytes: word(16)?, device: word(24)?, ipc })
    }
}

/// A heap of this rank: zeroed at first, freed when the last clone of its memory is gone. Peers must have closed it then.
#[derive(Debug)]
pub struct Heap {
    memory: Buffer<u8>,
    handle: HeapHandle,
}

impl Heap {
    /// Allocates `bytes`, rounded up to what the driver can export.
    ///
    /// # Errors
    /// The device is full.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, CudaError> {
        let memory = device.alloc::<u8>(bytes.next_multiple_of(PAGE_BYTES))?;
        let mut exported = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the context was bound by the allocation; `exported` is a valid place, the address that of an allocation.
        let result = unsafe { sys::cuIpcGetMemHandle(&mut exported, memory.address()) };
        // A machine that exports nothing still serves ranks of one process.
        let ipc = match result {
            sys::CUresult::CUDA_SUCCESS => exported.reserved.map(|byte| byte as u8),
            _ => [0; 64],
        };
        let handle = HeapHandle {
            process: this_process(),
            address: memory.address(),
            bytes: memory.len() as u64,
            device: u64::from(device.ordinal()),
            ipc,
        };
        Ok(Self { memory, handle })
    }

    /// All of it.
    pub fn memory(&self) -> &Buffer<u8> {
        &self.memory
    }

    /// Its name, for peers.
    pub fn handle(&self) -> HeapHandle {
        self.handle
    }
}

/// A heap of another rank, reachable until this is dropped.
#[derive(Debug)]
pub struct PeerHeap {
    device: Device,
    handle: HeapHandle,
    address: u64,
}

impl PeerHeap {
    /// Makes the heap that `handle` names reachable from `device`, at least `bytes` of it.
    ///
    /// # Errors
    /// The heap is too small, its owner is gone, or there is no path between the devices.
    pub fn open(device: &Device, handle: HeapHandle, bytes: usize) -> Result<Self, CudaError> {
        if handle.bytes < bytes as u64 {
            let HeapHandle { bytes: found, .. } = handle;
            return Err(CudaError::Other(format!("a peer's heap has {found} bytes, {bytes} are needed")));
        }
        let mut address = handle.address;
        if handle.process == this_process() && handle.device != u64::from(device.ordinal()) {
            let why = "ranks of one process must share its device: start a process for each device";
            return Err(CudaError::Other(why.to_owned()));
        }
        if handle.process != this_process() {
            if handle.ipc == [0; 64] {
                let why =
                    "a peer's driver exports no memory to other processes (CUDA IPC): use transport nccl";
                return Err(CudaError::Other(why.to_owned()));
            }
            device.bind()?;
            let exported = sys::CUipcMemHandle { reserved: handle.ipc.map(|byte| byte as std::ffi::c_char) };
            let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
            // SAFETY: the context is bound and `address` a valid place; the driver checks the handle.
            check("cuIpcOpenMemHandle", unsafe {
                sys::cuIpcOpenMemHandle_v2(&mut address, exported, flags)
            })?;
        }
        Ok(Self { device: device.clone(), handle, address })
    }

    /// Where it begins, in this process.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// What it was opened by.
    pub fn handle(&self) -> HeapHandle {
        self.handle
    }

    /// Queues a copy of the bytes from `offset` on into all of `to`, by the copy engines: over NVLink where the heap lies on
    /// another GPU. The call itself waits for nothing.
    ///
    /// # Errors
    /// The stream is broken, or the heap ends before.
    pub fn copy_to(&self, stream: &Stream, offset: usize, to: &Buffer<u8>) -> Result<(), CudaError> {
        let end = offset.checked_add(to.len());
        if end.is_none_or(|end| end as u64 > self.handle.bytes) {
            let (len, bytes) = (to.len(), self.handle.bytes);
            return Err(CudaError::Other(format!("{len} bytes at {offset} of a peer's heap of {bytes}")));
        }
        stream.device().bind()?;
        // SAFETY: both have this length; the heap is mapped as long as `self` lives, whose owner waits for the stream.
        check("cuMemcpyDtoDAsync", unsafe {
            let from = self.address + offset as u64;
            sys::cuMemcpyDtoDAsync_v2(to.address(), from, to.len(), stream.raw())
        })
    }
}

impl Drop for PeerHeap {
    fn drop(&mut self) {
        if self.handle.process != this_process() && self.device.bind().is_ok() {
            // SAFETY: opened once. What used it has ended: its owner drops it when its streams have come so far.
            unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

/// A number that no other process has.
fn this_process() -> u64 {
    static DRAWN: OnceLock<u64> = OnceLock::new();
    *DRAWN.get_or_init(|| RandomState::new().hash_one(std::process::id()))
}
