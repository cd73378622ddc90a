//! The model on a GPU against transformers, and against itself: batch, chunks, recordings, maps and steps scheduled
//! ahead must not change a bit. Without a GPU these tests say so and pass.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod models;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heliostat_engine::batch::{Batch, BatchSeq, LogitRows, PrefillAttention, Sampling, Step};
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::cuda::{BLOCK_SIZE, CudaOptions, CudaRank, GroupStep, KvRoom, LoadError, Weights};
use heliostat_engine::ep::{ExpertStore, SharedSlots, Slot, Slots, Topology};
use heliostat_engine::eplb::map::{ExpertMap, Layout, MapShape, PlacementStrategy};
use heliostat_engine::model::{KvPages, LocalExperts, Model, load_expert};
use heliostat_engine::request::{FinishReason, Request, RequestId, SamplingParams, StopConditions};
use heliostat_engine::scheduler::{Scheduler, SchedulerConfig};
use heliostat_kernels::cpu::Cpu;
use heliostat_kernels::cuda::exchange::Transport;
use heliostat_kernels::cuda::{CudaError, Device, DeviceOptions};
use serde::Deserialize;

use models::{cases, root};

/// Slots beyond one per expert, so that there is something to move.
const REDUNDANT: u32 = 2;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    /// All logits of the first step, or the best five.
    first_logits: Option<Vec<f32>>,
    top5_ids: Option<Vec<usize>>,
    top5_logits: Option<Vec<f32>>,
}

fn device() -> Option<Device> {
    let nvrtc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc/nvidia/cu13/lib");
    let options =
        DeviceOptions { library_dirs: vec![nvrtc], kernel_cache: Some(std::env::temp_dir().join("kernels")) };
    match Device::open_with(0, options) {
        Ok(device) => Some(device),
        Err(why @ (CudaError::NoDriver | CudaError::NoDevice { .. })) => {
            eprintln!("skipped: {why}");
            None
        }
        Err(why) => panic!("a driver is here, but no device can be opened: {why}"),
    }
}

/// A model on the GPU, alone.
struct Rig {
    name: String,
    prefill: PrefillAttention,
    rank: CudaRank,
    slots: SharedSlots,
    store: ExpertStore,
    checkpoint: Checkpoint,
    layout: Layout,
    reference: Reference,
    epoch: u64,
}

impl Rig {
    /// `None` where the GPU does not take prompts of these sizes in this way, and says so.
    fn load(
        device: &Device,
        (dir, prefill): (&Path, PrefillAttention),
        graph_rows_max: usize,
    ) -> Option<Self> {
        let config = Arc::new(ModelConfig::from_dir(dir).unwrap());
        let checkpoint = Checkpoint::open(dir).unwrap();
        checkpoint.validate(&config).unwrap();
        let experts = config.moe.num_experts as u32;
        let shape = MapShape { experts, slots: experts + REDUNDANT, ranks: 1 };
        let layout = Layout::initial(config.moe_layers(), shape, PlacementStrategy::Linear).unwrap();
        let options = CudaOptions {
            topology: Topology::new(1, 1, true).unwrap(),
            rank: 0,
            map: shape,
            rows_max: 512,
            seqs_max: 64,
            max_model_len: config.max_position_embeddings.min(1024),
            prefill_attention: prefill,
            kv: KvRoom::Blocks(128),
            graph_rows_max,
            transport: Transport::Local,
            library_dirs: Vec::new(),
            timeout: Duration::from_secs(5),
            stage_ahead: 2,
            fold: None,
        };
        let loaded =
            CudaRank::load(device, &config, &options, Weights::Checkpoint(&checkpoint), &mut |_, _| ());
        let mut rank = match loaded {
            Err(LoadError::Unsupported(why)) if prefill == PrefillAttention::Expanded => {
                assert!(why.contains("expanded attention takes") && why.contains("absorbed"), "{why}");
                return None;
            }
            loaded => loaded.unwrap(),
        };
        let store = ExpertStore::Cuda(rank.pool().unwrap().clone());
        let slots = SharedSlots::new(Slots::new(config.moe_layers(), shape.slots as usize));
        rank.connect(1, &[rank.handle()], None).unwrap();
        let reference = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        let name = format!("{} {prefill:?}", dir.file_name().unwrap().to_string_lossy());
        let reference = serde_json::from_str(&reference).unwrap();
        let mut rig = Self {
            name,
            prefill,
            rank,
            slots,
            store,
            checkpoint,
            layout: layout.clone(),
            reference,
            epoch: 1,
        };
        for moe_layer in 0..config.moe_layers() {
            rig.place(moe_layer, layout.layer(moe_layer).clone());
        }
        Some(rig)
    }

    /// Fills the slots of a layer as `map` says and takes the map.
    fn place(&mut self, moe_layer: usize, map: ExpertMap) {
        let config = Arc::clone(self.rank.config());
        let present = self.slots.read().logical(moe_layer);
        let mut contents = Vec::new();
        for (slot, &logical) in map.experts_of_rank(0).iter().enumerate() {
            if present[slot] != Some(logical) {
                let found = self.slots.read().find(moe_layer, logical);
                let weights = found.unwrap_or_else(|| {
                    let expert = load_expert(&self.checkpoint, &config, moe_layer, logical as usize).unwrap();
                    self.store.place(expert).unwrap()
                });
                contents.push((slot, Slot { logical, weights }));
            }
        }
        self.rank.guard_weights().unwrap();
        self.slots.replace(moe_layer, contents).unwrap();
        self.layout.set_layer(moe_layer, map).unwrap();
        self.rank.set_layer(moe_layer, &self.layout, &self.slots).unwrap();
    }

    /// Logits of the last row of each share, the shares computed as one step.
    fn logits(&mut self, shares: &[Share]) -> Vec<Vec<f32>> {
        let mut batch = Batch::default();
        for share in shares {
            let Share { tokens, context, table, prompt } = share;
            let expands = *prompt && self.prefill == PrefillAttention::Expanded;
            batch.seqs.push(BatchSeq {
                start: batch.tokens.len(),
                len: tokens.len(),
                context: *context,
                block_table: table.clone(),
                logits: LogitRows::Last,
                expanded: if expands { tokens.len() } else { 0 },
            });
            batch.tokens.extend(tokens);
            batch.positions.extend((*context..context + tokens.len()).map(|position| position as u32));
        }
        let sampling = vec![Sampling::Host; shares.len()];
        let step = Step { batch, feeds: Vec::new(), sampling };
        self.rank.launch(&Arc::new(step.clone()), GroupStep::of(&step)).unwrap();
        let (_, logits) = self.rank.finish().unwrap();
        logits.rows.chunks_exact(logits.vocab).map(<[f32]>::to_vec).collect()
    }

    /// Logits after each of `prompt` and the `forced` tokens that follow it.
    fn forced(&mut self, prompt: &[u32], forced: &[u32], table: &[u32]) -> Vec<Vec<f32>> {
        let first = Share { tokens: prompt.to_vec(), context: 0, table: table.to_vec(), prompt: true };
        let mut rows = self.logits(&[first]);
        for (index, &token) in forced.iter().enumerate() {
            let context = prompt.len() + index;
            let share = Share { tokens: vec![token], context, table: table.to_vec(), prompt: false };
            rows.extend(self.logits(&[share]));
        }
        rows
    }
}

/// Some tokens of a sequence.
#[derive(Clone)]
struct Share {
    tokens: Vec<u32>,
    context: usize,
    table: Vec<u32>,
    /// Rows of a prompt.
    prompt: bool,
}

fn calc_diff(x: &[f32], y: &[f32]) -> f64 {
    let dot =
        |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum() };
    1.0 - 2.0 * dot(x, y) / (dot(x, x) + dot(y, y))
}

fn bits(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|value| value.to_bits()).collect()
}

impl Prompt {
    fn calc_diff(&self, logits: &[f32]) -> f64 {
        match (&self.first_logits, &self.top5_ids, &self.top5_logits) {
            (Some(wanted), _, _) => calc_diff(logits, wanted),
            (None, Some(ids), Some(wanted)) => {
                let got: Vec<f32> = ids.iter().map(|&id| logits[id]).collect();
                calc_diff(&got, wanted)
            }
            _ => panic!("the reference has no logits"),
        }
    }
}

/// Logits of the same rows from the CPU model, which is held against transformers by its own tests.
fn on_cpu((dir, prefill): (&Path, PrefillAttention), sequences: &[(Vec<u32>, Vec<u32>)]) -> Vec<Vec<f32>> {
    let config = Arc::new(ModelConfig::from_dir(dir).unwrap());
    let checkpoint = Checkpoint::open(dir).unwrap();
    let cpu = Cpu::single_threaded();
    let mut model = Model::load_for(prefill, &checkpoint, &config, cpu.clone(), &mut |_, _| ()).unwrap();
    let mut experts = LocalExperts::load(&checkpoint, &config, cpu).unwrap();
    let mut kv = KvPages::new(&config, 16, BLOCK_SIZE);
    let mut rows = Vec::new();
    for (prompt, forced) in sequences {
        let tokens: Vec<u32> = prompt.iter().chain(forced).copied().collect();
        let seq = BatchSeq {
            start: 0,
            len: tokens.len(),
            context: 0,
            block_table: (0..16).collect(),
            logits: LogitRows::All,
            expanded: if prefill == PrefillAttention::Expanded { prompt.len() } else { 0 },
        };
        let positions = (0..tokens.len() as u32).collect();
        let logits =
            model.forward(&Batch { tokens, positions, seqs: vec![seq] }, &mut kv, &mut experts).unwrap();
        rows.extend(logits.rows.chunks_exact(logits.vocab).skip(prompt.len() - 1).map(<[f32]>::to_vec));
    }
    rows
}

/// Rounding to BF16 moves a router's choice now and then, and a row with another expert is far off, in transformers as
/// well: the median is the measure. First logits of transformers in BF16 differ from those in f32 by up
/// to 9e-3 on these models.
/// One test at a time: what one queues on the device could spoil another's recording.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn logits_are_those_of_the_cpu_and_of_transformers() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let table: Vec<u32> = (0..16).rev().collect();
    for (dir, prefill) in cases() {
        let Some(mut rig) = Rig::load(&device, (&dir, prefill), 0) else { continue };
        let prompts = std::mem::take(&mut rig.reference.prompts);
        let (mut got, mut first) = (Vec::new(), Vec::new());
        for prompt in &prompts {
            let rows = rig.forced(&prompt.prompt_ids, &prompt.greedy_ids, &table);
            first.push(prompt.calc_diff(&rows[0]));
            got.extend(rows);
        }
        let sequences: Vec<_> =
            prompts.iter().map(|prompt| (prompt.prompt_ids.clone(), prompt.greedy_ids.clone())).collect();
        let wanted = on_cpu((&dir, prefill), &sequences);
        assert_eq!(got.len(), wanted.len());
        let mut diffs: Vec<f64> =
            got.iter().zip(&wanted).map(|(got, wanted)| calc_diff(got, wanted)).collect();
        diffs.sort_by(f64::total_cmp);
        first.sort_by(f64::total_cmp);
        let (median, worst) = (diffs[diffs.len() / 2], diffs[diffs.len() - 1]);
        let off = diffs.iter().filter(|diff| **diff > 1e-2).count();
        println!(
            "{}: rows {median:.1e} median {worst:.1e} worst {off}/{} off; first logits of transformers {:.1e}..{:.1e}",
            rig.name,
            diffs.len(),
            first[0],
            first[first.len() - 1]
        );
        // FP8 products round their activations to 4 bits of fraction; the CPU keeps them in f32.
        let max = if rig.rank.config().fp8_blocks { 1e-2 } else { 1e-3 };
        assert!(median < max, "{}: half of the rows differ by {median:e} and more", rig.name);
        assert!(first[first.len() / 2] < 2.0 * max, "{}: first logits differ by {first:?}", rig.name);
    }
}

#[test]
fn batch_chunks_recordings_and_maps_do_not_change_a_bit() {
    let _alone = alone();
    let Some(device) = device() else { return };
    for (dir, prefill) in cases() {
        let Some(mut eager) = Rig::load(&device, (&dir, prefill), 0) else { continue };
        let mut recorded = Rig::load(&device, (&dir, prefill), 64).unwrap();
        let prompts: Vec<Vec<u32>> =
            eager.reference.prompts.iter().map(|prompt| prompt.prompt_ids.clone()).collect();
        let name = eager.name.clone();
        let prompt = prompts.iter().max_by_key(|prompt| prompt.len()).unwrap().clone();
        let forced = [3, 1, 4, 1, 5];
        let wanted = eager.forced(&prompt, &forced, &[0, 1, 2, 3]);
        assert_eq!(
            bits(&recorded.forced(&prompt, &forced, &[7, 5, 9, 2])),
            bits(&wanted),
            "{name}: recording"
        );
        // In blocks that went through the host.
        let blocks = eager.rank.read_blocks(&[0, 1, 2, 3]).unwrap();
        let parts = [30, 28, 29, 31].into_iter().zip(blocks.chunks_exact(eager.rank.block_bytes()));
        recorded.rank.write_blocks(&parts.collect::<Vec<_>>()).unwrap();
        let (last, table) = (prompt.len() + forced.len() - 1, vec![30, 28, 29, 31]);
        let share = Share { tokens: vec![forced[4]], context: last, table, prompt: false };
        assert_eq!(bits(&recorded.logits(&[share])), bits(&wanted[5..]), "{name}: blocks of another rank");
        // In chunks, beside other sequences.
        let table = vec![20, 21, 22, 23];
        let other = Share { tokens: prompts[0].clone(), context: 0, table, prompt: true };
        // A row that was drawn, in the same step.
        let drawn = Share { tokens: vec![5], context: prompts[0].len(), prompt: false, ..other.clone() };
        for chunk in [1, 5, 64] {
            let mut last = Vec::new();
            for (index, tokens) in prompt.chunks(chunk).enumerate() {
                let (tokens, table) = (tokens.to_vec(), vec![11, 10, 12, 13]);
                let share = Share { tokens, context: index * chunk, table, prompt: true };
                last = recorded.logits(&[other.clone(), share, drawn.clone()]).swap_remove(1);
            }
            assert_eq!(bits(&[last]), bits(&wanted[..1]), "{name}: chunks of {chunk}");
        }
        // Under another map, taken between two steps, with and without a recording.
        for rig in [&mut eager, &mut recorded] {
            let shape = rig.layout.shape();
            for moe_layer in 0..rig.layout.layers().len() {
                let rotated = (0..shape.slots).map(|slot| (slot * 3 + moe_layer as u32 + 1) % shape.experts);
                let mut map: Vec<u32> = rotated.collect();
                // Whatever the rotation missed goes to the last slots.
                for expert in (0..shape.experts).filter(|expert| !map.contains(expert)).collect::<Vec<_>>() {
                    let doubled =
                        map.iter().position(|e| map.iter().filter(|x| *x == e).count() > 1).unwrap();
                    map[doubled] = expert;
                }
                rig.place(moe_layer, ExpertMap::new(shape, map).unwrap());
            }
            let table = [3, 2, 1, 0];
            assert_eq!(bits(&rig.forced(&prompt, &forced, &table)), bits(&wanted), "{name}: another map");
        }
        eager.epoch += 1;
        eager.rank.connect(eager.epoch, &[eager.rank.handle()], None).unwrap();
        assert_eq!(
            bits(&eager.forced(&prompt, &forced, &[0, 1, 2, 3])),
            bits(&wanted),
            "{name}: a new epoch"
        );
    }
}

/// Runs requests to their ends through the scheduler, up to `depth` steps in flight.
fn run(rig: &mut Rig, depth: usize, requests: Vec<Request>) -> Vec<(RequestId, Vec<u32>, Vec<u32>)> {
    let config = SchedulerConfig {
        block_size: BLOCK_SIZE,
        num_blocks: rig.rank.num_blocks(),
        max_num_seqs: 32,
        max_num_batched_tokens: 128,
        max_model_len: 512,
        enable_prefix_caching: true,
        prefill_attention: rig.prefill,
        max_waiting: 256,
        vocab_size: rig.rank.config().vocab_size,
    };
    let mut scheduler = Scheduler::new(config).unwrap().with_async_depth(depth);
    let mut done: Vec<(RequestId, Vec<u32>, Vec<u32>)> =
        requests.iter().map(|request| (request.id, Vec::new(), Vec::new())).collect();
    requests.into_iter().for_each(|request| scheduler.add(request).unwrap());
    while scheduler.has_work() || rig.rank.in_flight() > 0 {
        if rig.rank.in_flight() < depth && scheduler.has_work() && scheduler.can_schedule() {
            let step = scheduler.schedule();
            rig.rank.launch(&step, GroupStep::of(&step)).unwrap();
        }
        if rig.rank.in_flight() == depth || !scheduler.can_schedule() || !scheduler.has_work() {
            let (drawn, logits) = rig.rank.finish().unwrap();
            for output in scheduler.complete_drawn(&drawn, &logits) {
                assert!(!matches!(output.finish, Some(FinishReason::Error(_))), "{:?}", output.finish);
                let entry = done.iter_mut().find(|entry| entry.0 == output.id).unwrap();
                entry.1.extend(&output.tokens);
                entry.2.extend(output.logprobs.iter().map(|logprob| logprob.logprob.to_bits()));
            }
        }
    }
    done
}

#[test]
fn steps_scheduled_ahead_draw_the_same() {
    let _alone = alone();
    let Some(device) = device() else { return };
    let dir = root().join("models/sundial-20m");
    for prefill in [PrefillAttention::Absorbed, PrefillAttention::Expanded] {
        let mut rig = Rig::load(&device, (&dir, prefill), 64).unwrap();
        let prompts: Vec<Vec<u32>> =
            rig.reference.prompts.iter().map(|prompt| prompt.prompt_ids.clone()).collect();
        let requests = |rig: &Rig| -> Vec<Request> {
            let make = |index: usize| Request {
                id: RequestId(index as u128 + 1),
                prompt: prompts[index % prompts.len()].clone(),
                sampling: SamplingParams {
                    temperature: if index.is_multiple_of(3) { 0.0 } else { 0.8 },
                    top_p: if index.is_multiple_of(2) { 0.9 } else { 1.0 },
                    top_k: if index.is_multiple_of(5) { 20 } else { 0 },
                    seed: index as u64,
                    ..SamplingParams::default()
                },
                stop: StopConditions {
                    max_tokens: 20 + index as u32,
                    min_tokens: 0,
                    eos_token_ids: Vec::new(),
                    stop_token_ids: Vec::new(),
                },
                generated: Vec::new(),
                prompt_logprobs: None,
                grammar: None,
                priority: 0,
                turn: 0,
                logprobs: Some(2),
            };
            let _ = rig;
            (0..40).map(make).collect()
        };
        let (first, ahead) = (requests(&rig), requests(&rig));
        let wanted = run(&mut rig, 1, first);
        assert!(wanted.iter().all(|(_, tokens, _)| !tokens.is_empty()));
        assert_eq!(run(&mut rig, 2, ahead), wanted);
    }
}
