//! One sequence: its tokens, its KV blocks and how far they are computed.

use crate::batch::PrefillAttention;
use crate::grammar::Constraint;
use crate::request::{FinishReason, Request, RequestId, TokenLogprob};

use super::kv::{BlockHash, BlockPool, extend_hashes};

/// A sequence that waits or runs.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) request: Request,
    /// Prompt, then output.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the KV cache. 0 while it waits.
    pub(super) computed: usize,
    /// `computed`, and the tokens that steps in flight compute. 0 while it waits.
    pub(super) scheduled: usize,
    /// Tokens that steps in flight draw: they follow `tokens`, but their ids are not known.
    pub(super) pending: usize,
    /// The last pending draw's index among its step's draws on the device; `None` when the host draws it.
    pub(super) device_draw: Option<u32>,
    /// Its KV blocks. Empty while it waits.
    pub(super) table: Vec<u32>,
    /// Blocks of `table` that the prefix cache knows.
    registered: usize,
    /// Hashes of the full blocks of a prefix of `tokens`.
    hashes: Vec<BlockHash>,
    /// Prompt tokens that the prefix cache served when it first ran; `None` before.
    pub(super) cached_tokens: Option<usize>,
    /// One entry for each prompt token but the first, as far as computed. `None` when not asked for or sent.
    pub(super) prompt_logprobs: Option<Vec<TokenLogprob>>,
    /// Rows before this one attend to expanded keys and values; `None`: no row does.
    absorbed_from: Option<usize>,
    /// How far its output is in its grammar.
    pub(super) constraint: Option<Constraint>,
}

impl Sequence {
    /// A sequence that waits. One that moved here with output has sent its prompt log-probabilities already.
    pub(super) fn new(request: Request, prefill: PrefillAttention) -> Self {
        let mut tokens = request.prompt.clone();
        tokens.extend_from_slice(&request.generated);
        let wanted = request.prompt_logprobs.is_some() && request.generated.is_empty();
        Self {
            tokens,
            computed: 0,
            scheduled: 0,
            pending: 0,
            device_draw: None,
            table: Vec::new(),
            registered: 0,
            hashes: Vec::new(),
            cached_tokens: None,
            prompt_logprobs: wanted.then(Vec::new),
            absorbed_from: match prefill {
                PrefillAttention::Absorbed => None,
                PrefillAttention::Expanded => Some(request.prompt.len()),
            },
            constraint: None,
            request,
        }
    }

    /// One that draws what a grammar allows. Hands the request back when what it has drawn elsewhere does not follow it.
    pub(super) fn constrained(
        request: Request,
        mut constraint: Constraint,
        prefill: PrefillAttention,
    ) -> Result<Self, Box<Request>> {
        if request.generated.iter().any(|&token| constraint.accept(token).is_err()) {
            return Err(Box::new(request));
        }
        Ok(Self { constraint: Some(constraint), ..Self::new(request, prefill) })
    }

    pub(super) fn id(&self) -> RequestId {
        self.request.id
    }

    /// Output tokens so far, those drawn elsewhere included.
    pub(super) fn output(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// How many of the rows from `context` on, `len` in number, attend to expanded keys and values.
    pub(super) fn expanded(&self, context: usize, len: usize) -> usize {
        self.absorbed_from.map_or(0, |from| from.saturating_sub(context).min(len))
    }

    /// Tokens, known or pending.
    fn len(&self) -> usize {
        self.tokens.len() + self.pending
    }

    /// Tokens to schedule before the next one can be drawn, at least one.
    pub(super) fn remaining(&self) -> usize {
        self.len() - self.scheduled
    }

    /// Whether more of it can be scheduled now. Not while the host owes it a token, and not when it ends with what it
    /// is owed.
    pub(super) fn is_ready(&self, max_len: usize) -> bool {
        let ends = self.output().len() + self.pending >= self.request.stop.max_tokens as usize
            || self.len() >= max_len;
        self.pending == 0 || (self.device_draw.is_some() && !ends)
    }

    /// Prompt tokens still to compute.
    pub(super) fn remaining_prompt(&self) -> usize {
        self.request.prompt.len().saturating_sub(self.computed)
    }

    /// Prompt log-probabilities that are known once everything scheduled is computed.
    pub(super) fn prompt_logprobs_ahead(&self) -> usize {
        self.prompt_logprobs.as_ref().map_or(0, Vec::len).max(self.scheduled)
    }

    /// Whether logits of prompt positions must still be scheduled.
    pub(super) fn owes_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some() && self.prompt_logprobs_ahead() + 1 < self.request.prompt.len()
    }

    /// Takes blocks for all its tokens, cached ones as far as there are any. The last token is always computed.
    /// Returns false, and takes nothing, when too few are idle.
    pub(super) fn admit(&mut self, pool: &mut BlockPool, block_size: usize, use_cache: bool) -> bool {
        let hits = if use_cache && !self.owes_prompt_logprobs() {
            extend_hashes(&mut self.hashes, &self.tokens, block_size, self.absorbed_from);
            let usable = (self.tokens.len() - 1) / block_size;
            pool.find(&self.hashes[..usable])
        } else {
            Vec::new()
        };
        let fresh = self.tokens.len().div_ceil(block_size) - hits.len();
        let Some(table) = pool.take(&hits, fresh) else {
            return false;
        };
        self.table = table;
        self.registered = hits.len();
        self.computed = hits.len() * block_size;
        self.scheduled = self.computed;
        true
    }

    /// Counts all tokens but the last as computed.
    pub(super) fn assume_computed(&mut self) {
        self.computed = self.tokens.len() - 1;
        self.scheduled = self.computed;
        self.cached_tokens = Some(self.computed);
    }

    /// Takes the block that the last token, known or pending, needs, if any. Returns false when none is idle.
    pub(super) fn grow(&mut self, pool: &mut BlockPool, block_size: usize) -> bool {
        // A draw that was pending when its steps were forgotten may have left a block too many.
        let missing = self.len().div_ceil(block_size).saturating_sub(self.table.len());
        if missing == 0 {
            return true;
        }
        match pool.take(&[], missing) {
            Some(more) => {
                self.table.extend(more);
                true
            }
            None => false,
        }
    }

    /// Forgets what steps in flight compute and draw for it.
    pub(super) fn rewind(&mut self) {
        self.scheduled = self.computed;
        self.pending = 0;
        self.device_draw = None;
    }

    /// Gives its blocks back; what they held, and what steps in flight compute, must be computed again.
    pub(super) fn release(&mut self, pool: &mut BlockPool) {
        pool.release(&self.table);
        self.table.clear();
        self.registered = 0;
        self.computed = 0;
        self.rewind();
    }

    /// Makes the full computed blocks hittable. No step in flight writes to them, and their tokens are known.
    pub(super) fn register(&mut self, pool: &mut BlockPool, block_size: usize) {
        let full = self.computed / block_size;
        if full == self.registered {
            return;
        }
        extend_hashes(&mut self.hashes, &self.tokens, block_size, self.absorbed_from);
        for block in self.registered..full {
            pool.register(self.table[block], self.hashes[block]);
        }
        self.registered = full;
    }

    /// Whether it ends with the token just appended.
    pub(super) fn finish(&self, max_len: usize) -> Option<FinishReason> {
        let stop = &self.request.stop;
        let last = *self.output().last()?;
        if stop.eos_token_ids.contains(&last) || stop.stop_token_ids.contains(&last) {
            return Some(FinishReason::Stop(last));
        }
        if let Some(eos) = self.constraint.as_ref().and_then(Constraint::ended) {
            return Some(FinishReason::Stop(eos));
        }
        let full = self.output().len() >= stop.max_tokens as usize || self.tokens.len() >= max_len;
        full.then_some(FinishReason::Length)
    }

    /// The request that continues it elsewhere.
    pub(super) fn into_request(mut self) -> Request {
        self.request.generated = self.tokens.split_off(self.request.prompt.len());
        self.request
    }
}
