//! Attention of one layer, queued.

use std::ops::Range;

use half::bf16;
use heliostat_kernels::cuda::activation::{ActivationArgs, RowSet};
use heliostat_kernels::cuda::attention::{BatchMeta, ExpandedArgs, GqaArgs, MlaArgs};
use heliostat_kernels::cuda::gemm::{HeadsView, Matrix, Operand, Output};
use heliostat_kernels::cuda::norm::{NormArgs, NormInput};
use heliostat_kernels::cuda::rope::{GqaRopeArgs, MlaAppend, MlaQuery, MlaRopeArgs};
use heliostat_kernels::cuda::rows::{Bf16Rows, RowsOut};
use heliostat_kernels::cuda::{Buffer, CudaError, StoredAs, Stream};

use super::buffers::{Activations, dense};
use super::layer::{AttentionWeights, GqaWeights, MlaWeights, Query};
use super::model::{AttentionKernel, Dp, Kv};
use crate::config::{Attention, GqaConfig, MlaConfig};
use crate::model::NORM_EPS;

impl AttentionWeights {
    /// What the first products read.
    pub(super) fn inputs(&self) -> Vec<StoredAs> {
        match self {
            Self::Mla(weights) => match &weights.query {
                Query::Full(query) => vec![query.stored(), weights.first.stored()],
                Query::LowRank { .. } => vec![weights.first.stored()],
            },
            Self::Gqa(weights) => vec![weights.query_key_value.stored()],
        }
    }
}

impl Dp {
    /// Lists the attention work of a step's rows, for all layers.
    pub(super) fn plan_attention(&self, stream: &Stream, rows: usize) -> Result<(), CudaError> {
        match &self.attention {
            AttentionKernel::Mla(_) if self.absorbed(rows).is_empty() => Ok(()),
            AttentionKernel::Mla(kernel) => kernel.plan(stream, &self.absorbed_meta(), rows),
            AttentionKernel::Gqa(kernel) => kernel.plan(stream, &self.inputs.meta(), rows),
        }
    }

    /// `branch = attention(normed)` for `rows` rows.
    pub(super) fn attention(
        &self,
        stream: &Stream,
        weights: &AttentionWeights,
        kv: &Kv,
        rows: usize,
    ) -> Result<(), CudaError> {
        match (&self.config.attention, weights, kv) {
            (Attention::Mla(config), AttentionWeights::Mla(weights), Kv::Latent(cache)) => {
                self.mla(stream, (config, weights), cache, rows)
            }
            (Attention::Gqa(config), AttentionWeights::Gqa(weights), Kv::KeysValues(keys, values)) => {
                self.gqa(stream, (config, weights), (keys, values), rows)
            }
            _ => unreachable!("a model has one kind of attention"),
        }
    }

    fn mla(
        &self,
        stream: &Stream,
        (config, weights): (&MlaConfig, &MlaWeights),
        cache: &Buffer<bf16>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (ops, buffers) = (&self.ops, &self.buffers);
        let MlaConfig { num_heads: heads, kv_lora_rank: latent, .. } = *config;
        let (nope, rope) = (config.qk_nope_head_dim, config.qk_rope_head_dim);
        let head = nope + rope;
        let width = weights.first.n();
        let first = dense(&buffers.wide, width);
        let out = |data, stride| Output::Bf16 { data, stride };
        stream.label("qkv_a");
        ops.gemm.dense(
            stream,
            &weights.first,
            buffers.normed.operand(weights.first.stored(), weights.first.k()),
            rows,
            out(&buffers.wide, width),
        )?;
        let (query, x) = match &weights.query {
            Query::Full(query) => (query, buffers.normed.operand(query.stored(), query.k())),
            Query::LowRank { norm, b } => {
                stream.label("q_a norm");
                let (input, out) = (NormInput::Rows(first), buffers.inner.out(&[b.stored()]));
                ops.norm.run(stream, &NormArgs { rows, input, gamma: norm, eps: NORM_EPS, out })?;
                (b, buffers.inner.operand(b.stored(), b.k()))
            }
        };
        stream.label("q_b");
        ops.gemm.dense(stream, query, x, rows, out(&buffers.query, heads * head))?;
        let fresh_at = width - latent - rope;
        let fresh = buffers.wide.slice(fresh_at..buffers.wide.len());
        stream.label("rope and append");
        ops.rope.mla(
            stream,
            &MlaRopeArgs {
                rows: self.inputs.paged(rows),
                angles: &self.angles,
                kv_lora: latent,
                query: Some(MlaQuery { heads, nope, query: &buffers.query, absorbed: &buffers.absorbed }),
                append: Some(MlaAppend {
                    fresh: Bf16Rows { data: &fresh, stride: width },
                    gamma: &weights.kv_a_norm,
                    eps: NORM_EPS,
                    cache,
                }),
            },
        )?;
        let values = Activations::bf16(&buffers.inner);
        self.attend_absorbed(stream, (config, weights), (cache, values), rows)?;
        if let (Some(prompts), Some(expand)) = (&self.prompts, &weights.expand) {
            let (query, absorbed, (plan, words)) = (&buffers.query, &buffers.absorbed, prompts.plan());
            let (key_up, value_up, out) = (&expand.keys, &expand.values, values);
            let args = ExpandedArgs { rows, query, absorbed, cache, key_up, value_up, plan, words, out };
            prompts.kernel.run(stream, &ops.gemm, &args)?;
        }
        self.project(stream, &weights.output, values, rows)
    }

    /// The rows from the first to the last that attends absorbed.
    fn absorbed(&self, rows: usize) -> Range<usize> {
        self.prompts.as_ref().map_or(0..rows, |prompts| prompts.absorbed(rows))
    }

    /// Where rows belong that attend absorbed; the others are idle.
    fn absorbed_meta(&self) -> BatchMeta<'_> {
        let meta = self.inputs.meta();
        self.prompts.as_ref().map_or(meta, |prompts| BatchMeta { positions: prompts.positions(), ..meta })
    }

    /// Attention's values of the rows that attend absorbed, and of rows between them values without meaning.
    fn attend_absorbed(
        &self,
        stream: &Stream,
        (config, weights): (&MlaConfig, &MlaWeights),
        (cache, values): (&Buffer<bf16>, &Buffer<bf16>),
        rows: usize,
    ) -> Result<(), CudaError> {
        let absorbed = self.absorbed(rows);
        if absorbed.is_empty() {
            return Ok(());
        }
        let (ops, buffers) = (&self.ops, &self.buffers);
        let MlaConfig { num_heads: heads, kv_lora_rank: latent, v_head_dim: v, .. } = *config;
        let (rope, head) = (config.qk_rope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim);
        let part = |data: &Buffer<bf16>, width: usize| {
            data.slice(absorbed.start * heads * width..absorbed.end * heads * width)
        };
        let (query, up) = (part(&buffers.query, head), part(&buffers.absorbed, latent + rope));
        let (attended, out) = (part(&buffers.attended, latent), part(values, v));
        let view = |data, width| HeadsView { data, row_stride: heads * width, head_stride: width };
        stream.label("W_UK");
        let count = absorbed.len();
        ops.gemm.heads(stream, &weights.key_up, view(&query, head), count, view(&up, latent + rope))?;
        let AttentionKernel::Mla(kernel) = &self.attention else { unreachable!("latent attention") };
        stream.label("MLA");
        let (query, out_all, meta) = (&buffers.absorbed, &buffers.attended, self.absorbed_meta());
        kernel.run(stream, &MlaArgs { rows, query, cache, meta, out: out_all })?;
        stream.label("W_UV");
        ops.gemm.heads(stream, &weights.value_up, view(&attended, latent), count, view(&out, v))
    }

    fn gqa(
        &self,
        stream: &Stream,
        (config, weights): (&GqaConfig, &GqaWeights),
        (keys, values): (&Buffer<bf16>, &Buffer<bf16>),
        rows: usize,
    ) -> Result<(), CudaError> {
        let (ops, buffers) = (&self.ops, &self.buffers);
        let GqaConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim } = *config;
        let first = &weights.query_key_value;
        let (width, query, key) = (first.n(), heads * head_dim, kv_heads * head_dim);
        stream.label("qkv");
        let x = buffers.normed.operand(first.stored(), first.k());
        ops.gemm.dense(stream, first, x, rows, Output::Bf16 { data: &buffers.wide, stride: width })?;
        let part = |from: usize| buffers.wide.slice(from..buffers.wide.len());
        let (key_part, value_part) = (part(query), part(query + key));
        stream.label("rope and append");
        ops.rope.gqa(
            stream,
            &GqaRopeArgs {
                rows: self.inputs.paged(rows),
                angles: &self.angles,
                heads,
                kv_heads,
                head_dim,
                query: dense(&buffers.wide, width),
                key: dense(&key_part, width),
                value: dense(&value_part, width),
                query_gamma: &weights.query_norm,
                key_gamma: &weights.key_norm,
                eps: self.config.rms_norm_eps,
                query_out: dense(&buffers.query, query),
                keys,
                values,
            },
        )?;
        let AttentionKernel::Gqa(kernel) = &self.attention else { unreachable!("grouped-query attention") };
        let (query, out, meta) = (&buffers.query, &buffers.attended, self.inputs.meta());
        stream.label("GQA");
        kernel.run(stream, &GqaArgs { rows, query, keys, values, meta, out })?;
        self.project(stream, &weights.output, &buffers.attended, rows)
    }

    /// `branch = output(values)`; quantises the values where the matrix is FP8.
    fn project(
        &self,
        stream: &Stream,
        output: &Matrix,
        values: &Buffer<bf16>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (ops, buffers, width) = (&self.ops, &self.buffers, output.k());
        stream.label("o_proj");
        let x = match output.stored() {
            StoredAs::Bf16 => Operand::Bf16 { data: values, stride: width },
            StoredAs::Fp8 => {
                let out = RowsOut { bf16: None, ..buffers.inner.out(&[StoredAs::Fp8]) };
                let args = ActivationArgs { rows: RowSet::First(rows), width, x: dense(values, width), out };
                ops.activation.quantize(stream, &args)?;
                buffers.inner.operand(StoredAs::Fp8, width)
            }
        };
        let branch = Output::Bf16 { data: &buffers.branch, stride: self.config.hidden_size };
        ops.gemm.dense(stream, output, x, rows, branch)
    }
}
