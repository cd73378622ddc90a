//! What the step thread sends to other actors. It never waits for them.
//!
//! Outputs that an ingress cannot take at the moment stay here and go with those of the next step; they are bounded by
//! the tokens of its running sequences. Load counts that cannot be sent are added to the next report.

use std::collections::HashMap;

use heliostat_engine::ep::PlanProgress;
use heliostat_engine::eplb::map::Layout;
use heliostat_engine::request::{Output, RankStats, RequestId};
use heliostat_runtime::handle::{ActorAddr, ProcessId};
use heliostat_runtime::system::System;
use tokio::sync::mpsc::UnboundedSender;

use super::args::RankArgs;
use super::link::Owner;
use super::plan::OpenPlan;
use super::suspect::Notice;
use crate::eplb::Eplb;
use crate::ingress::Hex;
use crate::ingress_actor::IngressActor;
use crate::messages::{Busy, PlanEnd, PlanReport, RankJoined, RankOutputs, RankRefused, StepLoad, StepTimes};
use crate::telemetry::SpanCounts;

/// The step thread's way out.
pub(super) struct Outlet {
    system: System,
    me: ActorAddr,
    rank: u32,
    dp: Option<u32>,
    /// By what the ingress knows the first DP rank of the group.
    first_rank: u32,
    /// Outputs that wait for each ingress that ever submitted something.
    outputs: HashMap<ActorAddr, Vec<Output>>,
    eplb: Option<ActorAddr>,
    joined: Option<RankJoined>,
    /// The EPLB actor came while a plan was open, of which it knows nothing.
    missed_plan: bool,
    load: Vec<Vec<u32>>,
    load_steps: u64,
    notices: UnboundedSender<Notice>,
}

impl Outlet {
    /// Nobody to send to yet.
    pub(super) fn new(
        args: &RankArgs,
        system: System,
        me: ActorAddr,
        notices: UnboundedSender<Notice>,
    ) -> Self {
        let RankArgs { rank, first_rank, .. } = *args;
        let dp = args.topology.role(rank as usize).dp.map(|dp| dp as u32);
        let (outputs, load) = (HashMap::new(), Vec::new());
        Self {
            system,
            me,
            rank,
            dp,
            first_rank,
            outputs,
            eplb: None,
            joined: None,
            missed_plan: false,
            load,
            load_steps: 0,
            notices,
        }
    }

    /// This rank's actor.
    pub(super) fn me(&self) -> ActorAddr {
        self.me.clone()
    }

    /// The rank cannot go on.
    pub(super) fn fail(&self, why: String) {
        self.notice(Notice::Failed(why));
    }

    /// The rank's GPU is lost.
    pub(super) fn device_failed(&self, why: String) {
        self.notice(Notice::DeviceFailed(why));
    }

    /// A rank said nothing for too long.
    pub(super) fn silent(&self, rank: u32, addr: ActorAddr) {
        self.notice(Notice::Silent(rank, addr));
    }

    fn notice(&self, notice: Notice) {
        // The receiver lives as long as the process; without it nobody is left to tell.
        let _ = self.notices.send(notice);
    }

    /// Queues an output for its ingress.
    pub(super) fn push(&mut self, ingress: &ActorAddr, output: Output) {
        match self.outputs.get_mut(ingress) {
            Some(waiting) => waiting.push(output),
            None => {
                self.outputs.insert(ingress.clone(), vec![output]);
            }
        }
    }

    /// Sends figures to this ingress from now on.
    pub(super) fn attach_ingress(&mut self, ingress: ActorAddr, stats: &RankStats, spans: SpanCounts) {
        self.outputs.entry(ingress).or_default();
        self.send_stats(stats, spans);
    }

    /// Tells an ingress that a sequence cannot run here.
    pub(super) fn refuse(&mut self, id: RequestId, owner: &Owner, why: Busy) {
        let Some(dp) = self.dp.map(|dp| dp + self.first_rank) else { return };
        let (request_id, sequence) = (owner.request_id.as_str(), Hex(id));
        tracing::debug!(request_id, %sequence, "refused a sequence: {why}");
        let ingress = self.system.handle::<IngressActor>(owner.ingress.clone());
        if let Err(refused) = ingress.tell(RankRefused { dp, id, why }) {
            tracing::warn!(request_id, %sequence, "the ingress took no refusal: {}", refused.reason);
        }
    }

    /// Forgets ingresses that are gone with their process.
    pub(super) fn forget(&mut self, process: ProcessId) {
        self.outputs.retain(|ingress, _| ingress.process != process);
    }

    /// Sends what waits.
    pub(super) fn send_outputs(&mut self, stats: &RankStats, spans: SpanCounts) {
        self.send((stats, spans), |waiting| !waiting.is_empty());
    }

    /// Sends what waits, and the figures to everybody.
    pub(super) fn send_stats(&mut self, stats: &RankStats, spans: SpanCounts) {
        self.send((stats, spans), |_| true);
    }

    fn send(&mut self, (stats, spans): (&RankStats, SpanCounts), wanted: impl Fn(&[Output]) -> bool) {
        let Some(dp) = self.dp.map(|dp| dp + self.first_rank) else { return };
        for (ingress, waiting) in self.outputs.iter_mut().filter(|(_, waiting)| wanted(waiting)) {
            let message = RankOutputs { dp, outputs: std::mem::take(waiting), stats: stats.clone(), spans };
            if let Err(refused) = self.system.handle::<IngressActor>(ingress.clone()).tell(message) {
                *waiting = refused.message.outputs;
            }
        }
    }

    /// Sends joins, plan reports and loads to this EPLB actor from now on; returns the last join, with what the rank has
    /// by `now`: an actor that took the place of another must not plan from a layout of long ago. `open` is the plan
    /// that is open here.
    pub(super) fn attach_eplb(
        &mut self,
        eplb: ActorAddr,
        now: (PlanProgress, Layout),
        open: Option<u64>,
    ) -> Option<RankJoined> {
        self.eplb = Some(eplb);
        self.missed_plan = open.is_some();
        let joined = self.joined.as_mut()?;
        (joined.progress, joined.layout) = now;
        // Its number is taken, whatever becomes of it.
        joined.progress.closed = joined.progress.closed.max(open.unwrap_or(0));
        Some(joined.clone())
    }

    /// A plan ended here and left this. Says so to an EPLB actor that came in the middle of it.
    pub(super) fn plan_ended(&mut self, progress: PlanProgress, layout: &Layout) {
        if !std::mem::take(&mut self.missed_plan) {
            return;
        }
        if let Some(joined) = &mut self.joined {
            (joined.progress, joined.layout) = (progress, layout.clone());
            let joined = joined.clone();
            self.to_eplb(joined);
        }
    }

    /// The rank joined its group.
    pub(super) fn joined(&mut self, joined: RankJoined) {
        self.to_eplb(joined.clone());
        self.joined = Some(joined);
    }

    /// A plan went on or ended here.
    pub(super) fn plan_report(
        &mut self,
        plan: &OpenPlan,
        committed: u32,
        end: Option<PlanEnd>,
        steps: StepTimes,
    ) {
        let staging = plan.staging();
        let report = PlanReport {
            rank: self.rank,
            epoch: plan.plan.epoch,
            staged: staging.staged,
            committed,
            end,
            moved: staging.moved,
            steps,
            error: staging.error,
        };
        let eplb = self.system.handle::<Eplb>(plan.reply_to.clone());
        if let Err(refused) = eplb.tell(report) {
            tracing::warn!(
                epoch = plan.plan.epoch,
                "the EPLB actor took no plan report: {:?}",
                refused.reason
            );
        }
    }

    /// Counts a step for the load report.
    pub(super) fn count_step(&mut self) {
        self.load_steps += 1;
    }

    /// Whether the load of `steps` steps has gathered.
    pub(super) fn load_is_due(&self, steps: u32) -> bool {
        self.load_steps >= u64::from(steps)
    }

    /// Where routed tokens gather, `[moe layer][logical expert]`.
    pub(super) fn load_sums(&mut self) -> &mut Vec<Vec<u32>> {
        &mut self.load
    }

    /// Hands out the gathered load.
    pub(super) fn take_load(&mut self) -> Option<StepLoad> {
        let counts = std::mem::take(&mut self.load);
        let steps = std::mem::take(&mut self.load_steps);
        self.dp.filter(|_| steps > 0).map(|dp| StepLoad { dp, steps, counts })
    }

    /// Sends the gathered load.
    pub(super) fn send_load(&mut self) {
        if self.load_steps > 0
            && self.eplb.is_some()
            && let Some(load) = self.take_load()
        {
            self.to_eplb(load);
        }
    }

    fn to_eplb<M>(&self, message: M)
    where
        M: heliostat_runtime::actor::WireMessage,
        Eplb: actix::Handler<M>,
    {
        if let Some(eplb) = &self.eplb
            && let Err(refused) = self.system.handle::<Eplb>(eplb.clone()).tell(message)
        {
            tracing::debug!("the EPLB actor took no report: {:?}", refused.reason);
        }
    }
}
