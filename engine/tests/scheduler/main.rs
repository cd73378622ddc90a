//! Whatever a scheduler does (batching, chunks, shared prefixes, preemption, aborts, repeated steps, moves), each
//! sequence gets what it would get alone.
//!
//! The model is a fake with a real paged memory: a logit depends on every token that it finds in the blocks of the
//! sequence, so a wrong block table, a stale block or a lost token changes the output.

#![allow(clippy::unwrap_used)]

mod ahead;
mod grammar;
mod rig;

use std::collections::HashSet;
use std::sync::Arc;

use heliostat_engine::batch::{Batch, LogitRows, Step};
use heliostat_engine::request::{FinishReason, Request, RequestId, SamplingParams};
use heliostat_engine::scheduler::{
    PROMPT_LOGPROB_ROWS_MAX, RefuseReason, Scheduler, SchedulerConfig, block_hashes,
};
use proptest::prelude::*;

use rig::{FakeModel, Received, alone, config, request, roomy, simple};

/// One rank: scheduler, memory, and what came out.
struct Rank {
    scheduler: Scheduler,
    model: FakeModel,
    max_len: usize,
}

impl Rank {
    fn new(config: &SchedulerConfig) -> Self {
        let scheduler = Scheduler::new(config.clone()).unwrap();
        Self { scheduler, model: FakeModel::new(config), max_len: config.max_len() }
    }

    fn schedule(&mut self) -> Arc<Step> {
        let batch = self.scheduler.schedule();
        let config = self.scheduler.config();
        assert!(batch.tokens.len() <= config.max_num_batched_tokens);
        assert!(batch.seqs.len() <= config.max_num_seqs);
        assert!(!batch.is_empty() || !self.scheduler.has_work(), "has work but does nothing");
        batch
    }

    fn assert_empty(&self) {
        let stats = self.scheduler.stats();
        assert!(!self.scheduler.has_work());
        assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0));
        assert_eq!(stats.queued_prefill_tokens, 0);
    }
}

#[derive(Clone, Debug)]
enum Event {
    Add(Box<Request>),
    Step,
    /// The step is cut short and redone.
    Redo,
    /// The step is given up; the next one is planned anew.
    Abandon,
    /// Aborts one of the requests added so far, between steps.
    Abort(usize),
    /// Likewise, while a step is in flight.
    AbortInFlight(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => request().prop_map(|request| Event::Add(Box::new(request))),
        8 => Just(Event::Step),
        1 => Just(Event::Redo),
        1 => Just(Event::Abandon),
        1 => (0usize..64).prop_map(Event::Abort),
        1 => (0usize..64).prop_map(Event::AbortInFlight),
    ]
}

/// A run of one rank, with what it owes.
struct Run {
    rank: Rank,
    received: Received,
    owed: Vec<Request>,
    aborted: HashSet<RequestId>,
}

impl Run {
    fn new(config: &SchedulerConfig) -> Self {
        let rank = Rank::new(config);
        Self { rank, received: Received::default(), owed: vec![], aborted: HashSet::new() }
    }

    fn add(&mut self, mut request: Request) {
        request.id = RequestId(self.owed.len() as u128);
        let total = request.prompt.len() + 1;
        let waiting = self.rank.scheduler.stats().waiting as usize;
        match self.rank.scheduler.add(request.clone()) {
            Ok(()) => {
                assert!(total <= self.rank.max_len);
                self.owed.push(request);
            }
            Err(refused) => {
                assert_eq!(*refused.request, request);
                match refused.reason {
                    RefuseReason::QueueFull { .. } => {
                        assert!(waiting >= self.rank.scheduler.config().max_waiting);
                    }
                    RefuseReason::TooLong { .. } | RefuseReason::NeverFits { .. } => {
                        assert!(total > self.rank.max_len);
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }

    fn abort(&mut self, pick: usize) {
        let Some(request) = self.owed.get(pick % self.owed.len().max(1)) else { return };
        let finished = self.received.0.get(&request.id).is_some_and(|g| g.finish.is_some());
        let aborted = self.rank.scheduler.abort(request.id);
        assert_eq!(aborted, !finished && !self.aborted.contains(&request.id));
        if aborted {
            self.aborted.insert(request.id);
        }
    }

    fn step(&mut self) {
        let batch = self.rank.schedule();
        let logits = self.rank.model.forward(&batch);
        self.received.take(self.rank.scheduler.complete(&logits));
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Add(request) => self.add(*request),
            Event::Step => self.step(),
            Event::Redo => {
                let batch = self.rank.schedule();
                self.rank.model.forward(&batch);
                assert_eq!(self.rank.scheduler.schedule(), batch);
                self.step();
            }
            Event::Abandon => {
                let batch = self.rank.schedule();
                self.rank.model.forward(&batch);
                self.rank.scheduler.abandon();
            }
            Event::Abort(pick) => self.abort(pick),
            Event::AbortInFlight(pick) => {
                let batch = self.rank.schedule();
                self.abort(pick);
                let before = self.aborted.clone();
                let logits = self.rank.model.forward(&batch);
                let outputs = self.rank.scheduler.complete(&logits);
                assert!(outputs.iter().all(|output| !before.contains(&output.id)));
                self.received.take(outputs);
            }
        }
    }

    fn finish(&mut self) {
        let mut steps = 0;
        while self.rank.scheduler.has_work() {
            self.step();
            steps += 1;
            assert!(steps < 20_000, "it never ends");
        }
        self.rank.assert_empty();
        for request in &self.owed {
            let mut got = self.received.0.remove(&request.id).unwrap_or_default();
            let mut want = alone(request, self.rank.max_len);
            if self.aborted.contains(&request.id) {
                assert_eq!(got.finish, None);
                want.tokens.truncate(got.tokens.len());
                want.logprobs.truncate(got.logprobs.len());
                (want.finish, want.prompt_logprobs, got.prompt_logprobs) = (None, None, None);
            }
            assert_eq!(got, want, "{request:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_gets_what_it_would_get_alone(
        config in config(),
        events in proptest::collection::vec(event(), 1..60),
    ) {
        let mut run = Run::new(&config);
        for event in events {
            run.apply(event);
        }
        run.finish();
    }

    #[test]
    fn a_sequence_goes_on_elsewhere_as_if_it_had_not_moved(
        (mut from, mut to) in (config(), config()),
        requests in proptest::collection::vec(request(), 1..8),
        steps in 0usize..20,
        in_flight in any::<bool>(),
    ) {
        // Both ranks take every request.
        for config in [&mut from, &mut to] {
            config.max_waiting = 8;
            config.max_model_len = 40;
            config.num_blocks = 40usize.div_ceil(config.block_size) + config.num_blocks / 4;
        }
        let mut run = Run::new(&from);
        requests.into_iter().for_each(|request| run.add(request));
        (0..steps).for_each(|_| run.step());
        if in_flight {
            run.rank.schedule();
        }
        let moved = run.rank.scheduler.take_back();
        run.rank.assert_empty();
        run.rank = Rank::new(&to);
        for request in moved {
            run.rank.scheduler.add(request).unwrap();
        }
        run.finish();
    }
}

#[test]
fn decodes_come_before_chunks_of_prompts() {
    let mut run = Run::new(&roomy());
    run.add(simple(0, vec![1, 2], 9));
    run.step();
    run.add(simple(1, (0..12).collect(), 9));
    let lens = |batch: &Batch| batch.seqs.iter().map(|seq| (seq.len, seq.logits)).collect::<Vec<_>>();
    let batch = run.rank.schedule();
    assert_eq!(lens(&batch), [(1, LogitRows::Last), (7, LogitRows::None)]);
    run.step();
    assert_eq!(lens(&run.rank.schedule()), [(1, LogitRows::Last), (5, LogitRows::Last)]);
    run.finish();
}

#[test]
fn a_repeated_prompt_is_served_from_the_cache_but_for_its_last_token() {
    let mut run = Run::new(&roomy());
    let prompt: Vec<u32> = (0..8).collect();
    run.add(simple(0, prompt.clone(), 1));
    run.step();
    let changes = run.rank.scheduler.take_cache_changes();
    let mut added = changes.added;
    let mut expected = block_hashes(&prompt, 4);
    added.sort();
    expected.sort();
    assert_eq!(added, expected);

    run.add(simple(1, prompt, 1));
    let batch = run.rank.schedule();
    assert_eq!((batch.seqs[0].context, batch.seqs[0].len), (4, 4), "the last token is always computed");
    let logits = run.rank.model.forward(&batch);
    assert_eq!(run.rank.scheduler.complete(&logits)[0].cached_tokens, 4);
    let stats = run.rank.scheduler.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens), (16, 4, 12));
}

#[test]
fn the_latest_of_the_lowest_priority_is_preempted() {
    let config = SchedulerConfig { num_blocks: 4, max_model_len: 16, ..roomy() };
    let mut run = Run::new(&config);
    run.add(Request { priority: 1, ..simple(0, vec![1, 2, 3, 4], 8) });
    run.step();
    run.add(simple(1, vec![5, 6, 7], 8));
    while run.rank.scheduler.stats().preemptions == 0 {
        run.step();
    }
    let left: Vec<RequestId> = run.rank.scheduler.take_back().into_iter().map(|request| request.id).collect();
    assert_eq!(left, [RequestId(1), RequestId(0)], "the earlier one of lower priority gave way");
}

#[test]
fn clients_take_turns_within_a_priority() {
    let mut run = Run::new(&SchedulerConfig { max_num_seqs: 1, ..roomy() });
    for (id, priority, turn) in [(0, 0, 30), (1, 0, 10), (2, 1, 0), (3, 0, 20)] {
        run.add(Request { priority, turn, ..simple(id, vec![1, 2, 3], 2) });
    }
    let order = run.rank.scheduler.take_back().into_iter().map(|request| request.id);
    assert_eq!(order.collect::<Vec<_>>(), [1, 3, 0, 2].map(RequestId));
}

#[test]
fn bad_logits_end_their_sequence_only() {
    let mut run = Run::new(&roomy());
    run.add(simple(0, vec![1], 3));
    run.add(simple(1, vec![2], 3));
    let batch = run.rank.schedule();
    let mut logits = run.rank.model.forward(&batch);
    logits.rows[5] = f32::NAN;
    let outputs = run.rank.scheduler.complete(&logits);
    assert!(matches!(&outputs[0].finish, Some(FinishReason::Error(why)) if why.contains("not numbers")));
    assert_eq!((outputs[1].finish.clone(), outputs[1].tokens.len()), (None, 1));
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = Scheduler::new(SchedulerConfig { num_blocks: 8, ..roomy() }).unwrap();
    let mut reason = |request| scheduler.add(request).unwrap_err().reason;
    assert_eq!(reason(simple(0, vec![], 1)), RefuseReason::EmptyPrompt);
    assert_eq!(reason(simple(0, vec![1; 64], 1)), RefuseReason::TooLong { tokens: 64, max_model_len: 64 });
    assert_eq!(reason(simple(0, vec![1; 32], 1)), RefuseReason::NeverFits { tokens: 32, kv_tokens: 32 });
    assert_eq!(reason(simple(0, vec![13], 1)), RefuseReason::UnknownToken { token: 13, vocab_size: 13 });
    let sampling = SamplingParams { top_p: 2.0, ..Default::default() };
    assert!(matches!(reason(Request { sampling, ..simple(0, vec![1], 1) }), RefuseReason::Parameter(_)));
    for id in 0..4 {
        scheduler.add(simple(id, vec![1], 1)).unwrap();
    }
    assert_eq!(scheduler.add(simple(0, vec![1], 1)).unwrap_err().reason, RefuseReason::Duplicate);
    let full = scheduler.add(simple(9, vec![1], 1)).unwrap_err().reason;
    assert_eq!((full.is_retryable(), full), (true, RefuseReason::QueueFull { waiting: 4 }));
    assert!(Scheduler::new(SchedulerConfig { max_num_batched_tokens: 3, ..roomy() }).is_err());
}

/// A row of logits is a whole vocabulary, and a device has room for so many of them.
#[test]
fn prompt_logprobs_of_many_sequences_share_the_rows_of_a_step() {
    let config = SchedulerConfig {
        num_blocks: 1000,
        max_num_seqs: 6,
        max_num_batched_tokens: 4096,
        max_model_len: 1000,
        max_waiting: 8,
        ..roomy()
    };
    let mut rank = Rank::new(&config);
    let prompt = |id: u32| (0..400).map(|at| (at + id) % 13).collect::<Vec<u32>>();
    for id in 0..5 {
        let wants = (id != 2).then_some(0);
        let request = Request { prompt_logprobs: wants, ..simple(u128::from(id), prompt(id), 3) };
        rank.scheduler.add(request).unwrap();
    }
    let mut received = Received::default();
    let mut steps = 0;
    while rank.scheduler.has_work() {
        let step = rank.schedule();
        let wanted = step.host_rows().count() + step.device_draws().count();
        assert!(wanted <= PROMPT_LOGPROB_ROWS_MAX + config.max_num_seqs, "{wanted} rows of logits");
        let logits = rank.model.forward(&step);
        received.take(rank.scheduler.complete(&logits));
        steps += 1;
    }
    assert!(steps > 4, "1,600 rows of 512 at a time took {steps} steps");
    rank.assert_empty();
}
