//! The compute slice of an EP32 deployment of DeepSeek-R1: all 61 layers with made-up FP8 weights, 9 expert slots per
//! rank, the real router over 256 experts folded onto the slots of one rank or of several, each a process with a GPU.
//!
//! Per expert it carries the same rows, FLOPs and weight bytes as 32 ranks with 288 slots; it does not carry their link
//! bytes, fan-out and skew. Steps go through the scheduler, the recorded graphs and the sampler, as when serving. Several
//! ranks run the same steps and wait for each other in every layer, so that the figures of one are those of all.

mod remap;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::config::{ConfigError, ModelConfig};
use heliostat_engine::cuda::{
    BLOCK_SIZE, CudaOptions, CudaRank, GroupStep, KvRoom, LoadError, PoolError, Weights,
};
use heliostat_engine::ep::Topology;
use heliostat_engine::eplb::map::MapShape;
use heliostat_engine::model::ExchangeError;
use heliostat_engine::request::{Request, RequestId, SamplingParams, StopConditions};
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cuda::exchange::Transport;
use heliostat_kernels::cuda::{CudaError, Device};

use super::meeting::Meeting;
pub use remap::RemapReport;

/// The model's config.json.
pub const DEEPSEEK_R1: &str = include_str!("deepseek-r1.json");
/// Expert slots of a rank.
pub const SLOTS: usize = 9;

/// What is measured.
#[derive(Clone, Debug)]
pub struct SliceArgs {
    /// Sequences that decode at once.
    pub batches: Vec<usize>,
    /// Tokens before each sequence's first measured one.
    pub contexts: Vec<usize>,
    /// Steps that are timed for each pair.
    pub steps: usize,
    /// Lengths of prompts to prefill.
    pub prompts: Vec<usize>,
    /// Tokens of one prefill step.
    pub chunk: usize,
    /// How rows of prompts attend.
    pub prefill_attention: PrefillAttention,
    /// Record decode steps.
    pub graphs: bool,
    /// Steps in flight.
    pub depth: usize,
    /// Layers; fewer make a quick trial.
    pub layers: Option<usize>,
    /// Decode once more, at the first batch and context, while experts move.
    pub remap: bool,
    /// How rows travel between ranks, where there are several.
    pub transport: Transport,
    /// Where NCCL is searched for first.
    pub library_dirs: Vec<PathBuf>,
}

impl SliceArgs {
    /// The model, of as many layers as are asked for and there are.
    pub(super) fn config(&self) -> Result<ModelConfig, ConfigError> {
        let mut config = ModelConfig::from_json("deepseek-r1.json", DEEPSEEK_R1)?;
        config.moe_layer_of.truncate(self.layers.unwrap_or(config.num_layers));
        config.num_layers = config.moe_layer_of.len();
        Ok(config)
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub enum SliceRow {
    /// Steady-state decode.
    Decode {
        /// Sequences.
        batch: usize,
        /// Tokens before the first measured one.
        context: usize,
        /// Median milliseconds from one step's end to the next's.
        step_ms: f64,
        /// The 99th percentile of the same.
        step_p99_ms: f64,
        /// Tokens per second.
        tokens_per_s: f64,
        /// Share of the time in which the host worked rather than waited.
        host_share: f64,
        /// Microseconds of each part of one step, every kernel timed on its own: their sum is above the step's time, in
        /// which kernels overlap.
        parts: Vec<(&'static str, f64)>,
    },
    /// Decode while experts move.
    Remap(RemapReport),
    /// Prefill.
    Prefill {
        /// Tokens of a prompt.
        prompt: usize,
        /// Tokens per second.
        tokens_per_s: f64,
        /// Microseconds of each part of one step, as in decode.
        parts: Vec<(&'static str, f64)>,
    },
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum SliceError {
    /// The shape is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device is missing, full or failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The rank could not be made.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] ExchangeError),
    /// Experts could not be moved.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The other ranks are not there.
    #[error(transparent)]
    Meeting(#[from] std::io::Error),
    /// The measurement does not fit the device.
    #[error(
        "{batch} sequences of {context} tokens do not fit: there is room for {tokens} tokens of KV cache"
    )]
    KvRoom {
        /// Sequences.
        batch: usize,
        /// Tokens of each.
        context: usize,
        /// Tokens that fit.
        tokens: usize,
    },
}

/// Loads the slice once and measures each pair of batch and context, then prefill. `report` hears each line as it is
/// measured.
///
/// # Errors
/// The device is missing, full, or failed, or another rank is.
pub fn slice(
    device: &Device,
    args: &SliceArgs,
    mut meeting: Meeting,
    report: &mut dyn FnMut(&SliceRow),
) -> Result<Vec<SliceRow>, SliceError> {
    let mut rank = load(device, args, &mut meeting)?;
    let mut rows = Vec::new();
    let mut push = |row: SliceRow| {
        report(&row);
        rows.push(row);
    };
    for &context in &args.contexts {
        for &batch in &args.batches {
            push(decode(&mut rank, args, batch, context)?);
        }
    }
    if let (true, Some(&batch), Some(&context)) = (args.remap, args.batches.first(), args.contexts.first()) {
        push(remap::remap(&mut rank, args, (batch, context), &mut meeting)?);
    }
    for &prompt in &args.prompts {
        push(prefill(&mut rank, args, prompt)?);
    }
    meeting.part()?;
    Ok(rows)
}

fn load(device: &Device, args: &SliceArgs, meeting: &mut Meeting) -> Result<CudaRank, SliceError> {
    let config = args.config()?;
    let longest = args.contexts.iter().chain(&args.prompts).copied().max().unwrap_or(BLOCK_SIZE);
    let batch = args.batches.iter().copied().max().unwrap_or(1);
    let (experts, ranks) = (config.moe.num_experts as u32, meeting.ranks());
    let options = CudaOptions {
        topology: Topology { dp: ranks, ep: ranks, colocate: true },
        rank: meeting.rank(),
        map: MapShape { experts, slots: experts, ranks: ranks as u32 },
        rows_max: args.chunk.max(batch),
        seqs_max: batch,
        max_model_len: longest + args.steps + 4 * BLOCK_SIZE,
        prefill_attention: args.prefill_attention,
        kv: KvRoom::Utilization(0.96),
        graph_rows_max: if args.graphs { batch } else { 0 },
        transport: args.transport,
        library_dirs: args.library_dirs.clone(),
        timeout: Duration::from_secs(5),
        stage_ahead: 1,
        fold: Some(SLOTS),
    };
    let mut rank = CudaRank::load(device, &Arc::new(config), &options, Weights::Synthetic, &mut |_, _| ())?;
    rank.make_up(SLOTS)?;
    let first = rank.is_by_nccl() && meeting.rank() == 0;
    let nccl = first.then(|| rank.new_nccl_id()).transpose()?;
    let (heaps, nccl) = meeting.meet(rank.handle(), nccl)?;
    rank.connect(1, &heaps, nccl)?;
    Ok(rank)
}

fn scheduler(rank: &CudaRank, args: &SliceArgs) -> Scheduler {
    let config = SchedulerConfig {
        block_size: BLOCK_SIZE,
        num_blocks: rank.num_blocks(),
        max_num_seqs: args.batches.iter().copied().max().unwrap_or(1),
        max_num_batched_tokens: args.chunk.max(args.batches.iter().copied().max().unwrap_or(1)),
        max_model_len: usize::MAX / BLOCK_SIZE / 2,
        enable_prefix_caching: false,
        prefill_attention: args.prefill_attention,
        max_waiting: 1 << 16,
        vocab_size: rank.config().vocab_size,
    };
    Scheduler::new(config).expect("all bounds are above zero").with_async_depth(args.depth)
}

/// A request of `len` made-up tokens.
fn request(id: usize, len: usize, max_tokens: usize, vocab: usize) -> Request {
    let token = |at: usize| {
        let mixed = (at as u64 + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(id as u64)
            .wrapping_mul(0xd134_2543_de82_ef95);
        (mixed >> 33) as u32 % vocab as u32
    };
    Request {
        id: RequestId(id as u128 + 1),
        prompt: (0..len).map(token).collect(),
        generated: Vec::new(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: StopConditions {
            max_tokens: max_tokens as u32,
            min_tokens: 0,
            eos_token_ids: Vec::new(),
            stop_token_ids: Vec::new(),
        },
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        priority: 0,
        turn: 0,
    }
}

/// Times of the steps of a run.
#[derive(Default)]
struct Times {
    /// From one step's end to the next's.
    steps: Vec<Duration>,
    /// Spent waiting for the device.
    waited: Duration,
    /// Of the whole run.
    wall: Duration,
}

impl Times {
    /// The median of sorted steps, in milliseconds.
    fn median_ms(&self) -> f64 {
        self.steps[self.steps.len() / 2].as_secs_f64() * 1e3
    }
}

/// Runs `scheduler` until it has nothing to do or `steps` steps have ended.
fn run(
    rank: &mut CudaRank,
    scheduler: &mut Scheduler,
    (depth, steps): (usize, usize),
    between: &mut dyn FnMut(&mut CudaRank) -> Result<(), SliceError>,
) -> Result<Times, SliceError> {
    let mut times = Times::default();
    let started = Instant::now();
    let mut last = started;
    while scheduler.has_work() && times.steps.len() < steps {
        between(rank)?;
        while rank.in_flight() < depth && scheduler.can_schedule() {
            let step = scheduler.schedule();
            rank.launch(&step, GroupStep::of(&step))?;
        }
        let began = Instant::now();
        let (drawn, logits) = rank.finish()?;
        times.waited += began.elapsed();
        scheduler.complete_drawn(&drawn, &logits);
        let now = Instant::now();
        times.steps.push(now - last);
        last = now;
    }
    while rank.in_flight() > 0 {
        let (drawn, logits) = rank.finish()?;
        scheduler.complete_drawn(&drawn, &logits);
    }
    times.wall = started.elapsed();
    Ok(times)
}

/// Steps before those that are timed.
const WARM: usize = 4;

/// Sequences that have `context` tokens and are about to decode.
fn decoding(
    rank: &CudaRank,
    args: &SliceArgs,
    (batch, context): (usize, usize),
) -> Result<Scheduler, SliceError> {
    let mut scheduler = scheduler(rank, args);
    let vocab = rank.config().vocab_size;
    let tokens = rank.num_blocks() * BLOCK_SIZE;
    for id in 0..batch {
        let mut decoding = request(id, context, args.steps + WARM + 9, vocab);
        // The last token was drawn, so that the first step is a decode like all others.
        decoding.generated = decoding.prompt.split_off((context - 1).max(1));
        let fits = scheduler.add_computed(decoding);
        if !fits.expect("the request is valid") {
            return Err(SliceError::KvRoom { batch, context, tokens });
        }
    }
    Ok(scheduler)
}

/// Times of the steps of a decode run, and its sequences at the end; `between` is called between two steps.
fn decode_run(
    rank: &mut CudaRank,
    args: &SliceArgs,
    shape: (usize, usize),
    between: &mut dyn FnMut(&mut CudaRank) -> Result<(), SliceError>,
) -> Result<(Times, Scheduler), SliceError> {
    let mut scheduler = decoding(rank, args, shape)?;
    run(rank, &mut scheduler, (args.depth, WARM), &mut |_| Ok(()))?;
    let mut times = run(rank, &mut scheduler, (args.depth, args.steps), between)?;
    // The first has no step before it.
    times.steps.remove(0);
    times.steps.sort();
    Ok((times, scheduler))
}

fn decode(
    rank: &mut CudaRank,
    args: &SliceArgs,
    batch: usize,
    context: usize,
) -> Result<SliceRow, SliceError> {
    let (times, mut scheduler) = decode_run(rank, args, (batch, context), &mut |_| Ok(()))?;
    let p99 = times.steps[(times.steps.len() * 99).div_ceil(100) - 1];
    Ok(SliceRow::Decode {
        batch,
        context,
        step_ms: times.median_ms(),
        step_p99_ms: p99.as_secs_f64() * 1e3,
        tokens_per_s: batch as f64 / times.median_ms() * 1e3,
        host_share: 1.0 - times.waited.as_secs_f64() / times.wall.as_secs_f64(),
        parts: parts(rank, &mut scheduler)?,
    })
}

/// Where the time of one more step goes, in the order of the parts' first kernels.
fn parts(rank: &mut CudaRank, scheduler: &mut Scheduler) -> Result<Vec<(&'static str, f64)>, SliceError> {
    let step = scheduler.schedule();
    let mut parts: Vec<(&'static str, f64)> = Vec::new();
    for time in rank.profile(&step, GroupStep::of(&step))? {
        match parts.iter_mut().find(|(label, _)| *label == time.label) {
            Some((_, us)) => *us += time.us,
            None => parts.push((time.label, time.us)),
        }
    }
    Ok(parts)
}

fn prefill(rank: &mut CudaRank, args: &SliceArgs, prompt: usize) -> Result<SliceRow, SliceError> {
    let mut scheduler = scheduler(rank, args);
    let vocab = rank.config().vocab_size;
    let prompts = (2 * args.chunk).div_ceil(prompt).max(2);
    for id in 0..prompts {
        scheduler.add(request(id, prompt, 1, vocab)).expect("the request is valid");
    }
    let began = Instant::now();
    run(rank, &mut scheduler, (args.depth, usize::MAX), &mut |_| Ok(()))?;
    let tokens_per_s = (prompts * prompt) as f64 / began.elapsed().as_secs_f64();
    for id in 0..args.chunk.div_ceil(prompt) {
        scheduler.add(request(id, prompt, 1, vocab)).expect("the request is valid");
    }
    Ok(SliceRow::Prefill { prompt, tokens_per_s, parts: parts(rank, &mut scheduler)? })
}
