//! The bounds of a scheduler, and what it refuses.

use bincode::{Decode, Encode};

use crate::batch::PrefillAttention;
use crate::request::Request;
use crate::sampler;

/// The bounds of one rank's scheduler. vLLM's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens of one KV block.
    pub block_size: usize,
    /// KV blocks of the rank.
    pub num_blocks: usize,
    /// Sequences that run at once, at most.
    pub max_num_seqs: usize,
    /// Tokens of one step, at most; at least `max_num_seqs`, so that every running sequence can decode at every step.
    pub max_num_batched_tokens: usize,
    /// Tokens of one sequence, prompt and output, at most.
    pub max_model_len: usize,
    /// Whether sequences share the KV blocks of equal prefixes.
    pub enable_prefix_caching: bool,
    /// How rows of prompts attend, as the model was loaded for.
    pub prefill_attention: PrefillAttention,
    /// Sequences that wait, at most; preempted ones come on top.
    pub max_waiting: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A bound is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Some running sequences could not decode.
    #[error("max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs})")]
    Budget {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// `max_num_seqs`.
        seqs: usize,
    },
}

impl SchedulerConfig {
    /// Fails when a bound is zero or the bounds contradict each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bounds = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("max_waiting", self.max_waiting),
            ("vocab_size", self.vocab_size),
        ];
        if let Some((name, _)) = bounds.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(ConfigError::Budget { tokens: self.max_num_batched_tokens, seqs: self.max_num_seqs });
        }
        Ok(())
    }

    /// Tokens of the longest sequence that can run: the context length, or less where the KV cache is smaller.
    pub fn max_len(&self) -> usize {
        self.max_model_len.min(self.num_blocks.saturating_mul(self.block_size))
    }

    /// Says why `request` can never run here, whatever the load.
    pub(super) fn check(&self, request: &Request) -> Result<(), RefuseReason> {
        if request.prompt.is_empty() {
            return Err(RefuseReason::EmptyPrompt);
        }
        let tokens = request.prompt.len() + request.generated.len();
        if tokens + 1 > self.max_model_len {
            return Err(RefuseReason::TooLong {
                tokens: tokens as u64,
                max_model_len: self.max_model_len as u64,
            });
        }
        if tokens + 1 > self.max_len() {
            return Err(RefuseReason::NeverFits { tokens: tokens as u64, kv_tokens: self.max_len() as u64 });
        }
        let vocab_size = self.vocab_size as u64;
        let all = request.prompt.iter().chain(&request.generated);
        if let Some(&token) = all.into_iter().find(|&&token| u64::from(token) >= vocab_size) {
            return Err(RefuseReason::UnknownToken { token, vocab_size });
        }
        sampler::check_params(&request.sampling, self.vocab_size).map_err(RefuseReason::Parameter)
    }
}

/// A request that was not taken, handed back.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// The request as it came.
    pub request: Box<Request>,
    /// Why.
    pub reason: RefuseReason,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum RefuseReason {
    /// Too many wait already. The only reason that passes: another rank, or this one later, may take it.
    #[error("the queue is full: {waiting} sequences wait already")]
    QueueFull {
        /// Sequences that wait.
        waiting: u32,
    },
    /// A sequence of that name is here.
    #[error("a sequence of this id is running or waiting here already")]
    Duplicate,
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// It moved here with tokens that its grammar does not allow.
    #[error("what was generated so far does not follow the grammar of the request")]
    OffGrammar,
    /// No token could be added.
    #[error(
        "the prompt has {tokens} tokens, but the context length is {max_model_len} and one must be left for output"
    )]
    TooLong {
        /// Tokens of the prompt, and output drawn elsewhere.
        tokens: u64,
        /// The context length.
        max_model_len: u64,
    },
    /// It would not run even alone.
    #[error(
        "the prompt has {tokens} tokens, but the KV cache holds {kv_tokens} and one must be left for output"
    )]
    NeverFits {
        /// Tokens of the prompt, and output drawn elsewhere.
        tokens: u64,
        /// Tokens that the KV cache holds.
        kv_tokens: u64,
    },
    /// A token id is out of range.
    #[error("token id {token} is not in the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Token ids are below this.
        vocab_size: u64,
    },
    /// A sampling parameter is out of range.
    #[error("{0}")]
    Parameter(String),
}

impl RefuseReason {
    /// Whether the same request may be taken elsewhere or later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::QueueFull { .. })
    }
}
