//! What a rank is asked to generate and what it answers: the types that cross from the ingress to a rank and back.
//!
//! Plain data. Text, templates and stop strings belong to the ingress; here are token ids only.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::grammar::Grammar;

/// Names one sequence over its whole life, on whichever ranks it runs. Unique in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct RequestId(pub u128);

/// How the next token is chosen from the logits. Names and meaning follow vLLM's `SamplingParams`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probability reaches this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens at least this likely relative to the most likely one, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides (multiplies, where negative) logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Keys the counter-based generator together with the position: a moved sequence draws the same tokens.
    pub seed: u64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
        }
    }
}

/// When a sequence ends. Stop strings are the ingress's: it aborts the request when it sees one.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct StopConditions {
    /// At most this many output tokens, those of `Request::generated` included.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens are never drawn before this many output tokens.
    pub min_tokens: u32,
    /// The model's end-of-sequence tokens; empty when the client asked to ignore them.
    pub eos_token_ids: Vec<u32>,
    /// The client's stop tokens.
    pub stop_token_ids: Vec<u32>,
}

/// One sequence to generate.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Output tokens drawn before the sequence moved to this rank. They are prefilled like the prompt, counted as
    /// output, and never sent again.
    pub generated: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// When it ends.
    pub stop: StopConditions,
    /// What its output must look like.
    pub grammar: Option<Box<Grammar>>,
    /// Report the log-probability of each output token and of this many most likely ones (0: only its own).
    pub logprobs: Option<u32>,
    /// Likewise for each prompt token but the first. Switches the prefix cache off for this sequence.
    pub prompt_logprobs: Option<u32>,
    /// Smaller runs first.
    pub priority: i32,
    /// Among equal priorities smaller runs first, equal ones in order of arrival: how clients take turns.
    pub turn: u64,
}

/// Log-probability of one token and of the most likely alternatives at its position.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the raw logits (before penalties and temperature).
    pub logprob: f32,
    /// Its rank among all tokens, 1 is the most likely.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FinishReason {
    /// It drew this end-of-sequence or stop token (not part of the text), or its grammar lets nothing else follow.
    Stop(u32),
    /// It reached `max_tokens` or the context length.
    Length,
    /// It was aborted by its client.
    Aborted,
    /// The rank could not go on; says why.
    Error(String),
}

/// What one step added to one sequence.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Output {
    /// The sequence.
    pub id: RequestId,
    /// Index among the output tokens of `tokens[0]`: a receiver drops what it already has.
    pub first_index: u32,
    /// New output tokens.
    pub tokens: Vec<u32>,
    /// As long as `tokens` where log-probabilities were asked for, else empty.
    pub logprobs: Vec<TokenLogprob>,
    /// Once, with the first output: one entry for each prompt token but the first.
    pub prompt_logprobs: Option<Vec<TokenLogprob>>,
    /// Prompt tokens that the prefix cache served.
    pub cached_tokens: u32,
    /// Set on the last output.
    pub finish: Option<FinishReason>,
}

/// What a rank tells the router and `/metrics` about itself.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct RankStats {
    /// KV blocks in all.
    pub kv_blocks: u32,
    /// KV blocks that hold tokens of running sequences.
    pub kv_blocks_used: u32,
    /// Sequences in the running batch.
    pub running: u32,
    /// Sequences waiting.
    pub waiting: u32,
    /// Prompt tokens not yet computed, of waiting and running sequences.
    pub queued_prefill_tokens: u64,
    /// Since start: prompt tokens computed, output tokens drawn, preemptions, prefix-cache queries and hits (tokens).
    pub prompt_tokens: u64,
    /// See `prompt_tokens`.
    pub output_tokens: u64,
    /// See `prompt_tokens`.
    pub preemptions: u64,
    /// See `prompt_tokens`.
    pub prefix_queries: u64,
    /// See `prompt_tokens`.
    pub prefix_hits: u64,
    /// Steps executed since start.
    pub steps: u64,
    /// Duration of the last step, microseconds.
    pub step_us: u64,
    /// Where the time of all steps since start went.
    pub phases: StepPhases,
    /// What other ranks computed for it since start.
    pub transfers: KvTransfers,
}

/// KV blocks that a rank got from others, with the sequences that it went on with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct KvTransfers {
    /// Sequences whose blocks were fetched.
    pub fetches: u64,
    /// Those of them that did not get all: the rest was computed.
    pub failures: u64,
    /// Bytes of the blocks that came.
    pub bytes: u64,
    /// Microseconds from the first question to the last answer, of all together.
    pub us: u64,
}

/// Microseconds by what a rank did in its steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct StepPhases {
    /// Waiting for the headers of the other ranks: the slowest of them is late.
    pub headers: u64,
    /// Choosing the batch.
    pub schedule: u64,
    /// The model itself: attention, dense layers, this rank's experts. On a GPU everything between launch and results.
    pub compute: u64,
    /// Waiting for rows from other ranks. On a GPU part of `compute`, since it happens within a recording.
    pub dispatch: u64,
    /// Waiting for rows to come back from experts. On a GPU part of `compute`.
    pub combine: u64,
    /// Drawing tokens and handing them out.
    pub sample: u64,
}

impl StepPhases {
    /// Names, in the order of [`Self::values`].
    pub const NAMES: [&str; 6] = ["headers", "schedule", "compute", "dispatch", "combine", "sample"];

    /// Every phase.
    pub fn values(&self) -> [u64; 6] {
        [self.headers, self.schedule, self.compute, self.dispatch, self.combine, self.sample]
    }

    /// Counts another step.
    pub fn add(&mut self, step: &Self) {
        self.headers += step.headers;
        self.schedule += step.schedule;
        self.compute += step.compute;
        self.dispatch += step.dispatch;
        self.combine += step.combine;
        self.sample += step.sample;
    }
}
