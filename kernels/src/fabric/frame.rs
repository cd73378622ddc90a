//! Frames: what travels on a link, its header, and how a byte stream becomes frames again.
//!
//! A frame is a header of [`HEADER_BYTES`] and a payload. The header ends with a checksum over the rest and over the
//! number of the frame on its link, so a lost, repeated or foreign frame is noticed.
//!
//! Pure: bytes in, frames out.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of an encoded header: kind u8, zeros, layer u32, step u64, payload length u64, checksum u64; little-endian.
pub(super) const HEADER_BYTES: usize = 32;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The few bytes that every rank sends to every other one in every step.
    Header = 1,
    /// Rows on their way to the experts.
    Dispatch = 2,
    /// Rows on their way back.
    Combine = 3,
}

/// An ordered sequence of frames of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Frames of [`Kind::Header`].
    Header,
    /// All other frames.
    Data,
}

/// Number of streams of a link.
pub(super) const STREAMS: usize = 2;

impl Kind {
    /// The stream in which frames of this kind travel.
    pub fn stream(self) -> Stream {
        match self {
            Self::Header => Stream::Header,
            Self::Dispatch | Self::Combine => Stream::Data,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Header, Self::Dispatch, Self::Combine].into_iter().find(|&kind| kind as u8 == byte)
    }
}

/// Names a frame: both sides must agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// What the frame is for.
    pub kind: Kind,
    /// Step of the engine.
    pub step: u64,
    /// MoE layer, or zero.
    pub layer: u32,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of step {}, layer {}", self.kind, self.step, self.layer)
    }
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// A frame with this tag and a payload of this many bytes follows.
    Frame(Tag, usize),
    /// The sender leaves in peace and sends nothing more.
    Bye,
}

const BYE: u8 = 0xff;

/// Encodes the header of the frame number `sequence` of a link.
pub(super) fn encode(head: Head, sequence: u64) -> [u8; HEADER_BYTES] {
    let (kind, layer, step, len) = match head {
        Head::Frame(tag, len) => (tag.kind as u8, tag.layer, tag.step, len as u64),
        Head::Bye => (BYE, 0, 0, 0),
    };
    let mut bytes = [0; HEADER_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&layer.to_le_bytes());
    bytes[8..16].copy_from_slice(&step.to_le_bytes());
    bytes[16..24].copy_from_slice(&len.to_le_bytes());
    let check = xxh3_64_with_seed(&bytes[..24], sequence);
    bytes[24..].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// Decodes a header, or says what is wrong with it.
pub(super) fn decode(
    bytes: &[u8; HEADER_BYTES],
    sequence: u64,
    frame_bytes_max: usize,
) -> Result<Head, String> {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    if word(24) != xxh3_64_with_seed(&bytes[..24], sequence) {
        return Err(format!("the header of frame {sequence} has a wrong checksum"));
    }
    if bytes[0] == BYE {
        return Ok(Head::Bye);
    }
    let kind = Kind::from_byte(bytes[0]).ok_or_else(|| format!("kind {} is unknown", bytes[0]))?;
    let layer = u32::from_le_bytes(std::array::from_fn(|i| bytes[4 + i]));
    let len = usize::try_from(word(16)).unwrap_or(usize::MAX);
    if len > frame_bytes_max {
        return Err(format!("a frame of {len} bytes is over the limit of {frame_bytes_max}"));
    }
    Ok(Head::Frame(Tag { kind, step: word(8), layer }, len))
}

/// Buffers of received frames that were dropped, for the next ones: fresh pages cost more than the copy into them.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u64>>,
    words: usize,
}

const POOL_BUFFERS_MAX: usize = 64;
const POOL_WORDS_MAX: usize = (256 << 20) / 8;

impl Pool {
    /// The smallest free buffer that is large enough, or the largest one grown.
    fn take(&self, bytes: usize) -> Vec<u64> {
        let words = bytes.div_ceil(8);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = (0..free.buffers.len())
            .filter(|&at| free.buffers[at].len() >= words)
            .min_by_key(|&at| free.buffers[at].len());
        let found = fitting.filter(|&at| free.buffers[at].len() <= words.max(512) * 4);
        match found {
            Some(at) => {
                let buffer = free.buffers.swap_remove(at);
                free.words -= buffer.len();
                buffer
            }
            None => {
                drop(free);
                vec![0; words.max(8).next_power_of_two().min(words + (1 << 17))]
            }
        }
    }

    fn give(&self, buffer: Vec<u64>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.buffers.len() < POOL_BUFFERS_MAX && free.words + buffer.len() <= POOL_WORDS_MAX {
            free.words += buffer.len();
            free.buffers.push(buffer);
        }
    }
}

/// A received frame. Its payload starts at an address that is a multiple of 8; the memory is reused after the drop.
pub struct Frame {
    tag: Tag,
    len: usize,
    words: Vec<u64>,
    pool: Arc<Pool>,
}

impl Frame {
    /// A frame with a payload of `len` bytes, which are left over from an earlier frame.
    pub(super) fn new(tag: Tag, len: usize, pool: &Arc<Pool>) -> Self {
        let words = if len == 0 { Vec::new() } else { pool.take(len) };
        Self { tag, len, words, pool: pool.clone() }
    }

    /// Its tag.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// Its payload.
    pub fn payload(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub(super) fn payload_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if !self.words.is_empty() {
            self.pool.give(std::mem::take(&mut self.words));
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame").field("tag", &self.tag).field("len", &self.len).finish_non_exhaustive()
    }
}

/// What an [`Assembler`] finished.
#[derive(Debug)]
pub(super) enum Assembled {
    Frame(Frame),
    Bye,
}

/// Turns the byte stream of one link into frames: fill [`Assembler::target`], then say how much with
/// [`Assembler::advance`].
#[derive(Debug)]
pub(super) struct Assembler {
    header: [u8; HEADER_BYTES],
    frame: Option<Frame>,
    filled: usize,
    sequence: u64,
    frame_bytes_max: usize,
    pool: Arc<Pool>,
}

impl Assembler {
    pub(super) fn new(frame_bytes_max: usize, pool: Arc<Pool>) -> Self {
        Self { header: [0; HEADER_BYTES], frame: None, filled: 0, sequence: 0, frame_bytes_max, pool }
    }

    /// Where the next bytes of the stream go; never empty.
    pub(super) fn target(&mut self) -> &mut [u8] {
        match &mut self.frame {
            None => &mut self.header[self.filled..],
            Some(frame) => &mut frame.payload_mut()[self.filled..],
        }
    }

    /// Takes note of `bytes` that were written to the target. Returns the frame that they completed.
    pub(super) fn advance(&mut self, bytes: usize) -> Result<Option<Assembled>, String> {
        self.filled += bytes;
        if let Some(frame) = &self.frame {
            if self.filled < frame.len {
                return Ok(None);
            }
            self.filled = 0;
            return Ok(self.frame.take().map(Assembled::Frame));
        }
        if self.filled < HEADER_BYTES {
            return Ok(None);
        }
        self.filled = 0;
        let head = decode(&self.header, self.sequence, self.frame_bytes_max)?;
        self.sequence += 1;
        match head {
            Head::Bye => Ok(Some(Assembled::Bye)),
            Head::Frame(tag, len) => {
                let frame = Frame::new(tag, len, &self.pool);
                if len == 0 {
                    return Ok(Some(Assembled::Frame(frame)));
                }
                self.frame = Some(frame);
                Ok(None)
            }
        }
    }

    /// Payload bytes set aside for the frame in the making.
    pub(super) fn reserved(&self) -> usize {
        self.frame.as_ref().map_or(0, |frame| frame.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(kind: Kind, step: u64, layer: u32) -> Tag {
        Tag { kind, step, layer }
    }

    #[test]
    fn headers_round_trip_and_every_flipped_bit_is_noticed() {
        for (sequence, kind) in [(0, Kind::Header), (1, Kind::Dispatch), (u64::MAX, Kind::Combine)] {
            let head = Head::Frame(tag(kind, u64::MAX - 3, 61), 1 << 20);
            let bytes = encode(head, sequence);
            assert_eq!(decode(&bytes, sequence, 1 << 20), Ok(head));
            assert!(decode(&bytes, sequence.wrapping_add(1), 1 << 20).is_err());
            for bit in 0..HEADER_BYTES * 8 {
                let mut bad = bytes;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&bad, sequence, 1 << 20).is_err(), "bit {bit}");
            }
        }
        assert_eq!(decode(&encode(Head::Bye, 9), 9, 0), Ok(Head::Bye));
        let large = encode(Head::Frame(tag(Kind::Combine, 0, 0), 11), 0);
        assert!(decode(&large, 0, 10).unwrap_err().contains("over the limit of 10"));
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_frames() {
        let frames =
            [(tag(Kind::Dispatch, 1, 0), 0), (tag(Kind::Header, 2, 0), 5), (tag(Kind::Combine, 1, 3), 900)];
        let mut stream = Vec::new();
        for (at, &(tag, len)) in frames.iter().enumerate() {
            stream.extend(encode(Head::Frame(tag, len), at as u64));
            stream.extend((0..len).map(|i| i as u8));
        }
        stream.extend(encode(Head::Bye, frames.len() as u64));
        for piece in [1, 7, 31, 32, 33, 4096] {
            let mut assembler = Assembler::new(1 << 20, Arc::default());
            let (mut rest, mut got, mut bye) = (&stream[..], Vec::new(), false);
            while !rest.is_empty() {
                let target = assembler.target();
                let n = target.len().min(piece).min(rest.len());
                target[..n].copy_from_slice(&rest[..n]);
                rest = &rest[n..];
                match assembler.advance(n).unwrap() {
                    Some(Assembled::Frame(frame)) => got.push(frame),
                    Some(Assembled::Bye) => bye = true,
                    None => {}
                }
            }
            assert!(bye);
            assert_eq!(got.len(), frames.len());
            for (frame, (tag, len)) in got.iter().zip(frames) {
                assert_eq!(frame.tag(), tag);
                assert_eq!(frame.payload(), (0..len).map(|i| i as u8).collect::<Vec<_>>());
            }
        }
    }
}
