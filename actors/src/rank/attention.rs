//! The attention role of a rank: its sequences, KV cache and model.

use std::collections::HashMap;

use heliostat_engine::ep::EpGroup;
use heliostat_engine::model::{ExchangeError, KvPages, Model};
use heliostat_engine::request::{Output, RankStats, Request, RequestId};
use heliostat_engine::scheduler::{RefuseReason, Scheduler};
use heliostat_runtime::handle::{ActorAddr, ProcessId};

use super::outlet::Outlet;
use crate::messages::Busy;

/// What a DP rank owns.
pub(super) struct Attention {
    model: Model,
    kv: KvPages,
    scheduler: Scheduler,
    owners: HashMap<RequestId, ActorAddr>,
}

impl Attention {
    /// Without sequences.
    pub(super) fn new(model: Model, kv: KvPages, scheduler: Scheduler) -> Self {
        Self { model, kv, scheduler, owners: HashMap::new() }
    }

    /// Queues a sequence; a refusal goes to its ingress as the sequence's end.
    pub(super) fn submit(&mut self, request: Request, owner: ActorAddr, outlet: &mut Outlet) {
        let id = request.id;
        match self.scheduler.add(request) {
            Ok(()) => {
                self.owners.insert(id, owner);
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
    }

    /// Forgets all sequences whose ingress lives in that process.
    pub(super) fn abort_all_of(&mut self, process: ProcessId) {
        let of_process = self.owners.iter().filter(|(_, owner)| owner.process == process);
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
    pub(super) fn stats(&self, step_us: u64) -> RankStats {
        RankStats { step_us, ..self.scheduler.stats() }
    }

    /// Computes the next batch, which may be empty: the other ranks' tokens still need this rank's experts. When the
    /// exchange fails the batch stays in flight and is computed again in the next epoch.
    pub(super) fn step(&mut self, group: &mut EpGroup, outlet: &mut Outlet) -> Result<(), ExchangeError> {
        let batch = self.scheduler.schedule();
        let logits = self.model.forward(&batch, &mut self.kv, group)?;
        for output in self.scheduler.complete(&logits) {
            self.deliver(output, outlet);
        }
        Ok(())
    }

    fn deliver(&mut self, output: Output, outlet: &mut Outlet) {
        let owner = match output.finish {
            Some(_) => self.owners.remove(&output.id),
            None => self.owners.get(&output.id).cloned(),
        };
        if let Some(owner) = owner {
            outlet.push(&owner, output);
        }
    }
}
