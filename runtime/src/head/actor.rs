//! The head as an actor: feeds what it hears to the pure core and carries out what that says.

mod drivers;
mod nodes;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use actix::{
    Actor, AsyncContext, Context, Handler, MessageResult, ResponseFuture, SpawnHandle, StreamHandler,
};
use futures_util::stream;
use tokio::sync::watch;

use super::authority::Authority;
use super::clock::{Clock, LOOK, Waking};
use super::core::{Command, Event, HeadState};
use super::keeper::Keeper;
use super::lives::Lives;
use super::messages::{
    Applied, Apply, ApplyError, Control, ControlAction, DeliverView, Dismiss, DrainNode, DriverBye,
    DriverHello, Find, FindLog, GetValue, HeadSeen, IsOver, Located, Lookup, MakePlacementGroup, NodeReport,
    PutValue, RemovePlacementGroup, Shutdown, StartWorker, StopNode, StopWorker, UndrainNode, Watch,
    WatchPlacementGroup, WorkerReport,
};
use super::packages::HeadPackages;
use super::tenure::Superseded;
use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::backoff::Backoff;
use crate::cluster::status::{ClusterStatus, HeadStatus, StoreHealth};
use crate::handle::{ActorAddr, AskError, Handle, Incarnation, ProcessId};
use crate::mesh::{RemoveMesh, WatchMesh};
use crate::node::NodeActor;
use crate::package::{ListPackages, PackageStore, RegisterPackage, RemovePackage};
use crate::supervisor::{ChildDied, Judge};
use crate::system::{PeerEvent, System};
use crate::worker::WorkerActor;

/// Longest wait for the store before a client is told that its change is not durable yet.
const DURABLE_PATIENCE: Duration = Duration::from_secs(3);
/// How long an actor that decides may take for one answer.
const JUDGE_DEADLINE: Duration = Duration::from_secs(5);
/// Pause before an order whose fate is unknown is repeated.
pub(super) const ORDER_PAUSE: Duration = Duration::from_millis(50);
/// Attempts to deliver what must arrive, with growing pauses: about 4 s.
const INSISTENCE: u32 = 12;

/// The head.
pub(crate) struct HeadActor {
    pub(super) core: HeadState,
    pub(super) packages: Option<HeadPackages>,
    system: System,
    pub(super) keeper: Keeper,
    pub(super) authority: Arc<Authority>,
    /// Where heads that stand by may be, beside this one.
    heads: Vec<String>,
    clock: Waking,
    pub(super) nodes: HashMap<String, NodeLink>,
    workers: HashMap<Incarnation, Handle<WorkerActor>>,
    pub(super) version: watch::Sender<u64>,
    closed: watch::Sender<bool>,
    pub(super) lives: Lives,
    timer: Option<(Duration, SpawnHandle)>,
}

pub(super) struct NodeLink {
    boot: u64,
    process: ProcessId,
    pub(super) handle: Handle<NodeActor>,
}

/// What a head actor is made of.
pub(super) struct Parts {
    pub(super) core: HeadState,
    pub(super) system: System,
    pub(super) keeper: Keeper,
    pub(super) authority: Arc<Authority>,
    /// Where heads may be, this one included.
    pub(super) heads: Vec<String>,
    /// The core's time.
    pub(super) clock: Clock,
    pub(super) closed: watch::Sender<bool>,
    /// The directory of packages and its bound.
    pub(super) packages: Option<(Arc<PackageStore>, u64)>,
}

impl HeadActor {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { core, system, keeper, authority, heads, clock, closed, packages } = parts;
        let packages = packages.map(|(store, max)| HeadPackages::new(store, max, core.known_packages()));
        Self {
            version: watch::Sender::new(core.version()),
            core,
            packages,
            system,
            keeper,
            authority,
            heads,
            clock: Waking::new(clock),
            nodes: HashMap::new(),
            workers: HashMap::new(),
            closed,
            lives: Lives::default(),
            timer: None,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    pub(super) fn feed(&mut self, event: Event, ctx: &mut Context<Self>) {
        let commands = self.core.handle(self.now(), event);
        self.carry_out(commands, ctx);
    }

    pub(super) fn carry_out(&mut self, commands: Vec<Command>, ctx: &mut Context<Self>) {
        for command in commands {
            self.execute(command, ctx);
        }
        if self.heads.len() > 1 && self.core.is_cut_off() {
            self.authority.end("it reaches no node, another head may");
        }
        let version = self.core.version();
        self.version.send_if_modified(|known| std::mem::replace(known, version) != version);
        if self.core.is_closed() {
            self.closed.send_replace(true);
        }
        self.rearm(ctx);
    }

    /// HA-1: nothing is ordered by a head that may not lead any more.
    fn execute(&mut self, command: Command, ctx: &mut Context<Self>) {
        if !self.authority.may_act() {
            return tracing::debug!(?command, "not carried out: this head leads no more");
        }
        let term = self.core.term();
        match command {
            Command::StartWorker { node, order } => self.start_worker(node, order, ctx),
            Command::StopWorker { node, incarnation, manner } => {
                if let Some(link) = self.nodes.get(&node) {
                    self.insist(&link.handle, StopWorker { incarnation, manner, term });
                }
            }
            Command::DismissWorker { incarnation, why } => {
                if let Some(worker) = self.workers.remove(&incarnation) {
                    self.insist(&worker, Dismiss { why, term });
                }
            }
            Command::CreateActor(order) => {
                if let Some(worker) = self.workers.get(&order.incarnation) {
                    self.insist(worker, *order);
                }
            }
            Command::SendView { incarnation, view } => {
                if let Some(worker) = self.workers.get(&incarnation) {
                    self.insist(worker, DeliverView { view: (*view).clone(), term });
                }
            }
            Command::AskJudge { judge, question } => self.ask_judge(judge, question, ctx),
            Command::StopNode { node } => {
                if let Some(link) = self.nodes.get(&node) {
                    self.insist(&link.handle, StopNode { term });
                }
            }
            Command::PrepareBundles { node, order } => self.prepare_bundles(node, order, ctx),
            Command::AwaitDurable { group, epoch } => self.await_durable(group, epoch, ctx),
            Command::DropPackage { sha256 } => {
                if let Some(packages) = &self.packages {
                    packages.drop_package(sha256);
                }
            }
            Command::Persist(write) => self.write(&write),
        }
    }

    /// Orders a worker. The order is repeated while its fate is unknown: the node carries it out once.
    fn start_worker(&self, node: String, order: StartWorker, ctx: &mut Context<Self>) {
        let Some(link) = self.nodes.get(&node) else { return };
        let (handle, head, authority) = (link.handle.clone(), ctx.address(), self.authority.clone());
        actix::spawn(async move {
            match handle.ask(order.clone()).await {
                Ok(Ok(outcome)) => head.do_send(Ordered { incarnation: order.incarnation, outcome }),
                Ok(Err(Superseded { term })) => {
                    authority.heard(term);
                }
                Err(error) => {
                    tracing::debug!(node, actor = order.actor, %error, "cannot order a worker");
                    tokio::time::sleep(ORDER_PAUSE).await;
                    head.do_send(OrderAgain { node, order });
                }
            }
        });
    }

    /// Asks the actor that decides what follows from a death.
    fn ask_judge(&self, judge: ActorAddr, question: ChildDied, ctx: &mut Context<Self>) {
        let (judge, head) = (self.system.handle::<Judge>(judge), ctx.address());
        actix::spawn(async move {
            let verdict = match judge.with_deadline(JUDGE_DEADLINE).ask(question.clone()).await {
                Ok(verdict) => Some(verdict),
                Err(error) => {
                    tracing::warn!(supervisor = question.supervisor, child = question.child, %error, "no verdict");
                    tokio::time::sleep(ORDER_PAUSE).await;
                    None
                }
            };
            let ChildDied { child, incarnation, .. } = question;
            head.do_send(Tell(Event::Judged { child, incarnation, verdict }));
        });
    }

    fn insist<A, M>(&self, to: &Handle<A>, message: M)
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage<Result = Result<(), Superseded>> + Clone,
    {
        insist(to.clone(), message, self.authority.clone());
    }

    /// This head, for those that report to it; an error once it leads no more.
    fn seen(&self, term: u64) -> Result<HeadSeen, Superseded> {
        if !self.authority.heard(term) {
            return Err(Superseded { term });
        }
        Ok(HeadSeen { process: self.system.process(), term: self.core.term(), heads: self.heads.clone() })
    }

    /// Answers once everything up to here is durable.
    pub(super) fn durably<T: 'static>(&self, done: T) -> ResponseFuture<Result<T, String>> {
        let (flushed, keeper) = (self.keeper.flushed(DURABLE_PATIENCE), self.keeper.clone());
        let authority = self.authority.clone();
        Box::pin(async move {
            match (flushed.await, authority.may_act()) {
                (true, true) => Ok(done),
                (_, false) => Err("this head leads no more".to_owned()),
                (false, true) => {
                    Err(keeper.health().error.unwrap_or_else(|| "the state store is slow".to_owned()))
                }
            }
        })
    }

    /// Has the core woken at its next deadline.
    fn rearm(&mut self, ctx: &mut Context<Self>) {
        let deadline = self.core.next_deadline();
        if self.timer.as_ref().map(|(at, _)| *at) == deadline {
            return;
        }
        if let Some((_, timer)) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        self.timer = deadline.map(|at| {
            let wait = at.saturating_sub(self.now());
            let timer = ctx.run_later(wait, |head, ctx| {
                head.timer = None;
                head.feed(Event::Tick, ctx);
            });
            (at, timer)
        });
    }

    fn status(&self) -> ClusterStatus {
        let head = HeadStatus {
            endpoint: self.system.endpoint().to_owned(),
            pid: std::process::id(),
            uptime_s: self.clock.started().elapsed().as_secs(),
            closing: false,
            recovering: false,
            term: self.core.term(),
            heads: self.heads.clone(),
        };
        ClusterStatus {
            version: self.core.version(),
            head: self.core.head_status(head),
            nodes: self.core.node_status(),
            workers: self.core.worker_status(),
            actors: self.core.actor_status(),
            groups: self.core.group_status(),
            placement_groups: self.core.placement_group_status(),
            supervisors: self.core.supervisor_status(),
            drivers: self.core.driver_status(),
            state_store: self.keeper.health(),
        }
    }
}

/// Delivers an order that must arrive: tries again until it did, or the receiver is certainly gone, or this head leads
/// no more.
fn insist<A, M>(to: Handle<A>, message: M, authority: Arc<Authority>)
where
    A: RemoteActor + Handler<M>,
    M: WireMessage<Result = Result<(), Superseded>> + Clone,
{
    actix::spawn(async move {
        let mut backoff = Backoff::reconnect();
        for _ in 0..INSISTENCE {
            if !authority.may_act() {
                return;
            }
            match to.ask(message.clone()).await {
                Ok(Ok(())) => return,
                Ok(Err(Superseded { term })) => {
                    authority.heard(term);
                    return;
                }
                Err(AskError::Refused(refused)) if !refused.reason.is_transient() => {
                    return tracing::debug!(message = M::NAME, to = %to.addr(), %refused, "not delivered");
                }
                Err(error) => tracing::debug!(message = M::NAME, to = %to.addr(), %error, "delivering again"),
            }
            backoff.pause().await;
        }
        tracing::warn!(message = M::NAME, to = %to.addr(), "could not be delivered");
    });
}

/// The node's answer to an order.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Ordered {
    incarnation: Incarnation,
    outcome: Result<(), String>,
}

/// An order may not have arrived.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct OrderAgain {
    node: String,
    order: StartWorker,
}

/// Something happened outside of this actor.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Tell(Event);

/// Asks for the status.
#[derive(actix::Message)]
#[rtype(result = "ClusterStatus")]
struct Snapshot;

impl Actor for HeadActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        let peers = self.system.peer_events();
        ctx.add_stream(stream::unfold(peers, |mut peers| async { Some((peers.next().await?, peers)) }));
        let health = self.keeper.watch();
        ctx.add_stream(stream::unfold(health, |mut health| async {
            health.changed().await.ok()?;
            let now = health.borrow_and_update().clone();
            Some((now, health))
        }));
        ctx.run_interval(LOOK, |head, _| {
            head.now();
        });
        self.rearm(ctx);
    }
}

impl RemoteActor for HeadActor {
    const TYPE: &'static str = "head";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<NodeReport>().accept::<WorkerReport>();
        m.accept::<Apply>().accept::<Control>().accept::<Watch>().accept::<Lookup>();
        m.accept::<FindLog>().accept::<Shutdown>();
        m.accept::<WatchMesh>().accept::<RemoveMesh>();
        m.accept::<MakePlacementGroup>().accept::<RemovePlacementGroup>().accept::<WatchPlacementGroup>();
        m.accept::<DrainNode>().accept::<UndrainNode>();
        m.accept::<Find>().accept::<IsOver>().accept::<DriverHello>().accept::<DriverBye>();
        m.accept::<PutValue>().accept::<GetValue>();
        m.accept::<ListPackages>().accept::<RegisterPackage>().accept::<RemovePackage>();
    }
}

impl StreamHandler<PeerEvent> for HeadActor {
    fn handle(&mut self, event: PeerEvent, ctx: &mut Context<Self>) {
        let gone: Vec<(String, u64)> = match event {
            PeerEvent::Connected { .. } => return,
            PeerEvent::Lost { process, .. } => {
                self.feed(Event::ProcessLost(process), ctx);
                self.links(|link| link.process == process)
            }
            PeerEvent::Missed(_) => {
                let system = self.system.clone();
                let drivers = self.core.driver_processes().filter(|process| !system.is_connected(*process));
                for process in drivers.collect::<Vec<_>>() {
                    self.feed(Event::ProcessLost(process), ctx);
                }
                self.links(|link| !system.is_connected(link.process))
            }
        };
        for (node, boot) in gone {
            self.feed(Event::NodeDisconnected { node, boot }, ctx);
        }
    }

    fn finished(&mut self, _: &mut Context<Self>) {}
}

impl HeadActor {
    fn links(&self, which: impl Fn(&NodeLink) -> bool) -> Vec<(String, u64)> {
        self.nodes
            .iter()
            .filter(|(_, link)| which(link))
            .map(|(name, link)| (name.clone(), link.boot))
            .collect()
    }
}

impl StreamHandler<StoreHealth> for HeadActor {
    fn handle(&mut self, health: StoreHealth, ctx: &mut Context<Self>) {
        let commands = self.core.store_health(health.error.is_none());
        self.carry_out(commands, ctx);
    }

    fn finished(&mut self, _: &mut Context<Self>) {}
}

impl Handler<Ordered> for HeadActor {
    type Result = ();

    fn handle(&mut self, ordered: Ordered, ctx: &mut Context<Self>) {
        if let Err(message) = ordered.outcome {
            self.feed(Event::StartFailed { incarnation: ordered.incarnation, message }, ctx);
        }
    }
}

impl Handler<OrderAgain> for HeadActor {
    type Result = ();

    fn handle(&mut self, again: OrderAgain, ctx: &mut Context<Self>) {
        if self.core.awaits_start(again.order.incarnation) && self.authority.may_act() {
            self.start_worker(again.node, again.order, ctx);
        }
    }
}

impl Handler<Snapshot> for HeadActor {
    type Result = MessageResult<Snapshot>;

    fn handle(&mut self, _: Snapshot, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.status())
    }
}

impl Handler<WorkerReport> for HeadActor {
    type Result = MessageResult<WorkerReport>;

    fn handle(&mut self, report: WorkerReport, ctx: &mut Context<Self>) -> Self::Result {
        let seen = match self.seen(report.term) {
            Ok(seen) => seen,
            Err(superseded) => return MessageResult(Err(superseded)),
        };
        let known = self.workers.get(&report.incarnation).is_some_and(|worker| *worker.addr() == report.addr);
        if !known {
            self.workers.insert(report.incarnation, self.system.handle(report.addr.clone()));
        }
        self.feed(Event::WorkerReport(report), ctx);
        MessageResult(Ok(seen))
    }
}

impl Handler<Apply> for HeadActor {
    type Result = ResponseFuture<Result<Applied, ApplyError>>;

    fn handle(&mut self, apply: Apply, ctx: &mut Context<Self>) -> Self::Result {
        if !self.authority.may_act() {
            return Box::pin(async { Err(ApplyError::NotDurable("this head leads no more".to_owned())) });
        }
        let applied = match self.core.apply(self.now(), apply) {
            Ok((applied, commands)) => {
                self.carry_out(commands, ctx);
                applied
            }
            Err(invalid) => return Box::pin(async { Err(ApplyError::Spec(invalid)) }),
        };
        let durable = self.durably(applied);
        Box::pin(async move { durable.await.map_err(ApplyError::NotDurable) })
    }
}

impl Handler<Control> for HeadActor {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, control: Control, ctx: &mut Context<Self>) -> Self::Result {
        let (now, name, by) = (self.now(), &control.actor, &control.by);
        let commands = match control.action {
            ControlAction::Stop(manner) => {
                self.core.stop_actor(now, name, by, manner).map_err(|e| e.to_string())
            }
            ControlAction::Restart => self.core.restart_actor(now, name, by).map_err(|e| e.to_string()),
            ControlAction::Remove => self.core.remove_actor(now, name, by).map_err(|e| e.to_string()),
            ControlAction::RemoveSupervisor => self.core.remove_supervisor(now, name, by),
        };
        match commands {
            Ok(commands) => self.carry_out(commands, ctx),
            Err(error) => return Box::pin(async move { Err(error) }),
        }
        self.durably(())
    }
}

impl Handler<Watch> for HeadActor {
    type Result = ResponseFuture<ClusterStatus>;

    fn handle(&mut self, watch: Watch, ctx: &mut Context<Self>) -> Self::Result {
        let now = self.status();
        // A version ahead of this head is of one before it: then anything is news.
        if watch.since == 0 || watch.since != now.version {
            return Box::pin(async { now });
        }
        let (mut version, head) = (self.version.subscribe(), ctx.address());
        Box::pin(async move {
            let wait = Duration::from_millis(watch.wait_ms);
            let _ = tokio::time::timeout(wait, version.wait_for(|version| *version != watch.since)).await;
            head.send(Snapshot).await.unwrap_or(now)
        })
    }
}

impl Handler<Lookup> for HeadActor {
    type Result = Option<Located>;

    fn handle(&mut self, lookup: Lookup, _: &mut Context<Self>) -> Self::Result {
        self.core.lookup(&lookup.actor)
    }
}

impl Handler<Tell> for HeadActor {
    type Result = ();

    fn handle(&mut self, Tell(event): Tell, ctx: &mut Context<Self>) {
        self.feed(event, ctx);
    }
}

impl Handler<FindLog> for HeadActor {
    type Result = Result<ActorAddr, String>;

    fn handle(&mut self, find: FindLog, _: &mut Context<Self>) -> Self::Result {
        let actor = find.actor;
        if !self.core.knows(&actor) {
            return Err(format!("no actor is named {actor:?} (helio list actors)"));
        }
        let node =
            self.core.node_of(&actor).ok_or_else(|| format!("{actor} has never been placed on a node"))?;
        let link =
            self.nodes.get(node).ok_or_else(|| format!("node {node}, where {actor} ran, is not here"))?;
        Ok(link.handle.addr().clone())
    }
}

impl Handler<Shutdown> for HeadActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Shutdown, ctx: &mut Context<Self>) -> Self::Result {
        self.feed(Event::Shutdown, ctx);
        let mut closed = self.closed.subscribe();
        Box::pin(async move {
            let _ = closed.wait_for(|closed| *closed).await;
        })
    }
}
