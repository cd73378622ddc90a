//! Decides which tokens each step computes: continuous batching with chunked prefill over a paged KV cache.
//!
//! Pure: `schedule` says what to compute, the rank runs the model, `complete` takes the logits, or `complete_drawn` the
//! device's draws, and says what was drawn. Semantics follow vLLM's V1 scheduler, with two differences. A sequence is
//! admitted when the blocks of all its present tokens are idle, so a prefill under way never needs another block. And
//! blocks enter the prefix cache once they are computed, not when they are scheduled, so a step may be aborted and
//! redone.
//!
//! With an async depth above 1 a step is scheduled while those before it are computed. Their draws are pending: a
//! sequence's next token is a placeholder that the device replaces. A sequence that turns out to have ended drops what
//! younger steps compute for it.
//!
//! Blocks are freed at once, although steps in flight may still write to them (SC-2). That is safe because steps run in
//! the order of their schedule (ST-1): whoever gets a block is in a younger step and writes what it reads, later. All
//! that a block keeps for others is what the prefix cache knows, and that is computed, full, and written by nobody. It
//! stays safe when steps in flight are computed again from the oldest: what a step reads for a sequence may be
//! overwritten only when the sequence gave its blocks up, and then nobody wants the result.

mod config;
mod kv;
mod pipeline;
mod sequence;
mod share;
mod transfer;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::batch::{BatchSeq, Drawn, PLACEHOLDER, Sampling, Step};
use crate::grammar::Constraint;
use crate::model::Logits;
use crate::request::{Output, RankStats, Request, RequestId};
use crate::sampler::{SampleError, Sampler};

pub use config::{ConfigError, RefuseReason, Refused, SchedulerConfig};
pub use kv::{BlockHash, CacheChanges, block_hashes};

use kv::BlockPool;
use pipeline::Pipeline;
use sequence::Sequence;
pub use share::PROMPT_LOGPROB_ROWS_MAX;
use share::{Found, StepBuilder, advance, chunk};

/// Who goes first: smaller priority, then smaller turn of its client, then earlier arrival. Never used twice, so it also names a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    priority: i32,
    turn: u64,
    arrival: u64,
}

/// The sequences of one rank.
///
/// Invariant (SC-1): only running sequences hold blocks, and each holds enough for its scheduled tokens.
/// Invariant (SC-2): a step's result for a sequence is used only if the sequence has held its blocks since the step was
/// scheduled.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    sampler: Sampler,
    turns: HashMap<RequestId, Turn>,
    waiting: BTreeMap<Turn, Sequence>,
    running: BTreeMap<Turn, Sequence>,
    pipeline: Pipeline,
    arrivals: u64,
    stats: RankStats,
}

impl Scheduler {
    /// A scheduler without sequences, with one step in flight at a time; fails when the configuration contradicts
    /// itself.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            pool: BlockPool::new(config.num_blocks),
            sampler: Sampler::default(),
            turns: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            pipeline: Pipeline::new(1),
            arrivals: 0,
            stats: RankStats::default(),
            config,
        })
    }

    /// Lets `depth` steps be in flight: 2 schedules a step while the one before it is computed.
    ///
    /// # Panics
    /// When `depth` is 0 or a step is in flight.
    #[must_use]
    pub fn with_async_depth(self, depth: usize) -> Self {
        assert!(self.pipeline.is_empty(), "the depth is set before the first step");
        Self { pipeline: Pipeline::new(depth), ..self }
    }

    /// Its bounds.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Queues a request without a grammar, or hands it back with the reason.
    ///
    /// # Panics
    /// When the request has a grammar.
    pub fn add(&mut self, request: Request) -> Result<(), Refused> {
        assert!(request.grammar.is_none(), "a request with a grammar comes with its constraint");
        self.queue(request, None)
    }

    /// Queues a request whose grammar was compiled to `constraint`, or hands it back with the reason.
    pub fn add_constrained(&mut self, request: Request, constraint: Constraint) -> Result<(), Refused> {
        self.queue(request, Some(constraint))
    }

    fn queue(&mut self, request: Request, constraint: Option<Constraint>) -> Result<(), Refused> {
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
        let turn = Turn { priority: request.priority, turn: request.turn, arrival: self.arrivals };
        let sequence = match constraint {
            None => Sequence::new(request, self.config.prefill_attention),
            Some(constraint) => Sequence::constrained(request, constraint, self.config.prefill_attention)
                .map_err(|request| Refused { request, reason: RefuseReason::OffGrammar })?,
        };
        self.arrivals += 1;
        self.turns.insert(sequence.id(), turn);
        self.waiting.insert(turn, sequence);
        Ok(())
    }

    /// Works out what the grammars of running sequences allow next. Never needed, but saves the time later: for when
    /// the device computes a step.
    pub fn prepare_masks(&mut self) {
        let owed = self.running.values_mut().filter(|sequence| sequence.pending > 0);
        owed.filter_map(|sequence| sequence.constraint.as_mut()).for_each(Constraint::prepare);
    }

    /// For measurements: takes a request as if all of its tokens but the last had been computed here. False when there is
    /// no room for it; it then waits like any other.
    ///
    /// # Errors
    /// Those of [`Scheduler::add`].
    pub fn add_computed(&mut self, request: Request) -> Result<bool, Refused> {
        let id = request.id;
        self.add(request)?;
        let turn = self.turns[&id];
        let mut sequence = self.waiting.remove(&turn).expect("it was just added");
        let admitted = sequence.admit(&mut self.pool, self.config.block_size, false);
        if admitted {
            sequence.assume_computed();
            self.running.insert(turn, sequence);
        } else {
            self.waiting.insert(turn, sequence);
        }
        Ok(admitted)
    }

    /// Forgets a sequence and frees its blocks at once; false when it is not here. Safe while steps with it are in
    /// flight: they may still write to its blocks, but who gets them comes in later steps, and what those in flight draw
    /// for it is dropped.
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

    /// Whether any sequence waits or runs. Steps scheduled ahead may still be in flight when none does.
    pub fn has_work(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Sequences that wait, preempted ones included.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether `schedule` has a step that is not being computed already: one to be scheduled, or to be computed again
    /// after `rewind`.
    pub fn can_schedule(&self) -> bool {
        self.pipeline.has_room()
    }

    /// The next step, empty when there is nothing to do, or nothing before older steps are complete. It stays in flight
    /// until it is completed or abandoned. With depth 1 the step in flight is returned again; with more, call `rewind`
    /// to get those in flight again.
    ///
    /// # Panics
    /// When the depth is above 1 and `can_schedule` is false.
    pub fn schedule(&mut self) -> Arc<Step> {
        if let Some(step) = self.pipeline.give() {
            return step;
        }
        let plan = self.plan();
        let mut builder = StepBuilder::default();
        for (turn, len) in &plan {
            builder.push(self.running.get_mut(turn).expect("what is planned runs"), *len);
        }
        self.pipeline.push(builder.build(), plan.into_iter().map(|(turn, _)| Some(turn)).collect());
        self.pipeline.give().expect("it was just pushed")
    }

    /// Whose tokens the step that `schedule` returned last computes, and how many of each.
    pub fn shares(&self) -> impl Iterator<Item = (RequestId, usize)> {
        let given = self.pipeline.last_given().into_iter();
        let shares = given.flat_map(|given| given.turns.iter().zip(&given.step.seqs));
        shares.filter_map(|(turn, share)| Some((self.running.get(turn.as_ref()?)?.id(), share.len)))
    }

    /// The steps in flight, oldest first.
    pub fn in_flight(&self) -> impl ExactSizeIterator<Item = &Arc<Step>> {
        self.pipeline.steps()
    }

    /// Starts the steps in flight again, after a fault cut them short: `schedule` returns them once more, oldest first.
    /// They compute the same; only the oldest has its placeholders replaced, so it needs nothing from the device but
    /// the KV cache.
    pub fn rewind(&mut self) {
        self.pipeline.rewind();
    }

    /// Forgets the steps in flight, as if they had never been scheduled.
    pub fn abandon(&mut self) {
        self.pipeline.clear();
        self.running.values_mut().for_each(Sequence::rewind);
    }

    /// Completes the oldest step in flight with the logits of all rows that it asks for: draws tokens, caches full
    /// blocks, ends sequences. Returns what is new for each sequence that drew a token or ended.
    ///
    /// # Panics
    /// When no step is in flight or the logits are not those of the step.
    pub fn complete(&mut self, logits: &Logits) -> Vec<Output> {
        let step = Arc::clone(self.pipeline.oldest());
        assert_eq!(logits.rows.len(), step.num_logit_rows() * logits.vocab, "logits of another step");
        let mut rows = logits.rows.chunks_exact(logits.vocab.max(1));
        let take = |share: &BatchSeq| Found::Logits(rows.by_ref().take(share.num_logit_rows()).collect());
        self.complete_with(step.seqs.iter().map(take).collect())
    }

    /// Completes the oldest step in flight like `complete`, where the device drew what it was asked to: `drawn` is in
    /// the order of `Step::device_draws`, `logits` are the rows of `Step::host_rows`. Where a draw failed, the next
    /// step may have been fed any token id.
    ///
    /// # Panics
    /// When no step is in flight or the results are not those of the step.
    pub fn complete_drawn(&mut self, drawn: &[Result<Drawn, SampleError>], logits: &Logits) -> Vec<Output> {
        let step = Arc::clone(self.pipeline.oldest());
        let mut rows = logits.rows.chunks_exact(logits.vocab.max(1));
        assert_eq!(logits.rows.len(), step.host_rows().count() * logits.vocab, "logits of another step");
        assert_eq!(drawn.len(), step.device_draws().count(), "draws of another step");
        for (drawn, (_, how)) in drawn.iter().zip(step.device_draws()) {
            let Ok(drawn) = drawn else { continue };
            assert!((drawn.token as usize) < self.config.vocab_size, "a token that does not exist was drawn");
            assert_eq!(drawn.logprob.is_some(), how.logprobs.is_some(), "the draw of another step");
        }
        let mut drawn = drawn.iter();
        let take = |(share, sampling): (&BatchSeq, &Sampling)| match sampling {
            Sampling::Device(_) => Found::Drawn(drawn.next().expect("counted above")),
            Sampling::None | Sampling::Host => {
                Found::Logits(rows.by_ref().take(share.num_logit_rows()).collect())
            }
        };
        self.complete_with(step.seqs.iter().zip(&step.sampling).map(take).collect())
    }

    fn complete_with(&mut self, found: Vec<Found>) -> Vec<Output> {
        let in_flight = self.pipeline.pop();
        let step = in_flight.step;
        self.stats.steps += 1;
        let mut drawn = Vec::new();
        let mut outputs = Vec::new();
        for (i, (turn, found)) in in_flight.turns.into_iter().zip(found).enumerate() {
            let output = turn.and_then(|turn| self.complete_share(turn, &step.seqs[i], &found));
            if let Sampling::Device(_) = step.sampling[i] {
                let token = output.as_ref().and_then(|output| output.tokens.first());
                drawn.push(token.copied().unwrap_or(PLACEHOLDER));
            }
            outputs.extend(output);
        }
        self.pipeline.set_drawn(drawn);
        outputs
    }

    /// Does nothing for a sequence that ended or was aborted since.
    fn complete_share(&mut self, turn: Turn, share: &BatchSeq, found: &Found) -> Option<Output> {
        let sequence = self.running.get_mut(&turn)?;
        self.stats.prompt_tokens += share.len.min(sequence.remaining_prompt()) as u64;
        sequence.computed = share.context + share.len;
        if self.config.enable_prefix_caching {
            sequence.register(&mut self.pool, self.config.block_size);
        }
        let output = advance(sequence, share, found, &mut self.sampler, self.config.max_len())?;
        self.stats.output_tokens += output.tokens.len() as u64;
        if output.finish.is_some() {
            self.turns.remove(&output.id);
            self.remove_running(turn);
        }
        Some(output)
    }

    /// Gives up all sequences, in the order of their turns, each as the request that continues it on another rank.
    /// Steps in flight are forgotten.
    pub fn take_back(&mut self) -> Vec<Request> {
        self.pipeline.clear();
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
        let max_len = self.config.max_len();
        let ready = self.running.iter().filter(|(_, sequence)| sequence.is_ready(max_len));
        let (decodes, prefills): (Vec<Turn>, Vec<Turn>) =
            ready.map(|(&turn, _)| turn).partition(|turn| self.running[turn].remaining() == 1);
        let running_before = self.running.len();
        for turn in decodes {
            if self.make_room_for(turn) {
                plan.push((turn, 1));
                budget -= 1;
            }
        }
        let preempted = self.running.len() < running_before;
        let mut prompt_rows = PROMPT_LOGPROB_ROWS_MAX;
        for turn in prefills {
            let Some(sequence) = self.running.get(&turn) else { continue };
            let len = chunk(sequence, budget, &mut prompt_rows);
            if len > 0 {
                plan.push((turn, len));
                budget -= len;
            }
        }
        while !preempted && budget > 0 {
            // Who is next waits rather than being overtaken.
            let first = self.waiting.values().next();
            if prompt_rows == 0 && first.is_some_and(Sequence::owes_prompt_logprobs) {
                break;
            }
            let Some(turn) = self.admit_next() else {
                break;
            };
            let len = chunk(&self.running[&turn], budget, &mut prompt_rows);
            plan.push((turn, len));
            budget -= len;
        }
        plan
    }

    /// Gets the block that the next token of a running sequence needs, preempting whoever is last for it: what steps in
    /// flight draw for that one is dropped, as its blocks may be overwritten before they are computed again. Returns
    /// false when the sequence itself was preempted, now or before.
    fn make_room_for(&mut self, turn: Turn) -> bool {
        while let Some(sequence) = self.running.get_mut(&turn) {
            if sequence.grow(&mut self.pool, self.config.block_size) {
                return true;
            }
            let (last, mut victim) = self.running.pop_last().expect("at least this one runs");
            victim.release(&mut self.pool);
            self.pipeline.disown(last);
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
