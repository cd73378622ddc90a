//! Reads tensors into memory and reports how far it is.

use heliostat_kernels::dtype::{DType, bf16_to_f32};
use heliostat_kernels::weight::{Block, Weight, WeightError};
use safetensors::Dtype;

use super::{Checkpoint, CheckpointError, Expected};

/// Called with the bytes read so far and in all.
pub(crate) type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Reads tensors of one checkpoint one after the other.
pub(crate) struct Reader<'a, 'p> {
    checkpoint: &'a Checkpoint,
    progress: &'a mut Progress<'p>,
    done: u64,
    total: u64,
}

impl<'a, 'p> Reader<'a, 'p> {
    /// A reader that will read `total` bytes.
    pub(crate) fn new(checkpoint: &'a Checkpoint, total: u64, progress: &'a mut Progress<'p>) -> Self {
        progress(0, total);
        Self { checkpoint, progress, done: 0, total }
    }

    /// The matrix of a linear layer, in the type it is stored in.
    pub(crate) fn linear(
        &mut self,
        name: String,
        rows: usize,
        cols: usize,
    ) -> Result<Weight, CheckpointError> {
        self.weight(&Expected::linear(name, rows, cols))
    }

    /// An embedding, head or router, in the type it is stored in.
    pub(crate) fn matrix(
        &mut self,
        name: String,
        rows: usize,
        cols: usize,
    ) -> Result<Weight, CheckpointError> {
        self.weight(&Expected::matrix(name, rows, cols))
    }

    /// A norm or bias.
    pub(crate) fn vector(&mut self, name: String, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let expected = Expected::vector(name, len);
        let values = self.checkpoint.read_f32(&expected)?;
        self.advance(&expected)?;
        Ok(values)
    }

    fn weight(&mut self, expected: &Expected) -> Result<Weight, CheckpointError> {
        let weight = self.checkpoint.read_weight(expected)?;
        self.advance(expected)?;
        Ok(weight)
    }

    fn advance(&mut self, expected: &Expected) -> Result<(), CheckpointError> {
        self.done += self.checkpoint.stored_bytes(expected)?;
        (self.progress)(self.done, self.total);
        Ok(())
    }
}

impl Checkpoint {
    /// Reads a matrix and, where it is FP8, its scales.
    pub(crate) fn read_weight(&self, expected: &Expected) -> Result<Weight, CheckpointError> {
        let (rows, cols) = (expected.rows, expected.cols);
        let weight = match self.entry(&expected.name)?.dtype {
            Dtype::F8_E4M3 => {
                let codes = self.read(&expected.name)?;
                let scales = f32_from_le(&self.read(&expected.scale_name())?);
                Weight::from_f8(rows, cols, codes, scales, Block::DEEPSEEK)
            }
            Dtype::F32 => Weight::from_le_bytes(DType::F32, rows, cols, &self.read(&expected.name)?),
            Dtype::BF16 => Weight::from_le_bytes(DType::Bf16, rows, cols, &self.read(&expected.name)?),
            dtype => return Err(self.unsupported(&expected.name, dtype)),
        };
        weight.map_err(|e| self.damaged(&expected.name, &e))
    }

    fn read_f32(&self, expected: &Expected) -> Result<Vec<f32>, CheckpointError> {
        let bytes = self.read(&expected.name)?;
        let values = match self.entry(&expected.name)?.dtype {
            Dtype::F32 => f32_from_le(&bytes),
            Dtype::BF16 => {
                bytes.as_chunks::<2>().0.iter().map(|&b| bf16_to_f32(u16::from_le_bytes(b))).collect()
            }
            dtype => return Err(self.unsupported(&expected.name, dtype)),
        };
        if values.len() != expected.rows {
            let problem =
                format!("has {} elements, but config.json asks for {}", values.len(), expected.rows);
            return Err(self.tensor_error(&expected.name, problem, "take config.json from the same release"));
        }
        if values.iter().any(|value| !value.is_finite()) {
            return Err(self.tensor_error(
                &expected.name,
                "holds NaN or infinity",
                "download its file again",
            ));
        }
        Ok(values)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let entry = self.entry(name)?;
        let mut bytes = vec![0; entry.len];
        self.shards[entry.shard].read(entry.offset, &mut bytes)?;
        Ok(bytes)
    }

    fn unsupported(&self, name: &str, dtype: Dtype) -> CheckpointError {
        self.tensor_error(
            name,
            format!("has type {dtype:?}, which is not supported here"),
            "convert it to BF16",
        )
    }

    fn damaged(&self, name: &str, error: &WeightError) -> CheckpointError {
        self.tensor_error(name, error.to_string(), "download its file again")
    }
}

fn f32_from_le(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}
