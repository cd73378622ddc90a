//! What a worker knows of its actor, and what it does when the head speaks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use actix::{Actor, Context, Handler};
use tokio::sync::{Notify, watch};

use super::code;
use super::hang::{self, Watched};
use super::views::Views;
use crate::actor::{Accepts, ActorCx, ActorTypes, CreateError, CxParts, RemoteActor, Reports};
use crate::cluster::Cluster;
use crate::handle::{ActorAddr, ActorId, Incarnation};
use crate::head::messages::{CreateActor, DeliverView, Dismiss, WorkerPhase, WorkerReport};
use crate::head::tenure::{Allegiance, Superseded};
use crate::mesh::MeshSeat;
use crate::node::files::WorkerRecord;
use crate::spec::{ActorSpec, DeathCause, Owner, Progress, split_name};
use crate::system::{ActorEnd, SpawnError, System};

/// How long an actor that asked for its own end may take for it.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);

/// Why the worker is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its actor ended; the head is told.
    Actor(DeathCause),
    /// It was asked to by a signal; the actor is stopped first.
    Terminated,
    /// The same, but the actor handles first what it has.
    Finishing,
    /// It has been replaced or abandoned and must not be heard of again.
    Fenced(String),
}

/// The worker.
pub(super) struct Host {
    pub(super) record: WorkerRecord,
    pub(super) system: System,
    pub(super) cluster: Cluster,
    types: ActorTypes,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
    views: Views,
    over: watch::Sender<Option<Ending>>,
    end_reported: watch::Sender<bool>,
    /// Something is to be reported at once.
    pub(super) news: Notify,
    /// Something is to be reported when it suits.
    pub(super) progress: Notify,
}

struct State {
    phase: WorkerPhase,
    announced: Option<Vec<u8>>,
    seq: u64,
    /// HA-2: the newest head that was heard of.
    allegiance: Allegiance,
    /// Why the actor asked for its end.
    exit: Option<DeathCause>,
}

impl Host {
    pub(super) fn new(record: WorkerRecord, system: System, cluster: Cluster, types: ActorTypes) -> Self {
        Self {
            views: Views::new(system.clone(), ActorId::named(&record.actor), record.incarnation),
            record,
            system,
            cluster,
            types,
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::new(State {
                phase: WorkerPhase::Waiting,
                announced: None,
                seq: 0,
                allegiance: Allegiance::default(),
                exit: None,
            }),
            over: watch::Sender::new(None),
            end_reported: watch::Sender::new(false),
            news: Notify::new(),
            progress: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// HA-2: whether to obey a head of that term.
    pub(super) fn obey(&self, term: u64) -> Result<(), Superseded> {
        self.lock().allegiance.obey(term)
    }

    fn actor(&self) -> ActorId {
        ActorId::named(&self.record.actor)
    }

    /// Begins to create the actor, once.
    fn create(self: &Arc<Self>, order: CreateActor) {
        {
            let mut state = self.lock();
            if order.incarnation != self.record.incarnation || state.phase != WorkerPhase::Waiting {
                return;
            }
            state.phase = WorkerPhase::Creating(Progress { phase: "creating".into(), ..Progress::default() });
        }
        self.news.notify_one();
        let host = self.clone();
        self.runtime.spawn(async move {
            let reports = Reports::new();
            let cause = tokio::select! {
                cause = host.live(order, reports.clone()) => cause,
                cause = host.pass_on(&reports) => cause,
            };
            // An actor that is stopped since it asked for its end has ended for its own reason, whoever saw it first.
            let asked = host.lock().exit.take();
            host.end(Ending::Actor(asked.unwrap_or(cause)));
        });
    }

    /// The cluster as the actor uses it: in its namespace, and what it spawns ends with this life of it.
    fn on_behalf(&self) -> Cluster {
        let name = self.record.actor.clone();
        let by = format!("actor {name}, incarnation {}", self.record.incarnation);
        let cluster = self.cluster.in_namespace(split_name(&name).0);
        cluster.owned_by(Owner::Actor { name, incarnation: Some(self.record.incarnation) }, by)
    }

    /// The actor from its creation to its end.
    async fn live(&self, order: CreateActor, reports: Reports) -> DeathCause {
        let spec = order.spec;
        let mesh = match self.take_seat(&spec, order.peers) {
            Ok(mesh) => mesh,
            Err(error) => return DeathCause::CreateFailed { message: error.to_string() },
        };
        let cx = ActorCx::new(CxParts {
            system: self.system.clone(),
            actor: self.actor(),
            name: spec.name,
            incarnation: order.incarnation,
            device: order.device,
            group: spec.group,
            reports: reports.clone(),
        });
        let (is_rank, hang_timeout) = (mesh.is_some(), spec.hang_timeout);
        let cx = cx.in_cluster(self.on_behalf()).in_mesh(mesh);
        let capacity = spec.mailbox_capacity as usize;
        let created = tokio::select! {
            created = self.types.create(&spec.type_name, spec.args, capacity, cx) => created,
            hung = hung(hang_timeout, Some(Watched::Create(reports))) => return hung,
        };
        match created {
            Ok(addr) => {
                self.system.read_at(&addr);
                let ended = self.system.watch_local(addr.actor, addr.incarnation);
                {
                    let mut state = self.lock();
                    // A rank of a mesh has nothing to add to its address, unless it said so.
                    if is_rank {
                        state.announced.get_or_insert_default();
                    }
                    state.phase = WorkerPhase::Ready(addr);
                }
                self.views.open();
                self.news.notify_one();
                code::give_back();
                tokio::select! {
                    ended = ended => match ended {
                        Some(ActorEnd::Panicked(panic)) => DeathCause::panicked(panic),
                        Some(ActorEnd::Stopped) | None => {
                            DeathCause::Failed { message: "the actor stopped without a cause".into() }
                        }
                    },
                    hung = hung(hang_timeout, self.handlers()) => hung,
                }
            }
            Err(CreateError::Panicked(panic)) => DeathCause::panicked(panic),
            Err(error) => DeathCause::CreateFailed { message: error.to_string() },
        }
    }

    /// The actor's life after its creation, if it lives.
    fn handlers(&self) -> Option<Watched> {
        self.system.registry().find(self.actor(), self.record.incarnation).ok().map(Watched::Handlers)
    }

    /// Its place in a mesh, if the spec has one. From then on rounds of the mesh wait for the first view.
    fn take_seat(
        &self,
        spec: &ActorSpec,
        peers: Vec<Option<ActorAddr>>,
    ) -> Result<Option<MeshSeat>, SpawnError> {
        let (Some(dims), Some(member)) = (&spec.mesh, &spec.group) else { return Ok(None) };
        self.system.expect_mesh(&member.group)?;
        Ok(Some(MeshSeat {
            system: self.system.clone(),
            name: member.group.clone(),
            dims: dims.clone(),
            rank: member.rank,
            peers: peers.into(),
        }))
    }

    /// Takes what the actor says of itself, until it asks for its end.
    async fn pass_on(&self, reports: &Reports) -> DeathCause {
        loop {
            let said = reports.next().await;
            if let Some(join_info) = said.announce {
                self.lock().announced = Some(join_info);
                self.news.notify_one();
            }
            if let Some(progress) = said.progress
                && let WorkerPhase::Creating(present) = &mut self.lock().phase
            {
                *present = progress;
                self.progress.notify_one();
            }
            if let Some(cause) = said.exit {
                self.lock().exit = Some(cause.clone());
                let ended = self.system.watch_local(self.actor(), self.record.incarnation);
                self.system.stop_actor(self.actor(), self.record.incarnation);
                let _ = tokio::time::timeout(EXIT_PATIENCE, ended).await;
                return cause;
            }
        }
    }

    /// Ends the worker; the first word counts.
    pub(super) fn end(&self, ending: Ending) {
        self.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert(ending);
            first
        });
    }

    /// Waits for the end.
    pub(super) async fn over(&self) -> Ending {
        let mut over = self.over.subscribe();
        match over.wait_for(Option::is_some).await.map(|over| over.clone()) {
            Ok(Some(ending)) => ending,
            Ok(None) | Err(_) => Ending::Terminated,
        }
    }

    pub(super) fn note_end(&self, cause: DeathCause) {
        self.lock().phase = WorkerPhase::Ended(cause);
        self.news.notify_one();
    }

    /// Waits until the head has heard of the end.
    pub(super) async fn end_reported(&self) {
        let _ = self.end_reported.subscribe().wait_for(|reported| *reported).await;
    }

    /// Lets the actor stop in good order.
    pub(super) async fn stop_actor(&self) {
        let ended = self.system.watch_local(self.actor(), self.record.incarnation);
        self.system.stop_actor(self.actor(), self.record.incarnation);
        ended.await;
    }

    /// Lets the actor handle what it has, and nothing more.
    pub(super) async fn finish_actor(&self) {
        let ended = self.system.watch_local(self.actor(), self.record.incarnation);
        self.system.finish_actor(self.actor(), self.record.incarnation);
        ended.await;
    }

    /// The next report to the head.
    pub(super) fn report(&self, registering: bool) -> WorkerReport {
        let mut state = self.lock();
        state.seq += 1;
        WorkerReport {
            actor: self.record.actor.clone(),
            incarnation: self.record.incarnation,
            seq: state.seq,
            registering,
            addr: ActorAddr {
                actor: ActorId::WORKER,
                incarnation: Incarnation::ANY,
                process: self.system.process(),
                endpoint: self.system.endpoint().to_owned(),
            },
            pid: std::process::id(),
            node: self.record.node.clone(),
            device: self.record.device,
            phase: state.phase.clone(),
            announced: state.announced.clone(),
            views: self.views.epochs(),
            held: if registering { self.views.held() } else { Vec::new() },
            term: state.allegiance.term(),
        }
    }

    /// Whether views have come since a report that told of these.
    pub(super) fn has_other_views(&self, told: &[(String, u64)]) -> bool {
        self.views.epochs() != told
    }

    /// The head has this report.
    pub(super) fn heard(&self, report: &WorkerReport) {
        if matches!(report.phase, WorkerPhase::Ended(_)) {
            self.end_reported.send_replace(true);
        }
    }
}

/// Returns when the actor hangs, if that is to be noticed.
async fn hung(limit: Option<Duration>, watched: Option<Watched>) -> DeathCause {
    match (limit, watched) {
        (Some(limit), Some(watched)) => hang::hung(watched, limit).await,
        (None, _) | (_, None) => std::future::pending().await,
    }
}

/// The worker as an actor.
pub(crate) struct WorkerActor {
    host: Arc<Host>,
}

impl WorkerActor {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }
}

impl Actor for WorkerActor {
    type Context = Context<Self>;
}

impl RemoteActor for WorkerActor {
    const TYPE: &'static str = "worker";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<CreateActor>().accept::<DeliverView>().accept::<Dismiss>();
    }
}

impl Handler<CreateActor> for WorkerActor {
    type Result = Result<(), Superseded>;

    fn handle(&mut self, order: CreateActor, _: &mut Self::Context) -> Self::Result {
        self.host.obey(order.term)?;
        self.host.create(order);
        Ok(())
    }
}

impl Handler<DeliverView> for WorkerActor {
    type Result = Result<(), Superseded>;

    fn handle(&mut self, DeliverView { view, term }: DeliverView, _: &mut Self::Context) -> Self::Result {
        self.host.obey(term)?;
        self.host.views.deliver(view);
        Ok(())
    }
}

impl Handler<Dismiss> for WorkerActor {
    type Result = Result<(), Superseded>;

    fn handle(&mut self, Dismiss { why, term }: Dismiss, _: &mut Self::Context) -> Self::Result {
        self.host.obey(term)?;
        self.host.end(Ending::Fenced(why));
        Ok(())
    }
}
