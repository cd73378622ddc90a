//! One sequence: its tokens, its KV blocks and how far they are computed.

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
}

impl Sequence {
    /// A sequence that waits. One that moved here with output has sent its prompt log-probabilities already.
    pub(super) fn new(request: Request) -> Self {
        let mut tokens = request.prompt.clone();
        tokens.extend_from_slice(&request.generated);
        let wanted = request.prompt_logprobs.is_some() && request.generated.is_empty();
        Self {
            tokens,
            computed: 0,
            table: Vec::new(),
            registered: 0,
            hashes: Vec::new(),
            cached_tokens: None,
            prompt_logprobs: wanted.then(Vec::new),
            request,
        }
    }

    pub(super) fn id(&self) -> RequestId {
        self.request.id
    }

    /// Output tokens so far, those drawn elsewhere included.
    pub(super) fn output(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// Tokens to compute before the next one can be drawn, at least one.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Prompt tokens still to compute.
    pub(super) fn remaining_prompt(&self) -> usize {
        self.request.prompt.len().saturating_sub(self.computed)
    }

    /// Whether logits of prompt positions are still owed.
    pub(super) fn owes_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.as_ref().is_some_and(|done| done.len() + 1 < self.request.prompt.len())
    }

    /// Takes blocks for all its tokens, cached ones as far as there are any. The last token is always computed.
    /// Returns false, and takes nothing, when too few are idle.
    pub(super) fn admit(&mut self, pool: &mut BlockPool, block_size: usize, use_cache: bool) -> bool {
        let hits = if use_cache && !self.owes_prompt_logprobs() {
            extend_hashes(&mut self.hashes, &self.tokens, block_size);
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
        true
    }

    /// Takes the block that the last token needs, if any. Returns false when none is idle.
    pub(super) fn grow(&mut self, pool: &mut BlockPool, block_size: usize) -> bool {
        let missing = self.tokens.len().div_ceil(block_size) - self.table.len();
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

    /// Gives its blocks back; what they held must be computed again.
    pub(super) fn release(&mut self, pool: &mut BlockPool) {
        pool.release(&self.table);
        self.table.clear();
        self.registered = 0;
        self.computed = 0;
    }

    /// Makes the full computed blocks hittable.
    pub(super) fn register(&mut self, pool: &mut BlockPool, block_size: usize) {
        let full = self.computed / block_size;
        if full == self.registered {
            return;
        }
        extend_hashes(&mut self.hashes, &self.tokens, block_size);
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
        let full = self.output().len() >= stop.max_tokens as usize || self.tokens.len() >= max_len;
        full.then_some(FinishReason::Length)
    }

    /// The request that continues it elsewhere.
    pub(super) fn into_request(mut self) -> Request {
        self.request.generated = self.tokens.split_off(self.request.prompt.len());
        self.request
    }
}
