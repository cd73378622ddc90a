//! What one step computes: the flat tokens of its sequences.
//!
//! The scheduler builds it, the model reads it. It holds no state: executing the same batch again writes the same
//! keys and values to the same places, so an aborted step can simply be redone.

use std::ops::Deref;

use bincode::{Decode, Encode};

use crate::config::{Attention, ModelConfig};
use crate::request::TokenLogprob;

/// The tokens of one step, sequence after sequence. Empty on a rank that only keeps its peers company.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[t]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[t]`.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub seqs: Vec<BatchSeq>,
}

impl Batch {
    /// Whether the step computes no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Rows of logits that the model returns for this batch.
    pub fn num_logit_rows(&self) -> usize {
        self.seqs.iter().map(BatchSeq::num_logit_rows).sum()
    }
}

/// One sequence's share of a batch: `len` tokens that follow `context` tokens already in the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSeq {
    /// First row in `Batch::tokens`.
    pub start: usize,
    /// Tokens of this step, at least one.
    pub len: usize,
    /// Tokens whose keys and values are in the KV cache already.
    pub context: usize,
    /// KV blocks in the order of positions; position `p` lives in `block_table[p / block_size]`. Covers at least
    /// `context + len` positions.
    pub block_table: Vec<u32>,
    /// Rows whose logits are wanted.
    pub logits: LogitRows,
    /// The first so many rows are a prompt's and attend to expanded keys and values; see [`PrefillAttention`].
    pub expanded: usize,
}

/// How rows of prompts attend, where a model has latent attention. Rows of generated tokens always attend absorbed, as
/// they do when they are computed again after a preemption or on another rank.
///
/// Either way of attending gives bits of its own, so which one a row takes depends on its position alone (PA-1): cuts of
/// a prompt, neighbours and remaps change nothing. The prefix cache shares a block where all of its rows, and those of
/// the blocks before it, attended in the same way (PA-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum PrefillAttention {
    /// All heads read the cached latents, as generated tokens do.
    #[default]
    Absorbed,
    /// Keys and values of every head are made from the latents first: less work where many rows share them.
    Expanded,
}

impl PrefillAttention {
    /// As it is written in cluster.toml.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absorbed => "absorbed",
            Self::Expanded => "expanded",
        }
    }

    /// # Errors
    /// The model has no latents to expand.
    pub fn check(self, config: &ModelConfig) -> Result<(), NoLatents> {
        match (self, &config.attention) {
            (Self::Absorbed, _) | (Self::Expanded, Attention::Mla(_)) => Ok(()),
            (Self::Expanded, Attention::Gqa(_)) => Err(NoLatents),
        }
    }
}

/// Expanded attention was asked for where there is nothing to expand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`prefill_attention` = \"expanded\" needs a model with latent attention (MLA): write \"absorbed\", or leave it out"
)]
pub struct NoLatents;

impl BatchSeq {
    /// Rows of logits that the model returns for this sequence.
    pub fn num_logit_rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.len,
        }
    }
}

/// Which rows of a sequence need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk of a prompt that goes on.
    None,
    /// The last row: the next token is drawn from it.
    Last,
    /// Every row: prompt log-probabilities were asked for.
    All,
}

/// One step of a rank: what it computes, where tokens come from that were not known when it was scheduled, and where
/// the next tokens are drawn. It reads as its `Batch`, which is all that a model needs when nothing is scheduled ahead
/// and the host draws.
///
/// Contract (ST-1): a rank's steps run in the order in which they were scheduled, each after the one before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// What is computed.
    pub batch: Batch,
    /// The tokens that the previous step draws: `batch.tokens` has `PLACEHOLDER` there. In the order of rows.
    pub feeds: Vec<Feed>,
    /// What becomes of the logits of each of `batch.seqs`; as long as that.
    pub sampling: Vec<Sampling>,
}

/// Stands in `Batch::tokens` for a token that is not known yet. A valid token id, so a step can run before it is fed.
pub const PLACEHOLDER: u32 = 0;

/// A token that the previous step draws on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Its row in `Batch::tokens`.
    pub row: u32,
    /// Which of the previous step's `device_draws` it is.
    pub draw: u32,
}

/// Where the logits of a sequence are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// There are none (`LogitRows::None`).
    None,
    /// On the device: the next token is drawn from the only row (`LogitRows::Last`).
    Device(DeviceSampling),
    /// On the host, which needs all rows: for prompt log-probabilities, or to draw with more than `DeviceSampling`.
    Host,
}

/// How the device draws a token. Logits are used as the model computed them; meaning and order as in `sampler`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceSampling {
    /// Exactly 0 is greedy, and then the next four do not matter.
    pub temperature: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// The random number of this draw, in [0, 1): the share of the kept probability, in order of token ids, at which
    /// the drawn token lies.
    pub uniform: f64,
    /// Report the token's log-probability and rank, and those of this many most likely tokens.
    pub logprobs: Option<u32>,
}

/// What the device drew for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Where `DeviceSampling::logprobs` asks for it.
    pub logprob: Option<TokenLogprob>,
}

impl Step {
    /// The draws of the device: the row of the batch whose logits are used, and how.
    pub fn device_draws(&self) -> impl Iterator<Item = (usize, &DeviceSampling)> {
        self.seqs.iter().zip(&self.sampling).filter_map(|(seq, sampling)| match sampling {
            Sampling::Device(how) => Some((seq.start + seq.len - 1, how)),
            Sampling::None | Sampling::Host => None,
        })
    }

    /// The rows of the batch whose logits the host needs, ascending.
    pub fn host_rows(&self) -> impl Iterator<Item = usize> {
        self.seqs.iter().zip(&self.sampling).flat_map(|(seq, sampling)| match sampling {
            Sampling::Host => seq.start + seq.len - seq.num_logit_rows()..seq.start + seq.len,
            Sampling::None | Sampling::Device(_) => 0..0,
        })
    }
}

impl Deref for Step {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        &self.batch
    }
}
