//! The EPLB actor: gathers the loads, plans remaps and sees them through. The only one that raises the map epoch.
//!
//! `core` decides; this file carries messages. The ranks agree among themselves on the step at which a layer
//! changes, so the actor may die at any time: ranks finish or drop what is open, and a new incarnation asks them where
//! they stand.

mod core;
mod status;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix::{Actor, AsyncContext, Context, Handler, MessageResult, ResponseActFuture, WrapFuture};
use futures_util::future::join_all;
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::group::GroupView;
use heliostat_runtime::handle::ActorAddr;

pub use core::{EplbArgs, EplbConfig};
pub use status::{Balancedness, EplbPulse, EplbStatus, LayerStatus, Remap, Totals, Trigger};

use crate::messages::{
    AbandonPlan, ApplyPlan, AttachEplb, GetPulse, GetStatus, PlanReport, RankJoined, Rebalance,
    RebalanceRefused, RebalanceStarted, ReportLoad, StepLoad,
};
use crate::rank::Rank;
use core::{Action, Core, Untaken};

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(250);
/// How long a rank may take to answer.
const RANK_DEADLINE: Duration = Duration::from_secs(5);

/// The actor.
pub struct Eplb {
    core: Core,
    cx: ActorCx,
    started: Instant,
    log_balancedness: bool,
}

impl Actor for Eplb {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(TICK, |this, ctx| {
            let action = this.core.on_tick(this.now());
            this.act(action, ctx);
        });
    }
}

impl RemoteActor for Eplb {
    const TYPE: &'static str = "eplb";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<GroupView>().accept::<StepLoad>().accept::<PlanReport>().accept::<RankJoined>();
        m.accept::<GetStatus>().accept::<GetPulse>().accept_json_result::<Rebalance>();
    }
}

impl Spawn for Eplb {
    type Args = EplbArgs;

    async fn create(args: EplbArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let log_balancedness = args.config.log_balancedness;
        Ok(Self { core: Core::new(args), cx, started: Instant::now(), log_balancedness })
    }
}

impl Eplb {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn act(&mut self, action: Option<Action>, ctx: &mut Context<Self>) {
        let Some(action) = action else { return };
        let ranks: Vec<(u32, ActorAddr)> =
            self.core.ranks().map(|(rank, addr)| (rank, addr.clone())).collect();
        for (rank, addr) in ranks {
            let handle = self.cx.system().handle::<Rank>(addr).with_deadline(RANK_DEADLINE);
            match &action {
                Action::Publish(plan) => {
                    let message = ApplyPlan { plan: plan.clone(), reply_to: self.cx.addr() };
                    let me = ctx.address();
                    let epoch = plan.epoch;
                    actix::spawn(async move {
                        let why = match handle.ask(message).await {
                            Ok(Ok(())) => return,
                            Ok(Err(refused)) => Untaken::Refused(refused.to_string()),
                            Err(lost) => Untaken::Untold(lost.to_string()),
                        };
                        me.do_send(PlanUntaken { epoch, rank, why });
                    });
                }
                Action::Abandon(epoch) => {
                    if let Err(refused) = handle.tell(AbandonPlan { epoch: *epoch }) {
                        tracing::warn!(
                            rank,
                            epoch,
                            "cannot tell the rank to drop the plan: {}",
                            refused.reason
                        );
                    }
                }
            }
        }
    }
}

/// A rank did not take a plan.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct PlanUntaken {
    epoch: u64,
    rank: u32,
    why: Untaken,
}

impl Handler<PlanUntaken> for Eplb {
    type Result = ();

    fn handle(&mut self, untaken: PlanUntaken, ctx: &mut Self::Context) {
        let PlanUntaken { epoch, rank, why } = untaken;
        let action = self.core.on_untaken(epoch, rank, &why, self.now());
        self.act(action, ctx);
    }
}

impl Handler<GroupView> for Eplb {
    type Result = ();

    fn handle(&mut self, view: GroupView, ctx: &mut Self::Context) {
        self.core.on_view(view.epoch, self.now());
        for addr in view.members.iter().filter_map(|member| member.addr.clone()) {
            let handle = self.cx.system().handle::<Rank>(addr).with_deadline(RANK_DEADLINE);
            let attach = AttachEplb { eplb: self.cx.addr() };
            let me = ctx.address();
            actix::spawn(async move {
                match handle.ask(attach).await {
                    Ok(Some(joined)) => me.do_send(joined),
                    Ok(None) => {}
                    Err(why) => tracing::debug!("cannot attach to a rank: {why}"),
                }
            });
        }
    }
}

impl Handler<RankJoined> for Eplb {
    type Result = ();

    fn handle(&mut self, joined: RankJoined, _: &mut Self::Context) {
        self.core.on_joined(joined, self.now());
    }
}

impl Handler<StepLoad> for Eplb {
    type Result = ();

    fn handle(&mut self, load: StepLoad, ctx: &mut Self::Context) {
        let action = self.core.on_load(&load, wall_ms(), self.now());
        if self.log_balancedness {
            let balancedness = self.core.balancedness();
            tracing::info!(
                min = balancedness.min,
                p50 = balancedness.p50,
                avg = balancedness.avg,
                "balancedness"
            );
        }
        self.act(action, ctx);
    }
}

impl Handler<PlanReport> for Eplb {
    type Result = ();

    fn handle(&mut self, report: PlanReport, ctx: &mut Self::Context) {
        let action = self.core.on_report(report, self.now());
        self.act(action, ctx);
    }
}

impl Handler<GetStatus> for Eplb {
    type Result = String;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> String {
        serde_json::to_string(&self.core.status(self.now())).expect("the status is plain data")
    }
}

impl Handler<GetPulse> for Eplb {
    type Result = MessageResult<GetPulse>;

    fn handle(&mut self, _: GetPulse, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.core.pulse())
    }
}

impl Handler<Rebalance> for Eplb {
    type Result = ResponseActFuture<Self, Result<RebalanceStarted, RebalanceRefused>>;

    /// Takes in what the ranks have counted up to now, then plans.
    fn handle(&mut self, _: Rebalance, ctx: &mut Self::Context) -> Self::Result {
        let asks = self.core.ranks().map(|(_, addr)| {
            let handle = self.cx.system().handle::<Rank>(addr.clone()).with_deadline(RANK_DEADLINE);
            async move { handle.ask(ReportLoad).await.ok().flatten() }
        });
        let loads = join_all(asks.collect::<Vec<_>>());
        let me = ctx.address();
        let plan = async move {
            let loads = loads.await.into_iter().flatten().filter(|load| !load.counts.is_empty()).collect();
            me.send(PlanNow(loads)).await.unwrap_or(Err(RebalanceRefused::NotReady { ready: 0, size: 0 }))
        };
        Box::pin(plan.into_actor(self))
    }
}

/// The loads are in: plan.
#[derive(actix::Message)]
#[rtype(result = "Result<RebalanceStarted, RebalanceRefused>")]
struct PlanNow(Vec<StepLoad>);

impl Handler<PlanNow> for Eplb {
    type Result = Result<RebalanceStarted, RebalanceRefused>;

    fn handle(&mut self, PlanNow(loads): PlanNow, ctx: &mut Self::Context) -> Self::Result {
        for load in &loads {
            let action = self.core.on_load(load, wall_ms(), self.now());
            self.act(action, ctx);
        }
        let (started, action) = self.core.rebalance(wall_ms(), self.now())?;
        self.act(Some(action), ctx);
        Ok(started)
    }
}

fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
