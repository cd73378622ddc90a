//! Decides which tokens each step computes: continuous batching with chunked prefill over a paged KV cache.
//!
//! Pure: `schedule` says what to compute, the rank runs the model, `complete` takes the logits and says what was
//! drawn. Semantics follow vLLM's V1 scheduler, with two differences. A sequence is admitted when the blocks of all
//! its present tokens are idle, so a prefill under way never needs another block. And blocks enter the prefix cache
//! once they are computed, not when they are scheduled, so a step may be aborted and redone.

mod config;
mod kv;
mod sequence;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::batch::{Batch, BatchSeq, LogitRows};
use crate::model::Logits;
use crate::request::{FinishReason, Output, RankStats, Request, RequestId, TokenLogprob};
use crate::sampler::{Draw, SampleError, Sampler, token_logprob};

pub use config::{ConfigError, RefuseReason, Refused, SchedulerConfig};
pub use kv::{BlockHash, CacheChanges, block_hashes};

use kv::BlockPool;
use sequence::Sequence;

/// Rows of one sequence that get logits in one step, at most, when prompt log-probabilities are asked for: a row is a
/// whole vocabulary of floats.
const PROMPT_LOGPROB_ROWS_MAX: usize = 512;

/// Who goes first: smaller priority, then earlier arrival. Never used twice, so it also names a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    priority: i32,
    arrival: u64,
}

#[derive(Debug)]
struct InFlight {
    batch: Arc<Batch>,
    /// Whose share each of `batch.seqs` is. Those who are gone by the end of the step were aborted.
    turns: Vec<Turn>,
}

/// The sequences of one rank.
///
/// Invariant (SC-1): only running sequences hold blocks, and each holds enough for its computed tokens.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    sampler: Sampler,
    turns: HashMap<RequestId, Turn>,
    waiting: BTreeMap<Turn, Sequence>,
    running: BTreeMap<Turn, Sequence>,
    in_flight: Option<InFlight>,
    arrivals: u64,
    stats: RankStats,
}

impl Scheduler {
    /// A scheduler without sequences; fails when the configuration contradicts itself.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            pool: BlockPool::new(config.num_blocks),
            sampler: Sampler::default(),
            turns: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            in_flight: None,
            arrivals: 0,
            stats: RankStats::default(),
            config,
        })
    }

    /// Its bounds.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Queues a request, or hands it back with the reason.
    pub fn add(&mut self, request: Request) -> Result<(), Refused> {
        let checked = if self.turns.contains_key(&request.id) {
            Err(RefuseReason::Duplicate)
        } else if self.waiting.len() >= self.config.max_waiting {
            Err(RefuseReason::QueueFull { waiting: self.waiting.len() as u32 })
        } else {
            self.config.check(&request)
        };
        if let Err(reason) = checked {
            return Err(Refused { request: Box::new(request), reason });
        }
        let turn = Turn { priority: request.priority, arrival: self.arrivals };
        self.arrivals += 1;
        self.turns.insert(request.id, turn);
        self.waiting.insert(turn, Sequence::new(request));
        Ok(())
    }

    /// Forgets a sequence and frees its blocks at once; false when it is not here. Safe while a step with it is in
    /// flight: the step may still write to its blocks, but nobody gets them before the next `schedule`, and what the
    /// step draws for it is dropped.
    pub fn abort(&mut self, id: RequestId) -> bool {
        let Some(turn) = self.turns.get(&id).copied() else {
            return false;
        };
        self.waiting.remove(&turn);
        if self.running.contains_key(&turn) {
            self.remove_running(turn);
        }
        self.turns.remove(&id);
        true
    }

    /// Whether any sequence waits or runs.
    pub fn has_work(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Sequences that wait, preempted ones included.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The batch of the next step, empty when there is nothing to do. It stays in flight until `complete` or
    /// `abandon`; until then the same batch is returned again.
    pub fn schedule(&mut self) -> Arc<Batch> {
        if let Some(in_flight) = &self.in_flight {
            return Arc::clone(&in_flight.batch);
        }
        let plan = self.plan();
        let mut batch = Batch::default();
        for &(turn, len) in &plan {
            push_share(&mut batch, &self.running[&turn], len);
        }
        let batch = Arc::new(batch);
        let turns = plan.into_iter().map(|(turn, _)| turn).collect();
        self.in_flight = Some(InFlight { batch: Arc::clone(&batch), turns });
        batch
    }

    /// The batch in flight, if any.
    pub fn in_flight(&self) -> Option<&Arc<Batch>> {
        self.in_flight.as_ref().map(|in_flight| &in_flight.batch)
    }

    /// Forgets the batch in flight, as if it had never been scheduled.
    pub fn abandon(&mut self) {
        self.in_flight = None;
    }

    /// Takes the logits of the batch in flight: draws tokens, caches full blocks, ends sequences. Returns what is new
    /// for each sequence that drew a token or ended.
    ///
    /// # Panics
    /// When no batch is in flight or the logits are not those of the batch.
    pub fn complete(&mut self, logits: &Logits) -> Vec<Output> {
        let InFlight { batch, turns } = self.in_flight.take().expect("complete follows schedule");
        assert_eq!(logits.rows.len(), batch.num_logit_rows() * logits.vocab, "logits of another batch");
        self.stats.steps += 1;
        let mut rest = logits.rows.as_slice();
        let mut outputs = Vec::new();
        for (share, turn) in batch.seqs.iter().zip(turns) {
            let (rows, others) = rest.split_at(share.num_logit_rows() * logits.vocab);
            rest = others;
            let Some(sequence) = self.running.get_mut(&turn) else {
                continue;
            };
            self.stats.prompt_tokens += share.len.min(sequence.remaining_prompt()) as u64;
            sequence.computed = share.context + share.len;
            if self.config.enable_prefix_caching {
                sequence.register(&mut self.pool, self.config.block_size);
            }
            let rows: Vec<&[f32]> = rows.chunks_exact(logits.vocab).collect();
            let max_len = self.config.max_len();
            let Some(output) = advance(sequence, share, &rows, &mut self.sampler, max_len) else {
                continue;
            };
            self.stats.output_tokens += output.tokens.len() as u64;
            if output.finish.is_some() {
                self.turns.remove(&output.id);
                self.remove_running(turn);
            }
            outputs.push(output);
        }
        outputs
    }

    /// Gives up all sequences, in the order of their turns, each as the request that continues it on another rank. A
    /// batch in flight is forgotten.
    pub fn take_back(&mut self) -> Vec<Request> {
        self.in_flight = None;
        self.turns.clear();
        let mut sequences = std::mem::take(&mut self.waiting);
        for (turn, mut sequence) in std::mem::take(&mut self.running) {
            sequence.release(&mut self.pool);
            sequences.insert(turn, sequence);
        }
        sequences.into_values().map(Sequence::into_request).collect()
    }

    /// What it knows of the rank's figures; `step_us` is the caller's.
    pub fn stats(&self) -> RankStats {
        let all = self.waiting.values().chain(self.running.values());
        RankStats {
            kv_blocks: self.pool.len() as u32,
            kv_blocks_used: (self.pool.len() - self.pool.num_idle()) as u32,
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            queued_prefill_tokens: all.map(|sequence| sequence.remaining_prompt() as u64).sum(),
            ..self.stats.clone()
        }
    }

    /// What changed in the prefix cache since the last call. A router that keeps these sets knows which rank has
    /// which prefix.
    pub fn take_cache_changes(&mut self) -> CacheChanges {
        self.pool.take_changes()
    }

    /// Who computes how many tokens: decodes, then prefills under way, then those who wait, each in order of turns.
    fn plan(&mut self) -> Vec<(Turn, usize)> {
        let mut budget = self.config.max_num_batched_tokens;
        let mut plan = Vec::new();
        let (decodes, prefills): (Vec<Turn>, Vec<Turn>) =
            self.running.keys().partition(|turn| self.running[turn].remaining() == 1);
        let running_before = self.running.len();
        for turn in decodes {
            if self.make_room_for(turn) {
                plan.push((turn, 1));
                budget -= 1;
            }
        }
        let preempted = self.running.len() < running_before;
        for turn in prefills {
            if let Some(sequence) = self.running.get(&turn)
                && budget > 0
            {
                let len = chunk(sequence, budget);
                plan.push((turn, len));
                budget -= len;
            }
        }
        while !preempted && budget > 0 {
            let Some(turn) = self.admit_next() else {
                break;
            };
            let len = chunk(&self.running[&turn], budget);
            plan.push((turn, len));
            budget -= len;
        }
        plan
    }

    /// Gets the block that the next token of a running sequence needs, preempting whoever is last for it. Returns
    /// false when the sequence itself was preempted, now or before.
    fn make_room_for(&mut self, turn: Turn) -> bool {
        while let Some(sequence) = self.running.get_mut(&turn) {
            if sequence.grow(&mut self.pool, self.config.block_size) {
                return true;
            }
            let (last, mut victim) = self.running.pop_last().expect("at least this one runs");
            victim.release(&mut self.pool);
            self.waiting.insert(last, victim);
            self.stats.preemptions += 1;
        }
        false
    }

    /// Starts the first of those who wait; `None` when there is none, or no room for it.
    fn admit_next(&mut self) -> Option<Turn> {
        if self.running.len() >= self.config.max_num_seqs {
            return None;
        }
        let mut first = self.waiting.first_entry()?;
        let use_cache = self.config.enable_prefix_caching;
        let sequence = first.get_mut();
        if !sequence.admit(&mut self.pool, self.config.block_size, use_cache) {
            return None;
        }
        if sequence.cached_tokens.is_none() {
            let prompt_len = sequence.request.prompt.len();
            let hits = sequence.computed.min(prompt_len);
            sequence.cached_tokens = Some(hits);
            if use_cache {
                self.stats.prefix_queries += prompt_len as u64;
                self.stats.prefix_hits += hits as u64;
            }
        }
        let (turn, sequence) = first.remove_entry();
        self.running.insert(turn, sequence);
        Some(turn)
    }

    fn remove_running(&mut self, turn: Turn) {
        let mut sequence = self.running.remove(&turn).expect("the caller saw it running");
        sequence.release(&mut self.pool);
    }
}

/// Tokens that a sequence computes at this step.
fn chunk(sequence: &Sequence, budget: usize) -> usize {
    let len = sequence.remaining().min(budget);
    if sequence.owes_prompt_logprobs() { len.min(PROMPT_LOGPROB_ROWS_MAX) } else { len }
}

/// Appends the next `len` tokens of a sequence to a batch.
fn push_share(batch: &mut Batch, sequence: &Sequence, len: usize) {
    let context = sequence.computed;
    let end = context + len;
    // After a preemption some prompt log-probabilities may be known although their positions are computed again.
    let known = sequence.prompt_logprobs.as_ref().map_or(0, Vec::len);
    let logits = if sequence.owes_prompt_logprobs() && end > known {
        LogitRows::All
    } else if end == sequence.tokens.len() {
        LogitRows::Last
    } else {
        LogitRows::None
    };
    let block_table = sequence.table.clone();
    batch.seqs.push(BatchSeq { start: batch.tokens.len(), len, context, block_table, logits });
    batch.tokens.extend_from_slice(&sequence.tokens[context..end]);
    batch.positions.extend((context..end).map(|position| position as u32));
}

/// What a computed share means for its sequence: prompt log-probabilities and, at the end of the known tokens, a draw.
/// A sequence whose logits are unusable ends with an error; the others do not notice.
fn advance(
    sequence: &mut Sequence,
    share: &BatchSeq,
    rows: &[&[f32]],
    sampler: &mut Sampler,
    max_len: usize,
) -> Option<Output> {
    let first_index = sequence.output().len() as u32;
    let drawn = if share.logits == LogitRows::All { record_prompt(sequence, share, rows) } else { Ok(()) };
    let drawn = match drawn {
        Ok(()) if sequence.remaining() > 0 => return None,
        Ok(()) => draw(sequence, rows.last().expect("the last token has logits"), sampler),
        Err(error) => Err(error),
    };
    let mut output = Output {
        id: sequence.id(),
        first_index,
        tokens: Vec::new(),
        logprobs: Vec::new(),
        prompt_logprobs: None,
        cached_tokens: sequence.cached_tokens.unwrap_or(0) as u32,
        finish: None,
    };
    match drawn {
        Ok(Some((token, logprob))) => {
            sequence.tokens.push(token);
            output.tokens.push(token);
            output.logprobs.extend(logprob);
            output.prompt_logprobs = sequence.prompt_logprobs.take();
            output.finish = sequence.finish(max_len);
        }
        Ok(None) => {
            output.prompt_logprobs = sequence.prompt_logprobs.take();
            output.finish = Some(FinishReason::Length);
        }
        Err(error) => output.finish = Some(FinishReason::Error(error.to_string())),
    }
    Some(output)
}

/// The row of position `p` tells how likely prompt token `p + 1` was.
fn record_prompt(sequence: &mut Sequence, share: &BatchSeq, rows: &[&[f32]]) -> Result<(), SampleError> {
    let Some(done) = &mut sequence.prompt_logprobs else {
        return Ok(());
    };
    let request = &sequence.request;
    let top = request.prompt_logprobs.unwrap_or(0);
    for (position, row) in (share.context..).zip(rows) {
        if let Some(&token) = request.prompt.get(position + 1)
            && position == done.len()
        {
            done.push(token_logprob(row, token, top)?);
        }
    }
    Ok(())
}

/// Draws the next token; `None` when no output is wanted.
fn draw(
    sequence: &Sequence,
    row: &[f32],
    sampler: &mut Sampler,
) -> Result<Option<(u32, Option<TokenLogprob>)>, SampleError> {
    let request = &sequence.request;
    let output = sequence.output();
    if output.len() >= request.stop.max_tokens as usize {
        return Ok(None);
    }
    let stop = &request.stop;
    let forbidden = if output.len() < stop.min_tokens as usize {
        [stop.eos_token_ids.as_slice(), stop.stop_token_ids.as_slice()]
    } else {
        [[].as_slice(); 2]
    };
    let token = sampler.draw(&Draw {
        logits: row,
        params: &request.sampling,
        prompt: &request.prompt,
        output,
        position: output.len() as u64,
        forbidden,
    })?;
    let logprob = request.logprobs.map(|top| token_logprob(row, token, top)).transpose()?;
    Ok(Some((token, logprob)))
}
