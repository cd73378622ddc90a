//! Where a GPU's weights come from: a checkpoint, or numbers made up on the device for a benchmark.

use heliostat_kernels::cuda::gemm::{Kind, Matrix};
use heliostat_kernels::cuda::synthetic::{Distribution, Synthetic};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, StoredAs, Stream, WeightStack};
use heliostat_kernels::weight::Weight;

use super::layer::Expand;
use crate::batch::PrefillAttention;
use crate::checkpoint::{CheckpointError, Reader};
use crate::config::MlaConfig;
use crate::model::{key_rows, split_kv_b};

/// Why weights did not come to a GPU.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint is incomplete or damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device is full or failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The model or the configuration asks for what CUDA ranks do not do.
    #[error("{0}")]
    Unsupported(String),
}

/// Hands out device weights one after the other.
pub(super) struct WeightSource<'a, 'p> {
    device: Device,
    stream: Stream,
    from: From<'a, 'p>,
}

enum From<'a, 'p> {
    Checkpoint(Reader<'a, 'p>),
    Synthetic {
        synthetic: Synthetic,
        /// Linear weights are FP8.
        fp8: bool,
        seed: u64,
    },
}

/// What becomes of the up-projections of keys and values.
pub(super) struct KeyValueUp {
    /// Of keys, transposed: `[heads * latent][nope]`.
    pub(super) key_up: Matrix,
    /// Of values: `[heads * v][latent]`.
    pub(super) value_up: Matrix,
    /// Where prompts attend to expanded keys and values.
    pub(super) expand: Option<Expand>,
}

/// Standard deviation of made-up weights, as of a freshly initialised model.
const SYNTHETIC_STD: f32 = 0.02;

/// A part of a matrix: the tensor's name and its rows.
pub(super) type Part = (String, usize);

impl<'a, 'p> WeightSource<'a, 'p> {
    /// Weights of a checkpoint.
    pub(super) fn checkpoint(device: &Device, stream: &Stream, reader: Reader<'a, 'p>) -> Self {
        Self { device: device.clone(), stream: stream.clone(), from: From::Checkpoint(reader) }
    }

    /// Made-up weights; `fp8`: linear ones are FP8.
    ///
    /// # Errors
    /// The kernels do not load.
    pub(super) fn synthetic(device: &Device, stream: &Stream, fp8: bool) -> Result<Self, CudaError> {
        let from = From::Synthetic { synthetic: Synthetic::new(device)?, fp8, seed: 1 };
        Ok(Self { device: device.clone(), stream: stream.clone(), from })
    }

    /// The matrices of linear layers, stacked.
    pub(super) fn linear(&mut self, parts: &[Part], cols: usize) -> Result<Matrix, LoadError> {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        match &mut self.from {
            From::Checkpoint(reader) => {
                let weights = parts.iter().map(|(name, rows)| reader.linear(name.clone(), *rows, cols));
                let weights = weights.collect::<Result<Vec<_>, _>>()?;
                self.upload(&weights.iter().collect::<Vec<_>>(), Kind::Dense)
            }
            From::Synthetic { fp8, .. } => {
                let stored = if *fp8 { StoredAs::Fp8 } else { StoredAs::Bf16 };
                self.made_up(stored, (rows, cols), Kind::Dense)
            }
        }
    }

    /// An embedding, head or router: BF16 always.
    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        match &mut self.from {
            From::Checkpoint(reader) => {
                let weight = reader.matrix(name.to_owned(), rows, cols)?;
                self.upload(&[&weight], Kind::Dense)
            }
            From::Synthetic { .. } => self.made_up(StoredAs::Bf16, (rows, cols), Kind::Dense),
        }
    }

    /// A norm or bias, in f32.
    pub(super) fn vector(&mut self, name: String, len: usize) -> Result<Buffer<f32>, LoadError> {
        let values = match &mut self.from {
            From::Checkpoint(reader) => reader.vector(name, len)?,
            // What follows a norm of ones is of unit size, and a bias of zeros leaves the choice to the router.
            From::Synthetic { .. } => vec![if name.ends_with("bias") { 0.0 } else { 1.0 }; len],
        };
        Ok(self.device.upload(&values)?)
    }

    /// What becomes of `kv_b_proj`.
    pub(super) fn key_value_up(
        &mut self,
        name: String,
        mla: &MlaConfig,
        prefill: PrefillAttention,
    ) -> Result<KeyValueUp, LoadError> {
        let (heads, latent) = (mla.num_heads, mla.kv_lora_rank);
        let kind = Kind::Heads(heads);
        let (nope, v) = (mla.qk_nope_head_dim, mla.v_head_dim);
        let expands = prefill == PrefillAttention::Expanded;
        let (key_up, value_up, keys) = match &mut self.from {
            From::Checkpoint(reader) => {
                let kv_b = reader.linear(name, heads * (nope + v), latent)?;
                let (key_up, values) = split_kv_b(&kv_b, mla);
                let keys = expands.then(|| key_rows(&kv_b, mla));
                let keys = keys.map(|keys| self.upload_as(StoredAs::Bf16, &[&keys], Kind::Dense));
                (self.upload(&[&key_up], kind)?, self.upload(&[&values], kind)?, keys.transpose()?)
            }
            From::Synthetic { .. } => {
                let mut made_up = |shape, kind| self.made_up(StoredAs::Bf16, shape, kind);
                let keys = expands.then(|| made_up((heads * nope, latent), Kind::Dense));
                let keys = keys.transpose()?;
                (made_up((heads * latent, nope), kind)?, made_up((heads * v, latent), kind)?, keys)
            }
        };
        let expand = keys.map(|keys| {
            let values = Matrix::new(&self.device, value_up.stack().clone(), Kind::Dense)?;
            Ok::<_, CudaError>(Expand { keys, values })
        });
        let expand = expand.transpose()?;
        Ok(KeyValueUp { key_up, value_up, expand })
    }

    fn upload(&self, parts: &[&Weight], kind: Kind) -> Result<Matrix, LoadError> {
        let stored = match kind {
            // A head may end within a block of scales.
            Kind::Heads(_) => StoredAs::Bf16,
            Kind::Dense | Kind::Pool => StoredAs::of(parts),
        };
        self.upload_as(stored, parts, kind)
    }

    fn upload_as(&self, stored: StoredAs, parts: &[&Weight], kind: Kind) -> Result<Matrix, LoadError> {
        let (rows, cols) = (parts.iter().map(|part| part.rows()).sum(), parts[0].cols());
        let stack = WeightStack::new(&self.device, stored, 1, (rows, cols))?;
        stack.write(&self.stream, 0, parts)?;
        Ok(Matrix::new(&self.device, stack, kind)?)
    }

    fn made_up(&mut self, stored: StoredAs, shape: (usize, usize), kind: Kind) -> Result<Matrix, LoadError> {
        let stack = WeightStack::new(&self.device, stored, 1, shape)?;
        self.fill(&stack)?;
        Ok(Matrix::new(&self.device, stack, kind)?)
    }

    /// Fills `stack` with made-up weights; leaves it as it is where weights come from a checkpoint.
    pub(super) fn fill(&mut self, stack: &WeightStack) -> Result<(), CudaError> {
        let From::Synthetic { synthetic, seed, .. } = &mut self.from else { return Ok(()) };
        *seed += 1;
        let data = stack.data();
        match stack.scales() {
            Some(scales) => synthetic.e4m3(&self.stream, (data, scales), (*seed, SYNTHETIC_STD)),
            None => {
                let what = Distribution { seed: *seed, mean: 0.0, deviation: SYNTHETIC_STD };
                synthetic.bf16(&self.stream, &data.cast(), what)
            }
        }
    }
}
