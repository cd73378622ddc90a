//! From a checkpoint, or from nothing, to a GPU rank that can step.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use heliostat_kernels::cuda::activation::Activation;
use heliostat_kernels::cuda::attention::{Gqa, GqaDims, Limits, Mla, MlaDims, PromptLimits};
use heliostat_kernels::cuda::exchange::{
    Exchange, ExchangeShape, RANKS_MAX, Roles, RowFormat, SEGMENT_ALIGN, SLOTS_MAX, Transport,
};
use heliostat_kernels::cuda::gemm::{Gemm, Kind, Matrix};
use heliostat_kernels::cuda::{CudaError, Device, Priority, StoredAs};

use super::buffers::{Activations, Buffers};
use super::draws::Draws;
use super::inputs::{InputSizes, Inputs};
use super::layer::Layer;
use super::model::{AttentionKernel, CudaModel, Dp, Ep, Kv, Ops, StepShape, angles, routing_rule};
use super::pool::{ExpertPool, PoolShape};
use super::prompts::Prompts;
use super::rank::{CudaRank, Loads};
use super::source::{LoadError, WeightSource};
use super::tables::Tables;
use super::transfer::Staging;
use crate::batch::PrefillAttention;
use crate::checkpoint::{Checkpoint, Reader};
use crate::config::{Attention, MlaConfig, ModelConfig};
use crate::ep::Topology;
use crate::eplb::map::MapShape;
use crate::model::load_expert;
use crate::scheduler::PROMPT_LOGPROB_ROWS_MAX;

/// Tokens of a KV block on a GPU.
pub const BLOCK_SIZE: usize = 64;
/// Recorded decode steps have as many rows as one of these.
const BUCKETS: [usize; 14] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256];

/// Room for KV blocks on a GPU.
#[derive(Clone, Copy, Debug)]
pub enum KvRoom {
    /// So many blocks.
    Blocks(usize),
    /// As many as fit into so many bytes.
    Bytes(u64),
    /// As many as fit when the device is filled up to this share of its memory.
    Utilization(f64),
}

/// What a GPU rank is made for.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Shape of the group.
    pub topology: Topology,
    /// This rank.
    pub rank: usize,
    /// Sizes of the expert map.
    pub map: MapShape,
    /// Tokens of one step, at most.
    pub rows_max: usize,
    /// Sequences of one step, at most.
    pub seqs_max: usize,
    /// Tokens of one sequence, at most.
    pub max_model_len: usize,
    /// How rows of prompts attend.
    pub prefill_attention: PrefillAttention,
    /// Room for KV blocks.
    pub kv: KvRoom,
    /// Largest decode step that is recorded; 0: none is.
    pub graph_rows_max: usize,
    /// How rows travel, in a group of several ranks.
    pub transport: Transport,
    /// Where NCCL is searched for first.
    pub library_dirs: Vec<PathBuf>,
    /// A peer that is silent for longer is given up.
    pub timeout: Duration,
    /// Layers whose new experts may wait beside the old ones.
    pub stage_ahead: usize,
    /// For measurements: slots per rank onto which all experts fold, expert e onto slot e modulo the slots of all ranks.
    pub fold: Option<usize>,
}

impl CudaOptions {
    /// Slots of one EP rank, per layer.
    fn local_slots(&self) -> usize {
        self.fold.unwrap_or(self.map.slots_per_rank() as usize)
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// A checkpoint.
    Checkpoint(&'a Checkpoint),
    /// Made up on the device, of the right shapes, for measurements.
    Synthetic,
}

impl CudaRank {
    /// Loads everything but the routed experts, and makes room for those. `progress` hears the bytes read so far and in all.
    ///
    /// # Errors
    /// A damaged checkpoint, a full device, or a model that CUDA ranks do not serve.
    pub fn load(
        device: &Device,
        config: &Arc<ModelConfig>,
        options: &CudaOptions,
        weights: Weights<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        check_supported(config, options)?;
        let stream = device.stream(Priority::High)?;
        let role = options.topology.role(options.rank);
        let source = match weights {
            Weights::Checkpoint(checkpoint) => {
                let reader = Reader::new(checkpoint, checkpoint.dense_bytes(config)?, progress);
                WeightSource::checkpoint(device, &stream, reader)
            }
            Weights::Synthetic => WeightSource::synthetic(device, &stream, config.fp8_blocks)?,
        };
        let stored = experts_stored(config, weights)?;
        let exchange = exchange(device, config, options, stored)?;
        let tables = Tables::new(device, config.moe_layers(), options.map, options.local_slots())?;
        let ep = role.ep.map(|_| load_ep(device, config, options, &exchange, stored)).transpose()?;
        let dp = role.dp.map(|_| load_dp(device, (config, options), source, &exchange)).transpose()?;
        let model = CudaModel { config: Arc::clone(config), dp, ep, exchange, tables };
        let mut rank = Self {
            loads: Loads::new(device, config)?,
            model,
            stream,
            graphs: BTreeMap::new(),
            graph_rows_max: options.graph_rows_max.min(options.seqs_max),
            library_dirs: options.library_dirs.clone(),
            in_flight: VecDeque::new(),
            next_copy: 0,
            topology: options.topology.clone(),
            rank: options.rank,
            timeout: options.timeout,
            num_blocks: 0,
            local_slots: options.local_slots(),
            made_up: Vec::new(),
            staging: Staging::default(),
        };
        rank.make_kv(device, options)?;
        // By NCCL a recording holds a communicator, and none is there before the ranks are connected.
        if !rank.is_by_nccl() {
            rank.record()?;
        }
        Ok(rank)
    }

    /// Allocates the KV blocks: last of all, so that a share of the device's memory means what is left.
    fn make_kv(&mut self, device: &Device, options: &CudaOptions) -> Result<(), LoadError> {
        let config = Arc::clone(&self.model.config);
        let Some(dp) = &mut self.model.dp else { return Ok(()) };
        let per_block = bytes_per_block(&config) as u64;
        self.num_blocks = match options.kv {
            KvRoom::Blocks(blocks) => blocks,
            KvRoom::Bytes(bytes) => (bytes / per_block) as usize,
            KvRoom::Utilization(share) => {
                // Other processes' memory is not this rank's share, but it is not free either.
                let (free, total) = device.memory()?;
                let left = ((total as f64 * share) as u64).saturating_sub(device.allocated());
                (left.min(free) / per_block) as usize
            }
        };
        if self.num_blocks == 0 {
            let (free, total) = device.memory()?;
            return Err(LoadError::Unsupported(format!(
                "there is no room for KV blocks of {per_block} bytes: weights and buffers leave {} of {} MiB of the GPU. \
                 Raise gpu_memory_utilization, lower max_num_batched_tokens, or spread the experts over more ranks",
                free >> 20,
                total >> 20
            )));
        }
        let rows = self.num_blocks * BLOCK_SIZE;
        let kv = |_| -> Result<Kv, CudaError> {
            Ok(match &config.attention {
                Attention::Mla(_) => Kv::Latent(device.alloc(rows * config.kv_elements_per_token())?),
                Attention::Gqa(_) => {
                    let half = rows * config.kv_elements_per_token() / 2;
                    Kv::KeysValues(device.alloc(half)?, device.alloc(half)?)
                }
            })
        };
        dp.kv = (0..config.num_layers).map(kv).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Records decode steps.
    pub(super) fn record(&mut self) -> Result<(), CudaError> {
        let rows_max = self.graph_rows_max;
        if rows_max == 0 {
            return Ok(());
        }
        let (tokens, by_nccl) = (self.model.dp.is_some(), self.is_by_nccl());
        // A rank without tokens has one kind of step, but for what NCCL carries; and every rank may have nothing to do but
        // for its peers.
        for bucket in buckets(if tokens || by_nccl { rows_max } else { 0 }) {
            let rows = if tokens { bucket } else { 0 };
            let shape = StepShape { rows, logit_rows: rows, carried: bucket };
            let graph = self.stream.capture(|stream| self.model.step(stream, shape))?;
            self.graphs.insert(bucket, graph);
        }
        Ok(())
    }
}

impl Loads {
    fn new(device: &Device, config: &ModelConfig) -> Result<Self, CudaError> {
        let len = config.moe_layers() * config.moe.num_experts;
        let host = (0..super::inputs::STEPS_MAX).map(|_| device.pinned(len)).collect::<Result<_, _>>()?;
        Ok(Self { host, newest: vec![0; len], before: vec![0; len], experts: config.moe.num_experts })
    }
}

/// Bytes that one KV block takes over all layers.
pub fn bytes_per_block(config: &ModelConfig) -> usize {
    config.num_layers * BLOCK_SIZE * config.kv_elements_per_token() * size_of::<half::bf16>()
}

/// Rows of the steps that are recorded for batches of up to `limit`.
fn buckets(limit: usize) -> impl Iterator<Item = usize> {
    let below = BUCKETS.into_iter().filter(move |&rows| rows < limit);
    [0].into_iter().chain(below).chain((limit > 0).then_some(limit))
}

fn check_supported(config: &ModelConfig, options: &CudaOptions) -> Result<(), LoadError> {
    let refuse = |why: String| Err(LoadError::Unsupported(why));
    let size = options.topology.size();
    if size > 1 && options.transport == Transport::Local {
        return refuse(format!("{size} ranks on GPUs need a way to exchange rows"));
    }
    if !config.hidden_size.is_multiple_of(16) {
        return refuse(format!("a hidden size of {} is not a multiple of 16", config.hidden_size));
    }
    if let Err(why) = options.prefill_attention.check(config) {
        return refuse(why.to_string());
    }
    if let (PrefillAttention::Expanded, Attention::Mla(mla)) = (options.prefill_attention, &config.attention)
        && let Some(why) = super::prompts::dims(mla, mla_scale(config, mla)).unsupported()
    {
        return refuse(format!("{why}: set `prefill_attention` = \"absorbed\", or leave it out"));
    }
    let Topology { dp, ep, .. } = options.topology;
    let (moe, router) = (&config.moe, &config.moe.router);
    let head_dim = match &config.attention {
        Attention::Mla(_) => 0,
        Attention::Gqa(gqa) => gqa.head_dim,
    };
    let bounds = [
        ("experts", moe.num_experts, 512),
        ("experts per token", moe.top_k, 32),
        ("groups of experts", router.n_group, 32),
        ("slots per rank and layer", options.local_slots(), SLOTS_MAX),
        ("ranks", dp.max(ep), RANKS_MAX),
        ("choices in a step of all ranks", dp * options.rows_max * moe.top_k, i32::MAX as usize / 2),
        ("tokens per sequence", options.max_model_len, 1 << 21),
        ("tokens of the vocabulary", config.vocab_size, 400_000),
        ("elements of the residual stream", config.hidden_size, 16_384),
        ("elements of a head", head_dim, 256),
    ];
    match bounds.into_iter().find(|(_, found, max)| found > max) {
        Some((what, found, max)) => refuse(format!("{found} {what}: GPU ranks serve at most {max}")),
        None => Ok(()),
    }
}

/// How the routed experts are stored: as the checkpoint has them, where the kernels take that.
fn experts_stored(config: &ModelConfig, weights: Weights<'_>) -> Result<StoredAs, LoadError> {
    match weights {
        Weights::Checkpoint(checkpoint) => {
            let expert = load_expert(checkpoint, config, 0, 0)?;
            let gate_up = StoredAs::of(&[&expert.gate, &expert.up]);
            Ok(if gate_up == StoredAs::of(&[&expert.down]) { gate_up } else { StoredAs::Bf16 })
        }
        Weights::Synthetic if config.fp8_blocks => Ok(StoredAs::Fp8),
        Weights::Synthetic => Ok(StoredAs::Bf16),
    }
}

fn exchange(
    device: &Device,
    config: &ModelConfig,
    options: &CudaOptions,
    stored: StoredAs,
) -> Result<Exchange, CudaError> {
    let Topology { dp, ep, .. } = options.topology;
    let (top_k, slots) = (config.moe.top_k, options.local_slots());
    let tokens_max = options.rows_max.next_multiple_of(4);
    let shape = ExchangeShape {
        tokens_max,
        top_k,
        hidden: config.hidden_size,
        format: match stored {
            StoredAs::Bf16 => RowFormat::Bf16,
            StoredAs::Fp8 => RowFormat::Fp8,
        },
        dp_max: dp,
        ep_max: ep,
        slots_max: slots,
        rows_max: ExchangeShape::rows_worst(dp, tokens_max, top_k, slots).next_multiple_of(SEGMENT_ALIGN),
    };
    let role = options.topology.role(options.rank);
    let roles = Roles { tokens: role.dp.is_some(), experts: role.ep.is_some() };
    let transport = if options.topology.size() == 1 { Transport::Local } else { options.transport };
    Exchange::new(device, shape, transport, roles)
}

fn load_ep(
    device: &Device,
    config: &ModelConfig,
    options: &CudaOptions,
    exchange: &Exchange,
    stored: StoredAs,
) -> Result<Ep, CudaError> {
    let (hidden, width) = (config.hidden_size, config.moe.intermediate_size);
    let slots = options.local_slots();
    // Those of the slots, of the layers that wait for their commit, one that a peer reads and one on its way here.
    let places = slots * (config.moe_layers() + options.stage_ahead.max(1)) + 2;
    // A step that takes longer counts as hung, and weights may wait for one.
    let pool = ExpertPool::new(device, PoolShape { places, hidden, width, stored }, options.timeout * 4)?;
    let rows_max = exchange.shape().rows_max;
    let carried = exchange.transport() == Transport::Nccl;
    Ok(Ep {
        gemm: Gemm::new(device),
        activation: Activation::new(device)?,
        gate_up: Matrix::new(device, pool.gate_up().clone(), Kind::Pool)?,
        down: Matrix::new(device, pool.down().clone(), Kind::Pool)?,
        pool,
        gate_up_out: device.alloc(rows_max * 2 * width)?,
        inner: Activations::new(device, (rows_max, width), &[stored])?,
        results: carried.then(|| device.alloc(rows_max * hidden)).transpose()?,
    })
}

fn load_dp(
    device: &Device,
    (config, options): (&Arc<ModelConfig>, &CudaOptions),
    mut source: WeightSource<'_, '_>,
    exchange: &Exchange,
) -> Result<Dp, LoadError> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let tokens_max = exchange.shape().tokens_max;
    let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden)?;
    let layers = (0..config.num_layers)
        .map(|layer| Layer::load(&mut source, config, layer, options.prefill_attention));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let norm = source.vector("model.norm.weight".to_owned(), hidden)?;
    let head = match config.tie_word_embeddings {
        true => embedding.clone(),
        false => source.matrix("lm_head.weight", vocab, hidden)?,
    };
    // What the scheduler bounds: one row per sequence, and those of prompt log-probabilities.
    let logit_rows_max = options.seqs_max + PROMPT_LOGPROB_ROWS_MAX.min(tokens_max);
    let sizes = InputSizes {
        rows_max: tokens_max,
        logit_rows_max,
        seqs_max: options.seqs_max,
        blocks_max: options.max_model_len.div_ceil(BLOCK_SIZE),
    };
    let buffers = Buffers::new(device, config, (tokens_max, logit_rows_max), head.stored())?;
    let moe_input = buffers.normed.with_rows(&exchange.outgoing().rows, tokens_max);
    let loads = device.alloc::<u32>(config.moe_layers() * config.moe.num_experts)?;
    let experts = config.moe.num_experts;
    Ok(Dp {
        config: Arc::clone(config),
        ops: Ops::new(device)?,
        side: device.stream(Priority::High)?,
        attention: attention_kernel(device, config, options, tokens_max)?,
        prompts: prompts(device, config, options, tokens_max)?,
        angles: angles(device, config, options.max_model_len)?,
        embedding: embedding.stack().data().cast(),
        layers,
        kv: Vec::new(),
        norm,
        head,
        rule: routing_rule(&config.moe),
        inputs: Inputs::new(device, sizes)?,
        buffers,
        moe_input,
        draws: Draws::new(device, logit_rows_max)?,
        loads: (0..config.moe_layers())
            .map(|layer| loads.slice(layer * experts..(layer + 1) * experts))
            .collect(),
        all_loads: loads,
    })
}

fn attention_kernel(
    device: &Device,
    config: &ModelConfig,
    options: &CudaOptions,
    rows: usize,
) -> Result<AttentionKernel, CudaError> {
    let limits = Limits { rows, positions: options.max_model_len };
    Ok(match &config.attention {
        Attention::Mla(mla) => {
            let scale = mla_scale(config, mla);
            let (heads, kv_lora, rope) = (mla.num_heads, mla.kv_lora_rank, mla.qk_rope_head_dim);
            AttentionKernel::Mla(Mla::new(device, MlaDims { heads, kv_lora, rope, scale }, limits)?)
        }
        Attention::Gqa(gqa) => {
            let (heads, kv_heads, head_dim) = (gqa.num_heads, gqa.num_kv_heads, gqa.head_dim);
            let dims = GqaDims { heads, kv_heads, head_dim, scale: root(head_dim) };
            AttentionKernel::Gqa(Gqa::new(device, dims, limits)?)
        }
    })
}

fn prompts(
    device: &Device,
    config: &ModelConfig,
    options: &CudaOptions,
    rows: usize,
) -> Result<Option<Prompts>, CudaError> {
    let limits = PromptLimits { rows, chunks: options.seqs_max, positions: options.max_model_len };
    match (options.prefill_attention, &config.attention) {
        (PrefillAttention::Expanded, Attention::Mla(mla)) => {
            Prompts::new(device, super::prompts::dims(mla, mla_scale(config, mla)), limits).map(Some)
        }
        (PrefillAttention::Expanded, Attention::Gqa(_)) | (PrefillAttention::Absorbed, _) => Ok(None),
    }
}

fn root(width: usize) -> f32 {
    (width as f64).powf(-0.5) as f32
}

/// Factor of the scores of latent attention.
fn mla_scale(config: &ModelConfig, mla: &MlaConfig) -> f32 {
    root(mla.qk_nope_head_dim + mla.qk_rope_head_dim) * config.rope.softmax_factor
}
