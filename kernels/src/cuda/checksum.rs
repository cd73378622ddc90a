//! Checksums of device memory, computed where it lies: whether weights that came from another GPU are those that left it.
//!
//! They tell damage and mistakes, not malice. [`plain`] is the specification.

use super::{Buffer, CudaError, Device, Kernel, Launch, Params, Source, Stream};

/// Parts of one checksum, at most.
pub const PARTS_MAX: usize = 4;
/// Threads of a block.
const THREADS: u32 = 256;

/// The kernel.
#[derive(Clone, Debug)]
pub struct Checksum {
    kernel: Kernel,
    blocks_max: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ChecksumParams {
    part: [u64; PARTS_MAX],
    words: [u64; PARTS_MAX],
    sum: u64,
}

// SAFETY: the fields of `ChecksumParams` in cu/checksum.cu.
unsafe impl Params for ChecksumParams {}

impl Checksum {
    /// The source of the kernel.
    pub fn source() -> Source {
        Source::new("checksum", include_str!("cu/checksum.cu"))
    }

    /// Loads the kernel.
    ///
    /// # Errors
    /// It does not compile or load.
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        let kernel = device.module(&Self::source())?.kernel("checksum")?;
        Ok(Self { kernel, blocks_max: device.properties().sm_count * 2 })
    }

    /// Queues writing the checksum of `parts`, as if they lay one after the other, to the first element of `sum`.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// If there are more than [`PARTS_MAX`] parts, one is not whole words that are aligned, or `sum` is empty.
    pub fn queue(&self, stream: &Stream, parts: &[Buffer<u8>], sum: &Buffer<u64>) -> Result<(), CudaError> {
        assert!(parts.len() <= PARTS_MAX, "{} parts", parts.len());
        let sum = sum.slice(0..1);
        let mut params = ChecksumParams { part: [0; PARTS_MAX], words: [0; PARTS_MAX], sum: sum.address() };
        for (index, part) in parts.iter().enumerate() {
            let aligned = part.address().is_multiple_of(4) && part.len().is_multiple_of(4);
            assert!(aligned, "part {index} has {} bytes at {:#x}", part.len(), part.address());
            params.part[index] = part.address();
            params.words[index] = part.len() as u64 / 4;
        }
        sum.fill(stream, 0)?;
        let longest = params.words.into_iter().max().unwrap_or(0);
        let grid = longest.div_ceil(u64::from(THREADS)).min(u64::from(self.blocks_max)) as u32;
        // SAFETY: the kernel of this struct; the parts have their buffers' own lengths, the sum is one element.
        unsafe { self.kernel.launch(stream, &Launch::new(grid, THREADS), &params) }
    }
}

/// The checksum of `parts`, as if they lay one after the other: the sum modulo 2^64 over all words of 32 bits, little-endian,
/// of SplitMix64's step of (index of the word << 32 | word).
///
/// # Panics
/// If a part is not whole words.
pub fn plain(parts: &[&[u8]]) -> u64 {
    let whole = parts.iter().all(|part| part.len().is_multiple_of(4));
    assert!(whole, "parts are whole words");
    let words = parts.iter().flat_map(|part| part.chunks_exact(4));
    let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (0_u64..)
        .zip(words)
        .fold(0, |sum: u64, (index, bytes)| sum.wrapping_add(mix(index << 32 | u64::from(word(bytes)))))
}

/// A permutation of the numbers of 64 bits in which every bit of `x` matters to every bit of the result.
fn mix(x: u64) -> u64 {
    let mut x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
