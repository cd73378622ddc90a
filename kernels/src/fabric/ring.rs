//! Shared memory of two processes: a mapping, and a byte ring with one producer and one consumer in it.
//!
//! All `unsafe` of the fabric is here. The other process is not trusted: every position is checked before it is used,
//! bytes are copied out before they are looked at, and no reference to the shared bytes is ever made.
//!
//! A ring is one page of header and `capacity` bytes, a power of two. `head` counts the bytes ever written, `tail` the
//! bytes ever read; each side keeps its own count privately and only tells the other one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// Memory that two processes have mapped. It cannot shrink, so an access never faults.
#[derive(Debug)]
pub(super) struct SharedMap {
    map: MmapRaw,
}

/// What a process must know to map memory of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub(super) struct MapOffer {
    pub pid: u32,
    pub fd: i32,
    pub bytes: u64,
    /// Stands at the start of the memory, so that a wrong descriptor is noticed.
    pub token: u64,
}

const TOKEN_AT: usize = 0;

impl SharedMap {
    /// Makes zeroed memory of `bytes`. It lives until all descriptors and mappings of it are gone.
    pub(super) fn create(name: &str, bytes: usize, token: u64) -> io::Result<(OwnedFd, MapOffer, Self)> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = Self { map: MmapOptions::new().len(bytes).populate().map_raw(&fd)? };
        map.u64(TOKEN_AT).store(token, Ordering::Release);
        let offer = MapOffer { pid: std::process::id(), fd: fd.as_raw_fd(), bytes: bytes as u64, token };
        Ok((fd, offer, map))
    }

    /// Maps memory that a process of this host offers. Fails unless it has exactly `bytes`, is sealed and bears the token.
    pub(super) fn open(offer: &MapOffer, bytes: usize) -> io::Result<Self> {
        let path = format!("/proc/{}/fd/{}", offer.pid, offer.fd);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        let size = rustix::fs::fstat(&fd)?.st_size;
        if !seals.contains(SealFlags::SHRINK) || size != bytes as i64 || offer.bytes != bytes as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the shared memory is not what was offered",
            ));
        }
        let map = Self { map: MmapOptions::new().len(bytes).populate().map_raw(&fd)? };
        if map.u64(TOKEN_AT).load(Ordering::Acquire) != offer.token {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the shared memory has another token"));
        }
        Ok(map)
    }

    /// The aligned word at byte `at`.
    pub(super) fn u32(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.map.len(), "word {at} is outside the mapping");
        // SAFETY: in bounds and aligned (mappings start at a page), mapped as long as `self`, which the result borrows;
        // the sealed file cannot shrink. This process accesses the word only through atomics.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    /// The aligned double word at byte `at`.
    pub(super) fn u64(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.map.len(), "word {at} is outside the mapping");
        // SAFETY: as in `u32`.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    fn copy_in(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.map.len() && bytes.len() <= self.map.len() - at, "write outside the mapping");
        // SAFETY: the destination is in bounds and mapped; `bytes` is this process's own memory, so they do not overlap.
        // The ring gives these bytes to this side alone until it publishes them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_mut_ptr().add(at), bytes.len()) }
    }

    fn copy_out(&self, at: usize, bytes: &mut [u8]) {
        assert!(at <= self.map.len() && bytes.len() <= self.map.len() - at, "read outside the mapping");
        // SAFETY: the source is in bounds and mapped; `bytes` is this process's own memory, so they do not overlap. A
        // well-behaved peer does not write what it has published; another one only changes which bytes are copied.
        unsafe { std::ptr::copy_nonoverlapping(self.map.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) }
    }
}

/// Bytes before the ring's data.
const DATA_AT: usize = 4096;
/// Written by the producer: bytes ever written.
const HEAD_AT: usize = 128;
/// Written by the consumer: bytes ever read.
const TAIL_AT: usize = 256;
/// Written by the producer: bytes of room that it sleeps for, or zero.
const WANTED_AT: usize = 384;

/// Bytes to map for a ring of `capacity`.
pub(super) fn mapping_bytes(capacity: usize) -> usize {
    DATA_AT + capacity
}

/// Whether `bytes` is what [`mapping_bytes`] returns for a capacity that is in use.
pub(super) fn is_mapping(bytes: u64) -> bool {
    usize::try_from(bytes)
        .ok()
        .and_then(|bytes| bytes.checked_sub(DATA_AT))
        .is_some_and(|capacity| capacity > 0 && capacity_for(capacity) == capacity)
}

/// The capacity to use when `bytes` are asked for: a power of two from a page to a gibibyte.
pub(super) fn capacity_for(bytes: usize) -> usize {
    bytes.clamp(4096, 1 << 30).next_power_of_two()
}

/// Where `len` bytes from `position` on lie in a ring: `(offset, length)` before and after the wrap.
fn spans(position: u64, len: usize, capacity: usize) -> [(usize, usize); 2] {
    let offset = (position % capacity as u64) as usize;
    let first = len.min(capacity - offset);
    [(offset, first), (0, len - first)]
}

/// Bytes between two positions, if a ring of `capacity` can hold that many.
fn distance(tail: u64, head: u64, capacity: usize) -> Result<usize, String> {
    let bytes = head.wrapping_sub(tail);
    if bytes > capacity as u64 {
        return Err(format!("ring positions {tail}..{head} do not fit {capacity} bytes"));
    }
    Ok(bytes as usize)
}

/// The writing end of a ring.
#[derive(Debug)]
pub(super) struct Producer {
    map: SharedMap,
    capacity: usize,
    head: u64,
    tail_seen: u64,
}

impl Producer {
    pub(super) fn new(map: SharedMap) -> Self {
        let capacity = map.map.len() - DATA_AT;
        Self { map, capacity, head: 0, tail_seen: 0 }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that can be written now.
    pub(super) fn room(&mut self) -> Result<usize, String> {
        self.tail_seen = self.map.u64(TAIL_AT).load(Ordering::Acquire);
        Ok(self.capacity - distance(self.tail_seen, self.head, self.capacity)?)
    }

    /// Copies what fits and returns how much that was. The consumer does not see it yet.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<usize, String> {
        let mut room = self.capacity - distance(self.tail_seen, self.head, self.capacity)?;
        if room < bytes.len() {
            room = self.room()?;
        }
        let len = bytes.len().min(room);
        let [(at, first), (wrapped, _)] = spans(self.head, len, self.capacity);
        self.map.copy_in(DATA_AT + at, &bytes[..first]);
        self.map.copy_in(DATA_AT + wrapped, &bytes[first..len]);
        self.head = self.head.wrapping_add(len as u64);
        Ok(len)
    }

    /// Shows everything written so far to the consumer.
    pub(super) fn publish(&self) {
        self.map.u64(HEAD_AT).store(self.head, Ordering::Release);
    }

    /// Asks the consumer to ring when it has made `bytes` of room; zero takes that back.
    pub(super) fn want_room(&self, bytes: usize) {
        self.map.u32(WANTED_AT).store(bytes as u32, Ordering::Relaxed);
    }
}

/// The reading end of a ring.
#[derive(Debug)]
pub(super) struct Consumer {
    map: SharedMap,
    capacity: usize,
    tail: u64,
    head_seen: u64,
}

impl Consumer {
    pub(super) fn new(map: SharedMap) -> Self {
        let capacity = map.map.len() - DATA_AT;
        Self { map, capacity, tail: 0, head_seen: 0 }
    }

    /// Copies what is there, at most `bytes.len()`, and returns how much that was. The producer does not see it yet.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Result<usize, String> {
        let mut there = distance(self.tail, self.head_seen, self.capacity)?;
        if there < bytes.len() {
            let head = self.map.u64(HEAD_AT).load(Ordering::Acquire);
            if distance(self.tail, head, self.capacity)? < there {
                return Err("the ring's head went backwards".to_owned());
            }
            self.head_seen = head;
            there = distance(self.tail, head, self.capacity)?;
        }
        let len = bytes.len().min(there);
        let [(at, first), (wrapped, _)] = spans(self.tail, len, self.capacity);
        let (start, rest) = bytes[..len].split_at_mut(first);
        self.map.copy_out(DATA_AT + at, start);
        self.map.copy_out(DATA_AT + wrapped, rest);
        self.tail = self.tail.wrapping_add(len as u64);
        Ok(len)
    }

    /// Gives everything read so far back to the producer. Returns whether the producer sleeps for room and has it now.
    pub(super) fn release(&self) -> bool {
        self.map.u64(TAIL_AT).store(self.tail, Ordering::Release);
        // The producer writes its wish, fences and reads the tail: one of the two sees the other.
        fence(Ordering::SeqCst);
        let wanted = self.map.u32(WANTED_AT).load(Ordering::Relaxed) as usize;
        if wanted == 0 {
            return false;
        }
        let head = self.map.u64(HEAD_AT).load(Ordering::Relaxed);
        distance(self.tail, head, self.capacity).is_ok_and(|used| self.capacity - used >= wanted)
    }

    /// Whether all that has been read is given back too.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.map.u64(HEAD_AT).load(Ordering::Acquire) == self.tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(capacity: usize) -> (Producer, Consumer, OwnedFd) {
        let (fd, offer, map) = SharedMap::create("test", mapping_bytes(capacity), 7).unwrap();
        let other = SharedMap::open(&offer, mapping_bytes(capacity)).unwrap();
        (Producer::new(map), Consumer::new(other), fd)
    }

    #[test]
    fn spans_cover_the_ring_once() {
        assert_eq!(spans(0, 8, 8), [(0, 8), (0, 0)]);
        assert_eq!(spans(13, 7, 8), [(5, 3), (0, 4)]);
        assert_eq!(spans(u64::MAX - 7, 8, 4096), [(4088, 8), (0, 0)]);
        assert_eq!(distance(u64::MAX, 3, 8), Ok(4));
        assert!(distance(4, 3, 8).is_err());
        assert!(distance(0, 9, 8).is_err());
        assert_eq!(capacity_for(5000), 8192);
    }

    #[test]
    fn only_the_offered_memory_is_mapped() {
        let (fd, offer, _map) = SharedMap::create("test", 8192, 7).unwrap();
        assert!(SharedMap::open(&offer, 8192).is_ok());
        assert!(SharedMap::open(&offer, 4096).is_err());
        assert!(SharedMap::open(&MapOffer { token: 8, ..offer }, 8192).is_err());
        assert!(SharedMap::open(&MapOffer { fd: 0, ..offer }, 8192).is_err(), "not a sealed memory file");
        assert!(rustix::fs::ftruncate(&fd, 0).is_err(), "sealed against shrinking");
    }

    #[test]
    fn wrong_positions_of_the_peer_are_errors() {
        let (mut producer, mut consumer, _fd) = ring(4096);
        let mut byte = [0];
        producer.map.u64(HEAD_AT).store(4097, Ordering::Release);
        assert!(consumer.read(&mut byte).is_err());
        producer.map.u64(HEAD_AT).store(10, Ordering::Release);
        assert_eq!(consumer.read(&mut byte), Ok(1));
        producer.map.u64(HEAD_AT).store(5, Ordering::Release);
        assert!(consumer.read(&mut [0; 20]).unwrap_err().contains("backwards"));
        consumer.map.u64(TAIL_AT).store(1, Ordering::Release);
        assert!(producer.room().is_err());
    }

    /// Two threads, odd piece sizes, a ring that wraps thousands of times: every byte arrives once and in order.
    #[test]
    fn bytes_survive_two_racing_threads() {
        const TOTAL: usize = 8 << 20;
        let (mut producer, mut consumer, _fd) = ring(4096);
        let value = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut at, mut piece) = (0, 1);
                while at < TOTAL {
                    piece = piece * 7 % 1361 + 1;
                    let bytes: Vec<u8> = (at..TOTAL.min(at + piece)).map(value).collect();
                    let n = producer.write(&bytes).unwrap();
                    producer.publish();
                    at += n;
                    if n == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let (mut at, mut piece) = (0, 1);
            while at < TOTAL {
                piece = piece * 5 % 1201 + 1;
                let mut bytes = vec![0; piece];
                let n = consumer.read(&mut bytes).unwrap();
                consumer.release();
                for (i, &byte) in bytes[..n].iter().enumerate() {
                    assert_eq!(byte, value(at + i), "byte {}", at + i);
                }
                at += n;
                if n == 0 {
                    std::thread::yield_now();
                }
            }
            assert!(consumer.is_empty());
        });
    }
}
