//! Carries out what the core decides: looks at the cluster, keeps the state with the head, applies and removes actors,
//! tells the ingresses.

mod callers;
mod sites;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use heliostat_engine::config::ModelConfig;
use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::cluster::{Cluster, ClusterError};
use heliostat_runtime::handle::{AskError, Refusal};
use heliostat_runtime::spec::{ActorSpec, DeathCause, Lifetime};
use tokio::sync::{Notify, watch};

use self::sites::IngressOrder;
use super::calls::callers::Callers;
use super::controller::ServeArgs;
use super::core::{Command, Health, Replica, Seen, ServeState, Stage};
use super::details;
use super::document::{self, Document, Facts};
use super::ingresses::Ingresses;
use super::messages::{DeployRefused, Table, Welcome};
use super::probes::{Answer, Probes, Question};
use super::replica::{AnyReplica, CheckHealth, Reconfigure};
use super::workload::{ActorDeployment, HealthChecks};
use crate::deployment::ReplicaNames;
use crate::ingress_actor::IngressArgs;

/// Under which the state is kept.
const KEY: &str = "serve";
/// Between two looks while something is under way, and else.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_IDLE: Duration = Duration::from_millis(500);

/// The controller's service. Cheap to clone.
#[derive(Clone)]
pub(super) struct Service(Arc<Inner>);

struct Inner {
    args: ServeArgs,
    cluster: Cluster,
    started: Instant,
    state: Mutex<State>,
    /// Held by whoever changes what is kept: the revision that is there.
    kept: tokio::sync::Mutex<u64>,
    woken: Notify,
    /// What callers are told.
    published: watch::Sender<Arc<Table>>,
}

#[derive(Default)]
struct State {
    core: ServeState,
    seen: Seen,
    /// Replicas whose actors the head does not take, and why.
    refused: BTreeMap<u64, String>,
    /// What replicas that are actors of users have answered.
    probes: Probes,
    /// What ingresses have answered.
    ingresses: Ingresses,
    /// The handles of replicas that ask others.
    callers: Callers,
}

/// What is to be asked of a replica that is an actor of a user.
struct Probe {
    number: u64,
    incarnation: u64,
    actor: String,
    question: Question,
    checks: HealthChecks,
}

/// What is to be done.
enum Order {
    /// For one replica.
    Replica { replica: Replica, names: ReplicaNames, remove: bool },
    /// For one ingress.
    Ingress(IngressOrder),
}

impl Service {
    /// Goes on with what an earlier controller kept.
    pub(super) async fn open(args: ServeArgs, cluster: Cluster) -> Result<Self, String> {
        let kept = cluster.value(KEY).await.map_err(|why| why.to_string())?;
        let revision = kept.as_ref().map_or(0, |kept| kept.revision);
        let core = match &kept {
            Some(kept) => ServeState::restore(&kept.value)
                .map_err(|why| format!("what is served was written down by another version: {why}"))?,
            None => ServeState::default(),
        };
        let service = Self(Arc::new(Inner {
            args,
            cluster,
            started: Instant::now(),
            state: Mutex::new(State { core, ..State::default() }),
            kept: tokio::sync::Mutex::new(revision),
            woken: Notify::new(),
            published: watch::Sender::default(),
        }));
        let (base, sites) = (service.0.args.base_app(), service.0.args.sites.clone());
        service
            .change(|core| {
                core.set_site_args(sites);
                core.set_base(base, unix_ms());
                Ok(())
            })
            .await
            .map_err(|why| why.to_string())?;
        Ok(service)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is wanted: it takes place once it is kept, or not at all.
    async fn change(
        &self,
        change: impl FnOnce(&mut ServeState) -> Result<(), String>,
    ) -> Result<(), DeployRefused> {
        let mut kept = self.0.kept.lock().await;
        let mut core = self.lock().core.clone();
        change(&mut core).map_err(DeployRefused::Document)?;
        *kept = self.keep(&core, *kept).await.map_err(DeployRefused::NotKept)?;
        self.lock().core = core;
        self.0.woken.notify_one();
        Ok(())
    }

    async fn keep(&self, core: &ServeState, revision: u64) -> Result<u64, String> {
        let value = core.snapshot().map_err(|why| why.to_string())?;
        self.0.cluster.put_value(KEY, revision, value).await.map_err(|why| why.to_string())
    }

    /// Serves what a document says.
    pub(super) async fn deploy(&self, json: String) -> Result<(), DeployRefused> {
        let args = self.0.args.clone();
        let nodes = self.0.cluster.status().await.map_or(1, |status| status.nodes.len().max(1));
        let packages = self.0.cluster.packages().await;
        let packages = packages.map_err(|why| DeployRefused::NotKept(why.to_string()))?;
        let read = tokio::task::spawn_blocking(move || {
            let look = |dir: &std::path::Path| ModelConfig::from_dir(dir).map_err(|why| why.to_string());
            let facts = Facts {
                base: &args.base,
                dir: &args.dir,
                http: args.ingress.bind,
                num_nodes: nodes,
                packages: &packages,
                look: &look,
            };
            document::read(&json, &facts)
        });
        let document = read.await.map_err(|why| DeployRefused::NotKept(why.to_string()))?;
        let Document { location, apps } =
            document.map_err(|problems| DeployRefused::Document(problems.join("\n")))?;
        self.change(|core| core.deploy_at(location, apps, unix_ms()).map_err(|clash| clash.to_string())).await
    }

    /// Drains and ends all applications.
    pub(super) async fn delete_all(&self) -> Result<(), DeployRefused> {
        self.change(|core| {
            core.delete_all();
            Ok(())
        })
        .await
    }

    /// What an ingress serves.
    fn table(&self) -> Table {
        self.lock().table()
    }

    /// What an ingress starts with.
    pub(super) fn welcome(&self, ingress: &str) -> Welcome {
        let state = self.lock();
        Welcome { table: state.table(), port: state.core.sites().get(ingress).and_then(|site| site.port) }
    }

    /// All that is known, for people and for Ray's tools.
    pub(super) async fn details(&self) -> String {
        let status = self.0.cluster.status().await.ok();
        let state = self.lock();
        details::instance(&state.core, &state.seen, status.as_ref(), self.0.args.ingress.bind).to_string()
    }

    /// Looks and acts, for as long as the controller lives.
    pub(super) async fn drive(self) {
        let mut version = 0;
        loop {
            match self.look(version).await {
                Ok(status) => {
                    version = status.version;
                    let told = self.tell_ingresses(&status).await;
                    self.act(&status).await;
                    // What was decided is told at once, not at the next look.
                    if self.table() != told {
                        self.tell_ingresses(&status).await;
                    }
                }
                Err(why) => {
                    tracing::debug!("the head does not answer: {why}");
                    tokio::time::sleep(LOOK_IDLE).await;
                }
            }
        }
    }

    async fn look(&self, version: u64) -> Result<ClusterStatus, ClusterError> {
        let wait = if self.lock().core.is_moving() { LOOK } else { LOOK_IDLE };
        tokio::select! {
            status = self.0.cluster.watch(version, wait) => status,
            () = self.0.woken.notified() => self.0.cluster.status().await,
        }
    }

    /// Has the core decide, keeps what it says, and does it.
    async fn act(&self, status: &ClusterStatus) {
        let mut kept = self.0.kept.lock().await;
        let (orders, changed) = {
            let mut state = self.lock();
            let now = self.0.started.elapsed();
            state.look_at_ingresses(status);
            state.hear_ingresses();
            state.hear_callers(now);
            let questions = state.look_at(status, now);
            questions.into_iter().for_each(|question| self.ask(question));
            let State { core, seen, .. } = &mut *state;
            let commands = core.step(now, unix_ms(), seen);
            let changed = commands.contains(&Command::Persist).then(|| core.clone());
            let order = |command| order(core, &self.0.args.ingress, command);
            let orders: Vec<Order> = commands.iter().filter_map(order).collect();
            (orders, changed)
        };
        if let Some(core) = changed {
            match self.keep(&core, *kept).await {
                Ok(revision) => *kept = revision,
                Err(why) => {
                    tracing::warn!("what is served cannot be kept, and nothing is done: {why}");
                    self.lock().core.not_kept();
                    // Somebody else's revision may be there: the one that this actor was replaced by, or its own.
                    if let Ok(Some(there)) = self.0.cluster.value(KEY).await {
                        *kept = there.revision;
                    }
                    return;
                }
            }
        }
        drop(kept);
        self.publish();
        join_all(orders.into_iter().map(|order| self.carry_out(order))).await;
    }

    async fn carry_out(&self, order: Order) {
        let (replica, names, remove) = match order {
            Order::Replica { replica, names, remove } => (replica, names, remove),
            Order::Ingress(order) => return self.carry_out_at(order).await,
        };
        if remove {
            let actors = replica.workload.actors(&names);
            join_all(actors.iter().map(|actor| self.0.cluster.remove_actor(actor))).await;
            self.lock().refused.remove(&replica.number);
            return;
        }
        let number = replica.number;
        let specs =
            tokio::task::spawn_blocking(move || replica.workload.specs(&names, number, replica.first_rank));
        let specs = match specs.await {
            Ok(Ok(specs)) => specs,
            Ok(Err(why)) => return self.refuse(number, why.to_string()),
            Err(why) => return self.refuse(number, why.to_string()),
        };
        // They outlive the controller.
        let specs = specs.into_iter().map(|spec| ActorSpec { lifetime: Lifetime::Detached, ..spec });
        match self.0.cluster.apply(specs.collect()).await {
            Ok(_) => {}
            Err(ClusterError::Spec(invalid)) => self.refuse(number, invalid.to_string()),
            Err(why) => tracing::warn!(number, "the actors of a replica cannot be applied yet: {why}"),
        }
    }

    /// Asks in the background, and looks again once there is an answer.
    fn ask(&self, probe: Probe) {
        let service = self.clone();
        tokio::spawn(async move {
            let Probe { number, incarnation, actor, question, checks } = probe;
            let asked = ask_replica(&service.0.cluster, (&actor, incarnation), &question, checks.timeout);
            let (answer, now) = (asked.await, service.0.started.elapsed());
            service.lock().probes.told((number, incarnation), question, answer, (now, checks.period));
            service.0.woken.notify_one();
        });
    }

    fn refuse(&self, number: u64, why: String) {
        self.lock().refused.insert(number, why);
        self.0.woken.notify_one();
    }
}

impl State {
    /// What an ingress serves: as the core says, and where the actors of users are.
    fn table(&self) -> Table {
        let mut table = self.core.table();
        let replicas = table.apps.iter_mut().flat_map(|app| &mut app.actors).flat_map(|it| &mut it.replicas);
        for shown in replicas.filter(|shown| !shown.draining) {
            let actor = self.core.replica(shown.number).and_then(|(_, _, replica)| replica.workload.actor());
            shown.addr = actor.and_then(|actor| self.probes.addr(shown.number, actor)).cloned();
        }
        table
    }

    /// Takes in how the actors of all replicas are. Returns what must be asked of them.
    fn look_at(&mut self, status: &ClusterStatus, now: Duration) -> Vec<Probe> {
        let actors: HashMap<&str, &ActorStatus> =
            status.actors.iter().map(|actor| (actor.name.as_str(), actor)).collect();
        let questions = self.probe(&actors, now);
        let health = self.core.replicas().map(|(app, deployment, replica)| {
            let names = replica.names(app, deployment);
            let group = replica.workload.model().is_none()
                || status.group(&names.group).is_some_and(|group| group.complete);
            let of: Vec<(String, Option<&ActorStatus>)> = replica
                .workload
                .actors(&names)
                .into_iter()
                .map(|name| (name.clone(), actors.get(name.as_str()).copied()))
                .collect();
            let refused = self.refused.get(&replica.number).filter(|_| replica.stage != Stage::Stopping);
            let health = match refused {
                Some(why) => Health::Broken(why.clone()),
                None => match (health(&of, group, replica.stage), replica.workload.actor()) {
                    (Health::Ready, Some(actor)) => self.probes.health(replica.number, actor),
                    (health, _) => health,
                },
            };
            (replica.number, health)
        });
        self.seen.health = health.collect();
        questions
    }

    /// What must be asked of the actors of users that live.
    fn probe(&mut self, actors: &HashMap<&str, &ActorStatus>, now: Duration) -> Vec<Probe> {
        let live = |(app, name, replica): (&str, &str, &Replica)| {
            let wanted = replica.workload.actor()?.clone();
            let actor = replica.names(app, name).replica();
            let there = actors.get(actor.as_str()).filter(|actor| actor.state == ActorState::Ready)?;
            matches!(replica.stage, Stage::Starting | Stage::Running).then_some((
                replica.number,
                there.incarnation.0,
                actor,
                wanted,
            ))
        };
        let live: Vec<_> = self.core.replicas().filter_map(live).collect();
        self.probes.set_living(&live.iter().map(|(number, it, ..)| (*number, *it)).collect());
        let question = |(number, _, actor, wanted): (u64, u64, String, ActorDeployment)| {
            let (incarnation, question) = self.probes.ask(number, &wanted, now)?;
            Some(Probe { number, incarnation, actor, question, checks: wanted.health })
        };
        live.into_iter().filter_map(question).collect()
    }
}

async fn ask_replica(
    cluster: &Cluster,
    (actor, incarnation): (&str, u64),
    question: &Question,
    limit: Duration,
) -> Answer {
    let known = cluster.handle::<AnyReplica>(actor).await;
    let handle = match known {
        Ok(handle) if handle.addr().incarnation.0 == incarnation => Ok(handle),
        _ => {
            cluster.forget(actor);
            cluster.handle::<AnyReplica>(actor).await
        }
    };
    let handle = match handle {
        Ok(handle) => handle.with_deadline(limit),
        Err(why) => return Answer::None(why.to_string()),
    };
    let addr = handle.addr().clone();
    let fine = || Answer::Fine(addr.clone());
    match question {
        Question::Configure(config) => match handle.ask(Reconfigure { user_config: config.clone() }).await {
            Ok(Ok(())) => fine(),
            Ok(Err(why)) => Answer::No(why),
            Err(why) if is_unknown(&why) => Answer::No(
                "the actor has no settings; have it accept `Reconfigure` in its table of messages, or leave \
                     user_config out"
                    .to_owned(),
            ),
            Err(why) => Answer::None(why.to_string()),
        },
        Question::Check => match handle.ask(CheckHealth).await {
            Ok(Ok(())) => fine(),
            Ok(Err(why)) => Answer::No(why),
            // Its process has answered: it lives. Whether its thread hangs the runtime sees by itself.
            Err(why) if is_unknown(&why) => fine(),
            Err(why) => Answer::None(why.to_string()),
        },
    }
}

/// Whether the actor does not know such a message.
fn is_unknown<M>(why: &AskError<M>) -> bool {
    matches!(why, AskError::Refused(refused) if refused.reason == Refusal::UnknownMessage)
}

fn order(core: &ServeState, ingress: &IngressArgs, command: &Command) -> Option<Order> {
    let (number, remove) = match command {
        Command::Persist => return None,
        Command::EnsureIngress(name) => {
            return Some(Order::Ingress(IngressOrder::ensure(core.sites().get(name)?, ingress)));
        }
        Command::RemoveIngress(name) => return Some(Order::Ingress(IngressOrder::Remove(name.clone()))),
        Command::Ensure(number) => (*number, false),
        Command::Remove(number) => (*number, true),
    };
    let (app, deployment, replica) = core.replica(number)?;
    Some(Order::Replica { replica: replica.clone(), names: replica.names(app, deployment), remove })
}

/// How a replica is, by its actors.
fn health(actors: &[(String, Option<&ActorStatus>)], complete: bool, stage: Stage) -> Health {
    if actors.iter().all(|(_, actor)| actor.is_none()) {
        return Health::Gone;
    }
    let (mut unplaced, mut starting) = (None, None);
    for (name, actor) in actors {
        let Some(actor) = actor else {
            starting.get_or_insert_with(|| format!("{name} is to be deployed"));
            continue;
        };
        match &actor.state {
            ActorState::Ready => {}
            ActorState::Dead { cause } => return Health::Broken(format!("{name} is dead: {cause}")),
            ActorState::Pending { reason } => {
                unplaced.get_or_insert_with(|| format!("{name} waits: {reason}"));
            }
            ActorState::Starting { .. } | ActorState::Restarting { .. } | ActorState::Stopping => {
                // A constructor that fails does so again; one that has served may be short of something for a while.
                if let (
                    Stage::Starting,
                    Some(cause @ (DeathCause::CreateFailed { .. } | DeathCause::StartFailed { .. })),
                ) = (stage, &actor.last_death)
                {
                    return Health::Broken(format!("{name}: {cause}"));
                }
                starting.get_or_insert_with(|| format!("{name} is starting"));
            }
        }
    }
    match (unplaced, starting, complete) {
        (Some(why), _, _) => Health::Unplaced(why),
        (None, Some(why), _) => Health::Starting(why),
        (None, None, true) => Health::Ready,
        (None, None, false) => Health::Starting("its ranks have not met yet".to_owned()),
    }
}

pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
