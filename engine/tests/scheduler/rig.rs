//! A fake model with a paged memory, requests, and the plain definition of what a request gets.

use std::collections::{HashMap, HashSet};

use heliostat_engine::batch::{Batch, BatchSeq, LogitRows, PrefillAttention};
use heliostat_engine::model::Logits;
use heliostat_engine::request::{
    FinishReason, Output, Request, RequestId, SamplingParams, StopConditions, TokenLogprob,
};
use heliostat_engine::sampler::{Draw, Sampler, token_logprob};
use heliostat_engine::scheduler::SchedulerConfig;
use proptest::prelude::*;

pub(crate) const VOCAB: usize = 13;
pub(crate) const EOS: u32 = 3;

pub(crate) fn logits_after(prefix: &[u32]) -> Vec<f32> {
    let mut state = 0xcbf2_9ce4_8422_2325u64;
    for &token in prefix {
        state = (state ^ u64::from(token + 1)).wrapping_mul(0x100_0000_01b3).rotate_left(29);
    }
    (0..VOCAB as u64)
        .map(|token| {
            let x = (state ^ token.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (x >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
        })
        .collect()
}

/// Tokens where a model has keys and values.
pub(crate) struct FakeModel {
    pub(crate) block_size: usize,
    pub(crate) memory: Vec<Option<u32>>,
}

impl FakeModel {
    pub(crate) fn new(config: &SchedulerConfig) -> Self {
        Self { block_size: config.block_size, memory: vec![None; config.num_blocks * config.block_size] }
    }

    pub(crate) fn slot(&self, table: &[u32], position: usize) -> usize {
        table[position / self.block_size] as usize * self.block_size + position % self.block_size
    }

    /// All tokens that `seq` finds when its share is computed.
    pub(crate) fn read(&self, seq: &BatchSeq) -> Vec<u32> {
        let at = |position| self.memory[self.slot(&seq.block_table, position)].expect("never written");
        (0..seq.context + seq.len).map(at).collect()
    }

    pub(crate) fn forward(&mut self, batch: &Batch) -> Logits {
        let mut written = HashSet::new();
        for seq in &batch.seqs {
            for i in 0..seq.len {
                let position = seq.context + i;
                assert_eq!(batch.positions[seq.start + i] as usize, position);
                let slot = self.slot(&seq.block_table, position);
                assert!(written.insert(slot), "two sequences write to one place");
                self.memory[slot] = Some(batch.tokens[seq.start + i]);
            }
        }
        let mut rows = Vec::new();
        for seq in &batch.seqs {
            let tokens = self.read(seq);
            let first = match seq.logits {
                LogitRows::None => seq.len,
                LogitRows::Last => seq.len - 1,
                LogitRows::All => 0,
            };
            for i in first..seq.len {
                rows.extend(logits_after(&tokens[..seq.context + i + 1]));
            }
        }
        Logits { rows, vocab: VOCAB }
    }
}

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Generation {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) prompt_logprobs: Option<Vec<TokenLogprob>>,
    pub(crate) finish: Option<FinishReason>,
}

/// The plain definition of what a request gets.
pub(crate) fn alone(request: &Request, max_len: usize) -> Generation {
    let mut all = request.prompt.clone();
    let mut result = Generation::default();
    let (eos, stop) = (&request.stop.eos_token_ids, &request.stop.stop_token_ids);
    if let Some(top) = request.prompt_logprobs {
        let entry = |p: usize| token_logprob(&logits_after(&all[..p]), all[p], top).unwrap();
        result.prompt_logprobs = Some((1..all.len()).map(entry).collect());
    }
    while result.finish.is_none() {
        if result.tokens.len() >= request.stop.max_tokens as usize || all.len() >= max_len {
            result.finish = Some(FinishReason::Length);
            break;
        }
        let logits = logits_after(&all);
        let early = result.tokens.len() < request.stop.min_tokens as usize;
        let token = Sampler::default()
            .draw(&Draw {
                logits: &logits,
                params: &request.sampling,
                prompt: &request.prompt,
                output: &result.tokens,
                position: result.tokens.len() as u64,
                forbidden: if early { [eos, stop] } else { [&[], &[]] },
                mask: None,
            })
            .unwrap();
        all.push(token);
        result.tokens.push(token);
        result.logprobs.extend(request.logprobs.map(|top| token_logprob(&logits, token, top).unwrap()));
        if eos.contains(&token) || stop.contains(&token) {
            result.finish = Some(FinishReason::Stop(token));
        }
    }
    result
}

#[derive(Default)]
pub(crate) struct Received(pub(crate) HashMap<RequestId, Generation>);

impl Received {
    pub(crate) fn take(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            let so_far = self.0.entry(output.id).or_default();
            assert_eq!(so_far.finish, None, "output after the end");
            assert_eq!(output.first_index as usize, so_far.tokens.len(), "a token is lost or sent twice");
            if output.prompt_logprobs.is_some() {
                assert_eq!(output.first_index, 0);
                so_far.prompt_logprobs = output.prompt_logprobs;
            }
            so_far.tokens.extend(output.tokens);
            so_far.logprobs.extend(output.logprobs);
            so_far.finish = output.finish;
        }
    }
}

pub(crate) fn config() -> impl Strategy<Value = SchedulerConfig> {
    (1usize..9, 1usize..24, 1usize..7, 0usize..20, 6usize..48, any::<bool>(), 1usize..12).prop_map(
        |(block_size, num_blocks, max_num_seqs, more, max_model_len, enable_prefix_caching, max_waiting)| {
            SchedulerConfig {
                block_size,
                num_blocks,
                max_num_seqs,
                max_num_batched_tokens: max_num_seqs + more,
                max_model_len,
                enable_prefix_caching,
                prefill_attention: PrefillAttention::Absorbed,
                max_waiting,
                vocab_size: VOCAB,
            }
        },
    )
}

pub(crate) fn request() -> impl Strategy<Value = Request> {
    let shared = (0usize..20, proptest::collection::vec(0..VOCAB as u32, 1..8));
    let stop = (0u32..14, prop_oneof![2 => Just(0), 1 => 0u32..4], any::<bool>(), any::<bool>());
    let sampling = (any::<bool>(), 0u64..4, proptest::bool::weighted(0.3), proptest::bool::weighted(0.1));
    let filters = (0u32..6, any::<bool>(), any::<bool>());
    let reports = (proptest::option::of(0u32..3), proptest::option::weighted(0.2, 0u32..3));
    (shared, stop, sampling, filters, reports, -1i32..2).prop_map(
        |((shared, own), stop, (greedy, seed, penalties, bias), (top_k, top_p, min_p), reports, priority)| {
            // Prompts share prefixes, so that the cache has something to do.
            let prompt = (0..shared as u32).map(|i| i * i % VOCAB as u32).chain(own).collect();
            let sampling = SamplingParams {
                temperature: if greedy { 0.0 } else { 0.8 },
                seed,
                top_k,
                top_p: if top_p { 0.8 } else { 1.0 },
                min_p: if min_p { 0.1 } else { 0.0 },
                repetition_penalty: if penalties { 1.2 } else { 1.0 },
                frequency_penalty: if penalties { 0.1 } else { 0.0 },
                logit_bias: if bias { vec![(5, 1.5)] } else { vec![] },
                ..Default::default()
            };
            let (max_tokens, min_tokens, eos, stops) = stop;
            let eos_token_ids = if eos { vec![EOS] } else { vec![] };
            let stop_token_ids = if stops { vec![EOS + 1] } else { vec![] };
            Request {
                id: RequestId(0),
                prompt,
                generated: vec![],
                sampling,
                stop: StopConditions { max_tokens, min_tokens, eos_token_ids, stop_token_ids },
                logprobs: reports.0,
                prompt_logprobs: reports.1,
                grammar: None,
                priority,
                turn: 0,
            }
        },
    )
}

pub(crate) fn simple(id: u128, prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt,
        generated: vec![],
        sampling: SamplingParams { temperature: 0.0, ..Default::default() },
        stop: StopConditions { max_tokens, min_tokens: 0, eos_token_ids: vec![], stop_token_ids: vec![] },
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        priority: 0,
        turn: 0,
    }
}

pub(crate) fn roomy() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        num_blocks: 16,
        max_num_seqs: 4,
        max_num_batched_tokens: 8,
        max_model_len: 64,
        enable_prefix_caching: true,
        prefill_attention: PrefillAttention::Absorbed,
        max_waiting: 4,
        vocab_size: VOCAB,
    }
}
