//! Steps that are scheduled before the draws of those before them are known: each sequence still gets what it would
//! get alone.
//!
//! The device runs steps in order, feeds and draws by itself, and may lose its progress. It checks what each share
//! reads against the texts that there are, and the prefix cache against the texts that were computed.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use heliostat_engine::batch::{
    Batch, BatchSeq, DeviceSampling, Drawn, Feed, LogitRows, PLACEHOLDER, Sampling, Step,
};
use heliostat_engine::model::Logits;
use heliostat_engine::request::{FinishReason, Output, Request, RequestId, SamplingParams, StopConditions};
use heliostat_engine::sampler::{SampleError, token_logprob};
use heliostat_engine::scheduler::{BlockHash, Scheduler, SchedulerConfig, block_hashes};
use proptest::prelude::*;

use super::rig::{EOS, FakeModel, Received, VOCAB, alone, config, request, roomy, simple};

/// What came of a step: the device's draws, the logits that the host needs, and all logits.
struct Results {
    drawn: Vec<Result<Drawn, SampleError>>,
    host: Logits,
    all: Logits,
}

struct Device {
    model: FakeModel,
    /// The tokens that the last step drew here; none after a fault.
    drawn: Vec<u32>,
}

impl Device {
    fn fed(&self, step: &Step) -> Batch {
        let mut batch = step.batch.clone();
        for feed in &step.feeds {
            assert_eq!(batch.tokens[feed.row as usize], PLACEHOLDER);
            batch.tokens[feed.row as usize] = self.drawn[feed.draw as usize];
        }
        batch
    }

    fn run(&mut self, step: &Step) -> Results {
        let all = self.model.forward(&self.fed(step));
        let mut rows = all.rows.chunks_exact(VOCAB);
        let (mut drawn, mut host) = (Vec::new(), Vec::new());
        for (seq, sampling) in step.seqs.iter().zip(&step.sampling) {
            let rows: Vec<&[f32]> = rows.by_ref().take(seq.num_logit_rows()).collect();
            match sampling {
                Sampling::None => assert_eq!(seq.logits, LogitRows::None),
                Sampling::Host => host.extend(rows.concat()),
                Sampling::Device(how) => drawn.push(Ok(draw(rows[0], how))),
            }
        }
        assert_eq!(step.host_rows().count() * VOCAB, host.len());
        self.drawn = drawn.iter().map(|drawn| drawn.as_ref().unwrap().token).collect();
        Results { drawn, host: Logits { rows: host, vocab: VOCAB }, all }
    }

    /// The process dies while `step` runs: its part of the memory is nonsense, the draws are lost.
    fn fault(&mut self, step: &Step) {
        for seq in &step.seqs {
            for position in seq.context..seq.context + seq.len {
                let slot = self.model.slot(&seq.block_table, position);
                self.model.memory[slot] = Some(1000);
            }
        }
        self.drawn.clear();
    }
}

/// A plain sampler.
fn draw(row: &[f32], how: &DeviceSampling) -> Drawn {
    let best = (0..VOCAB as u32).rev().max_by(|&a, &b| row[a as usize].total_cmp(&row[b as usize])).unwrap();
    let weight = |token: u32| ((row[token as usize] - row[best as usize]) / how.temperature).exp();
    let mut kept: Vec<(u32, f32)> = (0..VOCAB as u32).map(|token| (token, weight(token))).collect();
    let total = |kept: &[(u32, f32)]| kept.iter().map(|&(_, weight)| f64::from(weight)).sum::<f64>();
    kept.retain(|&(_, weight)| weight >= how.min_p);
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    kept.truncate(if how.top_k > 0 { how.top_k as usize } else { VOCAB });
    if how.top_p < 1.0 {
        kept.sort_by_key(|&(token, _)| token);
        let target = f64::from(how.top_p) * total(&kept);
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut sum = 0.0;
        kept.retain(|&(_, weight)| {
            let below = sum < target;
            sum += f64::from(weight);
            below
        });
    }
    kept.sort_by_key(|&(token, _)| token);
    let mut left = how.uniform * total(&kept);
    let hit = kept.iter().find(|&&(_, weight)| {
        left -= f64::from(weight);
        left < 0.0
    });
    let token = if how.temperature == 0.0 { best } else { hit.unwrap().0 };
    Drawn { token, logprob: how.logprobs.map(|top| token_logprob(row, token, top).unwrap()) }
}

#[derive(Clone, Debug)]
enum Event {
    Add(Box<Request>),
    /// Another step, if there may be one.
    Schedule,
    /// The oldest step is complete; the host may draw everything itself.
    Complete {
        host: bool,
    },
    /// The device runs so many of the steps in flight, dies in the last of them, and starts again.
    Fault(usize),
    /// Likewise, and the steps are given up.
    Abandon(usize),
    /// Aborts one of the requests added so far.
    Abort(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => request().prop_map(|request| Event::Add(Box::new(request))),
        10 => Just(Event::Schedule),
        8 => proptest::bool::weighted(0.2).prop_map(|host| Event::Complete { host }),
        1 => (0usize..4).prop_map(Event::Fault),
        1 => (0usize..4).prop_map(Event::Abandon),
        2 => (0usize..64).prop_map(Event::Abort),
    ]
}

/// A run of one rank, with what it owes.
struct Run {
    scheduler: Scheduler,
    depth: usize,
    device: Device,
    /// Given by the scheduler and not complete; whether it runs for the first time.
    queue: VecDeque<(Arc<Step>, bool)>,
    received: Received,
    owed: Vec<Request>,
    aborted: HashSet<RequestId>,
    /// Prompt and full output of each request.
    texts: Vec<Vec<u32>>,
    /// The blocks that may be cached: of tokens that are computed and known.
    hashes: HashSet<BlockHash>,
}

impl Run {
    fn new(config: &SchedulerConfig, depth: usize) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()).unwrap().with_async_depth(depth),
            depth,
            device: Device { model: FakeModel::new(config), drawn: vec![] },
            queue: VecDeque::new(),
            received: Received::default(),
            owed: vec![],
            aborted: HashSet::new(),
            texts: vec![],
            hashes: HashSet::new(),
        }
    }

    fn add(&mut self, mut request: Request) {
        request.id = RequestId(self.owed.len() as u128);
        if self.scheduler.add(request.clone()).is_ok() {
            let config = self.scheduler.config();
            let output = alone(&request, config.max_len()).tokens;
            let text = [request.prompt.as_slice(), &output].concat();
            let computed = text.len() - usize::from(!output.is_empty());
            self.hashes.extend(block_hashes(&text[..computed], config.block_size));
            self.texts.push(text);
            self.owed.push(request);
        }
    }

    fn schedule(&mut self) -> Option<Arc<Step>> {
        assert_eq!(self.scheduler.can_schedule(), self.queue.len() < self.depth);
        if !self.scheduler.can_schedule() {
            return None;
        }
        let again = self.queue.len() < self.scheduler.in_flight().len();
        let step = self.scheduler.schedule();
        assert_eq!(self.scheduler.in_flight().nth(self.queue.len()), Some(&step));
        let config = self.scheduler.config();
        assert!(step.tokens.len() <= config.max_num_batched_tokens && step.seqs.len() <= config.max_num_seqs);
        assert!(step.sampling.len() == step.seqs.len() && step.positions.len() == step.tokens.len());
        let idle = self.queue.is_empty() && self.scheduler.has_work() && !again;
        assert!(!step.is_empty() || !idle, "has work but does nothing");
        self.queue.push_back((Arc::clone(&step), !again));
        Some(step)
    }

    /// Runs a step and checks what its shares read. After a fault, those whose sequences are gone may read nonsense.
    fn run(&mut self, step: &Step, first: bool) -> Results {
        let results = self.device.run(step);
        // Steps after the next may compute something after the end of a text.
        let after =
            |read: &[u32], text: &[u32]| read.starts_with(text) && read.len() + 2 <= text.len() + self.depth;
        let known = |read: &[u32]| self.texts.iter().any(|text| text.starts_with(read) || after(read, text));
        for seq in step.seqs.iter().filter(|_| first) {
            let read = self.device.model.read(seq);
            assert!(known(&read), "{seq:?} reads {read:?}");
        }
        results
    }

    fn complete(&mut self, host: bool) -> Vec<Output> {
        let Some((step, first)) = self.queue.pop_front() else { return vec![] };
        let results = self.run(&step, first);
        let outputs = match host {
            true => self.scheduler.complete(&results.all),
            false => self.scheduler.complete_drawn(&results.drawn, &results.host),
        };
        assert!(outputs.iter().all(|output| !self.aborted.contains(&output.id)));
        let added = self.scheduler.take_cache_changes().added;
        assert!(added.iter().all(|hash| self.hashes.contains(hash)), "cached what was not computed");
        self.received.take(outputs.clone());
        outputs
    }

    fn fault(&mut self, ran: usize) {
        let queue = std::mem::take(&mut self.queue);
        let ran: Vec<_> = queue.into_iter().take(ran).collect();
        for (step, first) in &ran {
            self.run(step, *first);
        }
        match ran.last() {
            Some((step, _)) => self.device.fault(step),
            None => self.device.drawn.clear(),
        }
    }

    fn abort(&mut self, pick: usize) {
        let Some(request) = self.owed.get(pick % self.owed.len().max(1)) else { return };
        let finished = self.received.0.get(&request.id).is_some_and(|g| g.finish.is_some());
        let aborted = self.scheduler.abort(request.id);
        assert_eq!(aborted, !finished && !self.aborted.contains(&request.id));
        if aborted {
            self.aborted.insert(request.id);
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Add(request) => self.add(*request),
            Event::Schedule => {
                self.schedule();
            }
            Event::Complete { host } => {
                self.complete(host);
            }
            Event::Fault(ran) => {
                self.fault(ran);
                self.scheduler.rewind();
            }
            Event::Abandon(ran) => {
                self.fault(ran);
                self.scheduler.abandon();
                assert_eq!(self.scheduler.in_flight().len(), 0);
            }
            Event::Abort(pick) => self.abort(pick),
        }
    }

    fn finish(&mut self) {
        let mut steps = 0;
        while self.scheduler.has_work() {
            while self.schedule().is_some() {}
            self.complete(false);
            steps += 1;
            assert!(steps < 20_000, "it never ends");
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0));
        assert_eq!(stats.queued_prefill_tokens, 0);
        while !self.queue.is_empty() {
            assert_eq!(self.complete(false), []);
        }
        for request in &self.owed {
            let mut got = self.received.0.remove(&request.id).unwrap_or_default();
            let mut want = alone(request, self.scheduler.config().max_len());
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
    #![proptest_config(ProptestConfig { cases: 800, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_gets_what_it_would_get_alone(
        config in config(),
        depth in prop_oneof![1 => Just(1usize), 6 => Just(2), 2 => Just(3)],
        events in proptest::collection::vec(event(), 1..100),
    ) {
        let mut run = Run::new(&config, depth);
        for event in events {
            run.apply(event);
        }
        run.finish();
    }

    #[test]
    fn a_sequence_goes_on_elsewhere_as_if_it_had_not_moved(
        requests in proptest::collection::vec(request(), 1..8),
        steps in 0usize..20,
        depth in 1usize..4,
    ) {
        let config = SchedulerConfig { num_blocks: 14, max_waiting: 8, max_model_len: 40, ..roomy() };
        let mut run = Run::new(&config, depth);
        requests.into_iter().for_each(|request| run.add(request));
        for _ in 0..steps {
            while run.schedule().is_some() {}
            run.complete(false);
        }
        let moved = run.scheduler.take_back();
        assert!(!run.scheduler.has_work());
        assert_eq!((run.scheduler.stats().kv_blocks_used, run.scheduler.in_flight().len()), (0, 0));
        run.queue.clear();
        for request in moved {
            run.scheduler.add(request).unwrap();
        }
        run.finish();
    }
}

fn device(sampling: &Sampling) -> Option<DeviceSampling> {
    match sampling {
        Sampling::Device(how) => Some(*how),
        Sampling::None | Sampling::Host => None,
    }
}

#[test]
fn the_next_step_is_fed_by_the_draws_of_the_one_in_flight() {
    let mut run = Run::new(&roomy(), 2);
    run.add(simple(0, vec![1, 2, 3, 4], 9));
    run.add(Request { prompt_logprobs: Some(0), ..simple(1, vec![7, 8], 9) });
    run.add(simple(2, vec![5, 6], 9));
    let first = run.schedule().unwrap();
    assert_eq!(first.device_draws().map(|(row, _)| row).collect::<Vec<_>>(), [3, 7]);
    assert_eq!(first.host_rows().collect::<Vec<_>>(), [4, 5]);
    assert_eq!(first.feeds, []);

    let second = run.schedule().unwrap();
    assert_eq!(second.feeds, [Feed { row: 0, draw: 0 }, Feed { row: 1, draw: 1 }]);
    assert_eq!((&second.tokens[..], &second.positions[..]), ([PLACEHOLDER; 2].as_slice(), [4, 2].as_slice()));
    let shares: Vec<_> =
        second.seqs.iter().map(|seq| (seq.context, seq.block_table.len(), seq.logits)).collect();
    assert_eq!(
        shares,
        [(4, 2, LogitRows::Last), (2, 1, LogitRows::Last)],
        "the host draws for the third one"
    );
    assert!(!run.scheduler.can_schedule());

    assert_eq!(run.complete(false).len(), 3);
    let third = run.schedule().unwrap();
    assert_eq!(third.seqs.len(), 3);
    assert_eq!(third.feeds, [Feed { row: 0, draw: 0 }, Feed { row: 2, draw: 1 }]);
    run.finish();
}

#[test]
#[should_panic(expected = "complete one first")]
fn more_steps_than_allowed_are_not_scheduled() {
    let mut scheduler = Scheduler::new(roomy()).unwrap().with_async_depth(2);
    (0..3).for_each(|_| drop(scheduler.schedule()));
}

#[test]
fn who_ends_with_the_pending_draw_is_not_scheduled_again() {
    let config = SchedulerConfig { max_model_len: 8, ..roomy() };
    let mut run = Run::new(&config, 2);
    run.add(simple(0, vec![1, 2], 1));
    run.add(simple(1, vec![3], 2));
    run.schedule();
    assert_eq!(run.schedule().unwrap().seqs.len(), 1, "the first has all that it wants");
    run.complete(false);
    assert!(run.schedule().unwrap().is_empty(), "so has the second");
    run.complete(false);
    run.finish();

    let mut run = Run::new(&config, 2);
    run.add(simple(0, (0..7).collect(), 9));
    run.schedule();
    assert!(run.schedule().unwrap().is_empty(), "the context is full");
    run.finish();
}

#[test]
fn what_was_computed_after_the_last_token_is_dropped() {
    let mut run = Run::new(&roomy(), 2);
    let first = alone(&simple(0, vec![1, 2, 3], 1), 64).tokens[0];
    let stop = StopConditions { stop_token_ids: vec![first], ..simple(0, vec![], 9).stop };
    run.add(Request { stop, ..simple(0, vec![1, 2, 3], 9) });
    run.schedule();
    let second = run.schedule().unwrap();
    assert_eq!((second.seqs.len(), run.scheduler.stats().kv_blocks_used), (1, 1));
    let outputs = run.complete(false);
    assert_eq!(outputs[0].finish, Some(FinishReason::Stop(first)));
    assert_eq!((run.scheduler.has_work(), run.scheduler.in_flight().len()), (false, 1));
    assert_eq!(run.scheduler.stats().kv_blocks_used, 0);

    // The blocks go to another sequence while that step is still to run.
    run.add(simple(1, vec![4, 5, 6, 7, 8], 9));
    let third = run.schedule().unwrap();
    assert_eq!(third.seqs[0].block_table[0], second.seqs[0].block_table[0]);
    assert_eq!(run.complete(false), [], "nobody gets the step's draw, and its full block is not cached");
    run.finish();
}

#[test]
fn the_host_draws_what_the_device_cannot() {
    let sampling =
        SamplingParams { temperature: 0.7, top_k: 5, top_p: 0.9, min_p: 0.1, seed: 3, ..Default::default() };
    let how = |request: Request, drawn: usize| {
        let mut run = Run::new(&roomy(), 2);
        run.add(request);
        for _ in 0..drawn {
            run.schedule();
            run.complete(false);
        }
        run.schedule().unwrap().sampling[0]
    };
    let plain = Request { sampling: sampling.clone(), logprobs: Some(2), ..simple(0, vec![1], 9) };
    let (first, second) = (device(&how(plain.clone(), 0)).unwrap(), device(&how(plain.clone(), 1)).unwrap());
    assert_eq!((first.temperature, first.top_k, first.top_p, first.min_p), (0.7, 5, 0.9, 0.1));
    assert_eq!(first.logprobs, Some(2));
    assert!(first.uniform != second.uniform && (0.0..1.0).contains(&first.uniform));
    assert_eq!(device(&how(simple(0, vec![1], 9), 0)).unwrap().temperature, 0.0);

    let with = |change: fn(&mut SamplingParams)| {
        let mut request = plain.clone();
        change(&mut request.sampling);
        how(request, 0)
    };
    assert_eq!(with(|params| params.logit_bias = vec![(1, 1.0)]), Sampling::Host);
    assert_eq!(with(|params| params.repetition_penalty = 1.1), Sampling::Host);
    assert_eq!(with(|params| params.presence_penalty = 1.1), Sampling::Host);
    assert_eq!(with(|params| params.frequency_penalty = 1.1), Sampling::Host);
    assert_eq!(how(Request { prompt_logprobs: Some(0), ..simple(0, vec![1, 2], 9) }, 0), Sampling::Host);
    assert_eq!(how(simple(0, vec![1, 2], 0), 0), Sampling::Host, "nothing is drawn");

    // The first step computes as many rows as it may, and with them all that the prompt is owed; the host draws all the
    // same, so that the draw does not depend on where the prompt was cut.
    let long = Request { prompt_logprobs: Some(0), ..simple(0, (0..9).collect(), 9) };
    let mut run = Run::new(&roomy(), 2);
    run.add(long);
    let steps = [run.schedule().unwrap(), run.schedule().unwrap()];
    assert_eq!(steps.map(|step| device(&step.sampling[0]).is_some()), [false, false]);

    let stop = StopConditions { min_tokens: 1, eos_token_ids: vec![EOS], ..plain.stop.clone() };
    let late = Request { stop, ..plain.clone() };
    assert_eq!(how(late.clone(), 0), Sampling::Host, "the end is forbidden yet");
    assert_eq!(device(&how(late, 1)), Some(second));
}

#[test]
fn steps_in_flight_are_run_again_without_the_draws_before_them() {
    let mut run = Run::new(&roomy(), 2);
    run.add(simple(0, vec![1, 2, 3], 9));
    run.schedule();
    let second = run.schedule().unwrap();
    let token = run.complete(false)[0].tokens[0];
    let third = run.schedule().unwrap();
    run.apply(Event::Fault(1));
    let again = run.schedule().unwrap();
    assert_eq!((again.tokens.as_slice(), again.feeds.as_slice()), ([token].as_slice(), [].as_slice()));
    assert_eq!((again.seqs.clone(), again.sampling.clone()), (second.seqs.clone(), second.sampling.clone()));
    assert_eq!(run.schedule().unwrap(), third);
    assert_eq!(run.complete(false)[0].first_index, 1);
    run.finish();
}

#[test]
fn a_preempted_sequence_draws_again_what_was_pending() {
    let config = SchedulerConfig { num_blocks: 4, max_model_len: 16, ..roomy() };
    let mut run = Run::new(&config, 2);
    run.add(simple(0, vec![1, 2, 3], 12));
    run.add(simple(1, vec![5, 6, 7], 12));
    let mut lost: Option<BatchSeq> = None;
    while run.scheduler.stats().preemptions == 0 {
        lost = run.queue.back().and_then(|(step, _)| step.seqs.get(1).cloned());
        run.schedule();
        if run.queue.len() == 2 && run.scheduler.stats().preemptions == 0 {
            run.complete(false);
        }
    }
    let lost = lost.expect("the second one was being computed");
    let outputs = run.complete(false);
    assert_eq!(outputs.iter().map(|output| output.id).collect::<Vec<_>>(), [RequestId(0)]);
    let drawn = run.received.0[&RequestId(1)].tokens.len();
    assert_eq!(drawn + 3, lost.context + lost.len, "its last draw is not known");
    run.finish();
}

#[test]
fn a_failed_draw_ends_its_sequence_only() {
    let mut run = Run::new(&roomy(), 2);
    run.add(simple(0, vec![1], 3));
    run.add(simple(1, vec![2], 3));
    run.schedule();
    assert_eq!(run.schedule().unwrap().seqs.len(), 2);
    let (step, _) = run.queue.pop_front().unwrap();
    let mut results = run.device.run(&step);
    results.drawn[0] = Err(SampleError::NotFinite);
    let outputs = run.scheduler.complete_drawn(&results.drawn, &results.host);
    assert!(matches!(&outputs[0].finish, Some(FinishReason::Error(why)) if why.contains("not numbers")));
    assert_eq!((outputs[1].finish.clone(), outputs[1].tokens.len()), (None, 1));
    run.received.take(outputs);
    let outputs = run.complete(false);
    assert_eq!(
        outputs.iter().map(|output| (output.id, output.first_index)).collect::<Vec<_>>(),
        [(RequestId(1), 1)]
    );
}
