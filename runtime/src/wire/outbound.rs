//! What waits to be sent on a connection, gathered into chunks so that many frames share one system call.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use super::stream::Stream;

/// Frames are gathered into chunks of this size; one of half of it has a chunk for itself.
pub(super) const CHUNK_BYTES: usize = 64 << 10;
/// A flush sooner than this after the last one waits for more frames.
const GATHER_AFTER: Duration = Duration::from_micros(50);
/// Chunks per system call.
const CHUNKS_PER_WRITE: usize = 32;

/// The queue of a connection.
#[derive(Default)]
pub(super) struct Outbound {
    queued: Chunks,
    /// Bytes queued or being written.
    bytes: usize,
    /// Somebody is writing or will.
    flushing: bool,
    flushed_at: Option<Instant>,
    /// A written chunk to use again.
    spare: Vec<u8>,
}

/// What has to be done after a frame was queued.
pub(super) enum Flush {
    /// Somebody else writes it.
    Nothing,
    /// Write it at once.
    Now,
    /// Write it after the other work of this thread.
    Soon,
}

impl Outbound {
    /// Bytes that are not yet with the kernel.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends a frame. A large one is taken out of its buffer, so that it is not copied again.
    pub(super) fn push(&mut self, frame: &mut Vec<u8>) {
        self.bytes += frame.len();
        if frame.len() >= CHUNK_BYTES / 2 {
            self.queued.chunks.push_back(std::mem::take(frame));
            return;
        }
        match self.queued.chunks.back_mut().filter(|last| last.len() + frame.len() <= CHUNK_BYTES) {
            Some(last) => last.extend_from_slice(frame),
            None => {
                let mut chunk = std::mem::take(&mut self.spare);
                chunk.extend_from_slice(frame);
                self.queued.chunks.push_back(chunk);
            }
        }
    }

    /// Who writes what was pushed. Whoever is told `Now` or `Soon` must see it done.
    pub(super) fn flush(&mut self) -> Flush {
        if self.flushing {
            return Flush::Nothing;
        }
        self.flushing = true;
        match self.flushed_at {
            Some(at) if at.elapsed() < GATHER_AFTER => Flush::Soon,
            Some(_) | None => Flush::Now,
        }
    }

    /// Takes all that is queued for writing; `None` ends the flush.
    pub(super) fn take(&mut self) -> Option<Chunks> {
        if self.queued.chunks.is_empty() {
            self.flushing = false;
            self.flushed_at = Some(Instant::now());
            return None;
        }
        Some(std::mem::take(&mut self.queued))
    }

    /// Notes what was written of what was taken, and takes the rest back.
    pub(super) fn wrote(&mut self, bytes: usize, mut rest: Chunks) {
        self.bytes = self.bytes.saturating_sub(bytes);
        if let Some(mut spare) = rest.spare.take().filter(|spare| spare.capacity() <= 2 * CHUNK_BYTES) {
            spare.clear();
            self.spare = spare;
        }
        if !rest.chunks.is_empty() {
            rest.chunks.append(&mut self.queued.chunks);
            self.queued = rest;
        }
    }

    /// Forgets everything; the connection is closed.
    pub(super) fn clear(&mut self) {
        self.queued = Chunks::default();
        self.bytes = 0;
    }
}

/// Chunks in the order they go out.
#[derive(Default)]
pub(super) struct Chunks {
    chunks: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are out already.
    sent: usize,
    spare: Option<Vec<u8>>,
}

impl Chunks {
    /// Writes until all is out or the socket is full. Returns the bytes written.
    pub(super) fn write_to(&mut self, stream: &Stream) -> io::Result<usize> {
        let mut total = 0;
        while !self.chunks.is_empty() {
            match stream.try_write_vectored(&self.slices()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    total += written;
                    self.advance(written);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(total)
    }

    /// Whether all is out.
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut skip = self.sent;
        let mut slices = Vec::with_capacity(self.chunks.len().min(CHUNKS_PER_WRITE));
        for chunk in self.chunks.iter().take(CHUNKS_PER_WRITE) {
            slices.push(IoSlice::new(&chunk[skip..]));
            skip = 0;
        }
        slices
    }

    fn advance(&mut self, written: usize) {
        self.sent += written;
        while let Some(first) = self.chunks.front()
            && self.sent >= first.len()
        {
            self.sent -= first.len();
            self.spare = self.chunks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Partial writes, new frames between them, large frames: the bytes go out once and in order.
    #[test]
    fn bytes_go_out_once_and_in_order() {
        let mut outbound = Outbound::default();
        let (mut pushed, mut out, mut value) = (Vec::new(), Vec::new(), 0u32);
        for round in 0..200usize {
            for len in [5, 300, CHUNK_BYTES / 2 + round, 1000] {
                let mut frame: Vec<u8> = (0..len).map(|i| (value as usize + i) as u8).collect();
                value += 7;
                pushed.extend_from_slice(&frame);
                outbound.push(&mut frame);
            }
            let mut chunks = outbound.take().unwrap();
            let mut left = 7777 * (round % 17);
            while left > 0 && !chunks.is_empty() {
                let some: Vec<u8> =
                    chunks.slices().iter().flat_map(|s| s.iter().copied()).take(left).collect();
                chunks.advance(some.len());
                left -= some.len();
                outbound.wrote(some.len(), std::mem::take(&mut chunks));
                out.extend(some);
                chunks = outbound.take().unwrap_or_default();
            }
            outbound.wrote(0, chunks);
            assert_eq!(outbound.bytes(), pushed.len() - out.len());
        }
        assert!(pushed.starts_with(&out));
        while let Some(mut chunks) = outbound.take() {
            let some: Vec<u8> = chunks.slices().iter().flat_map(|s| s.iter().copied()).collect();
            chunks.advance(some.len());
            outbound.wrote(some.len(), chunks);
            out.extend(some);
        }
        assert!(pushed == out);
        assert_eq!(outbound.bytes(), 0);
    }
}
