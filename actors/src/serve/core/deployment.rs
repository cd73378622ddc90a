//! One deployment: its replicas, from the first start over updates and load to the last drain.
//!
//! SD-1: while an update by surge runs, no replica that serves is drained unless the wanted number serves without it.
//! SD-2: a version that never served whole does not stay: what served before it comes back.
//! SD-3: a replica ends only when its ingress has said that nothing is in flight there, or its grace has passed, or it
//! is broken.

use std::time::Duration;

use bincode::{Decode, Encode};

use super::autoscale::Scaler;
use super::{Command, Health, Numbers, Seen};
use crate::deployment::{Duty, ModelDeployment, ReplicaNames};
use crate::serve::messages::{TableActorReplica, TableActors, TableDeployment, TableModel, TableReplica};
use crate::serve::target::{DeploymentTarget, Scale, Settings};
use crate::serve::workload::Workload;

/// Starts of a new version that may fail before it is given up.
const FAILURES_MAX: u32 = 3;
/// A replica may take so long to start.
const START_PATIENCE: Duration = Duration::from_secs(3600);
/// A replica of a new version may wait so long for a place while an old one serves; so an update gives up after three times
/// as long.
const PLACE_PATIENCE: Duration = Duration::from_secs(40);
/// An order that has no effect is given again after this long.
const ORDER_AGAIN: Duration = Duration::from_secs(3);
/// Longest pause between two starts of what fails.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// What a deployment is to be.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
struct Target {
    /// Changes when its processes do.
    version: u64,
    workload: Workload,
    settings: Settings,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Stage {
    /// It has not served yet.
    Starting,
    /// It serves.
    Running,
    /// It takes nothing new.
    Draining,
    /// It ends.
    Stopping,
}

/// A replica: a whole DP x EP group with its EPLB actor, or an actor of a user.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Replica {
    /// Its number, never used again.
    pub number: u64,
    /// The number by which an ingress knows its first DP rank.
    pub first_rank: u32,
    /// Whether its actors have the short names of cluster.toml's model.
    pub home: bool,
    /// What it runs.
    pub workload: Workload,
    /// How far it is.
    pub stage: Stage,
    /// What it lacks, if it serves and is not whole.
    pub ailing: Option<String>,
    /// Live settings are on their way to it.
    updating: bool,
    /// When it was asked for, milliseconds since 1970.
    pub started_at_ms: u64,
    version: u64,
    /// In this stage since; not known to a controller that started since.
    since: Duration,
    ordered: Option<Duration>,
}

impl Replica {
    /// What its actors are called.
    pub fn names(&self, app: &str, deployment: &str) -> ReplicaNames {
        if self.home { ReplicaNames::home() } else { ReplicaNames::numbered(app, deployment, self.number) }
    }

    fn is_live(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Running)
    }
}

/// How a deployment is, in Ray's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeploymentState {
    /// It changes to what was asked for.
    Updating,
    /// It is as asked for.
    Healthy,
    /// Something of it does not serve at present.
    Unhealthy,
    /// What was asked for does not work.
    DeployFailed,
    /// The load asks for more.
    Upscaling,
    /// The load asks for fewer, or it ends.
    Downscaling,
}

/// A deployment.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Deployment {
    target: Target,
    /// The last one that served whole.
    proven: Option<Target>,
    replicas: Vec<Replica>,
    /// As the load asks for.
    scaled: u32,
    /// Starts of the target that failed in a row.
    failures: u32,
    /// What last went wrong.
    trouble: Option<String>,
    /// What was asked for was given up.
    failed: bool,
    pub(super) removing: bool,
    pub(super) changed: bool,
    transient: Transient,
}

/// What a controller that starts anew does not need.
#[derive(Clone, Debug, Default, PartialEq)]
struct Transient {
    scaler: Scaler,
    start_at: Duration,
    problem: Option<String>,
}

impl Encode for Transient {
    fn encode<E: bincode::enc::Encoder>(&self, _: &mut E) -> Result<(), bincode::error::EncodeError> {
        Ok(())
    }
}

impl<C> Decode<C> for Transient {
    fn decode<D: bincode::de::Decoder<Context = C>>(_: &mut D) -> Result<Self, bincode::error::DecodeError> {
        Ok(Self::default())
    }
}

bincode::impl_borrow_decode!(Transient);

fn next(number: &mut u64) -> u64 {
    *number += 1;
    *number
}

impl Deployment {
    pub(super) fn new(target: DeploymentTarget, versions: &mut u64) -> Self {
        let scaled = target.settings.scale.initial();
        let DeploymentTarget { workload, settings, .. } = target;
        Self {
            target: Target { version: next(versions), workload, settings },
            proven: None,
            replicas: Vec::new(),
            scaled,
            failures: 0,
            trouble: None,
            failed: false,
            removing: false,
            changed: true,
            transient: Transient::default(),
        }
    }

    /// Times of an earlier process mean nothing.
    pub(super) fn start_anew(&mut self) {
        for replica in &mut self.replicas {
            (replica.since, replica.ordered) = (Duration::ZERO, None);
        }
    }

    /// Something else, or the same again, is wanted.
    pub(super) fn retarget(&mut self, wanted: DeploymentTarget, versions: &mut u64) {
        let DeploymentTarget { workload, settings, .. } = wanted;
        let same = workload.has_processes_of(&self.target.workload);
        let known = self.proven.as_ref().filter(|proven| proven.workload.has_processes_of(&workload));
        let version = match known {
            _ if same => self.target.version,
            Some(proven) => proven.version,
            None => next(versions),
        };
        if self.target.settings.scale != settings.scale {
            self.scaled = settings.scale.bound(self.scaled.max(u32::from(self.removing)));
        }
        self.target = Target { version, workload, settings };
        self.try_anew();
        (self.removing, self.changed) = (false, true);
    }

    fn try_anew(&mut self) {
        (self.failures, self.failed, self.trouble) = (0, false, None);
        self.transient.start_at = Duration::ZERO;
    }

    /// Takes in how the replicas are.
    pub(super) fn observe(&mut self, now: Duration, seen: &Seen) {
        let serving = self.replicas.iter().any(|replica| replica.stage == Stage::Running);
        let mut failures = Vec::new();
        for replica in &mut self.replicas {
            let health = seen.health.get(&replica.number).unwrap_or(&Health::Gone);
            let waited = now.saturating_sub(replica.since);
            let grace = self.target.settings.graceful_shutdown_timeout;
            let idle = seen.draining.get(&replica.number) == Some(&0);
            let stage = match (replica.stage, health) {
                (Stage::Starting, Health::Ready) => Stage::Running,
                (Stage::Starting | Stage::Running, Health::Broken(why)) => {
                    failures.push((replica.version, why.clone()));
                    Stage::Stopping
                }
                (Stage::Starting, Health::Unplaced(why)) if serving && waited > PLACE_PATIENCE => {
                    failures.push((replica.version, format!("it finds no place: {why}")));
                    Stage::Stopping
                }
                (Stage::Starting, Health::Starting(why) | Health::Ailing(why)) if waited > START_PATIENCE => {
                    failures.push((replica.version, format!("it does not start: {why}")));
                    Stage::Stopping
                }
                (Stage::Draining, Health::Broken(_) | Health::Gone) => Stage::Stopping,
                (Stage::Draining, _) if idle || waited >= grace => Stage::Stopping,
                (stage, _) => stage,
            };
            replica.ailing = match (stage, health) {
                (
                    Stage::Starting | Stage::Running,
                    Health::Starting(why) | Health::Unplaced(why) | Health::Ailing(why),
                ) => Some(why.clone()),
                (Stage::Running, Health::Gone) => Some("its actors are gone".to_owned()),
                _ => None,
            };
            replica.updating &= matches!(health, Health::Starting(_) | Health::Unplaced(_));
            self.changed |= enter(replica, stage, now);
        }
        let gone = |replica: &Replica| {
            replica.stage == Stage::Stopping
                && seen.health.get(&replica.number).is_none_or(|health| *health == Health::Gone)
                && replica.ordered.is_some()
        };
        let before = self.replicas.len();
        self.replicas.retain(|replica| !gone(replica));
        self.changed |= before != self.replicas.len();
        for (version, why) in failures {
            self.failed_start(now, version, why);
        }
    }

    fn failed_start(&mut self, now: Duration, version: u64, why: String) {
        if version != self.target.version {
            return;
        }
        self.failures += 1;
        self.trouble = Some(why);
        let pause = Duration::from_secs(1 << (self.failures - 1).min(6)).min(BACKOFF_MAX);
        self.transient.start_at = now + pause;
    }

    /// Takes in the load.
    pub(super) fn scale(&mut self, now: Duration, load: u64) {
        let scaled = match &self.target.settings.scale {
            Scale::Fixed(replicas) => *replicas,
            Scale::Auto(config) => self.transient.scaler.advance(config, now, self.scaled, load),
        };
        self.changed |= std::mem::replace(&mut self.scaled, scaled) != scaled;
    }

    fn wanted(&self) -> u32 {
        if self.removing { 0 } else { self.scaled }
    }

    fn is_proven(&self) -> bool {
        self.proven.as_ref().is_some_and(|proven| proven.version == self.target.version)
    }

    fn count(&self, which: impl Fn(&Replica) -> bool) -> u32 {
        self.replicas.iter().filter(|replica| which(replica)).count() as u32
    }

    /// Whether what is wanted serves, or needs nothing that serves.
    pub(super) fn is_settled(&self) -> bool {
        self.removing || self.is_proven() || (!self.failed && self.wanted() == 0)
    }

    /// Whether HTTP requests of the application go there.
    pub(super) fn is_ingress(&self) -> bool {
        self.target.workload.actor().is_some_and(|actor| actor.ingress)
    }

    /// It has no replica left that could ask another deployment.
    pub(super) fn is_empty(&self) -> bool {
        self.replicas.is_empty()
    }

    /// Brings the replicas closer to what is wanted.
    pub(super) fn reconcile(
        &mut self,
        now: Duration,
        numbers: &mut Numbers,
        (may_be_home, hold): (bool, bool),
    ) {
        self.give_up_or_prove();
        if hold {
            return;
        }
        let version = self.target.version;
        for replica in self.replicas.iter_mut().filter(|it| it.version == version && it.is_live()) {
            if replica.workload != self.target.workload {
                // The head sees which of its actors differ: settings of EPLB concern that actor alone.
                replica.workload = self.target.workload.clone();
                if replica.stage == Stage::Running {
                    replica.ailing = Some("its new settings are on their way".to_owned());
                    replica.updating = true;
                }
                (replica.ordered, self.changed) = (None, true);
            }
        }
        // What serves nothing yet, and is not wanted any more, need not be drained.
        for replica in self.replicas.iter_mut() {
            if replica.version != version && replica.stage == Stage::Starting {
                self.changed |= enter(replica, Stage::Stopping, now);
            }
        }
        let wanted = self.wanted();
        let (surge, missing_max) = self.target.settings.rollout.slack(wanted);
        let old = self.count(|it| it.version != version && it.stage == Stage::Running);
        let new = self.count(|it| it.version == version && it.is_live());
        let running = self.count(|it| it.stage == Stage::Running);
        // An update in place waits until what it replaces has made room.
        let leaving = self.count(|it| !it.is_live());
        let there = old + new + if surge == 0 { leaving } else { 0 };
        let room = if old > 0 || surge == 0 { (wanted + surge).saturating_sub(there) } else { wanted };
        let given_up = self.failed && !self.is_proven();
        if !given_up && now >= self.transient.start_at {
            for _ in 0..wanted.saturating_sub(new).min(room) {
                self.start(now, numbers, may_be_home);
            }
        }
        let spare = running.saturating_sub(wanted.saturating_sub(missing_max));
        self.drain(now, old.min(spare), |it| it.version != version && it.stage == Stage::Running);
        let mut excess = new.saturating_sub(wanted);
        for replica in self.replicas.iter_mut().rev() {
            if excess > 0 && replica.version == version && replica.stage == Stage::Starting {
                self.changed |= enter(replica, Stage::Stopping, now);
                excess -= 1;
            }
        }
        self.drain(now, excess, |it| it.version == version && it.stage == Stage::Running);
    }

    fn give_up_or_prove(&mut self) {
        let (wanted, version) = (self.wanted(), self.target.version);
        let serving = self.count(|it| it.version == version && it.stage == Stage::Running);
        if wanted > 0 && serving >= wanted {
            if !self.failed {
                self.trouble = None;
            }
            self.failures = 0;
            if self.proven.as_ref() != Some(&self.target) {
                (self.proven, self.changed) = (Some(self.target.clone()), true);
            }
        }
        if self.failures < FAILURES_MAX || self.is_proven() || self.failed {
            return;
        }
        let why = self.trouble.take().unwrap_or_default();
        self.failed = true;
        self.changed = true;
        self.trouble = Some(match self.proven.clone() {
            Some(proven) => {
                (self.target, self.failures) = (proven, 0);
                format!("the new version failed {FAILURES_MAX} times and was rolled back: {why}")
            }
            None => format!("it failed {FAILURES_MAX} times: {why}; deploy it again to try again"),
        });
    }

    fn start(&mut self, now: Duration, numbers: &mut Numbers, may_be_home: bool) {
        let home = may_be_home && !self.replicas.iter().any(|replica| replica.home);
        let first_rank = numbers.rank;
        numbers.rank = numbers.rank.wrapping_add(self.target.workload.dp());
        self.replicas.push(Replica {
            number: next(&mut numbers.replica),
            first_rank,
            home,
            workload: self.target.workload.clone(),
            stage: Stage::Starting,
            ailing: None,
            updating: false,
            started_at_ms: numbers.wall_ms,
            version: self.target.version,
            since: now,
            ordered: None,
        });
        self.changed = true;
    }

    /// Drains `count` of those, the newest first.
    fn drain(&mut self, now: Duration, count: u32, which: impl Fn(&Replica) -> bool) {
        let leaving = self.replicas.iter_mut().rev().filter(|replica| which(replica)).take(count as usize);
        for replica in leaving {
            self.changed |= enter(replica, Stage::Draining, now);
        }
    }

    /// What is to be done for the replicas as they are now.
    pub(super) fn orders(&mut self, now: Duration, seen: &Seen, commands: &mut Vec<Command>) {
        for replica in &mut self.replicas {
            let gone = seen.health.get(&replica.number).is_none_or(|health| *health == Health::Gone);
            let due = replica.ordered.is_none_or(|at| now.saturating_sub(at) >= ORDER_AGAIN);
            let command = match replica.stage {
                Stage::Starting | Stage::Running if replica.ordered.is_none() || (gone && due) => {
                    Command::Ensure(replica.number)
                }
                Stage::Stopping if due => Command::Remove(replica.number),
                Stage::Starting | Stage::Running | Stage::Draining | Stage::Stopping => continue,
            };
            replica.ordered = Some(now);
            commands.push(command);
        }
    }

    /// Whether nothing of it is left.
    pub(super) fn is_over(&self) -> bool {
        self.removing && self.replicas.is_empty()
    }

    /// Whether something is under way.
    pub(super) fn is_moving(&self) -> bool {
        (!self.failed && self.count(|it| it.stage == Stage::Running) != self.wanted())
            || self
                .replicas
                .iter()
                .any(|it| it.stage != Stage::Running || it.updating || it.version != self.target.version)
    }

    /// Its replicas, oldest first.
    pub fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    /// What each replica is to run.
    pub fn workload(&self) -> &Workload {
        &self.target.workload
    }

    /// The other settings.
    pub fn settings(&self) -> &Settings {
        &self.target.settings
    }

    /// Replicas that are wanted now.
    pub fn replicas_wanted(&self) -> u32 {
        self.wanted()
    }

    /// How it is, and what there is to say.
    pub fn state(&self) -> (DeploymentState, String) {
        let version = self.target.version;
        let running = self.count(|it| it.version == version && it.stage == Stage::Running);
        let ailing = self.replicas.iter().find_map(|replica| replica.ailing.clone());
        let message = self.trouble.clone().or(ailing).unwrap_or_default();
        let old = self.count(|it| it.version != version && it.stage != Stage::Stopping);
        // What is wanted has changed since the last look.
        let stale =
            |it: &Replica| it.version == version && it.is_live() && it.workload != self.target.workload;
        let old = old + self.count(stale) + self.count(|it| it.stage == Stage::Running && it.updating);
        let sick = self.replicas.iter().any(|it| it.stage == Stage::Running && it.ailing.is_some());
        let state = match running.cmp(&self.wanted()) {
            _ if self.removing => DeploymentState::Downscaling,
            _ if self.failed => DeploymentState::DeployFailed,
            _ if old > 0 => DeploymentState::Updating,
            _ if sick => DeploymentState::Unhealthy,
            std::cmp::Ordering::Less if !self.is_proven() => DeploymentState::Updating,
            std::cmp::Ordering::Less if self.failures > 0 => DeploymentState::Unhealthy,
            std::cmp::Ordering::Less => DeploymentState::Upscaling,
            std::cmp::Ordering::Equal => DeploymentState::Healthy,
            std::cmp::Ordering::Greater => DeploymentState::Downscaling,
        };
        (state, message)
    }

    /// As an ingress sees it: once for each model that its replicas serve, what is wanted first.
    pub(super) fn table(&self, app: &str, name: &str) -> Vec<TableDeployment> {
        let present = self.replicas.iter().filter(|it| it.stage != Stage::Stopping).map(|it| &it.workload);
        let mut models: Vec<TableModel> = Vec::new();
        for model in std::iter::once(&self.target.workload).chain(present).filter_map(Workload::model) {
            let model = table_model(model);
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models.into_iter().map(|model| self.table_of(app, name, model)).collect()
    }

    fn table_of(&self, app: &str, name: &str, model: TableModel) -> TableDeployment {
        let settings = &self.target.settings;
        let seat = |replica: &Replica| TableReplica {
            number: replica.number,
            group: replica.names(app, name).group,
            first_rank: replica.first_rank,
            dp: replica.workload.dp(),
            draining: replica.stage == Stage::Draining,
        };
        let shown = |it: &&Replica| {
            it.stage != Stage::Stopping && it.workload.model().is_some_and(|it| table_model(it) == model)
        };
        let per_replica = settings.max_ongoing_requests.map(u64::from);
        let in_flight_max = per_replica.map(|max| {
            let running = u64::from(self.count(|it| it.stage == Stage::Running).max(1));
            let queued = settings.max_queued_requests.map_or(u64::MAX, u64::from);
            (max * running).saturating_add(queued)
        });
        TableDeployment {
            name: name.to_owned(),
            in_flight_max: in_flight_max.filter(|max| *max < u64::MAX),
            backpressure: settings.backpressure,
            may_wait: self.may_wait(),
            duty: self.target.workload.model().map_or(Duty::Whole, |model| model.duty),
            replicas: self.replicas.iter().filter(shown).map(seat).collect(),
            model,
        }
    }

    /// Requests may wait for the first replica: one is started for them.
    fn may_wait(&self) -> bool {
        !self.removing && matches!(&self.target.settings.scale, Scale::Auto(auto) if auto.min_replicas == 0)
    }

    /// As an ingress sees it, where it is an actor of a user. Where its replicas are is not known here.
    pub(super) fn table_of_actors(&self, name: &str, ingress: bool) -> Option<TableActors> {
        self.target.workload.actor()?;
        let settings = &self.target.settings;
        let seat = |replica: &Replica| TableActorReplica {
            number: replica.number,
            addr: None,
            draining: replica.stage == Stage::Draining,
        };
        let present = self.replicas.iter().filter(|it| it.stage != Stage::Stopping);
        Some(TableActors {
            name: name.to_owned(),
            ingress,
            max_ongoing_requests: settings.max_ongoing_requests.unwrap_or(u32::MAX),
            max_queued_requests: settings.max_queued_requests,
            backpressure: settings.backpressure,
            may_wait: self.may_wait(),
            message: self.state().1,
            replicas: present.map(seat).collect(),
        })
    }
}

fn table_model(model: &ModelDeployment) -> TableModel {
    TableModel {
        names: vec![model.model_name.clone()],
        path: model.model.clone(),
        max_model_len: model.engine.max_model_len,
        block_size: model.engine.block_size,
        max_waiting: model.engine.max_waiting,
    }
}

/// Enters a stage; whether it is another one.
fn enter(replica: &mut Replica, stage: Stage, now: Duration) -> bool {
    let other = replica.stage != stage;
    if other {
        (replica.stage, replica.since, replica.ordered) =
            (stage, now, replica.ordered.filter(|_| stage != Stage::Stopping));
    }
    other
}
