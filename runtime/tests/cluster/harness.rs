//! Starts heads, nodes and workers as processes, and sees to it that none outlives a scenario.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use heliostat_runtime::actor::WireMessage;
use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::cluster::{Cluster, Named};
use heliostat_runtime::head::{self, HeadConfig};
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::spec::Device;
use heliostat_runtime::state::StateConfig;
use heliostat_runtime::system::Secret;
use heliostat_runtime::worker::{self, WorkerConfig};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::actors::{Add, Counter, types};

/// A message of these tests, with its reply and its name on the wire.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident $fields:tt -> $result:ty, $wire:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, bincode::Encode, bincode::Decode)]
        pub(crate) struct $name $fields;
        impl actix::Message for $name {
            type Result = $result;
        }
        impl heliostat_runtime::actor::WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}
pub(crate) use message;

/// The token of all clusters here.
pub(crate) const TOKEN: &str = "a token of the tests";
/// How long workers live on without an agent, and a node without a word is not yet lost.
pub(crate) const GRACE: Duration = Duration::from_secs(4);

fn serve<F: Future<Output = ()>>(future: F) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter("info,heliostat_runtime=debug")
        .init();
    tokio::runtime::Runtime::new().unwrap().block_on(future);
    ExitCode::SUCCESS
}

/// `head BIND STATE`, where the state is a directory or `etcd:HOST:PORT`.
pub(crate) fn head(mut args: impl Iterator<Item = String>) -> ExitCode {
    let bind: SocketAddr = args.next().unwrap().parse().unwrap();
    let state = args.next().unwrap();
    let state = match state.strip_prefix("etcd:") {
        Some(endpoint) => {
            let endpoints = vec![endpoint.to_owned()];
            StateConfig::Etcd { endpoints, prefix: "test/".into(), tls: None }
        }
        None => StateConfig::Embedded { dir: state.into() },
    };
    let mut config = HeadConfig::new(bind, state);
    config.token = Some(Secret::new(TOKEN));
    config.patience.agent_grace = Duration::from_secs(1);
    config.patience.gpu_grace = 2 * GRACE;
    config.patience.node_grace = GRACE;
    config.patience.heartbeat_timeout = GRACE / 2;
    serve(async {
        let head = head::run(config).await.unwrap();
        let ending = head.serve().await.unwrap();
        tracing::info!(?ending, "head ended");
    })
}

/// `node NAME HEAD RUN_DIR DEVICES [OBJECTS_BYTES SPILL_DIR SPILL_BYTES]`, where the devices are a number of CPU devices or
/// `gpus=N`.
pub(crate) fn node(mut args: impl Iterator<Item = String>) -> ExitCode {
    let mut next = || args.next().unwrap();
    let mut config = NodeConfig::new(next(), next(), next());
    let devices = next();
    // GPUs by name only: nobody opens them.
    config.devices = match devices.strip_prefix("gpus=") {
        Some(gpus) => (0..gpus.parse().unwrap()).map(|index| Device::cuda(index, index)).collect(),
        None => (0..devices.parse().unwrap()).map(|index| Device::cpu(index, 1)).collect(),
    };
    config.token = Some(Secret::new(TOKEN));
    if let Some(objects) = args.next() {
        config.objects_bytes_max = objects.parse().unwrap();
        config.spill_dir = args.next().map(Into::into);
        config.spill_bytes_max = args.next().unwrap().parse().unwrap();
    }
    config.timing.agent_grace = GRACE;
    config.timing.stop_grace = Duration::from_secs(1);
    serve(async {
        let node = node::run(config).await.unwrap();
        node.serve().await.unwrap();
    })
}

pub(crate) fn worker(args: impl Iterator<Item = String>) -> ExitCode {
    let config = WorkerConfig::from_args(args).unwrap();
    serve(async {
        let ended = worker::run(config, types()).await.unwrap();
        std::process::exit(ended.code());
    })
}

/// A process that is killed when it is dropped.
pub(crate) struct Proc(Child);

impl Proc {
    pub(crate) fn start(program: &Path, args: &[&str], log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let mut command = Command::new(program);
        Self(command.args(args).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }

    pub(crate) fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub(crate) fn terminate(&self) {
        signal(self.0.id(), Signal::TERM);
    }

    /// Waits for the end; panics if it does not come.
    pub(crate) async fn ended(mut self, limit: Duration) {
        let start = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < limit, "a process should have ended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

pub(crate) fn is_alive(pid: u32) -> bool {
    test_kill_process(Pid::from_raw(pid as i32).unwrap()).is_ok()
        && !std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

/// One cluster in a directory of its own.
pub(crate) struct TestCluster {
    pub(crate) cluster: Cluster,
    pub(crate) head: Option<Proc>,
    pub(crate) nodes: Vec<(String, Proc)>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) endpoint: String,
    state: String,
    /// Workers that were ever seen, so that none is left behind.
    pids: std::sync::Mutex<Vec<u32>>,
}

/// A port that nobody listens on, below those that the kernel gives to outgoing connections: one of these may be taken
/// before the test has used it.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let turn = TAKEN.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id().wrapping_mul(97));
        let port = 10_000 + (turn % 20_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl TestCluster {
    /// A head with embedded state and nodes `n0`, `n1`, ... with so many devices.
    pub(crate) async fn start(devices: &[u32]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state").to_string_lossy().into_owned();
        Self::start_on(dir, state, devices).await
    }

    pub(crate) async fn start_on(dir: tempfile::TempDir, state: String, devices: &[u32]) -> Self {
        let endpoint = format!("127.0.0.1:{}", free_port());
        let program = std::env::current_exe().unwrap();
        let head = start_head(&program, dir.path(), &endpoint, &state);
        let cluster = connect(&endpoint).await;
        let mut cluster = Self {
            cluster,
            head: Some(head),
            nodes: Vec::new(),
            dir,
            endpoint,
            state,
            pids: Default::default(),
        };
        for (i, devices) in devices.iter().enumerate() {
            cluster.start_node(&format!("n{i}"), *devices);
        }
        cluster
    }

    pub(crate) fn start_head(&mut self) {
        let program = std::env::current_exe().unwrap();
        self.head = Some(start_head(&program, self.dir.path(), &self.endpoint, &self.state));
    }

    pub(crate) fn start_node(&mut self, name: &str, devices: u32) {
        self.start_node_with(name, &devices.to_string());
    }

    pub(crate) fn start_node_with(&mut self, name: &str, devices: &str) {
        self.start_node_and(name, devices, &[]);
    }

    /// The same with what `node` takes more.
    pub(crate) fn start_node_and(&mut self, name: &str, devices: &str, more: &[&str]) {
        let program = std::env::current_exe().unwrap();
        let run_dir = self.dir.path().join(name).to_string_lossy().into_owned();
        let args = [&["node", name, &self.endpoint, &run_dir, devices], more].concat();
        self.nodes.push((name.to_owned(), Proc::start(&program, &args, &self.log(name))));
    }

    pub(crate) fn log(&self, of: &str) -> PathBuf {
        self.dir.path().join(format!("{of}.log"))
    }

    pub(crate) fn take_node(&mut self, name: &str) -> Proc {
        let at = self.nodes.iter().position(|(node, _)| node == name).unwrap();
        self.nodes.remove(at).1
    }

    /// Waits for a status; prints logs and panics if it does not come.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&ClusterStatus) -> bool) -> ClusterStatus {
        let reached = self.cluster.wait_until(Duration::from_secs(40), wanted).await;
        let Some(status) = reached else {
            let status = self.cluster.status().await;
            println!("never: {what}\n{status:#?}");
            self.print_logs();
            panic!("never: {what}");
        };
        self.pids.lock().unwrap().extend(status.actors.iter().filter_map(|actor| actor.pid));
        status
    }

    /// Waits until all actors are ready and all groups complete.
    pub(crate) async fn all_ready(&self, actors: usize) -> ClusterStatus {
        let ready = |actor: &ActorStatus| actor.state == ActorState::Ready;
        let complete = |status: &ClusterStatus| status.groups.iter().all(|group| group.complete);
        self.until("all ready", |status| {
            status.actors.len() == actors && status.actors.iter().all(ready) && complete(status)
        })
        .await
    }

    pub(crate) fn print_logs(&self) {
        for entry in walk(self.dir.path()).into_iter().filter(|path| path.to_string_lossy().contains(".log"))
        {
            println!("--- {}\n{}", entry.display(), std::fs::read_to_string(&entry).unwrap_or_default());
        }
    }

    pub(crate) fn counter(&self, name: &str) -> Named<Counter> {
        self.cluster.named(name)
    }

    /// Asks until there is an answer; the answer and how long that took.
    pub(crate) async fn ask<M>(&self, name: &str, message: impl Fn() -> M) -> (M::Result, Duration)
    where
        M: WireMessage,
        Counter: actix::Handler<M>,
    {
        let (start, named) = (Instant::now(), self.counter(name));
        loop {
            match named.ask(message()).await {
                Ok(answer) => return (answer, start.elapsed()),
                Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "{name}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) async fn add(&self, name: &str) -> u64 {
        self.ask(name, || Add(1)).await.0
    }

    /// Ends the cluster and checks that nothing of it is left.
    pub(crate) async fn end(mut self) {
        self.cluster.shutdown().await.unwrap();
        self.head.take().unwrap().ended(Duration::from_secs(20)).await;
        for (_, node) in std::mem::take(&mut self.nodes) {
            node.ended(Duration::from_secs(20)).await;
        }
        let left: Vec<u32> = self.pids.lock().unwrap().iter().copied().filter(|pid| is_alive(*pid)).collect();
        assert!(left.is_empty(), "workers {left:?} are left");
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for pid in self.pids.lock().unwrap().iter().filter(|pid| is_alive(**pid)) {
            signal(*pid, Signal::KILL);
        }
    }
}

fn start_head(program: &Path, dir: &Path, endpoint: &str, state: &str) -> Proc {
    Proc::start(program, &["head", endpoint, state], &dir.join("head.log"))
}

async fn connect(endpoint: &str) -> Cluster {
    let start = Instant::now();
    loop {
        match Cluster::connect(endpoint, Some(Secret::new(TOKEN))).await {
            Ok(cluster) => return cluster,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}
