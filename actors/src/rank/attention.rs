//! The attention role of a rank: its sequences and who asked for them.

use std::collections::HashMap;
use std::sync::Arc;

use heliostat_engine::batch::Step;
use heliostat_engine::cuda::StepResults;
use heliostat_engine::model::Logits;
use heliostat_engine::request::{KvTransfers, Output, RankStats, RequestId};
use heliostat_engine::scheduler::{RefuseReason, Scheduler};
use heliostat_runtime::handle::ProcessId;

use super::clock::StepClock;
use super::kv::Fetched;
use super::link::{Owner, Submission};
use super::outlet::Outlet;
use super::spans::Spans;
use crate::ingress::Hex;
use crate::messages::Busy;
use crate::telemetry::SpanCounts;

/// What a DP rank owns.
pub(super) struct Attention {
    scheduler: Scheduler,
    owners: HashMap<RequestId, Owner>,
    spans: Spans,
    transfers: KvTransfers,
}

impl Attention {
    /// Without sequences; up to `depth` steps are in flight at a time.
    pub(super) fn new(scheduler: Scheduler, depth: usize, spans: Spans) -> Self {
        let transfers = KvTransfers::default();
        Self { scheduler: scheduler.with_async_depth(depth), owners: HashMap::new(), spans, transfers }
    }

    /// Queues a sequence, under its grammar if it has one; a refusal goes to its ingress as the sequence's end.
    pub(super) fn submit(&mut self, submission: Submission, outlet: &mut Outlet) {
        let Submission { request, constraint, owner, traced } = submission;
        let (id, sizes) = (request.id, (request.prompt.len(), request.generated.len()));
        let added = match constraint {
            Some(constraint) => self.scheduler.add_constrained(request, constraint),
            None => self.scheduler.add(request),
        };
        match added {
            Ok(()) => {
                let request_id = owner.request_id.as_str();
                tracing::debug!(request_id, sequence = %Hex(id), "took a sequence");
                self.owners.insert(id, owner);
                traced.iter().for_each(|traced| self.spans.queued(id, traced, sizes));
            }
            Err(refused) => {
                let why = match refused.reason {
                    RefuseReason::QueueFull { waiting } => Busy::QueueFull { waiting },
                    // The rank has it already: the ingress sent it twice, and the first one goes on.
                    RefuseReason::Duplicate => return,
                    other => Busy::Unservable(other.to_string()),
                };
                outlet.refuse(id, &owner, why);
            }
        }
    }

    /// Forgets a sequence.
    pub(super) fn abort(&mut self, id: RequestId) {
        self.scheduler.abort(id);
        self.owners.remove(&id);
        self.spans.aborted(id);
    }

    /// Forgets all sequences whose ingress lives in that process.
    pub(super) fn abort_all_of(&mut self, process: ProcessId) {
        let of_process = self.owners.iter().filter(|(_, owner)| owner.ingress.process == process);
        let ids: Vec<RequestId> = of_process.map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.abort(id));
    }

    /// Whether any sequence waits or runs.
    pub(super) fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    /// Sequences that wait.
    pub(super) fn waiting(&self) -> u32 {
        self.scheduler.num_waiting() as u32
    }

    /// Figures for the router.
    pub(super) fn stats(&self, clock: &StepClock) -> RankStats {
        RankStats {
            step_us: clock.last_us(),
            phases: clock.phases(),
            transfers: self.transfers,
            ..self.scheduler.stats()
        }
    }

    /// The KV blocks of its sequences, for those of other ranks.
    pub(super) fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    /// Blocks of a sequence came from another rank, or did not.
    pub(super) fn fetched(&mut self, fetched: &Fetched) {
        self.transfers.fetches += 1;
        self.transfers.failures += u64::from(!fetched.complete);
        self.transfers.bytes += fetched.bytes;
        self.transfers.us += fetched.took.as_micros() as u64;
    }

    /// The steps that follow have numbers from this one on, as recordings know them.
    pub(super) fn begin_step(&mut self, step: u64) {
        self.spans.begin_step(step);
    }

    /// What became of the spans of this process.
    pub(super) fn spans(&self) -> SpanCounts {
        self.spans.counts()
    }

    /// The next step, which may be empty.
    pub(super) fn schedule(&mut self) -> Arc<Step> {
        let step = self.scheduler.schedule();
        if !self.spans.is_empty() {
            self.scheduler.shares().for_each(|(id, tokens)| self.spans.scheduled(id, tokens));
        }
        step
    }

    /// Works out what grammars allow next, while the device computes.
    pub(super) fn prepare_masks(&mut self) {
        self.scheduler.prepare_masks();
    }

    /// Has the steps in flight computed again, after a fault.
    pub(super) fn rewind(&mut self) {
        self.scheduler.rewind();
        self.spans.interrupted();
    }

    /// Takes the logits of the oldest step and delivers what is drawn from them.
    pub(super) fn complete(&mut self, logits: &Logits, outlet: &mut Outlet) {
        let outputs = self.scheduler.complete(logits);
        outputs.into_iter().for_each(|output| self.deliver(output, outlet));
    }

    /// Takes what the device drew in the oldest step and delivers it.
    pub(super) fn complete_drawn(&mut self, (drawn, logits): &StepResults, outlet: &mut Outlet) {
        let outputs = self.scheduler.complete_drawn(drawn, logits);
        outputs.into_iter().for_each(|output| self.deliver(output, outlet));
    }

    fn deliver(&mut self, output: Output, outlet: &mut Outlet) {
        self.spans.brought(&output);
        let owner = match output.finish {
            Some(_) => self.owners.remove(&output.id),
            None => self.owners.get(&output.id).cloned(),
        };
        if let Some(owner) = owner {
            if let Some(finish) = &output.finish {
                let request_id = owner.request_id.as_str();
                tracing::debug!(request_id, sequence = %Hex(output.id), ?finish, "ended a sequence");
            }
            outlet.push(&owner.ingress, output);
        }
    }
}
