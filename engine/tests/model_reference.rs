//! The forward pass against transformers, and against itself: batch, chunks and blocks must not change a bit.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod models;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use heliostat_engine::batch::{Batch, BatchSeq, LogitRows, PrefillAttention};
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::model::{
    ExchangeError, Expert, ExpertError, Experts, KvPages, LocalExperts, Model, load_expert,
};
use heliostat_kernels::cpu::Cpu;
use serde::Deserialize;

use models::{cases, models, root};

/// Largest difference of a logit, relative to the largest logit.
const TOLERANCE: f32 = 1e-3;

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

/// A loaded checkpoint with its reference.
struct Rig {
    model: Model,
    experts: LocalExperts,
    config: Arc<ModelConfig>,
    reference: Reference,
    prefill: PrefillAttention,
}

/// How a sequence is fed.
#[derive(Clone, Copy, Debug)]
struct Feed {
    chunk: usize,
    block_size: usize,
}

/// One sequence of a run.
struct Sequence {
    tokens: Vec<u32>,
    prompt_len: usize,
    cached: usize,
    block_table: Vec<u32>,
    /// Logits of the rows that a token was drawn from.
    logits: Vec<Vec<f32>>,
}

impl Rig {
    fn load(dir: &Path) -> Self {
        Self::load_on(dir, PrefillAttention::Absorbed, Cpu::single_threaded())
    }

    fn load_on(dir: &Path, prefill: PrefillAttention, cpu: Cpu) -> Self {
        let config = Arc::new(ModelConfig::from_dir(dir).unwrap());
        let checkpoint = Checkpoint::open(dir).unwrap();
        checkpoint.validate(&config).unwrap();
        let mut read = (0, 0);
        let model = Model::load_for(prefill, &checkpoint, &config, cpu.clone(), &mut |done, total| {
            read = (done, total)
        })
        .unwrap();
        assert!(read.0 == read.1 && read.0 > 0, "progress ends at its total: {read:?}");
        let experts = LocalExperts::load(&checkpoint, &config, cpu).unwrap();
        let reference = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        Self { model, experts, config, reference: serde_json::from_str(&reference).unwrap(), prefill }
    }

    /// Generates `new_tokens` greedily after each of the prompts, all in one batch.
    fn generate(&mut self, prompts: &[&[u32]], new_tokens: usize, feed: Feed) -> Vec<Sequence> {
        let blocks_each = self.blocks_each(prompts, new_tokens, feed.block_size);
        let mut kv = KvPages::new(&self.config, prompts.len() * blocks_each, feed.block_size);
        let sequence = |(number, prompt): (usize, &&[u32])| Sequence {
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            cached: 0,
            // Blocks of the sequences interleave and run backwards: nothing may rely on their order.
            block_table: (0..blocks_each)
                .rev()
                .map(|block| (block * prompts.len() + number) as u32)
                .collect(),
            logits: Vec::new(),
        };
        let mut sequences: Vec<Sequence> = prompts.iter().enumerate().map(sequence).collect();
        while sequences.iter().any(|sequence| sequence.logits.len() < new_tokens) {
            let batch = next_batch(&sequences, (new_tokens, self.prefill), feed);
            let logits = self.model.forward(&batch, &mut kv, &mut self.experts).unwrap();
            let mut rows = logits.rows.chunks_exact(logits.vocab);
            let running = sequences.iter_mut().filter(|sequence| sequence.logits.len() < new_tokens);
            for (sequence, step) in running.zip(&batch.seqs) {
                sequence.cached += step.len;
                if step.logits == LogitRows::Last {
                    let row = rows.next().unwrap().to_vec();
                    sequence.tokens.push(argmax(&row));
                    sequence.logits.push(row);
                }
            }
        }
        sequences
    }

    fn blocks_each(&self, prompts: &[&[u32]], new_tokens: usize, block_size: usize) -> usize {
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap();
        (longest + new_tokens).div_ceil(block_size)
    }
}

/// Up to `chunk` tokens of every sequence that is not done.
fn next_batch(sequences: &[Sequence], (new_tokens, prefill): (usize, PrefillAttention), feed: Feed) -> Batch {
    let mut batch = Batch::default();
    for sequence in sequences.iter().filter(|sequence| sequence.logits.len() < new_tokens) {
        let len = (sequence.tokens.len() - sequence.cached).min(feed.chunk);
        let rows = sequence.cached..sequence.cached + len;
        let last = rows.end == sequence.tokens.len();
        batch.seqs.push(BatchSeq {
            start: batch.tokens.len(),
            len,
            context: sequence.cached,
            block_table: sequence.block_table.clone(),
            logits: if last { LogitRows::Last } else { LogitRows::None },
            expanded: match prefill {
                PrefillAttention::Absorbed => 0,
                PrefillAttention::Expanded => sequence.prompt_len.saturating_sub(rows.start).min(len),
            },
        });
        batch.tokens.extend(&sequence.tokens[rows.clone()]);
        batch.positions.extend(rows.map(|position| position as u32));
    }
    batch
}

fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}

impl Prompt {
    /// Largest difference of the first step's logits, relative to the largest.
    fn difference(&self, logits: &[f32]) -> f32 {
        let all: Vec<usize> = (0..logits.len()).collect();
        let (ids, wanted) = match (&self.first_logits, &self.top5_ids, &self.top5_logits) {
            (Some(wanted), _, _) => (&all, wanted),
            (None, Some(ids), Some(wanted)) => (ids, wanted),
            _ => panic!("the reference has no logits"),
        };
        let largest = wanted.iter().fold(0f32, |max, logit| max.max(logit.abs()));
        ids.iter().zip(wanted).map(|(&id, wanted)| (logits[id] - wanted).abs() / largest).fold(0.0, f32::max)
    }
}

#[test]
fn greedy_tokens_and_first_logits_are_those_of_transformers() {
    for (dir, prefill) in cases() {
        let mut rig = Rig::load_on(&dir, prefill, Cpu::single_threaded());
        let name = format!("{} {prefill:?}", dir.file_name().unwrap().to_string_lossy());
        let mut worst = 0f32;
        for number in 0..rig.reference.prompts.len() {
            let prompt = rig.reference.prompts[number].prompt_ids.clone();
            let new_tokens = rig.reference.prompts[number].greedy_ids.len();
            let feed = Feed { chunk: usize::MAX, block_size: 16 };
            let done = rig.generate(&[&prompt], new_tokens, feed).remove(0);
            let wanted = &rig.reference.prompts[number];
            worst = worst.max(wanted.difference(&done.logits[0]));
            assert!(worst < TOLERANCE, "{name}, prompt {number}: logits differ by {worst}");
            assert_eq!(done.tokens[done.prompt_len..], wanted.greedy_ids, "{name}, prompt {number}");
        }
        println!("{name}: first logits within {worst:.1e}");
    }
}

#[test]
fn chunks_and_blocks_do_not_change_a_bit() {
    for (dir, prefill) in cases() {
        let mut rig = Rig::load_on(&dir, prefill, Cpu::single_threaded());
        let prompts: Vec<Vec<u32>> =
            rig.reference.prompts.iter().map(|prompt| prompt.prompt_ids.clone()).collect();
        let longest = prompts.iter().max_by_key(|prompt| prompt.len()).unwrap();
        let wanted = rig.generate(&[longest], 4, Feed { chunk: usize::MAX, block_size: 16 }).remove(0);
        for (chunk, block_size) in [(1, 16), (3, 4), (16, 1), (usize::MAX, 1), (3, 16), (usize::MAX, 4)] {
            let feed = Feed { chunk, block_size };
            let got = rig.generate(&[longest], 4, feed).remove(0);
            assert_eq!(bits(&got), bits(&wanted), "{}: {feed:?}", dir.display());
        }
    }
}

#[test]
fn neighbours_and_threads_do_not_change_a_bit() {
    for (dir, prefill) in cases() {
        let mut rig = Rig::load_on(&dir, prefill, Cpu::single_threaded());
        let prompts: Vec<Vec<u32>> =
            rig.reference.prompts.iter().map(|prompt| prompt.prompt_ids.clone()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let alone: Vec<Sequence> = prompts
            .iter()
            .map(|prompt| rig.generate(&[prompt], 6, Feed { chunk: usize::MAX, block_size: 4 }).remove(0))
            .collect();
        let mut rig = Rig::load_on(&dir, prefill, Cpu::new(NonZeroUsize::new(2).unwrap()).unwrap());
        for chunk in [2, usize::MAX] {
            let together = rig.generate(&prompts, 6, Feed { chunk, block_size: 4 });
            for (number, (alone, together)) in alone.iter().zip(&together).enumerate() {
                assert_eq!(bits(together), bits(alone), "{}: prompt {number}, chunk {chunk}", dir.display());
            }
        }
    }
}

#[test]
fn all_rows_of_logits_are_those_of_a_token_at_a_time() {
    for (dir, prefill) in cases() {
        let mut rig = Rig::load_on(&dir, prefill, Cpu::single_threaded());
        let prompt = rig.reference.prompts[1].prompt_ids.clone();
        let mut kv = KvPages::new(&rig.config, 64, 1);
        let block_table: Vec<u32> = (0..64).collect();
        let mut step = |range: std::ops::Range<usize>| {
            let seq = BatchSeq {
                start: 0,
                len: range.len(),
                context: range.start,
                block_table: block_table.clone(),
                logits: LogitRows::All,
                expanded: if rig.prefill == PrefillAttention::Expanded { range.len() } else { 0 },
            };
            let positions = range.clone().map(|position| position as u32).collect();
            let batch = Batch { tokens: prompt[range].to_vec(), positions, seqs: vec![seq] };
            rig.model.forward(&batch, &mut kv, &mut rig.experts).unwrap().rows
        };
        let singly: Vec<f32> = (0..prompt.len()).flat_map(|position| step(position..position + 1)).collect();
        assert!(step(0..prompt.len()) == singly, "{}", dir.display());
    }
}

/// Fails the exchange of one layer once, as a lost peer does, and counts the calls.
struct Flaky<'a> {
    experts: &'a mut LocalExperts,
    fail_in: Option<usize>,
    calls: Vec<usize>,
}

impl Experts for Flaky<'_> {
    fn forward(
        &mut self,
        moe_layer: usize,
        hidden: &[f32],
        ids: &[u32],
        weights: &[f32],
        out: &mut [f32],
    ) -> Result<(), ExchangeError> {
        self.calls.push(moe_layer);
        if self.fail_in == Some(moe_layer) {
            self.fail_in = None;
            out.fill(f32::NAN);
            return Err(ExchangeError::PeerLost { rank: 3 });
        }
        self.experts.forward(moe_layer, hidden, ids, weights, out)
    }
}

#[test]
fn an_aborted_step_can_be_done_again() {
    for dir in models() {
        let mut rig = Rig::load(&dir);
        let tokens = rig.reference.prompts[2].prompt_ids.clone();
        let prompts: &[&[u32]] = &[&tokens];
        let feed = Feed { chunk: usize::MAX, block_size: 4 };
        let wanted = rig.generate(prompts, 1, feed).remove(0);
        let sequence = Sequence {
            prompt_len: tokens.len(),
            tokens,
            cached: 0,
            block_table: (0..64).collect(),
            logits: Vec::new(),
        };
        let batch = next_batch(&[sequence], (1, rig.prefill), feed);
        let mut kv = KvPages::new(&rig.config, 64, feed.block_size);
        let last = rig.config.moe_layers() - 1;
        let mut experts = Flaky { experts: &mut rig.experts, fail_in: Some(last), calls: Vec::new() };
        let error = rig.model.forward(&batch, &mut kv, &mut experts).expect_err("a peer was lost");
        assert_eq!(error, ExchangeError::PeerLost { rank: 3 });
        let logits = rig.model.forward(&batch, &mut kv, &mut experts).unwrap();
        assert!(logits.rows == wanted.logits[0], "{}", dir.display());
    }
}

#[test]
fn an_empty_batch_still_meets_its_peers_in_every_moe_layer() {
    let mut rig = Rig::load(&root().join("tests/data/models/qwen3-moe-sparse"));
    let mut kv = KvPages::new(&rig.config, 1, 1);
    let mut experts = Flaky { experts: &mut rig.experts, fail_in: None, calls: Vec::new() };
    let logits = rig.model.forward(&Batch::default(), &mut kv, &mut experts).unwrap();
    assert!(logits.rows.is_empty());
    assert_eq!(experts.calls, [0, 1]);
}

#[test]
fn experts_travel_as_bytes() {
    for name in ["deepseek-v3-fp8", "deepseek-v3-yarn", "qwen3-moe-tied"] {
        let dir = root().join("tests/data/models").join(name);
        let (config, checkpoint) = (ModelConfig::from_dir(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
        let expert = load_expert(&checkpoint, &config, 0, 2).unwrap();
        let other = load_expert(&checkpoint, &config, 0, 3).unwrap();
        let bytes = expert.to_bytes();
        let copy = Expert::from_bytes(&bytes).unwrap();
        assert_eq!(copy.checksum(), expert.checksum());
        assert_ne!(copy.checksum(), other.checksum());
        let x: Vec<f32> = (0..3 * config.hidden_size).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |expert: &Expert| {
            let mut out = vec![0.0; x.len()];
            expert.forward(&Cpu::single_threaded(), &x, 3, &mut out);
            out
        };
        assert!(run(&copy) == run(&expert) && run(&copy) != run(&other), "{name}");
        for cut in [0, 7, 40, bytes.len() / 2, bytes.len() - 1] {
            assert!(Expert::from_bytes(&bytes[..cut]).is_err(), "{name}: {cut} bytes are not an expert");
        }
        let swapped = Expert { gate: expert.down.clone(), up: expert.up.clone(), down: expert.gate.clone() };
        assert!(matches!(Expert::from_bytes(&swapped.to_bytes()), Err(ExpertError::Shape { .. })), "{name}");
    }
}

fn bits(sequence: &Sequence) -> Vec<Vec<u32>> {
    sequence.logits.iter().map(|row| row.iter().map(|logit| logit.to_bits()).collect()).collect()
}
