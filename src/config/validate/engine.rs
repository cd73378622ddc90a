//! One rank's engine: its bounds, whose defaults depend on the device, and its room for KV blocks.

use heliostat_engine::batch::PrefillAttention;

use super::super::raw::{PrefillAttention as Written, Raw};
use super::super::section::ByteSize;
use super::super::{Engine, KvCache, Model};
use super::{Check, Facts, Kind};

/// Memory for KV blocks on CPU devices where the file says nothing.
const KV_CACHE_BYTES_DEFAULT: ByteSize = ByteSize(128 << 20);
/// Share of a GPU's memory where the file says nothing, as vLLM's.
const GPU_MEMORY_UTILIZATION: f64 = 0.9;
/// Tokens per KV block that the CUDA kernels are written for.
const CUDA_BLOCK_SIZE: u32 = 64;

/// Writes down the defaults that depend on the device.
pub(super) fn write_out(raw: &mut Raw, engine: &Engine) {
    raw.engine.block_size = Some(engine.block_size);
    raw.engine.max_num_seqs = Some(engine.max_num_seqs);
    raw.engine.max_num_batched_tokens = Some(engine.max_num_batched_tokens);
}

impl Check<'_> {
    pub(super) fn engine(&mut self, raw: &Raw, kind: Kind) -> Engine {
        let written = &raw.engine;
        let (block_size, seqs, tokens) = match kind {
            Kind::Cpu => (16, 64, 512),
            Kind::Cuda => (CUDA_BLOCK_SIZE, 256, 8192),
        };
        let engine = Engine {
            block_size: written.block_size.unwrap_or(block_size),
            max_num_seqs: written.max_num_seqs.unwrap_or(seqs),
            max_num_batched_tokens: written.max_num_batched_tokens.unwrap_or(tokens),
            enable_prefix_caching: written.enable_prefix_caching,
            prefill_attention: match written.prefill_attention {
                Written::Absorbed => PrefillAttention::Absorbed,
                Written::Expanded => PrefillAttention::Expanded,
            },
        };
        for (name, n) in [
            ("block_size", engine.block_size),
            ("max_num_seqs", engine.max_num_seqs),
            ("max_num_batched_tokens", engine.max_num_batched_tokens),
            ("num_gpu_blocks_override", written.num_gpu_blocks_override.unwrap_or(1)),
        ] {
            self.require(
                n > 0,
                &format!("engine.{name}"),
                format!("`{name}` must be at least 1"),
                "leave it out for the default",
            );
        }
        self.require(
            kind == Kind::Cpu || engine.block_size == CUDA_BLOCK_SIZE,
            "engine.block_size",
            format!("`block_size` = {} is not possible on CUDA devices", engine.block_size),
            format!("write {CUDA_BLOCK_SIZE}, or leave it out"),
        );
        self.require(
            engine.max_num_batched_tokens >= engine.max_num_seqs,
            "engine.max_num_batched_tokens",
            format!(
                "`max_num_batched_tokens` = {} is below `max_num_seqs` = {}: a full batch could not decode",
                engine.max_num_batched_tokens, engine.max_num_seqs
            ),
            format!("write {} or more", engine.max_num_seqs),
        );
        engine
    }

    /// Only latents can be expanded.
    pub(super) fn prefill(&mut self, engine: &Engine, facts: &Facts) {
        let Some(Ok(model)) = &facts.model else { return };
        self.require(
            engine.prefill_attention.check(model).is_ok(),
            "engine.prefill_attention",
            "`prefill_attention` = \"expanded\" needs a model with latent attention (MLA)",
            "write \"absorbed\", or leave it out",
        );
    }

    pub(super) fn kv_cache(
        &mut self,
        raw: &Raw,
        engine: &Engine,
        model: Option<&Model>,
        kind: Kind,
    ) -> KvCache {
        let written = &raw.engine;
        let rooms = [
            ("num_gpu_blocks_override", written.num_gpu_blocks_override.is_some()),
            ("kv_cache_memory_bytes", written.kv_cache_memory_bytes.is_some()),
            ("gpu_memory_utilization", written.gpu_memory_utilization.is_some()),
        ];
        let set: Vec<&str> = rooms.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if let [first, second, ..] = set[..] {
            let message = format!("`{first}` and `{second}` are both set");
            self.require(false, &format!("engine.{first}"), message, "keep one of them");
        }
        if let Some(blocks) = written.num_gpu_blocks_override {
            let tokens = u64::from(blocks) * u64::from(engine.block_size);
            let longest = model.map_or(0, |model| model.max_model_len);
            self.require(
                set.len() > 1 || tokens >= u64::from(longest),
                "engine.num_gpu_blocks_override",
                format!(
                    "{blocks} blocks of {} tokens hold {tokens} tokens, one sequence may have {}",
                    engine.block_size, longest
                ),
                "raise it, or lower `max_model_len` in [model]",
            );
            return KvCache::Blocks(blocks);
        }
        match (written.kv_cache_memory_bytes, kind) {
            (Some(bytes), _) => KvCache::Bytes(bytes.0),
            (None, Kind::Cpu) => KvCache::Bytes(KV_CACHE_BYTES_DEFAULT.0),
            (None, Kind::Cuda) => {
                let share = written.gpu_memory_utilization.unwrap_or(GPU_MEMORY_UTILIZATION);
                self.require(
                    share > 0.0 && share <= 1.0,
                    "engine.gpu_memory_utilization",
                    format!("`gpu_memory_utilization` = {share} is no share of a GPU's memory"),
                    "write a number above 0, up to 1",
                );
                KvCache::Utilization(((share * 1000.0).round() as u32).max(1))
            }
        }
    }
}
