//! The rank actor: one device's share of the group, its attention role, its expert role or both.
//!
//! The actor answers messages; its step thread (`thread`) computes. No message waits for a step, but for those that
//! ask the thread for figures.

mod args;
mod attention;
mod borrow;
mod clock;
mod engine;
mod grammars;
mod join;
mod kv;
mod leases;
mod link;
mod load;
mod outlet;
mod plan;
mod recorder;
mod refill;
mod spans;
mod stager;
mod steps;
mod suspect;
mod thread;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::{Actor, AsyncContext, Context, Handler, ResponseFuture};
use heliostat_engine::ep::{ExpertWeights, SharedSlots};
use heliostat_kernels::cuda::Stream;
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::group::GroupView;
use heliostat_runtime::handle::ActorAddr;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use args::{CudaArgs, EngineArgs, ExchangeBackend, KvCacheArgs, LinkArgs, RankArgs};

use crate::ingress::Hex;
use crate::ingress_actor::IngressActor;
use crate::messages::{
    AbandonPlan, Abort, ApplyPlan, AttachEplb, AttachIngress, BreakDevice, Busy, ExpertChunk, FetchExpert,
    FetchKv, KvChunk, LendExpert, Lent, NoSuchExpert, NotBroken, NotLent, Ping, PlanRefused, RankJoined,
    RankRefused, ReportLoad, ReturnExpert, StartTrace, StepLoad, Submit, TakeTrace,
};
use crate::monitor::trace::RankTrace;
use crate::telemetry::Tracing;
use borrow::Borrower;
use grammars::Grammars;
use join::ExpertLoader;
use leases::Leases;
use link::{Command, Link, Submission};
use plan::OpenPlan;
use spans::Traced;
use stager::Stager;

/// How often a rank sees whether its GPU still answers.
const DEVICE_CHECK: Duration = Duration::from_secs(2);

/// The codec of what ranks say to each other beside the actor messages; a decoded value has at most 64 MiB.
fn codec() -> impl bincode::config::Config {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<{ 64 << 20 }>()
}

/// One rank of the group.
pub struct Rank {
    args: RankArgs,
    cx: ActorCx,
    link: Link,
    slots: SharedSlots,
    loader: ExpertLoader,
    /// Actors of all ranks in the newest complete view.
    peers: Vec<ActorAddr>,
    staging: Option<(u64, JoinHandle<()>)>,
    /// The expert that was last read by a peer, encoded: large ones are read in several chunks.
    encoded: Arc<Mutex<Option<Encoded>>>,
    /// Experts that peers copy from this rank's GPU.
    leases: Leases,
    /// Tells whether its GPU still answers.
    probe: Option<Stream>,
    grammars: Arc<Grammars>,
    tracing: Tracing,
}

struct Encoded {
    moe_layer: u32,
    weights: ExpertWeights,
    bytes: Vec<u8>,
    checksum: u64,
}

impl Actor for Rank {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // Steps notice a lost GPU by themselves; a rank without work would not.
        let Some(probe) = self.probe.clone() else { return };
        ctx.run_interval(DEVICE_CHECK, move |this, _| match probe.check() {
            Err(why) if why.is_fatal() => this.link.device_failed(why.to_string()),
            Ok(()) | Err(_) => {}
        });
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.drop_staging();
        self.link.stop();
        self.tracing.close();
    }
}

impl RemoteActor for Rank {
    const TYPE: &'static str = "rank";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<GroupView>().accept::<Submit>().accept::<Abort>();
        m.accept::<ApplyPlan>().accept::<AbandonPlan>().accept::<FetchExpert>().accept::<FetchKv>();
        m.accept::<LendExpert>().accept::<ReturnExpert>();
        m.accept::<ReportLoad>().accept::<AttachEplb>().accept::<AttachIngress>();
        m.accept::<StartTrace>().accept::<TakeTrace>();
        m.accept_json::<Ping>().accept_json_result::<BreakDevice>();
    }
}

impl Spawn for Rank {
    type Args = RankArgs;

    async fn create(args: RankArgs, cx: ActorCx) -> Result<Self, CreateError> {
        let loading = cx.clone();
        let wanted = args.clone();
        let experts = load::Experts::of(&args, &cx).await;
        let loaded = tokio::task::spawn_blocking(move || load::load(&wanted, &loading, experts))
            .await
            .map_err(|why| CreateError::Panicked(why.to_string().into()))??;
        load::start(args, cx, loaded)
    }
}

impl Rank {
    fn drop_staging(&mut self) {
        if let Some((_, task)) = self.staging.take() {
            task.abort();
        }
    }

    /// Drops an expert whose reader went away before its end.
    fn forget_encoded(&self) {
        // Whoever reads it now keeps it.
        if let Ok(mut encoded) = self.encoded.try_lock() {
            *encoded = None;
        }
    }

    /// Makes ready what the request needs, which may take long, and queues it then: its grammar, and the KV blocks that
    /// another rank has of it.
    fn prepare(&self, message: Submit, dp: u32) {
        let (id, ingress) = (message.request.id, message.reply_to.process);
        self.link.note_coming(id, ingress);
        let traced = Traced::now(&message.from);
        let (grammars, link, cx) = (Arc::clone(&self.grammars), self.link.clone(), self.cx.clone());
        let patience = self.args.links.timeout;
        tokio::spawn(async move {
            let constraint = match message.request.grammar.clone() {
                None => None,
                Some(grammar) => {
                    let compiled = tokio::task::spawn_blocking(move || grammars.compile(&grammar)).await;
                    match compiled.unwrap_or_else(|why| Err(why.to_string())) {
                        Ok(constraint) => Some(constraint),
                        Err(why) => {
                            if link.abort(id) {
                                refuse(&cx, dp, &message, Busy::Unservable(why));
                            }
                            return;
                        }
                    }
                }
            };
            if let Some(from) = &message.kv_at {
                let from = cx.system().handle::<Self>(from.clone()).with_deadline(patience);
                kv::fetch(&link, &from, &message.request).await;
            }
            link.submit_coming(Submission::of(message, traced, constraint));
        });
    }

    fn open(&mut self, message: ApplyPlan) -> Result<(), PlanRefused> {
        let epoch = message.plan.epoch;
        let closed = self.link.closed_plan();
        if epoch <= closed {
            return Err(PlanRefused::Stale { plan: epoch, closed });
        }
        if let Some((open, _)) = &self.staging
            && *open > closed
        {
            return if *open == epoch { Ok(()) } else { Err(PlanRefused::Busy { open: *open }) };
        }
        if self.peers.is_empty() {
            return Err(PlanRefused::NotJoined);
        }
        let plan = Arc::new(OpenPlan::new(message.plan, message.reply_to));
        self.link.send(Command::Open(Arc::clone(&plan)));
        let stager = Stager {
            borrower: Borrower {
                peers: self.peers.clone(),
                ..Borrower::new(self.cx.system(), self.loader.store.clone(), self.link.clone())
            },
            topology: self.args.topology.clone(),
            rank: self.args.rank as usize,
            slots: self.slots.clone(),
            loader: self.loader.clone(),
            ahead: self.args.links.stage_ahead,
        };
        self.drop_staging();
        self.forget_encoded();
        // Peers may have opened this plan before, and borrow for it.
        self.leases.plan_ended(epoch - 1);
        self.staging = Some((epoch, tokio::spawn(stager.run(plan))));
        Ok(())
    }
}

/// Tells the ingress that its request does not run.
fn refuse(cx: &ActorCx, dp: u32, message: &Submit, why: Busy) {
    let (request_id, sequence) = (message.from.request_id.as_str(), Hex(message.request.id));
    tracing::debug!(request_id, %sequence, "refused a sequence: {why}");
    let ingress = cx.system().handle::<IngressActor>(message.reply_to.clone());
    let refusal = RankRefused { dp, id: message.request.id, why };
    if let Err(refused) = ingress.tell(refusal) {
        tracing::warn!(request_id, %sequence, "the ingress took no refusal: {}", refused.reason);
    }
}

/// A part of an expert's bytes.
fn chunk(slots: &SharedSlots, encoded: &Mutex<Option<Encoded>>, ask: FetchExpert) -> Option<ExpertChunk> {
    let weights = slots.read().find(ask.moe_layer as usize, ask.logical)?;
    let mut encoded = encoded.lock().unwrap_or_else(PoisonError::into_inner);
    let kept =
        encoded.take().filter(|kept| kept.moe_layer == ask.moe_layer && kept.weights.is_same(&weights));
    let kept = match kept {
        Some(kept) => kept,
        None => {
            let expert = weights.to_host().inspect_err(|why| tracing::error!("cannot read an expert: {why}"));
            let expert = expert.ok()?;
            let (bytes, checksum) = (expert.to_bytes(), expert.checksum());
            Encoded { moe_layer: ask.moe_layer, weights, bytes, checksum }
        }
    };
    let rest = kept.bytes.get(ask.offset as usize..).unwrap_or_default();
    let chunk = ExpertChunk {
        total: kept.bytes.len() as u64,
        checksum: kept.checksum,
        bytes: rest[..rest.len().min(ask.len as usize)].to_vec(),
    };
    let is_last = ask.offset + chunk.bytes.len() as u64 >= chunk.total;
    *encoded = (!is_last).then_some(kept);
    Some(chunk)
}

impl Handler<GroupView> for Rank {
    type Result = ();

    fn handle(&mut self, view: GroupView, _: &mut Self::Context) {
        // A plan that was open ends with the membership epoch: the ranks agree on that when they join.
        self.drop_staging();
        self.forget_encoded();
        self.leases.clear();
        self.peers = view.members.iter().filter_map(|member| member.addr.clone()).collect();
        if !view.is_complete() {
            self.peers.clear();
        }
        self.link.send_view(view);
    }
}

impl Handler<Submit> for Rank {
    type Result = ();

    fn handle(&mut self, message: Submit, _: &mut Self::Context) {
        let Some(dp) = self.args.topology.role(self.args.rank as usize).dp else {
            tracing::error!("a request came to rank {}, which has no attention role", self.args.rank);
            return;
        };
        let dp = dp as u32 + self.args.first_rank;
        match self.link.admit(self.args.engine.max_waiting) {
            Ok(()) if message.request.grammar.is_some() || message.kv_at.is_some() => {
                self.prepare(message, dp);
            }
            Ok(()) => {
                let traced = Traced::now(&message.from);
                self.link.submit(Submission::of(message, traced, None));
            }
            Err(why) => refuse(&self.cx, dp, &message, why),
        }
    }
}

impl Handler<Abort> for Rank {
    type Result = ();

    fn handle(&mut self, message: Abort, _: &mut Self::Context) {
        self.link.abort(message.id);
    }
}

impl Handler<ApplyPlan> for Rank {
    type Result = Result<(), PlanRefused>;

    fn handle(&mut self, message: ApplyPlan, _: &mut Self::Context) -> Self::Result {
        self.open(message)
    }
}

impl Handler<AbandonPlan> for Rank {
    type Result = ();

    fn handle(&mut self, message: AbandonPlan, _: &mut Self::Context) {
        self.link.send(Command::Abandon(message.epoch));
        self.leases.plan_ended(message.epoch);
        if self.staging.as_ref().is_some_and(|(epoch, _)| *epoch <= message.epoch) {
            self.drop_staging();
        }
    }
}

impl Handler<FetchKv> for Rank {
    type Result = ResponseFuture<KvChunk>;

    fn handle(&mut self, ask: FetchKv, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        self.link.send(Command::ReadKv(ask, reply));
        // Without an answer the asker computes what it wanted.
        Box::pin(async move { answer.await.unwrap_or_default() })
    }
}

impl Handler<FetchExpert> for Rank {
    type Result = ResponseFuture<Result<ExpertChunk, NoSuchExpert>>;

    fn handle(&mut self, ask: FetchExpert, _: &mut Self::Context) -> Self::Result {
        let (slots, encoded) = (self.slots.clone(), Arc::clone(&self.encoded));
        let missing = NoSuchExpert { moe_layer: ask.moe_layer, logical: ask.logical };
        // Encoding a large expert, or reading it from a GPU, takes longer than other messages should wait.
        let read = tokio::task::spawn_blocking(move || chunk(&slots, &encoded, ask));
        Box::pin(async move { read.await.ok().flatten().ok_or(missing) })
    }
}

impl Handler<LendExpert> for Rank {
    type Result = Result<Lent, NotLent>;

    fn handle(&mut self, ask: LendExpert, ctx: &mut Self::Context) -> Self::Result {
        let LendExpert { moe_layer, logical, plan, borrower } = ask;
        if !self.peers.iter().any(|peer| peer.process == borrower) {
            return Err(NotLent::NoPeer(borrower));
        }
        let found = self.slots.read().find(moe_layer as usize, logical);
        let weights = found.ok_or(NotLent::NotHere(NoSuchExpert { moe_layer, logical }))?;
        let place = weights.lent().ok_or(NotLent::OnHost)?;
        let lease = self.leases.lend(borrower, plan, weights);
        let leases = self.leases.clone();
        ctx.run_later(self.args.links.timeout, move |_, _| {
            if leases.end(lease) {
                tracing::warn!(moe_layer, logical, %borrower, "an expert was lent for too long: taken back");
            }
        });
        Ok(Lent { lease, moe_layer, logical, place })
    }
}

impl Handler<ReturnExpert> for Rank {
    type Result = ();

    fn handle(&mut self, message: ReturnExpert, _: &mut Self::Context) {
        self.leases.end(message.lease);
    }
}

impl Handler<BreakDevice> for Rank {
    type Result = Result<(), NotBroken>;

    fn handle(&mut self, _: BreakDevice, _: &mut Self::Context) -> Self::Result {
        if !self.args.engine.cuda.fault_injection {
            return Err(NotBroken::NotAllowed);
        }
        self.link.send(Command::BreakDevice);
        Ok(())
    }
}

impl Handler<ReportLoad> for Rank {
    type Result = ResponseFuture<Option<StepLoad>>;

    fn handle(&mut self, _: ReportLoad, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        self.link.send(Command::ReportLoad(reply));
        Box::pin(async move { answer.await.unwrap_or(None) })
    }
}

impl Handler<AttachIngress> for Rank {
    type Result = ();

    fn handle(&mut self, message: AttachIngress, _: &mut Self::Context) {
        self.link.send(Command::AttachIngress(message.ingress));
    }
}

impl Handler<Ping> for Rank {
    type Result = ();

    fn handle(&mut self, _: Ping, _: &mut Self::Context) {}
}

impl Handler<StartTrace> for Rank {
    type Result = ();

    fn handle(&mut self, message: StartTrace, _: &mut Self::Context) {
        self.link.send(Command::StartTrace(message.steps_max));
    }
}

impl Handler<TakeTrace> for Rank {
    type Result = ResponseFuture<RankTrace>;

    fn handle(&mut self, _: TakeTrace, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        self.link.send(Command::TakeTrace(reply));
        Box::pin(async move { answer.await.unwrap_or_default() })
    }
}

impl Handler<AttachEplb> for Rank {
    type Result = ResponseFuture<Option<RankJoined>>;

    fn handle(&mut self, message: AttachEplb, _: &mut Self::Context) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        self.link.send(Command::AttachEplb(message.eplb, reply));
        Box::pin(async move { answer.await.unwrap_or(None) })
    }
}
