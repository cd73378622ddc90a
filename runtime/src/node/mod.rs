//! The node agent: starts, watches and reaps worker processes, and keeps their logs.
//!
//! It decides nothing about actors: the head orders, the agent reports. Workers outlive it; a new agent in the same
//! run directory takes them over.

mod agent;
pub(crate) mod files;
mod logs;
mod machine;
mod oom;
mod packages;
mod process;
mod report;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use self::agent::Agent;
pub(crate) use self::agent::NodeActor;
use self::files::{AgentRecord, RunDir};
pub(crate) use self::machine::host_name;
use self::packages::NodePackages;
use crate::actor::CreateError;
use crate::handle::ActorId;
use crate::objects::store::{self, StoreConfig, StoreHandle};
use crate::package::{Door, PACKAGES_BYTES_MAX, PackageActor};
use crate::spec::{Capacity, Device, Labels};
use crate::system::{Secret, SpawnError, SpawnOptions, System, SystemConfig, SystemError, TlsFiles};
use crate::wire::name_hash;

/// What a node is.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Name, unique in the cluster.
    pub name: String,
    /// Where the head listens, `host:port`; several, with commas between, are tried in turn.
    pub head: String,
    /// Where the agent listens. Default 127.0.0.1, a free port.
    pub bind: SocketAddr,
    /// Address at which the workers listen, each on a free port. Default 127.0.0.1.
    pub worker_bind: IpAddr,
    /// Host name or address by which other hosts reach agent and workers; needed when they bind to a wildcard.
    pub advertise: Option<String>,
    /// Devices that the node lends to actors.
    pub devices: Vec<Device>,
    /// What actors can reserve beside devices. Default: the CPUs and the memory there are.
    pub capacity: Capacity,
    /// Labels, beside those that every node has (`NODE_LABEL`, `HOST_LABEL`).
    pub labels: Labels,
    /// Records, logs and lock of this node. It must survive the agent for workers to be taken over.
    pub run_dir: PathBuf,
    /// Program and first arguments of a worker process; `WorkerConfig::from_args` reads what follows them.
    /// Default: this program with the argument `worker`.
    pub worker_command: Vec<String>,
    /// The cluster token.
    pub token: Option<Secret>,
    /// Certificates for TLS with every peer, of its workers, too.
    pub tls: Option<TlsFiles>,
    /// How patient the agent is.
    pub timing: NodeTiming,
    /// A log that grows beyond this is rotated; one old file is kept. Default 64 MiB.
    pub log_bytes_max: u64,
    /// Packages that are kept, in bytes; those that no worker runs make room, the one used longest ago first. Default 4 GiB.
    pub packages_bytes_max: u64,
    /// Shared memory for objects, in bytes. Default: 30 % of the machine's.
    pub objects_bytes_max: u64,
    /// Where objects go that have no room in memory: in a directory of the node's own, which is made in this one and removed
    /// when the node leaves. Default: in the run directory.
    pub spill_dir: Option<PathBuf>,
    /// Bytes of objects that may lie there; 0 has a full store refuse. Default 16 GiB.
    pub spill_bytes_max: u64,
    /// Sizes of objects, in bytes, for each of which the store keeps memory ready, with its pages cleared: the first object of
    /// that size of a process needs only to be mapped and copied. It counts as memory of the store. Default: none.
    pub objects_ready: Vec<usize>,
}

/// How patient a node agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeTiming {
    /// It reports to the head at least this often. Default 0.5 s.
    pub heartbeat: Duration,
    /// A report that is not answered for so long is repeated on a new connection. Default 3 s.
    pub report_timeout: Duration,
    /// Between SIGTERM and SIGKILL of a worker. Default 5 s.
    pub stop_grace: Duration,
    /// How long workers live on without an agent. Default 10 s.
    pub agent_grace: Duration,
    /// How often the size of logs is looked at. Default 10 s.
    pub log_check: Duration,
}

impl Default for NodeTiming {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(500),
            report_timeout: Duration::from_secs(3),
            stop_grace: Duration::from_secs(5),
            agent_grace: Duration::from_secs(10),
            log_check: Duration::from_secs(10),
        }
    }
}

impl NodeConfig {
    /// A node on loopback with defaults and no device.
    pub fn new(name: impl Into<String>, head: impl Into<String>, run_dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            head: head.into(),
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            worker_bind: Ipv4Addr::LOCALHOST.into(),
            advertise: None,
            devices: Vec::new(),
            capacity: machine::capacity(),
            labels: Labels::new(),
            run_dir: run_dir.into(),
            worker_command: Vec::new(),
            token: None,
            tls: None,
            timing: NodeTiming::default(),
            log_bytes_max: 64 << 20,
            packages_bytes_max: PACKAGES_BYTES_MAX,
            objects_bytes_max: machine::capacity().memory / 10 * 3,
            spill_dir: None,
            spill_bytes_max: 16 << 30,
            objects_ready: Vec::new(),
        }
    }
}

/// Why a node agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Two agents would start and end the same workers.
    #[error("another node agent{} uses {run_dir}; stop it, or give this one another run directory", .pid.map_or(String::new(), |pid| format!(" (pid {pid})")))]
    RunDirInUse {
        /// The directory.
        run_dir: String,
        /// Process id of the other agent, if it can be read.
        pid: Option<u32>,
    },
    /// The run directory cannot be used.
    #[error("run directory {run_dir}: {source}")]
    RunDir {
        /// The directory.
        run_dir: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The name is used in file names and on the wire.
    #[error("node name {0:?} must be 1 to 128 letters, digits, '-', '_' or '.'")]
    Name(String),
    /// A label cannot be set, or a resource cannot be called so.
    #[error("node {name}: {why}")]
    Offer {
        /// Name of the node.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Two devices have the same index.
    #[error("device {0} is listed twice")]
    Device(u32),
    /// The path of this program is unknown.
    #[error("cannot find the program to start workers with: {0}")]
    Program(std::io::Error),
    /// Signals cannot be listened to.
    #[error("cannot listen to signals: {0}")]
    Signals(std::io::Error),
    /// It cannot listen.
    #[error(transparent)]
    System(#[from] SystemError),
    /// Its object store cannot be served.
    #[error("object store: {0}")]
    Objects(CreateError),
    /// Its packages cannot be served.
    #[error("packages: {0}")]
    Packages(CreateError),
    /// The agent cannot be reached.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// A running node agent.
pub struct NodeHandle {
    agent: Arc<Agent>,
    over: watch::Receiver<bool>,
    objects: StoreHandle,
    /// Held until the end, so that nobody else uses the run directory.
    _lock: File,
}

/// Where the store of a node puts what has no room in memory. A store removes what it finds there and does not know, so it has
/// the place to itself: neither what else a user keeps in that directory nor another node's objects are its own.
fn spill_dir(config: &NodeConfig) -> PathBuf {
    let Some(dir) = &config.spill_dir else { return RunDir::new(&config.run_dir).spilled() };
    // Nodes of one machine never share a run directory, those of one cluster never a name.
    let who = format!("{} {}", config.name, config.run_dir.display());
    dir.join(format!("heliostat-objects-{:016x}", name_hash(&who)))
}

/// Starts a node agent: takes over what workers it finds and joins the head, for as long as that takes.
pub async fn run(mut config: NodeConfig) -> Result<NodeHandle, NodeError> {
    check(&config)?;
    config.labels.extend(machine::labels(&config.name));
    if config.worker_command.is_empty() {
        let program = std::env::current_exe().map_err(NodeError::Program)?;
        config.worker_command = vec![program.to_string_lossy().into_owned(), "worker".to_owned()];
    }
    let shown = config.run_dir.display().to_string();
    let failed = |source| NodeError::RunDir { run_dir: shown.clone(), source };
    config.run_dir = std::path::absolute(&config.run_dir).map_err(failed)?;
    let dir = RunDir::new(&config.run_dir);
    dir.create().map_err(failed)?;
    let lock = File::create(dir.lock()).map_err(failed)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let pid = files::read::<AgentRecord>(&dir.agent()).ok().map(|agent| agent.pid);
        return Err(NodeError::RunDirInUse { run_dir: shown, pid });
    }
    if let Some(token) = &config.token {
        files::write_private(&dir.token(), token.bytes()).map_err(failed)?;
    }
    let mut system = SystemConfig::new(listen_at(config.bind, &dir));
    system.advertise.clone_from(&config.advertise);
    system.token.clone_from(&config.token);
    system.tls.clone_from(&config.tls);
    let system = System::start(system).await?;
    let (over, watched) = watch::channel(false);
    let packages = NodePackages::open(&dir.packages(), config.packages_bytes_max).map_err(failed)?;
    PackageActor::start(&system, packages.store(), Door::Out).await.map_err(NodeError::Packages)?;
    let store = StoreConfig {
        node: config.name.clone(),
        socket: dir.objects(),
        memory_bytes_max: config.objects_bytes_max,
        spill_dir: spill_dir(&config),
        spill_bytes_max: config.spill_bytes_max,
        ready: config.objects_ready.clone(),
    };
    let objects = store::run(store, &system).await.map_err(NodeError::Objects)?;
    let agent = Arc::new(Agent::new(config, dir.clone(), system.clone(), packages));
    agent.adopt_workers().map_err(failed)?;
    let hosted = agent.clone();
    system.spawn(SpawnOptions::well_known(ActorId::NODE), move || NodeActor::new(hosted))?;
    let own = AgentRecord { endpoint: system.endpoint().to_owned(), pid: std::process::id() };
    files::write(&dir.agent(), &own).map_err(failed)?;
    let reporting = agent.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = report::report(&reporting) => {}
            () = report::check_logs(&reporting) => {}
            () = report::check_pulses(&reporting) => {}
        }
        let _ = over.send(true);
    });
    Ok(NodeHandle { agent, over: watched, objects, _lock: lock })
}

/// Where the agent listens: if it may choose, where the one before it did. Refs to objects say where their store is.
fn listen_at(bind: SocketAddr, dir: &RunDir) -> SocketAddr {
    let before = files::read::<AgentRecord>(&dir.agent()).ok();
    let port = before.and_then(|agent| agent.endpoint.rsplit_once(':')?.1.parse().ok());
    match port {
        Some(port) if bind.port() == 0 => {
            let again = SocketAddr::new(bind.ip(), port);
            if std::net::TcpListener::bind(again).is_ok() { again } else { bind }
        }
        Some(_) | None => bind,
    }
}

fn check(config: &NodeConfig) -> Result<(), NodeError> {
    if !crate::spec::is_name(&config.name) {
        return Err(NodeError::Name(config.name.clone()));
    }
    let offer = |why| NodeError::Offer { name: config.name.clone(), why };
    crate::spec::check_labels(&config.labels).map_err(offer)?;
    config.capacity.validate().map_err(offer)?;
    for (i, device) in config.devices.iter().enumerate() {
        if config.devices[..i].iter().any(|other| other.index == device.index) {
            return Err(NodeError::Device(device.index));
        }
    }
    Ok(())
}

impl NodeHandle {
    /// Where the agent listens.
    pub fn endpoint(&self) -> &str {
        self.agent.system.endpoint()
    }

    /// Whether the head has accepted the node, and if not, why.
    pub fn joined(&self) -> Result<(), String> {
        self.agent.joined()
    }

    /// Begins to leave: workers get SIGTERM, after a grace SIGKILL. `stopped` says when it is done.
    pub fn stop(&self) {
        self.agent.leave();
    }

    /// Waits until the node has left: it was stopped, here or by the head, and none of its workers runs.
    pub async fn stopped(&self) {
        // The sender goes only with its task, which ends by sending.
        let _ = self.over.clone().wait_for(|over| *over).await;
        self.objects.leave();
        self.agent.system.shutdown().await;
    }

    /// Serves until SIGTERM, SIGINT or the head ends it, and leaves nothing behind.
    pub async fn serve(&self) -> Result<(), NodeError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(NodeError::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::Signals)?;
        let mut over = self.over.clone();
        tokio::select! {
            _ = terminate.recv() => self.stop(),
            _ = interrupt.recv() => self.stop(),
            _ = over.wait_for(|over| *over) => {}
        }
        self.stopped().await;
        Ok(())
    }
}

/// Has the kernel send this process SIGTERM when its parent ends: a supervisor's children never outlive it.
///
/// Call it on the main thread, before any other is started.
pub fn terminate_with_parent() -> std::io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::TERM))?)
}
