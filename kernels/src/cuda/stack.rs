//! Matrices of one shape, one after the other in device memory, each of which can be replaced while others are in use.

use std::ops::Range;

use super::{Buffer, CudaError, Device, Stream};
use crate::dtype::{DType, f32_to_bf16};
use crate::weight::{Block, Elements, Weight};

/// Rows and columns of an FP8 scale.
const BLOCK: usize = 128;

/// How a matrix is stored on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredAs {
    /// Two bytes per element.
    Bf16,
    /// One byte per element and one f32 scale per 128 x 128.
    Fp8,
}

impl StoredAs {
    /// How `parts`, stacked into one matrix, are stored: FP8 where all are and no scale block spans two of them.
    pub fn of(parts: &[&Weight]) -> Self {
        let fp8 = parts.iter().all(|part| part.dtype() == DType::F8E4M3);
        let inner = parts.split_last().map_or(&[][..], |(_, inner)| inner);
        let aligned = inner.iter().all(|part| part.rows().is_multiple_of(BLOCK));
        if fp8 && aligned { Self::Fp8 } else { Self::Bf16 }
    }
}

/// One matrix as it lies on a device, on the host.
#[derive(Debug)]
enum Packed {
    Bf16(Vec<half::bf16>),
    Fp8 { codes: Vec<u8>, scales: Vec<f32> },
}

/// `count` matrices `[rows][cols]`.
#[derive(Clone, Debug)]
pub struct WeightStack {
    stored: StoredAs,
    count: usize,
    rows: usize,
    cols: usize,
    /// Codes, or bf16 as bytes.
    data: Buffer<u8>,
    /// FP8 only.
    scales: Option<Buffer<f32>>,
}

impl WeightStack {
    /// Zeroed matrices.
    ///
    /// # Errors
    /// The device is full.
    pub fn new(
        device: &Device,
        stored: StoredAs,
        count: usize,
        (rows, cols): (usize, usize),
    ) -> Result<Self, CudaError> {
        let (bytes, scales) = Self::sizes(stored, (rows, cols));
        let scales = match stored {
            StoredAs::Bf16 => None,
            StoredAs::Fp8 => Some(device.alloc(count * scales)?),
        };
        Ok(Self { stored, count, rows, cols, data: device.alloc(count * bytes)?, scales })
    }

    /// Matrices in memory that is there already: elements in `data`, and FP8 scales in `scales`.
    ///
    /// # Panics
    /// If their lengths are not those of `count` matrices.
    pub fn within(
        stored: StoredAs,
        count: usize,
        (rows, cols): (usize, usize),
        data: Buffer<u8>,
        scales: Buffer<f32>,
    ) -> Self {
        let (bytes, scales_each) = Self::sizes(stored, (rows, cols));
        assert_eq!((data.len(), scales.len()), (count * bytes, count * scales_each), "lengths of a stack");
        let scales = match stored {
            StoredAs::Bf16 => None,
            StoredAs::Fp8 => Some(scales),
        };
        Self { stored, count, rows, cols, data, scales }
    }

    /// Bytes that one matrix takes, scales included.
    pub fn bytes_per_matrix(stored: StoredAs, shape: (usize, usize)) -> usize {
        let (bytes, scales) = Self::sizes(stored, shape);
        bytes + scales * size_of::<f32>()
    }

    /// Bytes of elements and number of scales of one matrix.
    pub fn sizes(stored: StoredAs, (rows, cols): (usize, usize)) -> (usize, usize) {
        match stored {
            StoredAs::Bf16 => (rows * cols * 2, 0),
            StoredAs::Fp8 => (rows * cols, rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK)),
        }
    }

    /// How they are stored.
    pub fn stored(&self) -> StoredAs {
        self.stored
    }

    /// Matrices.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Rows and columns of each.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Elements of all, as bytes.
    pub fn data(&self) -> &Buffer<u8> {
        &self.data
    }

    /// Scales of all, `[count][ceil(rows / 128)][ceil(cols / 128)]`; FP8 only.
    pub fn scales(&self) -> Option<&Buffer<f32>> {
        self.scales.as_ref()
    }

    /// A run of the rows of a stack of one BF16 matrix.
    ///
    /// # Panics
    /// If it holds anything else.
    pub(super) fn part(&self, rows: Range<usize>) -> Self {
        assert_eq!((self.stored, self.count), (StoredAs::Bf16, 1), "a part of a matrix");
        let (bytes, _) = Self::sizes(self.stored, (1, self.cols));
        Self { rows: rows.len(), data: self.data.slice(rows.start * bytes..rows.end * bytes), ..self.clone() }
    }

    fn data_of(&self, index: usize) -> Buffer<u8> {
        let (bytes, _) = Self::sizes(self.stored, (self.rows, self.cols));
        self.data.slice(index * bytes..(index + 1) * bytes)
    }

    fn scales_of(&self, index: usize) -> Option<Buffer<f32>> {
        let (_, scales) = Self::sizes(self.stored, (self.rows, self.cols));
        self.scales.as_ref().map(|all| all.slice(index * scales..(index + 1) * scales))
    }

    /// Writes `parts`, stacked, to matrix `index`. Blocks until `stream` has taken them.
    ///
    /// # Errors
    /// The parts are stored otherwise, or the device is lost.
    ///
    /// # Panics
    /// If the shapes do not fit or there is no such matrix.
    pub fn write(&self, stream: &Stream, index: usize, parts: &[&Weight]) -> Result<(), CudaError> {
        let rows: usize = parts.iter().map(|part| part.rows()).sum();
        assert!(
            rows == self.rows && parts.iter().all(|part| part.cols() == self.cols),
            "shape of matrix {index}"
        );
        match pack(self.stored, parts)? {
            Packed::Bf16(values) => self.data_of(index).cast::<half::bf16>().write(stream, &values),
            Packed::Fp8 { codes, scales } => {
                self.data_of(index).write(stream, &codes)?;
                self.scales_of(index).map_or(Ok(()), |place| place.write(stream, &scales))
            }
        }
    }

    /// Reads matrix `index` back. Blocks.
    ///
    /// # Errors
    /// The device is lost.
    pub fn read(&self, stream: &Stream, index: usize) -> Result<Weight, CudaError> {
        let weight = match self.scales_of(index) {
            None => {
                let values = self.data_of(index).cast::<half::bf16>().download(stream)?;
                let bits = values.into_iter().map(half::bf16::to_bits).collect();
                Weight::from_bf16(self.rows, self.cols, bits)
            }
            Some(scales) => {
                let codes = self.data_of(index).download(stream)?;
                Weight::from_f8(self.rows, self.cols, codes, scales.download(stream)?, Block::DEEPSEEK)
            }
        };
        weight.map_err(|why| CudaError::Other(format!("weights on the device are damaged: {why}")))
    }
}

fn pack(stored: StoredAs, parts: &[&Weight]) -> Result<Packed, CudaError> {
    match stored {
        StoredAs::Bf16 => {
            let mut values = Vec::new();
            parts.iter().for_each(|part| push_bf16(part, &mut values));
            Ok(Packed::Bf16(values))
        }
        StoredAs::Fp8 => {
            let whole = Weight::concat(parts).map_err(|why| CudaError::Other(why.to_string()))?;
            match whole.elements() {
                Elements::F8(f8) if f8.block == Block::DEEPSEEK && f8.row_offset == 0 => {
                    Ok(Packed::Fp8 { codes: f8.codes.to_vec(), scales: f8.scales.to_vec() })
                }
                Elements::F8(_) | Elements::F32(_) | Elements::Bf16(_) => {
                    Err(CudaError::Other("FP8 weights with 128 x 128 blocks are wanted here".to_owned()))
                }
            }
        }
    }
}

fn push_bf16(weight: &Weight, values: &mut Vec<half::bf16>) {
    match weight.elements() {
        Elements::Bf16(bits) => values.extend(bits.iter().map(|&bits| half::bf16::from_bits(bits))),
        Elements::F32(_) | Elements::F8(_) => {
            let rounded =
                weight.dequantized().into_iter().map(|value| half::bf16::from_bits(f32_to_bf16(value)));
            values.extend(rounded);
        }
    }
}
