//! Weights as bytes: how experts move between ranks, and what their checksum covers.
//!
//! Little-endian: magic, storage type (u32), rows, cols (u64), block rows, block cols, row offset within the first
//! block (u64; 0 unless FP8), scales (f32, FP8 only), elements. A view is written as a matrix of its own.

use xxhash_rust::xxh3::Xxh3;

use super::{Block, Elements, Weight, WeightError, check_length, elements, f32_from_le};
use crate::dtype::DType;

const MAGIC: [u8; 4] = *b"HLW1";
const HEADER_LEN: usize = 8 + 5 * 8;

impl Weight {
    /// The matrix as self-describing bytes; [`Weight::from_bytes`] is the inverse.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.size_bytes());
        self.write_to(&mut |part| bytes.extend_from_slice(part));
        bytes
    }

    /// Reads what [`Weight::to_bytes`] wrote.
    ///
    /// # Errors
    /// Anything else: a wrong magic, lengths that do not fit, NaN codes. Nothing is allocated before the length of
    /// `bytes` is known to fit the shape it states.
    pub fn from_bytes(bytes: &[u8]) -> Result<Weight, WeightError> {
        let (header, body) =
            bytes.split_at_checked(HEADER_LEN).ok_or(WeightError::Format("shorter than its header"))?;
        if header[..4] != MAGIC {
            return Err(WeightError::Format("wrong magic"));
        }
        let field = |index: usize| {
            let at = 8 + index * 8;
            let value: [u8; 8] = header[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(value)).map_err(|_| WeightError::Format("size overflows"))
        };
        let (rows, cols) = (field(0)?, field(1)?);
        match header[4..8] {
            [0, 0, 0, 0] => Weight::from_le_bytes(DType::F32, rows, cols, body),
            [1, 0, 0, 0] => Weight::from_le_bytes(DType::Bf16, rows, cols, body),
            [2, 0, 0, 0] => {
                let block = Block { rows: field(2)?, cols: field(3)? };
                f8_from_bytes((rows, cols), block, field(4)?, body)
            }
            _ => Err(WeightError::Format("unknown storage type")),
        }
    }

    /// The xxh3 of [`Weight::to_bytes`], computed without building it: equal for equal content, whatever it is a view of.
    pub fn checksum(&self) -> u64 {
        let mut hasher = Xxh3::new();
        self.write_to(&mut |part| hasher.update(part));
        hasher.digest()
    }

    fn write_to(&self, sink: &mut impl FnMut(&[u8])) {
        let (tag, block, row_offset) = match self.elements() {
            Elements::F32(_) => (0u32, Block { rows: 0, cols: 0 }, 0),
            Elements::Bf16(_) => (1, Block { rows: 0, cols: 0 }, 0),
            Elements::F8(f8) => (2, f8.block, f8.row_offset),
        };
        sink(&MAGIC);
        sink(&tag.to_le_bytes());
        for value in [self.rows(), self.cols(), block.rows, block.cols, row_offset] {
            sink(&(value as u64).to_le_bytes());
        }
        match self.elements() {
            Elements::F32(values) => write_le(values, sink, f32::to_le_bytes),
            Elements::Bf16(bits) => write_le(bits, sink, u16::to_le_bytes),
            Elements::F8(f8) => {
                write_le(f8.scales, sink, f32::to_le_bytes);
                sink(f8.codes);
            }
        }
    }
}

fn f8_from_bytes(
    (rows, cols): (usize, usize),
    block: Block,
    row_offset: usize,
    body: &[u8],
) -> Result<Weight, WeightError> {
    block.check()?;
    if row_offset >= block.rows {
        return Err(WeightError::Format("row offset beyond a block"));
    }
    let code_count = elements(rows, cols)?;
    let rows_padded = rows.checked_add(row_offset).ok_or(WeightError::Shape(rows, cols))?;
    let scale_count = elements(rows_padded.div_ceil(block.rows), cols.div_ceil(block.cols))?;
    let scales_len = scale_count.checked_mul(4).ok_or(WeightError::Shape(rows, cols))?;
    let expected = scales_len.checked_add(code_count).ok_or(WeightError::Shape(rows, cols))?;
    check_length("bytes", (rows, cols), expected, body.len())?;
    let (scales, codes) = body.split_at(scales_len);
    Weight::from_f8_parts((rows, cols), codes.to_vec(), f32_from_le(scales), block, row_offset)
}

/// Hands `values` to `sink` in pieces of a few kilobytes.
fn write_le<T: Copy, const N: usize>(
    values: &[T],
    sink: &mut impl FnMut(&[u8]),
    to_le: impl Fn(T) -> [u8; N],
) {
    let mut piece = Vec::with_capacity(4096 * N);
    for chunk in values.chunks(4096) {
        piece.clear();
        piece.extend(chunk.iter().flat_map(|&v| to_le(v)));
        sink(&piece);
    }
}
