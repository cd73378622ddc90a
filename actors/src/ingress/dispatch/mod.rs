//! Every sequence from submission to its end: where it runs, what it has generated, and where it goes on when its rank
//! is lost.
//!
//! Pure: events and the time come in, effects go out. A sequence whose rank is lost is submitted to another with the
//! tokens it already has, so its client sees neither a gap nor a repetition.

mod outcome;
mod shares;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use heliostat_engine::request::{FinishReason, Output, RankStats, Request, RequestId};

use super::engine::{Admission, RankCommand, Ranks, Refusal, Stage};
use super::router::{Job, Router, block_hashes};
use crate::deployment::Duty;
use crate::http::Caller;

pub use outcome::{Effect, Failure, Refused};
use shares::{Shares, Ticket};

/// Bounds of the dispatch.
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchConfig {
    /// Tokens of one KV block.
    pub block_size: usize,
    /// Sequences that may wait at one rank before requests are refused.
    pub queue_max: usize,
    /// A sequence that has lost its rank this often fails.
    pub moves_max: u32,
    /// A sequence without a rank, or whose group is incomplete and generates nothing, fails after this long.
    pub park_timeout: Duration,
}

impl Default for DispatchConfig {
    fn default() -> Self {
        Self { block_size: 16, queue_max: 256, moves_max: 8, park_timeout: Duration::from_secs(120) }
    }
}

/// Whom a request comes from, and where it wants to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The client, for its fair share.
    pub client: Caller,
    /// The rank that it asks for.
    pub pinned: Option<u32>,
}

impl Default for Origin {
    fn default() -> Self {
        Self { client: Caller::Other, pinned: None }
    }
}

/// All sequences in flight.
#[derive(Debug)]
pub struct Dispatch {
    config: DispatchConfig,
    router: Router,
    shares: Shares,
    ranks: Ranks,
    admission: Admission,
    sequences: HashMap<RequestId, Sequence>,
    /// Those without a rank.
    parked: BTreeSet<RequestId>,
    moves: u64,
    /// Since when the group lacks something.
    incomplete_since: Option<Duration>,
    last_output: Duration,
}

#[derive(Debug)]
struct Sequence {
    /// As submitted, but `generated` holds all tokens delivered so far.
    request: Request,
    place: Place,
    /// The rank that computed its prompt for others.
    prefilled_by: Option<u32>,
    /// Since when it has no rank, or none that has generated anything yet.
    homeless_since: Option<Duration>,
    moves: u32,
    /// Ranks that refused it since it last had one.
    refused_by: Vec<u32>,
    /// The client, and its choice of a rank, which holds until that is lost.
    origin: Origin,
    ticket: Ticket,
    /// It has its first token.
    began: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    On(u32),
    Nowhere,
}

impl Sequence {
    fn job(&self, block_size: usize) -> Job {
        let tokens = self.tokens();
        let cacheable = self.request.prompt_logprobs.is_none();
        let blocks = if cacheable { block_hashes(&tokens, block_size) } else { Vec::new() };
        Job { tokens: tokens.len(), blocks }
    }

    fn stage(&self) -> Stage {
        Stage::of(self.request.generated.len())
    }

    fn tokens(&self) -> Vec<u32> {
        [self.request.prompt.as_slice(), self.request.generated.as_slice()].concat()
    }
}

impl Dispatch {
    /// No ranks, no sequences.
    pub fn new(config: DispatchConfig) -> Self {
        let router = Router::new(config.block_size, config.queue_max);
        Self {
            config,
            router,
            shares: Shares::default(),
            ranks: Ranks::default(),
            admission: Admission::default(),
            sequences: HashMap::new(),
            parked: BTreeSet::new(),
            moves: 0,
            incomplete_since: None,
            last_output: Duration::ZERO,
        }
    }

    /// What the ranks were last said to be.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Sequences in flight.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Where a sequence is.
    pub fn rank_of(&self, id: RequestId) -> Option<u32> {
        match self.sequences.get(&id)?.place {
            Place::On(rank) => Some(rank),
            Place::Nowhere => None,
        }
    }

    /// Sequences that went on at another rank, since the start.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// How many requests may be there from now on.
    pub fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// What it served ends, and its ranks with it.
    pub fn close(&mut self, effects: &mut Vec<Effect>) {
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.abort(id, effects);
            effects.push(Effect::Fail(id, Failure::Ended));
        }
    }

    /// Whether a request could be taken: a rank does, or it may wait for one.
    pub fn is_open(&self) -> bool {
        self.admission.may_wait || self.ranks.doors().next().is_some()
    }

    /// Sequences that are that far, with a rank or without.
    pub fn at_stage(&self, stage: Stage) -> usize {
        self.sequences.values().filter(|sequence| sequence.stage() == stage).count()
    }

    /// Sequences at ranks of that range.
    pub fn at(&self, ranks: std::ops::Range<u32>) -> usize {
        let there = |sequence: &&Sequence| matches!(sequence.place, Place::On(rank) if ranks.contains(&rank));
        self.sequences.values().filter(there).count()
    }

    /// Takes all of `requests`, or none.
    ///
    /// # Errors
    /// No rank is ready, the queues are full, or the rank that was asked for is not there.
    pub fn submit(
        &mut self,
        now: Duration,
        requests: Vec<Request>,
        origin: Origin,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refused> {
        self.admit(now, requests.len(), origin).inspect_err(|refused| match refused {
            Refused::QueueFull => self.shares.turned_away(origin.client, now),
            Refused::OverShare
            | Refused::NotReady { .. }
            | Refused::NeverFits { .. }
            | Refused::NoSuchRank { .. }
            | Refused::RankNotReady(_) => {}
        })?;
        for mut request in requests {
            let id = request.id;
            let ticket = self.shares.enter(origin.client, request.prompt.len(), request.stop.max_tokens);
            request.turn = ticket.turn;
            let sequence = Sequence {
                request,
                place: Place::Nowhere,
                prefilled_by: None,
                homeless_since: None,
                moves: 0,
                refused_by: Vec::new(),
                origin,
                ticket,
                began: false,
            };
            self.sequences.insert(id, sequence);
            if self.place(id, effects) {
                continue;
            }
            if self.ranks.doors().next().is_some() {
                self.fail(id, Failure::QueueFull, effects);
            } else {
                // It was admitted to wait for the first rank.
                self.sequences.get_mut(&id).expect("it was put in above").homeless_since = Some(now);
                self.park(id);
            }
        }
        Ok(())
    }

    fn admit(&self, now: Duration, requests: usize, origin: Origin) -> Result<(), Refused> {
        let Origin { client, pinned } = origin;
        let Ranks { size, missing, .. } = &self.ranks;
        let open: Vec<u32> = self.ranks.doors().collect();
        if (open.is_empty() && !self.admission.may_wait) || self.is_stalled(now) {
            return Err(Refused::NotReady { missing: missing.clone() });
        }
        let named = |rank: &u32| pinned.is_none_or(|pinned| self.ranks.local(*rank) == pinned);
        let takers: Vec<u32> = open.iter().copied().filter(named).collect();
        let capacity = self.config.queue_max * takers.len().max(1);
        if requests > capacity {
            return Err(Refused::NeverFits { sequences: requests, capacity });
        }
        let full = self.admission.in_flight_max.is_some_and(|max| self.sequences.len() + requests > max);
        let room = match pinned {
            _ if full => 0,
            _ if open.is_empty() => self.config.queue_max.saturating_sub(self.parked.len()),
            Some(rank) if takers.is_empty() && rank < *size => return Err(Refused::RankNotReady(rank)),
            Some(rank) if takers.is_empty() => return Err(Refused::NoSuchRank { rank, size: *size }),
            _ => takers.iter().map(|&rank| self.router.room(rank)).sum::<usize>().min(self.room_to_go_on()),
        };
        let all = self.config.queue_max * open.len().max(1);
        match room < requests {
            true => Err(Refused::QueueFull),
            false if !self.shares.admits(client, requests, all, now) => Err(Refused::OverShare),
            false => Ok(()),
        }
    }

    /// Sequences for which there is room where they go on once they have a token, where that is elsewhere: prompts must not be
    /// computed faster than others can go on with them.
    fn room_to_go_on(&self) -> usize {
        if self.ranks.duties.is_empty() {
            return usize::MAX;
        }
        let others: Vec<u32> =
            self.ranks.open().filter(|&rank| self.ranks.takes(rank, Stage::Output)).collect();
        match others.as_slice() {
            // Whoever goes on with them is yet to come.
            [] => usize::MAX,
            _ => {
                let room = others.iter().map(|&rank| self.router.room(rank)).sum::<usize>();
                room.saturating_sub(self.at_stage(Stage::Prompt))
            }
        }
    }

    /// The client is gone, or has all it wanted.
    pub fn abort(&mut self, id: RequestId, effects: &mut Vec<Effect>) {
        let Some(Place::On(rank)) = self.remove(id) else { return };
        effects.push(Effect::Send(rank, RankCommand::Abort(id)));
    }

    /// Takes what a rank generated.
    pub fn outputs(&mut self, now: Duration, rank: u32, outputs: Vec<Output>, effects: &mut Vec<Effect>) {
        for output in outputs {
            self.output(now, rank, output, effects);
        }
    }

    fn output(&mut self, now: Duration, rank: u32, mut output: Output, effects: &mut Vec<Effect>) {
        let id = output.id;
        let sequence = self.sequences.get_mut(&id).filter(|sequence| sequence.place == Place::On(rank));
        let Some(sequence) = sequence else {
            // Its abort was lost, or the rank was thought lost: it must not go on unheard.
            if output.finish.is_none() {
                effects.push(Effect::Send(rank, RankCommand::Abort(id)));
            }
            return;
        };
        let have = sequence.request.generated.len();
        let first = output.first_index as usize;
        if first > have {
            effects.push(Effect::Send(rank, RankCommand::Abort(id)));
            self.move_away(now, id, effects);
            return;
        }
        let known = (have - first).min(output.tokens.len());
        output.tokens.drain(..known);
        output.logprobs.drain(..known.min(output.logprobs.len()));
        output.first_index = have as u32;
        sequence.request.generated.extend_from_slice(&output.tokens);
        if output.prompt_logprobs.is_some() {
            sequence.request.prompt_logprobs = None;
        }
        sequence.homeless_since = None;
        if !sequence.began && !output.tokens.is_empty() {
            sequence.began = true;
            self.shares.began(sequence.origin.client, sequence.ticket);
        }
        self.last_output = now;
        self.router.started(rank, id);
        match &output.finish {
            Some(FinishReason::Error(cause)) => self.fail(id, Failure::Rank(cause.clone()), effects),
            Some(FinishReason::Aborted) => {
                self.fail(id, Failure::Rank("it aborted the request".into()), effects);
            }
            Some(FinishReason::Length) if self.is_first_leg(rank, id) => {
                output.finish = None;
                effects.push(Effect::Deliver(rank, output));
                self.hand_over(now, rank, id, effects);
            }
            Some(FinishReason::Stop(_) | FinishReason::Length) => {
                self.remove(id);
                effects.push(Effect::Deliver(rank, output));
            }
            None if output.tokens.is_empty() && output.prompt_logprobs.is_none() => {}
            None => effects.push(Effect::Deliver(rank, output)),
        }
    }

    /// How many requests may be there.
    pub fn admission(&self) -> Admission {
        self.admission
    }

    /// How far the order of sequences is.
    pub fn turn(&self) -> u64 {
        self.shares.clock()
    }

    /// At another ingress it is that far.
    pub fn advance_turn(&mut self, turn: u64) {
        self.shares.advance(turn);
    }

    /// Whether a rank that takes prompts only has done its part of a sequence.
    fn is_first_leg(&self, rank: u32, id: RequestId) -> bool {
        let unfinished = |it: &Sequence| it.request.generated.len() < it.request.stop.max_tokens as usize;
        self.ranks.duty(rank) == Duty::Prefill && self.sequences.get(&id).is_some_and(unfinished)
    }

    /// Has a sequence go on where tokens are generated.
    fn hand_over(&mut self, now: Duration, rank: u32, id: RequestId, effects: &mut Vec<Effect>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.place = Place::Nowhere;
        sequence.prefilled_by = Some(rank);
        sequence.homeless_since = Some(now);
        // Its number there means nothing where the sequence goes.
        sequence.origin.pinned = None;
        sequence.refused_by.clear();
        let blocks = sequence.job(self.config.block_size).blocks;
        self.router.left(rank, id, &blocks);
        if !self.place(id, effects) {
            self.park(id);
        }
    }

    /// Takes a rank's report.
    pub fn report(&mut self, rank: u32, stats: RankStats) {
        self.router.report(rank, stats);
    }

    /// The ranks changed: sequences of lost ones move, parked ones go where there is room.
    pub fn set_ranks(&mut self, now: Duration, ranks: Ranks, effects: &mut Vec<Effect>) {
        let before = std::mem::replace(&mut self.ranks, ranks);
        self.incomplete_since = match (self.ranks.missing.is_empty(), self.incomplete_since) {
            (true, _) => None,
            (false, since) => since.or(Some(now)),
        };
        let lost: Vec<u32> = before
            .ready
            .iter()
            .filter(|(rank, incarnation)| self.ranks.ready.get(rank) != Some(incarnation))
            .map(|(&rank, _)| rank)
            .collect();
        lost.iter().for_each(|&rank| self.router.remove(rank));
        let new = self.ranks.ready.iter().filter(|(rank, now)| before.ready.get(rank) != Some(now));
        new.for_each(|(&rank, _)| self.router.add(rank));
        self.evacuate(now, &lost, effects);
        self.place_parked(effects);
    }

    /// A rank is known to be lost before the group says so.
    pub fn rank_lost(&mut self, now: Duration, rank: u32, effects: &mut Vec<Effect>) {
        if self.ranks.ready.remove(&rank).is_some() {
            self.router.remove(rank);
            self.evacuate(now, &[rank], effects);
        }
    }

    fn evacuate(&mut self, now: Duration, lost: &[u32], effects: &mut Vec<Effect>) {
        let on_lost = |sequence: &Sequence| matches!(sequence.place, Place::On(rank) if lost.contains(&rank));
        let mut ids: Vec<RequestId> =
            self.sequences.iter().filter(|(_, sequence)| on_lost(sequence)).map(|(&id, _)| id).collect();
        ids.sort_unstable();
        for id in ids {
            self.move_away(now, id, effects);
        }
    }

    /// A rank did not take a sequence.
    pub fn refused(
        &mut self,
        now: Duration,
        rank: u32,
        id: RequestId,
        refusal: Refusal,
        effects: &mut Vec<Effect>,
    ) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.place != Place::On(rank) {
            return;
        }
        sequence.place = Place::Nowhere;
        sequence.homeless_since.get_or_insert(now);
        sequence.refused_by.push(rank);
        let fresh = sequence.moves == 0 && sequence.prefilled_by.is_none();
        self.router.left(rank, id, &[]);
        match refusal {
            Refusal::Unservable(cause) => self.fail(id, Failure::Unservable(cause), effects),
            Refusal::Full | Refusal::Gone if self.place(id, effects) => {}
            Refusal::Full if fresh => self.fail(id, Failure::QueueFull, effects),
            Refusal::Full | Refusal::Gone => self.park(id),
        }
    }

    /// Fails what has waited too long for a rank or for a group that is incomplete, and tries the rest again. Returns
    /// whether the caller must call again soon.
    pub fn tick(&mut self, now: Duration, effects: &mut Vec<Effect>) -> bool {
        let timeout = self.config.park_timeout;
        if self.is_stalled(now) {
            let missing = &self.ranks.missing;
            let stalled = Failure::Stalled { waited: timeout, missing: missing.clone() };
            for id in self.sequences.keys().copied().collect::<Vec<_>>() {
                self.abort(id, effects);
                effects.push(Effect::Fail(id, stalled.clone()));
            }
        }
        self.place_parked(effects);
        let since = |id: &RequestId| self.sequences[id].homeless_since;
        let overdue = |id: &&RequestId| since(id).is_some_and(|since| now.saturating_sub(since) >= timeout);
        for id in self.parked.iter().filter(overdue).copied().collect::<Vec<_>>() {
            self.fail(id, Failure::NoRank(timeout), effects);
        }
        self.needs_tick()
    }

    /// Whether time alone can change something, so that [`Self::tick`] must be called.
    pub fn needs_tick(&self) -> bool {
        !self.parked.is_empty() || (self.incomplete_since.is_some() && !self.sequences.is_empty())
    }

    /// The group lacks a rank that it cannot work without, and has generated nothing for too long.
    fn is_stalled(&self, now: Duration) -> bool {
        let quiet_since = self.incomplete_since.map(|since| since.max(self.last_output));
        quiet_since.is_some_and(|since| now.saturating_sub(since) >= self.config.park_timeout)
    }

    /// Takes a sequence off its rank, which is lost or has lost it, and places it again.
    fn move_away(&mut self, now: Duration, id: RequestId, effects: &mut Vec<Effect>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Place::On(rank) = sequence.place {
            self.router.left(rank, id, &[]);
        }
        sequence.place = Place::Nowhere;
        sequence.homeless_since.get_or_insert(now);
        sequence.moves += 1;
        sequence.origin.pinned = None;
        sequence.refused_by.clear();
        self.moves += 1;
        let complete = sequence.request.generated.len() >= sequence.request.stop.max_tokens as usize;
        if complete {
            // Only the word that it has finished was lost with the rank.
            effects.push(Effect::Deliver(0, finished(&sequence.request)));
            self.remove(id);
        } else if sequence.moves > self.config.moves_max {
            self.fail(id, Failure::MovedTooOften(self.config.moves_max), effects);
        } else if !self.place(id, effects) {
            self.park(id);
        }
    }

    /// Sends a sequence to the best rank that has not refused it. A moved one may overfill a queue: it was taken long
    /// ago.
    fn place(&mut self, id: RequestId, effects: &mut Vec<Effect>) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("placed sequences are in flight");
        let job = sequence.job(self.config.block_size);
        let stage = sequence.stage();
        let moved = sequence.moves > 0 || sequence.prefilled_by.is_some();
        let allowed = |rank| {
            self.ranks.is_open(rank)
                && self.ranks.takes(rank, stage)
                && sequence.origin.pinned.is_none_or(|pinned| self.ranks.local(rank) == pinned)
                && !sequence.refused_by.contains(&rank)
                && (moved || self.router.room(rank) > 0)
        };
        let Some(rank) = self.router.pick(&job, allowed) else { return false };
        sequence.place = Place::On(rank);
        self.router.sent(rank, id, &job);
        self.parked.remove(&id);
        let mut request = Box::new(sequence.request.clone());
        if self.ranks.duty(rank) == Duty::Prefill {
            request.stop.max_tokens = request.stop.max_tokens.min(1);
        }
        let elsewhere = sequence.prefilled_by.filter(|from| self.ranks.ready.contains_key(from));
        let command = match elsewhere {
            Some(from) => RankCommand::Continue(request, from),
            None => RankCommand::Submit(request),
        };
        effects.push(Effect::Send(rank, command));
        true
    }

    fn place_parked(&mut self, effects: &mut Vec<Effect>) {
        for id in self.parked.clone() {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.refused_by.clear();
                self.place(id, effects);
            }
        }
    }

    /// Keeps a sequence without a rank until one comes.
    fn park(&mut self, id: RequestId) {
        self.parked.insert(id);
    }

    fn fail(&mut self, id: RequestId, failure: Failure, effects: &mut Vec<Effect>) {
        self.remove(id);
        effects.push(Effect::Fail(id, failure));
    }

    /// Forgets a sequence. Returns where it was.
    fn remove(&mut self, id: RequestId) -> Option<Place> {
        let sequence = self.sequences.remove(&id)?;
        self.parked.remove(&id);
        let drawn = sequence.began.then_some(sequence.request.generated.len());
        self.shares.left(sequence.origin.client, sequence.ticket, drawn);
        if let Place::On(rank) = sequence.place {
            self.router.left(rank, id, &sequence.job(self.config.block_size).blocks);
        }
        Some(sequence.place)
    }
}

/// The end of a sequence that has all its tokens.
fn finished(request: &Request) -> Output {
    Output {
        id: request.id,
        first_index: request.generated.len() as u32,
        tokens: Vec::new(),
        logprobs: Vec::new(),
        prompt_logprobs: None,
        cached_tokens: 0,
        finish: Some(FinishReason::Length),
    }
}

#[cfg(test)]
mod tests;
