//! A weight matrix as it lies in memory: `[rows][cols]`, row-major, as in a Hugging Face `Linear`.
//!
//! A [`Weight`] is immutable and cheap to clone; slices of rows share its memory. It owns its elements (nothing is
//! mapped from a file), because experts move between ranks while a checkpoint on disk may change or vanish.

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use crate::dtype::{DType, bf16_to_f32, e4m3_to_f32};

mod codec;

/// Largest scale of an FP8 block: `code * scale` stays finite, and the kernels may fold a power of two into it.
const SCALE_MAX: f32 = 1.0e30;

/// Why bytes do not make a weight.
#[derive(Debug, Error, PartialEq)]
pub enum WeightError {
    /// The number of elements is not that of the shape.
    #[error("{what}: {actual} values, but the shape [{rows}, {cols}] needs {expected}")]
    Length {
        /// Which array it is.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Values the shape needs.
        expected: usize,
        /// Values given.
        actual: usize,
    },
    /// Rows x columns do not fit in memory at all.
    #[error("shape [{0}, {1}] overflows")]
    Shape(usize, usize),
    /// FP8 weights need scales.
    #[error("F8_E4M3 weights need block scales")]
    ScalesMissing,
    /// The kernels need whole steps of 16 columns under one scale.
    #[error("block of {0}x{1}: rows must be at least 1, columns a positive multiple of 16")]
    Block(usize, usize),
    /// A scale is NaN, infinite, negative or absurdly large.
    #[error("scale {index} is {value}")]
    Scale {
        /// Index in the scale array.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// An FP8 code is NaN: the checkpoint is broken.
    #[error("FP8 code {index} is NaN")]
    NotANumber {
        /// Index in the code array.
        index: usize,
    },
    /// Matrices to be stacked differ in columns, storage or blocks, or an inner one ends within a block.
    #[error("matrices cannot be stacked: {0}")]
    Concat(&'static str),
    /// `from_bytes` was given something that `to_bytes` did not write.
    #[error("not a serialised weight: {0}")]
    Format(&'static str),
}

/// Rows and columns that share one FP8 scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Rows of a block.
    pub rows: usize,
    /// Columns of a block, a multiple of 16.
    pub cols: usize,
}

impl Block {
    /// DeepSeek's blocks.
    pub const DEEPSEEK: Block = Block { rows: 128, cols: 128 };

    fn check(self) -> Result<(), WeightError> {
        if self.rows == 0 || self.cols == 0 || !self.cols.is_multiple_of(16) {
            return Err(WeightError::Block(self.rows, self.cols));
        }
        Ok(())
    }
}

#[derive(Debug)]
enum Storage {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    /// `row_offset` rows of the first row of blocks lie before the first code.
    F8 {
        codes: Vec<u8>,
        scales: Vec<f32>,
        block: Block,
        row_offset: usize,
    },
}

/// Borrowed elements of a weight, for kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    F8(F8Elements<'a>),
}

/// Borrowed FP8 elements: `row_offset` rows of the first scale block lie before the first code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F8Elements<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) scales: &'a [f32],
    pub(crate) scale_cols: usize,
    pub(crate) block: Block,
    pub(crate) row_offset: usize,
}

impl<'a> F8Elements<'a> {
    /// The scales of row `row`, one per block of columns.
    #[inline(always)]
    pub(crate) fn row_scales(&self, row: usize) -> &'a [f32] {
        let at = (row + self.row_offset) / self.block.rows * self.scale_cols;
        &self.scales[at..at + self.scale_cols]
    }
}

/// A matrix `[rows][cols]`, of which a product is `y = x w^T`.
#[derive(Clone, Debug)]
pub struct Weight {
    storage: Arc<Storage>,
    cols: usize,
    /// Rows of the storage that this view shows.
    range: Range<usize>,
}

impl Weight {
    /// A matrix of f32.
    ///
    /// # Errors
    /// The length is not `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Result<Weight, WeightError> {
        check_length("values", (rows, cols), elements(rows, cols)?, values.len())?;
        Ok(Weight::whole(Storage::F32(values), rows, cols))
    }

    /// A matrix of bf16 bits.
    ///
    /// # Errors
    /// The length is not `rows * cols`.
    pub fn from_bf16(rows: usize, cols: usize, bits: Vec<u16>) -> Result<Weight, WeightError> {
        check_length("values", (rows, cols), elements(rows, cols)?, bits.len())?;
        Ok(Weight::whole(Storage::Bf16(bits), rows, cols))
    }

    /// A matrix of E4M3 codes with a scale per block, `scales[ceil(rows / block.rows)][ceil(cols / block.cols)]`
    /// (Hugging Face's `weight_scale_inv`): an element is `code * scale`, rounded to f32.
    ///
    /// # Errors
    /// Lengths that do not fit the shape, NaN codes, and scales that are not finite and in 0..=1e30.
    pub fn from_f8(
        rows: usize,
        cols: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        block: Block,
    ) -> Result<Weight, WeightError> {
        block.check()?;
        Weight::from_f8_parts((rows, cols), codes, scales, block, 0)
    }

    fn from_f8_parts(
        (rows, cols): (usize, usize),
        codes: Vec<u8>,
        scales: Vec<f32>,
        block: Block,
        row_offset: usize,
    ) -> Result<Weight, WeightError> {
        check_length("codes", (rows, cols), elements(rows, cols)?, codes.len())?;
        let scale_count = (rows + row_offset).div_ceil(block.rows) * cols.div_ceil(block.cols);
        check_length("scales", (rows, cols), scale_count, scales.len())?;
        if let Some(index) = scales.iter().position(|s| !(0.0..=SCALE_MAX).contains(s)) {
            return Err(WeightError::Scale { index, value: scales[index] });
        }
        if let Some(index) = codes.iter().position(|&c| c & 0x7f == 0x7f) {
            return Err(WeightError::NotANumber { index });
        }
        Ok(Weight::whole(Storage::F8 { codes, scales, block, row_offset }, rows, cols))
    }

    /// A matrix of F32 or BF16 from little-endian bytes, as they stand in a checkpoint.
    ///
    /// # Errors
    /// The length does not fit the shape, or the type is FP8 (which needs scales: [`Weight::from_f8`]).
    pub fn from_le_bytes(
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Weight, WeightError> {
        let count = elements(rows, cols)?;
        let expected = count.checked_mul(dtype.size()).ok_or(WeightError::Shape(rows, cols))?;
        check_length("bytes", (rows, cols), expected, bytes.len())?;
        match dtype {
            DType::F32 => Weight::from_f32(rows, cols, f32_from_le(bytes)),
            DType::Bf16 => Weight::from_bf16(rows, cols, u16_from_le(bytes)),
            DType::F8E4M3 => Err(WeightError::ScalesMissing),
        }
    }

    fn whole(storage: Storage, rows: usize, cols: usize) -> Weight {
        Weight { storage: Arc::new(storage), cols, range: 0..rows }
    }

    /// Rows, the length of an output.
    pub fn rows(&self) -> usize {
        self.range.len()
    }

    /// Columns, the length of an input.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    pub fn dtype(&self) -> DType {
        match *self.storage {
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
            Storage::F8 { .. } => DType::F8E4M3,
        }
    }

    /// Bytes of the elements and scales that this view shows.
    pub fn size_bytes(&self) -> usize {
        let scales = match self.elements() {
            Elements::F32(_) | Elements::Bf16(_) => 0,
            Elements::F8(f8) => f8.scales.len() * 4,
        };
        self.rows() * self.cols * self.dtype().size() + scales
    }

    /// A view of some rows, sharing memory.
    ///
    /// # Panics
    /// If the range is not within `0..rows()`.
    pub fn row_slice(&self, rows: Range<usize>) -> Weight {
        assert!(rows.start <= rows.end && rows.end <= self.rows(), "rows {rows:?} of {}", self.rows());
        let range = self.range.start + rows.start..self.range.start + rows.end;
        Weight { storage: Arc::clone(&self.storage), cols: self.cols, range }
    }

    /// Stacks matrices of equal columns and storage, first on top. The elements are copied.
    ///
    /// # Errors
    /// The columns, storage or blocks differ, or an FP8 matrix begins or (unless last) ends within a block.
    pub fn concat(parts: &[&Weight]) -> Result<Weight, WeightError> {
        let first = *parts.first().ok_or(WeightError::Concat("there are none"))?;
        if parts.iter().any(|p| p.cols != first.cols) {
            return Err(WeightError::Concat("their columns differ"));
        }
        let rows = parts.iter().map(|p| p.rows()).sum();
        let other = WeightError::Concat("their storage types differ");
        match first.elements() {
            Elements::F32(_) => {
                let all = parts.iter().map(|p| match p.elements() {
                    Elements::F32(values) => Some(values),
                    Elements::Bf16(_) | Elements::F8(_) => None,
                });
                Weight::from_f32(rows, first.cols, all.collect::<Option<Vec<_>>>().ok_or(other)?.concat())
            }
            Elements::Bf16(_) => {
                let all = parts.iter().map(|p| match p.elements() {
                    Elements::Bf16(values) => Some(values),
                    Elements::F32(_) | Elements::F8(_) => None,
                });
                Weight::from_bf16(rows, first.cols, all.collect::<Option<Vec<_>>>().ok_or(other)?.concat())
            }
            Elements::F8(f8) => concat_f8(parts, rows, f8.block),
        }
    }

    /// All elements as f32, `[rows][cols]`.
    pub fn dequantized(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows() * self.cols];
        for row in 0..self.rows() {
            self.read_row(row, &mut values[row * self.cols..(row + 1) * self.cols]);
        }
        values
    }

    /// Writes one row as f32.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not `cols()` long.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "length of a row");
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        let at = row * self.cols..(row + 1) * self.cols;
        match self.elements() {
            Elements::F32(values) => out.copy_from_slice(&values[at]),
            Elements::Bf16(bits) => {
                out.iter_mut().zip(&bits[at]).for_each(|(o, &b)| *o = bf16_to_f32(b));
            }
            Elements::F8(f8) => {
                let chunks = out.chunks_mut(f8.block.cols).zip(f8.codes[at].chunks(f8.block.cols));
                for ((out, codes), &scale) in chunks.zip(f8.row_scales(row)) {
                    out.iter_mut().zip(codes).for_each(|(o, &c)| *o = e4m3_to_f32(c) * scale);
                }
            }
        }
    }

    /// The elements of this view.
    pub(crate) fn elements(&self) -> Elements<'_> {
        let at = self.range.start * self.cols..self.range.end * self.cols;
        match &*self.storage {
            Storage::F32(values) => Elements::F32(&values[at]),
            Storage::Bf16(bits) => Elements::Bf16(&bits[at]),
            Storage::F8 { codes, scales, block, row_offset } => {
                let scale_cols = self.cols.div_ceil(block.cols);
                let first = (self.range.start + row_offset) / block.rows;
                let last = (self.range.end + row_offset).div_ceil(block.rows).max(first);
                Elements::F8(F8Elements {
                    codes: &codes[at],
                    scales: &scales[first * scale_cols..last * scale_cols],
                    scale_cols,
                    block: *block,
                    row_offset: (self.range.start + row_offset) % block.rows,
                })
            }
        }
    }
}

fn concat_f8(parts: &[&Weight], rows: usize, block: Block) -> Result<Weight, WeightError> {
    let (mut codes, mut scales, mut row_offset, mut end) = (Vec::new(), Vec::new(), 0, 0);
    for (index, part) in parts.iter().enumerate() {
        let Elements::F8(f8) = part.elements() else {
            return Err(WeightError::Concat("their storage types differ"));
        };
        if f8.block != block {
            return Err(WeightError::Concat("their blocks differ"));
        }
        if index == 0 {
            row_offset = f8.row_offset;
        } else if f8.row_offset != 0 || end % block.rows != 0 {
            return Err(WeightError::Concat("an inner FP8 matrix begins or ends within a block"));
        }
        end = f8.row_offset + part.rows();
        codes.extend_from_slice(f8.codes);
        scales.extend_from_slice(f8.scales);
    }
    Weight::from_f8_parts((rows, parts[0].cols), codes, scales, block, row_offset)
}

fn elements(rows: usize, cols: usize) -> Result<usize, WeightError> {
    rows.checked_mul(cols).ok_or(WeightError::Shape(rows, cols))
}

fn check_length(
    what: &'static str,
    (rows, cols): (usize, usize),
    expected: usize,
    actual: usize,
) -> Result<(), WeightError> {
    if expected != actual {
        return Err(WeightError::Length { what, rows, cols, expected, actual });
    }
    Ok(())
}

/// Little-endian f32 values; a trailing part of a value is ignored.
fn f32_from_le(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Little-endian u16 values; a trailing part of a value is ignored.
fn u16_from_le(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect()
}
