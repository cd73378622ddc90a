//! The running ingress: [`Ingress`], which HTTP handlers and the actor that hears the ranks share, and [`Generation`],
//! one request's end of it.
//!
//! One lock guards [`Dispatch`] and the line to the ranks; it is held for bookkeeping only. Tokens go to each request
//! through a queue of its own, at most as long as its `max_tokens`, so that a slow client holds up nobody.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use heliostat_engine::request::{Output, RankStats, Request, RequestId};
use tokio::sync::{Notify, mpsc};

use super::dispatch::{Dispatch, DispatchConfig, Effect, Failure, Origin, Refused};
use super::engine::{Admission, EngineLink, RankCommand, Ranks, Refusal, Stage};
use super::metrics::{Finish, Finished, Metrics};
use super::spans::{Hex, RequestTrace, SequenceTrace};
use crate::monitor::trace::SequenceSpan;
use crate::serve::target::Backpressure;
use crate::telemetry::{Provenance, SpanCounts};

/// How often sequences without a working rank are looked at.
const TICK_INTERVAL: Duration = Duration::from_millis(250);

/// The ingress between HTTP and the ranks. Cheap to clone.
#[derive(Clone)]
pub struct Ingress(Arc<Inner>);

struct Inner {
    shell: Mutex<Shell>,
    metrics: Metrics,
    started: Instant,
    /// Distinguishes the ids of this process from those of any other.
    instance: u64,
    next_id: AtomicU64,
    stopping: AtomicBool,
    ticking: Notify,
}

struct Shell {
    dispatch: Dispatch,
    link: Box<dyn EngineLink>,
    clients: HashMap<RequestId, Client>,
}

impl Shell {
    /// Says in the trace of a sequence, if it has one, why it is not at its rank any more.
    fn note_place(&self, id: RequestId, why: &str) {
        if let Some(trace) = self.clients.get(&id).and_then(|client| client.trace.as_ref()) {
            trace.stays(self.dispatch.rank_of(id), why);
        }
    }

    /// The same of all sequences, after ranks were lost.
    fn note_losses(&self) {
        self.clients.keys().for_each(|id| self.note_place(*id, "the rank was lost"));
    }
}

/// Who gets a sequence's outputs.
struct Client {
    index: usize,
    events: mpsc::UnboundedSender<(usize, Event)>,
    arrived: Instant,
    last_tokens: Option<Instant>,
    request_id: Arc<str>,
    /// The rank that it was sent to last.
    rank: Option<u32>,
    trace: Option<SequenceTrace>,
}

/// What happened to a sequence of a request.
#[derive(Debug)]
pub enum Event {
    /// New tokens from this rank.
    Output(u32, Output),
    /// It will not finish.
    Failed(Failure),
}

impl Ingress {
    /// An ingress that sends by `link`; no rank is ready yet.
    pub fn new(model_name: &str, config: DispatchConfig, link: impl EngineLink) -> Self {
        Self::with_metrics(Metrics::new(model_name), config, link)
    }

    /// The same with metrics of its own.
    pub fn with_metrics(metrics: Metrics, config: DispatchConfig, link: impl EngineLink) -> Self {
        let shell = Shell { dispatch: Dispatch::new(config), link: Box::new(link), clients: HashMap::new() };
        Self(Arc::new(Inner {
            shell: Mutex::new(shell),
            metrics,
            started: Instant::now(),
            instance: rand::random(),
            next_id: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            ticking: Notify::new(),
        }))
    }

    /// Takes what a step of `rank` brought.
    pub fn on_outputs(&self, rank: u32, outputs: Vec<Output>) {
        self.act(|dispatch, now, effects| dispatch.outputs(now, rank, outputs, effects));
    }

    /// Takes the state of `rank` after a step.
    pub fn on_stats(&self, rank: u32, stats: RankStats) {
        self.0.metrics.report(rank, &stats);
        self.lock().dispatch.report(rank, stats);
    }

    /// What became of the spans of a rank's process.
    pub fn on_spans(&self, rank: u32, spans: SpanCounts) {
        self.0.metrics.spans_of(rank, spans);
    }

    /// The set of ready ranks, or what is missing, changed. Sequences of lost ranks go on elsewhere.
    pub fn on_ranks(&self, ranks: Ranks) {
        if !ranks.local.is_empty() {
            self.0.metrics.keep(|rank| ranks.local.contains_key(&rank));
        }
        self.act_and(|dispatch, now, effects| dispatch.set_ranks(now, ranks, effects), Shell::note_losses);
    }

    /// What it served ends: requests in flight fail.
    pub fn close(&self) {
        self.stop_taking_requests();
        self.act(|dispatch, _, effects| dispatch.close(effects));
    }

    /// How many requests may be there from now on.
    pub fn set_admission(&self, admission: Admission) {
        self.lock().dispatch.set_admission(admission);
    }

    /// How a request is refused for which there is no room.
    pub(super) fn backpressure(&self) -> Option<Backpressure> {
        self.lock().dispatch.admission().backpressure
    }

    /// How far the order of sequences is.
    pub fn turn(&self) -> u64 {
        self.lock().dispatch.turn()
    }

    /// At another ingress of the same ranks it is that far.
    pub fn advance_turn(&self, turn: u64) {
        self.lock().dispatch.advance_turn(turn);
    }

    /// Sequences in flight, those that wait for a rank included.
    pub fn in_flight(&self) -> usize {
        self.lock().dispatch.len()
    }

    /// Sequences at ranks of that range.
    pub fn in_flight_at(&self, ranks: std::ops::Range<u32>) -> usize {
        self.lock().dispatch.at(ranks)
    }

    /// Sequences that are that far.
    pub fn in_flight_at_stage(&self, stage: Stage) -> usize {
        self.lock().dispatch.at_stage(stage)
    }

    /// Ranks that take something new.
    pub fn open_ranks(&self) -> usize {
        self.lock().dispatch.ranks().doors().count()
    }

    /// `rank` is known to be lost, before [`Self::on_ranks`] says so.
    pub fn on_rank_lost(&self, rank: u32) {
        self.act_and(|dispatch, now, effects| dispatch.rank_lost(now, rank, effects), Shell::note_losses);
    }

    /// `rank` did not take a sequence that was handed to it.
    pub fn on_refused(&self, rank: u32, id: RequestId, refusal: Refusal) {
        self.act_and(
            |dispatch, now, effects| dispatch.refused(now, rank, id, refusal, effects),
            |shell| shell.note_place(id, "the rank did not take it"),
        );
    }

    /// Submits the sequences of one request: all of them or none.
    ///
    /// # Errors
    /// No rank is ready, or the queues are full, or `origin` names no ready rank.
    pub fn submit(
        &self,
        requests: Vec<Request>,
        origin: Origin,
        Arrival { at: arrived, request_id, trace }: Arrival,
    ) -> Result<Generation, Refused> {
        let (events, receiver) = mpsc::unbounded_channel();
        let traces: Vec<Option<SequenceTrace>> =
            requests.iter().map(|request| trace.as_ref()?.sequence(request, arrived)).collect();
        let open = requests.iter().zip(&traces).map(|(request, trace)| Open {
            id: request.id,
            rank: origin.pinned.unwrap_or(0),
            prompt_tokens: request.prompt.len(),
            first_token: None,
            finished: false,
            failure: None,
            trace: trace.clone(),
        });
        let generation =
            Generation { ingress: self.clone(), events: receiver, open: open.map(Some).collect(), arrived };
        let mut shell = self.lock();
        let mut effects = Vec::new();
        for (index, (request, trace)) in requests.iter().zip(&traces).enumerate() {
            let (events, request_id, trace) = (events.clone(), Arc::clone(&request_id), trace.clone());
            let client = Client { index, events, arrived, last_tokens: None, request_id, rank: None, trace };
            shell.clients.insert(request.id, client);
        }
        let ids: Vec<RequestId> = requests.iter().map(|request| request.id).collect();
        let submitted = shell.dispatch.submit(self.now(), requests, origin, &mut effects);
        if let Err(refused) = submitted {
            ids.iter().for_each(|id| drop(shell.clients.remove(id)));
            drop(shell);
            generation.discard(&refused);
            return Err(refused);
        }
        self.perform(&mut shell, effects);
        drop(shell);
        Ok(generation)
    }

    /// A name for a new sequence, unique in the cluster.
    pub fn next_id(&self) -> RequestId {
        let count = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        RequestId(u128::from(self.0.instance) << 64 | u128::from(count))
    }

    /// Whether requests are taken and the group is complete.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), Vec<String>> {
        if self.0.stopping.load(Ordering::Relaxed) {
            return Err(vec!["the server is stopping".into()]);
        }
        let shell = self.lock();
        let ranks = shell.dispatch.ranks();
        match (shell.dispatch.is_open(), ranks.missing.is_empty()) {
            (true, true) => Ok(()),
            (false, true) => Err(vec!["no rank is ready".into()]),
            (_, false) => Err(ranks.missing.clone()),
        }
    }

    /// From now on new requests are refused; those in flight go on.
    pub fn stop_taking_requests(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    pub(crate) fn count_response(&self, code: u16) {
        self.0.metrics.response(code);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Relaxed)
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        let shell = self.lock();
        let (in_flight, moves) = (shell.dispatch.len(), shell.dispatch.moves());
        drop(shell);
        self.0.metrics.dispatch(in_flight, moves);
        &self.0.metrics
    }

    /// Fails sequences that wait too long for a rank. Runs for as long as the server; sleeps while all have one.
    pub(crate) async fn watch_time(self) {
        loop {
            self.0.ticking.notified().await;
            while self.act(|dispatch, now, effects| dispatch.tick(now, effects)) {
                tokio::time::sleep(TICK_INTERVAL).await;
            }
        }
    }

    fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Shell> {
        // A panic under the lock is a bug in one request's bookkeeping; the others need not end with it.
        self.0.shell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act<R>(&self, event: impl FnOnce(&mut Dispatch, Duration, &mut Vec<Effect>) -> R) -> R {
        self.act_and(event, |_| ())
    }

    /// The same; `look` sees what has become of it before its effects are carried out.
    fn act_and<R>(
        &self,
        event: impl FnOnce(&mut Dispatch, Duration, &mut Vec<Effect>) -> R,
        look: impl FnOnce(&Shell),
    ) -> R {
        let mut shell = self.lock();
        let mut effects = Vec::new();
        let result = event(&mut shell.dispatch, self.now(), &mut effects);
        look(&shell);
        self.perform(&mut shell, effects);
        result
    }

    /// Carries out effects, and those that follow from commands that a rank does not take.
    fn perform(&self, shell: &mut Shell, mut effects: Vec<Effect>) {
        while !effects.is_empty() {
            for effect in std::mem::take(&mut effects) {
                match effect {
                    Effect::Send(rank, command) => self.send(shell, rank, command, &mut effects),
                    Effect::Deliver(rank, output) => self.deliver(shell, rank, output),
                    Effect::Fail(id, failure) => {
                        if let Some(client) = shell.clients.remove(&id) {
                            client.tell(Event::Failed(failure));
                        }
                    }
                }
            }
        }
        if shell.dispatch.needs_tick() {
            self.0.ticking.notify_one();
        }
    }

    fn send(&self, shell: &mut Shell, rank: u32, command: RankCommand, effects: &mut Vec<Effect>) {
        let (request, prefilled_by) = match &command {
            RankCommand::Submit(request) => (Some(request), None),
            RankCommand::Continue(request, by) => (Some(request), Some(*by)),
            RankCommand::Abort(_) => (None, None),
        };
        let from = match request {
            Some(request) => {
                let client = shell.clients.get_mut(&request.id);
                client.map_or_else(Provenance::default, |client| client.sent(rank, request, prefilled_by))
            }
            None => Provenance::default(),
        };
        let Err(unavailable) = shell.link.send(rank, command, from) else { return };
        match *unavailable.command {
            RankCommand::Submit(request) | RankCommand::Continue(request, _) => {
                shell.dispatch.refused(self.now(), rank, request.id, unavailable.cause, effects);
            }
            // A rank that goes on with it is told again when it sends tokens.
            RankCommand::Abort(id) => {
                tracing::debug!(rank, sequence = %Hex(id), "an abort was not delivered")
            }
        }
    }

    fn deliver(&self, shell: &mut Shell, rank: u32, output: Output) {
        let finished = output.finish.is_some();
        let Some(client) = shell.clients.get_mut(&output.id) else { return };
        if !output.tokens.is_empty() {
            let now = Instant::now();
            let since = now - client.last_tokens.unwrap_or(client.arrived);
            self.0.metrics.tokens(rank, output.tokens.len(), since, client.last_tokens.is_none());
            client.last_tokens = Some(now);
        }
        if let Some(trace) = &client.trace {
            trace.heard(output.tokens.len(), finished);
        }
        let id = output.id;
        client.tell(Event::Output(rank, output));
        if finished {
            shell.clients.remove(&id);
        }
    }

    fn abort(&self, id: RequestId) {
        self.act(|dispatch, _, effects| dispatch.abort(id, effects));
        self.lock().clients.remove(&id);
    }
}

impl Client {
    /// The sequence goes to a rank: which request it belongs to. `prefilled_by` computed its prompt for others.
    fn sent(&mut self, rank: u32, request: &Request, prefilled_by: Option<u32>) -> Provenance {
        let (request_id, tokens) = (self.request_id.as_ref(), request.generated.len());
        let before = self.rank.replace(rank);
        let handed_over = before.is_some() && before == prefilled_by;
        match before {
            Some(by) if handed_over => {
                tracing::debug!(request_id, sequence = %Hex(request.id), rank, by, "handed a sequence over");
            }
            None => tracing::debug!(request_id, sequence = %Hex(request.id), rank, "sent a sequence"),
            Some(before) => {
                tracing::info!(request_id, sequence = %Hex(request.id), rank, before, tokens, "moved a sequence");
            }
        }
        let trace = self.trace.as_ref().and_then(|trace| trace.sent(rank, tokens, handed_over));
        Provenance { request_id: request_id.to_owned(), trace }
    }

    fn tell(&self, event: Event) {
        // A request that has just gone away takes its sequences along: nothing is lost with the event.
        let _ = self.events.send((self.index, event));
    }
}

/// The sequences of one request. Dropping it aborts those that still run.
pub struct Generation {
    ingress: Ingress,
    events: mpsc::UnboundedReceiver<(usize, Event)>,
    open: Vec<Option<Open>>,
    arrived: Instant,
}

struct Open {
    id: RequestId,
    rank: u32,
    prompt_tokens: usize,
    first_token: Option<Instant>,
    /// The ranks are done with it.
    finished: bool,
    /// Why it ended without finishing.
    failure: Option<String>,
    trace: Option<SequenceTrace>,
}

/// When a request came, and its trace if that is recorded.
pub struct Arrival {
    /// When it was read.
    pub at: Instant,
    /// Its name, for logs.
    pub request_id: Arc<str>,
    /// Its trace.
    pub trace: Option<RequestTrace>,
}

impl Generation {
    /// Waits for events of its sequences, by index, and returns all that have come; nothing once all are closed.
    pub async fn next(&mut self) -> Vec<(usize, Event)> {
        let mut events = Vec::new();
        while events.is_empty() && self.open.iter().any(Option::is_some) {
            if self.events.recv_many(&mut events, usize::MAX >> 1).await == 0 {
                break;
            }
            events.retain(|(index, event)| match (&mut self.open[*index], event) {
                (Some(open), Event::Output(rank, output)) => {
                    open.rank = *rank;
                    if !output.tokens.is_empty() {
                        open.first_token.get_or_insert_with(Instant::now);
                    }
                    open.finished |= output.finish.is_some();
                    true
                }
                (Some(open), Event::Failed(failure)) => {
                    open.finished = true;
                    open.failure = open.trace.as_ref().map(|_| failure.to_string());
                    true
                }
                (None, _) => false,
            });
        }
        events
    }

    /// A sequence has ended for its client. If its rank does not know yet, it is aborted there.
    pub fn close(&mut self, index: usize, finish: Finish, output_tokens: u32) {
        let Some(open) = self.open[index].take() else { return };
        if !open.finished {
            self.ingress.abort(open.id);
        }
        self.ingress.0.metrics.span(self.span(&open, finish, output_tokens));
        if let Some(trace) = &open.trace {
            trace.end(finish, output_tokens, open.failure.clone());
        }
        self.ingress.0.metrics.finished(&Finished {
            rank: open.rank,
            finish,
            duration: self.arrived.elapsed(),
            prompt_tokens: open.prompt_tokens,
            output_tokens,
        });
    }

    /// How far a sequence came, by the clock on the wall.
    fn span(&self, open: &Open, finish: Finish, output_tokens: u32) -> SequenceSpan {
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_us = |at: Instant| ended.saturating_sub(at.elapsed()).as_micros() as u64;
        SequenceSpan {
            id: Hex(open.id).to_string(),
            rank: open.rank,
            arrived_us: unix_us(self.arrived),
            first_token_us: open.first_token.map(unix_us),
            ended_us: ended.as_micros() as u64,
            prompt_tokens: open.prompt_tokens as u64,
            output_tokens,
            finish: finish.word().to_owned(),
        }
    }

    /// Nothing of it was submitted.
    fn discard(mut self, refused: &Refused) {
        for trace in self.open.drain(..).flatten().filter_map(|open| open.trace) {
            trace.end(Finish::Error, 0, Some(refused.to_string()));
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for index in 0..self.open.len() {
            self.close(index, Finish::Abort, 0);
        }
    }
}
