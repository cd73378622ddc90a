//! What the agent knows of its workers, and what it does when it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use actix::{Actor, Context, Handler, MessageResult, ResponseFuture};
use tokio::sync::Notify;

use super::files::{self, RunDir, WorkerRecord};
use super::oom::OomWatch;
use super::packages::NodePackages;
use super::process::{self, Process};
use super::{NodeConfig, logs};
use crate::actor::{Accepts, RemoteActor};
use crate::handle::{ActorAddr, ActorId, Incarnation};
use crate::head::core::Manner;
use crate::head::finder::Heads;
use crate::head::messages::{
    HelloReply, LogChunk, NodeReport, NodeStage, PrepareBundles, ProcessStatus, ReadLog, StartWorker,
    StopNode, StopWorker, WhoIs, WorkerHello, WorkerProcess,
};
use crate::head::tenure::{Allegiance, Superseded};
use crate::package::{self, Digest};
use crate::spec::DeathCause;
use crate::system::System;

/// Most bytes of a log in one answer.
const LOG_CHUNK_MAX: u32 = 1 << 20;
/// Silence of a process that is always borne: a busy machine alone makes some.
const SILENCE_MIN: Duration = Duration::from_secs(3);

/// The agent. Its state is small and behind a lock; nothing waits while it is held.
pub(super) struct Agent {
    pub(super) config: NodeConfig,
    pub(super) dir: RunDir,
    pub(super) system: System,
    boot: u64,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
    heads: Mutex<Heads>,
    packages: NodePackages,
    oom: OomWatch,
    /// Something is to be reported.
    pub(super) news: Notify,
}

#[derive(Default)]
struct State {
    workers: BTreeMap<Incarnation, Worker>,
    leaving: bool,
    seq: u64,
    /// `seq` of the last report that began a connection.
    registered_seq: u64,
    /// Highest incarnation that was ever ordered here.
    ordered: Incarnation,
    /// HA-2: the newest head that was heard of.
    allegiance: Allegiance,
    /// What the head last said to a report.
    verdict: Option<Result<(), String>>,
}

struct Worker {
    record: WorkerRecord,
    status: Status,
    pulse: Pulse,
}

/// Whether a worker's process is heard of.
enum Pulse {
    /// It has not said anything yet: its program is being loaded.
    Unborn,
    /// Looks in a row at which nothing had been heard.
    Beating { missed: u32 },
    /// It was silent for too long, and was killed for that.
    Hung(DeathCause),
}

impl Worker {
    fn new(record: WorkerRecord, status: Status) -> Self {
        Self { record, status, pulse: Pulse::Unborn }
    }
}

enum Status {
    /// The order is being carried out.
    Starting,
    Running(Process),
    /// Kept until the head has heard of it.
    Ended {
        pid: u32,
        cause: DeathCause,
        last_words: Option<String>,
    },
}

impl Agent {
    pub(super) fn new(config: NodeConfig, dir: RunDir, system: System, packages: NodePackages) -> Self {
        Self {
            heads: Mutex::new(Heads::new(&config.head)),
            config,
            dir,
            system,
            boot: rand::random(),
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::default(),
            packages,
            oom: OomWatch::default(),
            news: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The known heads.
    pub(super) fn heads(&self) -> MutexGuard<'_, Heads> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// HA-2: whether to obey a head of that term.
    pub(super) fn obey(&self, term: u64) -> Result<(), Superseded> {
        self.lock().allegiance.obey(term)
    }

    /// Takes over the workers of an earlier agent.
    pub(super) fn adopt_workers(self: &Arc<Self>) -> std::io::Result<()> {
        self.oom.count();
        for record in self.dir.worker_records()? {
            let incarnation = record.incarnation;
            let found = match record.process {
                Some(process) => process::adopt(process)?,
                None => None,
            };
            let pid = record.process.map_or(0, |process| process.pid);
            let mut state = self.lock();
            state.ordered = state.ordered.max(incarnation);
            let status = match found {
                Some(process) => {
                    tracing::info!(actor = record.actor, %incarnation, pid, "took over a worker");
                    self.watch(incarnation, process.clone());
                    Status::Running(process)
                }
                None => {
                    let why = "it ended while no node agent was there".to_owned();
                    Status::Ended {
                        pid,
                        cause: DeathCause::Vanished { why },
                        last_words: self.last_words(&record),
                    }
                }
            };
            // It knows where to say that it is there.
            let pulse = Pulse::Beating { missed: 0 };
            state.workers.insert(incarnation, Worker { pulse, ..Worker::new(record, status) });
        }
        Ok(())
    }

    /// Has the end of a process noticed the moment it happens.
    fn watch(self: &Arc<Self>, incarnation: Incarnation, process: Process) {
        let agent = self.clone();
        self.runtime.spawn(async move {
            let cause = process.ended().await;
            agent.ended(incarnation, &process, cause);
        });
    }

    fn ended(&self, incarnation: Incarnation, process: &Process, cause: DeathCause) {
        let pid = process.record.pid;
        let cause = match cause {
            DeathCause::Killed { signal: 9 } if !process.was_killed() => {
                self.oom.explains_a_kill().map_or(cause, |scope| DeathCause::OutOfMemory { scope })
            }
            cause => cause,
        };
        if let Some(worker) = self.lock().workers.get_mut(&incarnation) {
            let cause = match std::mem::replace(&mut worker.pulse, Pulse::Unborn) {
                Pulse::Hung(why) => why,
                Pulse::Unborn | Pulse::Beating { .. } => cause,
            };
            tracing::info!(actor = worker.record.actor, %incarnation, pid, %cause, "worker ended");
            let last_words = self.last_words(&worker.record);
            worker.status = Status::Ended { pid, cause, last_words };
        }
        self.news.notify_one();
    }

    fn last_words(&self, record: &WorkerRecord) -> Option<String> {
        logs::last_words(&self.dir.log(&record.actor), record.incarnation)
    }

    /// Ends workers whose processes run and say nothing: frozen, or out of threads that run. Called once in a while
    /// (`look`); looks are counted and not time, so that an agent that was frozen itself blames nobody.
    pub(super) fn check_pulses(&self, look: Duration) {
        for worker in self.lock().workers.values_mut() {
            let (Status::Running(process), Pulse::Beating { missed }) = (&worker.status, &mut worker.pulse)
            else {
                continue;
            };
            *missed += 1;
            let limit = worker.record.hang_timeout_ms.map(|ms| Duration::from_millis(ms).max(SILENCE_MIN));
            if limit.is_some_and(|limit| look * *missed > limit) {
                let waited_ms = u64::try_from((look * *missed).as_millis()).unwrap_or(u64::MAX);
                let what = format!("process {} says nothing; {}", process.record.pid, process.state());
                tracing::warn!(
                    actor = worker.record.actor,
                    pid = process.record.pid,
                    waited_ms,
                    "worker hangs"
                );
                process.kill();
                worker.pulse = Pulse::Hung(DeathCause::Hung { waited_ms, what });
            }
        }
    }

    /// Takes an order to start a worker; `None` if that very worker was started before. Called in the order of the
    /// head's messages: a lower incarnation than one that was ordered comes from a head that is gone.
    fn admit(&self, order: &StartWorker) -> Result<Option<WorkerRecord>, String> {
        let incarnation = order.incarnation;
        let record = self.record(order);
        let mut state = self.lock();
        if state.workers.contains_key(&incarnation) {
            return Ok(None);
        }
        if state.leaving {
            return Err("the node is leaving".into());
        }
        if order.report_seq < state.registered_seq || incarnation <= state.ordered {
            return Err("the order is outdated".into());
        }
        state.ordered = incarnation;
        state.workers.insert(incarnation, Worker::new(record.clone(), Status::Starting));
        Ok(Some(record))
    }

    /// Whether what the head knows of this node still holds. Nothing is set aside here: the head alone counts.
    fn confirms(&self, report_seq: u64) -> Result<(), String> {
        let state = self.lock();
        if state.leaving {
            return Err("it is leaving".into());
        }
        if report_seq < state.registered_seq {
            return Err("it has registered anew since".into());
        }
        Ok(())
    }

    /// Starts an admitted worker, with its package.
    async fn start(self: Arc<Self>, order: StartWorker, record: WorkerRecord) -> Result<(), String> {
        let program = match &order.package {
            Some(package) => {
                let (head, in_use) = (self.heads().list(), self.packages_in_use());
                let ready = self.packages.ensure(&self.system, package, head, in_use).await;
                let ready = ready.and_then(|path| self.still_wanted(&order).map(|()| path));
                match ready {
                    Ok(path) => vec![path.display().to_string(), package::WORKER.to_owned()],
                    Err(why) => {
                        self.lock().workers.remove(&order.incarnation);
                        return Err(format!("node {}: {why}", self.config.name));
                    }
                }
            }
            None => self.config.worker_command.clone(),
        };
        // Starting a process blocks for a moment.
        let agent = self.clone();
        let started = tokio::task::spawn_blocking(move || agent.launch(&program, record));
        started.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// HD-3: the head does not know of an order that was being prepared when the node registered anew.
    fn still_wanted(&self, order: &StartWorker) -> Result<(), String> {
        let state = self.lock();
        if state.leaving || order.report_seq < state.registered_seq {
            return Err("the order was outdated before its package was here".to_owned());
        }
        Ok(())
    }

    fn packages_in_use(&self) -> BTreeSet<Digest> {
        let state = self.lock();
        state.workers.values().filter_map(|worker| Some(worker.record.package.as_ref()?.sha256)).collect()
    }

    /// Starts the process of an admitted worker.
    fn launch(self: &Arc<Self>, program: &[String], record: WorkerRecord) -> Result<(), String> {
        let incarnation = record.incarnation;
        let started = self.spawn(program, &record);
        let mut state = self.lock();
        match started {
            Ok(process) => {
                let status = Status::Running(process.clone());
                let record = WorkerRecord { process: Some(process.record), ..record };
                state.workers.insert(incarnation, Worker::new(record, status));
                self.watch(incarnation, process);
                let leaving = state.leaving;
                drop(state);
                self.news.notify_one();
                if leaving {
                    self.stop(incarnation, Manner::Graceful);
                }
                Ok(())
            }
            Err(error) => {
                state.workers.remove(&incarnation);
                self.forget(incarnation);
                Err(format!("node {}: {error}", self.config.name))
            }
        }
    }

    fn record(&self, order: &StartWorker) -> WorkerRecord {
        let grace = self.config.timing.agent_grace;
        WorkerRecord {
            actor: order.actor.clone(),
            incarnation: order.incarnation,
            device: order.device.as_ref().map(|device| device.index),
            package: order.package.as_ref().map(|package| package.id.clone()),
            node: self.config.name.clone(),
            head: self.heads().list(),
            bind: self.config.worker_bind,
            advertise: self.config.advertise.clone(),
            token_file: self.config.token.as_ref().map(|_| self.dir.token()),
            tls: self.config.tls.clone(),
            agent_grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            hang_timeout_ms: order
                .hang_timeout
                .map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            process: None,
        }
    }

    fn spawn(&self, program: &[String], record: &WorkerRecord) -> std::io::Result<Process> {
        self.oom.count();
        let path = self.dir.worker(record.incarnation);
        files::write(&path, record)?;
        let log = self.dir.log(&record.actor);
        let log = logs::open(&log, &record.actor, record.incarnation, self.config.log_bytes_max)?;
        let args = crate::worker::WorkerConfig::to_args(&record.actor, record.incarnation, &path);
        let process = process::start(program, &args, log)?;
        files::write(&path, &WorkerRecord { process: Some(process.record), ..record.clone() })?;
        Ok(process)
    }

    fn forget(&self, incarnation: Incarnation) {
        if let Err(error) = std::fs::remove_file(self.dir.worker(incarnation)) {
            tracing::debug!(%incarnation, %error, "cannot remove a worker record");
        }
    }

    /// Ends a worker.
    fn stop(self: &Arc<Self>, incarnation: Incarnation, manner: Manner) {
        let process = match self.lock().workers.get(&incarnation) {
            Some(Worker { status: Status::Running(process), .. }) => process.clone(),
            _ => return,
        };
        match manner {
            Manner::Kill => process.kill(),
            Manner::Graceful | Manner::Finish(_) => {
                let grace = match manner {
                    Manner::Finish(grace) => {
                        process.finish();
                        grace
                    }
                    Manner::Graceful | Manner::Kill => {
                        process.terminate();
                        self.config.timing.stop_grace
                    }
                };
                // By pidfd: harmless if the process has ended by then.
                self.runtime.spawn(async move {
                    tokio::time::sleep(grace).await;
                    process.kill();
                });
            }
        }
    }

    /// Ends all workers, and then the agent.
    pub(super) fn leave(self: &Arc<Self>) {
        let running: Vec<Incarnation> = {
            let mut state = self.lock();
            if std::mem::replace(&mut state.leaving, true) {
                return;
            }
            state.workers.keys().copied().collect()
        };
        for incarnation in running {
            self.stop(incarnation, Manner::Graceful);
        }
        self.news.notify_one();
    }

    /// What the head last said to a report; an error before its first word.
    pub(super) fn joined(&self) -> Result<(), String> {
        let verdict = self.lock().verdict.clone();
        verdict.unwrap_or_else(|| Err(format!("no answer from the head at {} yet", self.heads().list())))
    }

    pub(super) fn judged(&self, verdict: Result<(), String>) {
        self.lock().verdict = Some(verdict);
    }

    /// The next report.
    pub(super) fn report(&self, registering: bool) -> NodeReport {
        let packages = self.packages.here();
        let mut state = self.lock();
        state.seq += 1;
        if registering {
            state.registered_seq = state.seq;
        }
        let alive = state.workers.values().any(|worker| !matches!(worker.status, Status::Ended { .. }));
        let stage = match (state.leaving, alive) {
            (false, _) => NodeStage::Serving,
            (true, true) => NodeStage::Leaving,
            (true, false) => NodeStage::Left,
        };
        NodeReport {
            name: self.config.name.clone(),
            boot: self.boot,
            seq: state.seq,
            registering,
            addr: ActorAddr {
                actor: ActorId::NODE,
                incarnation: Incarnation::ANY,
                process: self.system.process(),
                endpoint: self.system.endpoint().to_owned(),
            },
            pid: std::process::id(),
            devices: self.config.devices.clone(),
            capacity: self.config.capacity.clone(),
            labels: self.config.labels.clone(),
            packages,
            stage,
            workers: state.workers.values().filter_map(Worker::reported).collect(),
            term: state.allegiance.term(),
        }
    }

    /// The head has this report: ends that it tells of need not be told again.
    pub(super) fn heard(&self, report: &NodeReport) {
        let mut state = self.lock();
        for process in &report.workers {
            if process.status != ProcessStatus::Running {
                state.workers.remove(&process.incarnation);
                self.forget(process.incarnation);
            }
        }
    }

    /// Names of actors whose workers run.
    pub(super) fn running(&self) -> Vec<String> {
        self.lock().workers.values().map(|worker| worker.record.actor.clone()).collect()
    }

    fn hello(&self, hello: &WorkerHello) -> HelloReply {
        let mut state = self.lock();
        let known = state.workers.get_mut(&hello.incarnation).is_some_and(|worker| match &worker.status {
            Status::Starting | Status::Running(_) => {
                if !matches!(worker.pulse, Pulse::Hung(_)) {
                    worker.pulse = Pulse::Beating { missed: 0 };
                }
                true
            }
            Status::Ended { .. } => false,
        });
        HelloReply { known, node: self.system.process() }
    }
}

impl Worker {
    /// `None` while its process is being started: the head does not miss what it has not seen.
    fn reported(&self) -> Option<WorkerProcess> {
        let (pid, status) = match &self.status {
            Status::Starting => return None,
            Status::Running(process) => (process.record.pid, ProcessStatus::Running),
            Status::Ended { pid, cause, last_words } => {
                let (cause, last_words) = (cause.clone(), last_words.clone());
                (*pid, ProcessStatus::Exited { cause, last_words })
            }
        };
        Some(WorkerProcess {
            actor: self.record.actor.clone(),
            incarnation: self.record.incarnation,
            device: self.record.device,
            pid,
            status,
        })
    }
}

/// The agent as an actor.
pub(crate) struct NodeActor {
    agent: Arc<Agent>,
}

impl NodeActor {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }
}

impl Actor for NodeActor {
    type Context = Context<Self>;
}

impl RemoteActor for NodeActor {
    const TYPE: &'static str = "node";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<WhoIs>()
            .accept::<StartWorker>()
            .accept::<StopWorker>()
            .accept::<PrepareBundles>()
            .accept::<StopNode>()
            .accept::<WorkerHello>()
            .accept::<ReadLog>();
    }
}

impl Handler<WhoIs> for NodeActor {
    type Result = MessageResult<WhoIs>;

    fn handle(&mut self, _: WhoIs, _: &mut Self::Context) -> Self::Result {
        MessageResult((self.agent.config.name.clone(), self.agent.boot))
    }
}

impl Handler<StartWorker> for NodeActor {
    type Result = ResponseFuture<Result<Result<(), String>, Superseded>>;

    fn handle(&mut self, order: StartWorker, _: &mut Self::Context) -> Self::Result {
        if let Err(superseded) = self.agent.obey(order.term) {
            return Box::pin(async move { Err(superseded) });
        }
        let record = match self.agent.admit(&order) {
            Ok(Some(record)) => record,
            Ok(None) => return Box::pin(async { Ok(Ok(())) }),
            Err(why) => return Box::pin(async { Ok(Err(why)) }),
        };
        let started = self.agent.runtime.spawn(self.agent.clone().start(order, record));
        Box::pin(async move { Ok(started.await.unwrap_or_else(|error| Err(error.to_string()))) })
    }
}

impl Handler<PrepareBundles> for NodeActor {
    type Result = Result<Result<(), String>, Superseded>;

    fn handle(&mut self, order: PrepareBundles, _: &mut Self::Context) -> Self::Result {
        self.agent.obey(order.term)?;
        Ok(self.agent.confirms(order.report_seq))
    }
}

impl Handler<StopWorker> for NodeActor {
    type Result = Result<(), Superseded>;

    fn handle(&mut self, order: StopWorker, _: &mut Self::Context) -> Self::Result {
        self.agent.obey(order.term)?;
        self.agent.stop(order.incarnation, order.manner);
        Ok(())
    }
}

impl Handler<StopNode> for NodeActor {
    type Result = Result<(), Superseded>;

    fn handle(&mut self, order: StopNode, _: &mut Self::Context) -> Self::Result {
        self.agent.obey(order.term)?;
        self.agent.leave();
        Ok(())
    }
}

impl Handler<WorkerHello> for NodeActor {
    type Result = MessageResult<WorkerHello>;

    fn handle(&mut self, hello: WorkerHello, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.agent.hello(&hello))
    }
}

impl Handler<ReadLog> for NodeActor {
    type Result = ResponseFuture<Result<LogChunk, String>>;

    fn handle(&mut self, wanted: ReadLog, _: &mut Self::Context) -> Self::Result {
        let agent = self.agent.clone();
        let path = agent.dir.log(&wanted.actor);
        let max = wanted.max.min(LOG_CHUNK_MAX);
        let wait = Duration::from_millis(wanted.wait_ms);
        let read = self.agent.runtime.spawn(logs::read(path, wanted.offset, max, wait));
        Box::pin(async move {
            let read = read.await.map_err(|error| error.to_string())?;
            read.map_err(|error| format!("log of {} on node {}: {error}", wanted.actor, agent.config.name))
        })
    }
}
