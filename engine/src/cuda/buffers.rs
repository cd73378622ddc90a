//! The buffers of a step: fixed addresses, worst-case sizes.

use half::bf16;
use heliostat_kernels::cuda::exchange::Rows;
use heliostat_kernels::cuda::gemm::Operand;
use heliostat_kernels::cuda::rows::{Bf16Rows, Fp8Rows, RowsOut};
use heliostat_kernels::cuda::{Buffer, CudaError, Device, StoredAs};

use crate::config::{Attention, ModelConfig};

/// Of any storage.
const BOTH: [StoredAs; 2] = [StoredAs::Bf16, StoredAs::Fp8];

/// Rows that go into BF16 or FP8 products, or both.
#[derive(Clone, Debug)]
pub(super) struct Activations {
    bf16: Buffer<bf16>,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    scale_stride: usize,
}

impl Activations {
    /// Room for `rows_max` rows of up to `width_max`, for products with matrices stored as any of `stored`.
    pub(super) fn new(
        device: &Device,
        (rows_max, width_max): (usize, usize),
        stored: &[StoredAs],
    ) -> Result<Self, CudaError> {
        let scale_stride = rows_max.next_multiple_of(4);
        let room = |wanted: StoredAs, len: usize| if stored.contains(&wanted) { len } else { 0 };
        let elements = rows_max * width_max;
        Ok(Self {
            bf16: device.alloc(room(StoredAs::Bf16, elements))?,
            codes: device.alloc(room(StoredAs::Fp8, elements))?,
            scales: device.alloc(room(StoredAs::Fp8, width_max.div_ceil(128) * scale_stride))?,
            scale_stride,
        })
    }

    /// The same, but for those rows of them that lie in `rows`, a buffer with scales for `rows_max` rows.
    pub(super) fn with_rows(&self, rows: &Rows, rows_max: usize) -> Self {
        match rows {
            Rows::Bf16(data) => Self { bf16: data.clone(), ..self.clone() },
            Rows::Fp8 { codes, scales } => {
                Self { codes: codes.clone(), scales: scales.clone(), scale_stride: rows_max, ..self.clone() }
            }
        }
    }

    /// As rows of BF16.
    pub(super) fn bf16(&self) -> &Buffer<bf16> {
        &self.bf16
    }

    fn fp8(&self) -> Fp8Rows<'_> {
        Fp8Rows { codes: &self.codes, scales: &self.scales, scale_stride: self.scale_stride }
    }

    /// Where an operation writes what products with matrices stored as `stored` read.
    pub(super) fn out(&self, stored: &[StoredAs]) -> RowsOut<'_> {
        RowsOut {
            bf16: stored.contains(&StoredAs::Bf16).then_some(&self.bf16),
            fp8: stored.contains(&StoredAs::Fp8).then(|| self.fp8()),
        }
    }

    /// What a product with a matrix stored as `stored` reads, in rows of `width`.
    pub(super) fn operand(&self, stored: StoredAs, width: usize) -> Operand<'_> {
        match stored {
            StoredAs::Bf16 => Operand::Bf16 { data: &self.bf16, stride: width },
            StoredAs::Fp8 => {
                Operand::Fp8 { codes: &self.codes, scales: &self.scales, rows_stride: self.scale_stride }
            }
        }
    }
}

/// What the rows of an exchange are multiplied as.
pub(super) fn operand_of(rows: &Rows, width: usize, rows_max: usize) -> Operand<'_> {
    match rows {
        Rows::Bf16(data) => Operand::Bf16 { data, stride: width },
        Rows::Fp8 { codes, scales } => Operand::Fp8 { codes, scales, rows_stride: rows_max },
    }
}

/// Rows without gaps.
pub(super) fn dense(data: &Buffer<bf16>, stride: usize) -> Bf16Rows<'_> {
    Bf16Rows { data, stride }
}

/// Buffers of a DP rank.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The residual stream, `[t][hidden]`.
    pub(super) residual: Buffer<f32>,
    /// What a layer adds to it, `[t][hidden]`.
    pub(super) branch: Buffer<bf16>,
    /// Input of attention or feed-forward.
    pub(super) normed: Activations,
    /// Input of a layer's inner products.
    pub(super) inner: Activations,
    /// First projections of attention, or gate and up, `[t][widest]`.
    pub(super) wide: Buffer<bf16>,
    /// Queries, `[t][heads][...]`.
    pub(super) query: Buffer<bf16>,
    /// Absorbed queries, `[t][heads][kv_lora + rope]`; empty without latent attention.
    pub(super) absorbed: Buffer<bf16>,
    /// What attention read, `[t][heads][kv_lora]` or `[t][heads * head_dim]`.
    pub(super) attended: Buffer<bf16>,
    /// Output of shared experts, `[t][hidden]`.
    pub(super) shared: Buffer<bf16>,
    /// `[t][experts]`.
    pub(super) router_logits: Buffer<f32>,
    /// Choices, `[t][top_k]`.
    pub(super) ids: Buffer<u32>,
    /// Their weights, `[t][top_k]`.
    pub(super) weights: Buffer<f32>,
    /// Last norm of the rows whose logits are wanted.
    pub(super) last: Activations,
    /// `[rows][vocab]`.
    pub(super) logits: Buffer<f32>,
}

impl Buffers {
    /// For `rows_max` tokens, of which `logit_rows_max` may want logits.
    /// `head`: how the LM head is stored.
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        (rows_max, logit_rows_max): (usize, usize),
        head: StoredAs,
    ) -> Result<Self, CudaError> {
        let hidden = config.hidden_size;
        let widths = AttentionWidths::of(config);
        let feed_forward = config.intermediate_size.max(config.moe.shared_intermediate_size);
        let rows = |width: usize| device.alloc::<bf16>(rows_max * width);
        Ok(Self {
            residual: device.alloc(rows_max * hidden)?,
            branch: rows(hidden)?,
            normed: Activations::new(device, (rows_max, hidden), &BOTH)?,
            inner: Activations::new(device, (rows_max, widths.inner.max(feed_forward)), &BOTH)?,
            wide: rows(widths.first.max(2 * feed_forward))?,
            query: rows(widths.query)?,
            absorbed: rows(widths.absorbed)?,
            attended: rows(widths.attended)?,
            shared: rows(hidden)?,
            router_logits: device.alloc(rows_max * config.moe.num_experts)?,
            ids: device.alloc(rows_max * config.moe.top_k)?,
            weights: device.alloc(rows_max * config.moe.top_k)?,
            last: Activations::new(device, (logit_rows_max, hidden), &[head])?,
            logits: device.alloc(logit_rows_max * config.vocab_size)?,
        })
    }
}

/// Elements per token of attention's buffers.
struct AttentionWidths {
    first: usize,
    inner: usize,
    query: usize,
    absorbed: usize,
    attended: usize,
}

impl AttentionWidths {
    fn of(config: &ModelConfig) -> Self {
        match &config.attention {
            Attention::Mla(mla) => {
                let latent = mla.kv_lora_rank + mla.qk_rope_head_dim;
                let query = mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
                Self {
                    first: mla.q_lora_rank.unwrap_or(0) + latent,
                    inner: mla.q_lora_rank.unwrap_or(0).max(mla.num_heads * mla.v_head_dim),
                    query,
                    absorbed: mla.num_heads * latent,
                    attended: mla.num_heads * mla.kv_lora_rank,
                }
            }
            Attention::Gqa(gqa) => {
                let query = gqa.num_heads * gqa.head_dim;
                let first = query + 2 * gqa.num_kv_heads * gqa.head_dim;
                Self { first, inner: query, query, absorbed: 0, attended: query }
            }
        }
    }
}
