//! What a cluster of real processes costs: start, actors in processes of their own, memory, deaths and losses.
//!
//! `cargo bench -p heliostat-runtime --bench cluster [-- ROW...]` starts itself again as head, nodes and workers, and prints one
//! JSON object per row: `{"row": ..., "value": ..., "unit": ...}`. `scripts/bench_ray` reads them. Timings end with an answer of
//! an actor wherever Ray's do, and with an event of the head otherwise; nothing sleeps where an event tells.

#![allow(clippy::print_stdout, reason = "the rows are the purpose of the program")]

mod common;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, ActorTypes, CreateError, RemoteActor, Spawn, WireMessage};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState};
use heliostat_runtime::head::{self, HeadConfig};
use heliostat_runtime::node::{self, NodeConfig};
use heliostat_runtime::spec::{ActorSpec, Placement, PlacementGroupSpec, Quantity, Resources};
use heliostat_runtime::state::StateConfig;
use heliostat_runtime::system::Secret;
use heliostat_runtime::wire::to_bytes;
use heliostat_runtime::worker::{self, WorkerConfig};
use rustix::process::{Pid, Signal, kill_process};

use common::print;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const TOKEN: &str = "a token of the benchmark";
/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(120);
/// Actors that are started at once.
const ACTORS: u32 = 50;
/// Deaths and losses that are measured.
const DEATHS: usize = 10;
const LOSSES: usize = 3;
/// Bundles of a gang, half a CPU each, and CPUs of a node, so that only one gang fits.
const BUNDLES: usize = 128;
const CPUS: u32 = 64;

/// Answers, and does nothing else.
struct Echo;

impl Actor for Echo {
    type Context = Context<Self>;
}

#[derive(Clone, Copy, Message, Encode, Decode)]
#[rtype(result = "u64")]
struct Ping(u64);

impl WireMessage for Ping {
    const NAME: &'static str = "ping";
}

/// Never comes back.
#[derive(Clone, Copy, Message, Encode, Decode)]
#[rtype(result = "()")]
struct Hang;

impl WireMessage for Hang {
    const NAME: &'static str = "hang";
}

impl Handler<Hang> for Echo {
    type Result = ();
    fn handle(&mut self, _: Hang, _: &mut Context<Self>) {
        loop {
            std::thread::park();
        }
    }
}

impl Handler<Ping> for Echo {
    type Result = u64;

    fn handle(&mut self, ping: Ping, _: &mut Context<Self>) -> u64 {
        ping.0 + 1
    }
}

impl RemoteActor for Echo {
    const TYPE: &'static str = "echo";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Ping>();
        m.accept::<Hang>();
    }
}

impl Spawn for Echo {
    type Args = ();

    async fn create((): (), _: ActorCx) -> Result<Self, CreateError> {
        Ok(Self)
    }
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let first = args.next();
    let served = match first.as_deref() {
        Some("head") => serve(run_head(args.collect())),
        Some("node") => serve(run_node(args.collect())),
        Some("worker") => serve(run_worker(args.collect())),
        _ => {
            let wanted: Vec<String> =
                first.into_iter().chain(args).filter(|arg| !arg.starts_with('-')).collect();
            serve(measure(wanted))
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(future: impl Future<Output = Result<(), AnyError>>) -> Result<(), AnyError> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(future)
}

/// `head BIND DIR`.
async fn run_head(args: Vec<String>) -> Result<(), AnyError> {
    let [bind, dir] = args.as_slice() else { return Err("head BIND DIR".into()) };
    let mut config = HeadConfig::new(bind.parse::<SocketAddr>()?, StateConfig::Embedded { dir: dir.into() });
    config.token = Some(Secret::new(TOKEN));
    head::run(config).await?.serve().await?;
    Ok(())
}

/// `node NAME HEAD DIR`.
async fn run_node(args: Vec<String>) -> Result<(), AnyError> {
    let [name, head, dir] = args.as_slice() else { return Err("node NAME HEAD DIR".into()) };
    let mut config = NodeConfig::new(name, head, dir);
    config.token = Some(Secret::new(TOKEN));
    config.capacity.cpus = CPUS;
    node::run(config).await?.serve().await?;
    Ok(())
}

async fn run_worker(args: Vec<String>) -> Result<(), AnyError> {
    let config = WorkerConfig::from_args(args)?;
    let ended = worker::run(config, ActorTypes::new().with::<Echo>()).await?;
    std::process::exit(ended.code())
}

/// A process of the cluster; it is killed when it is dropped.
struct Proc(Child);

impl Proc {
    fn start(args: &[&str], log: &Path) -> Result<Self, AnyError> {
        let log = std::fs::File::create(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(Self(command.spawn()?))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // One that was frozen dies of this as well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A head and its nodes.
struct Bench {
    cluster: Cluster,
    head: Proc,
    nodes: Vec<Proc>,
    _dir: tempfile::TempDir,
}

impl Bench {
    /// Returns when the head answers; nodes are still joining.
    async fn start(nodes: usize) -> Result<Self, AnyError> {
        let dir = tempfile::tempdir()?;
        let endpoint = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let state = dir.path().join("state");
        let head = Proc::start(&["head", &endpoint, &state.to_string_lossy()], &dir.path().join("head.log"))?;
        let mut bench = Vec::with_capacity(nodes);
        for i in 0..nodes {
            bench.push(start_node(i, &endpoint, dir.path())?);
        }
        let began = Instant::now();
        let cluster = loop {
            match Cluster::connect(&endpoint, Some(Secret::new(TOKEN))).await {
                Ok(cluster) => break cluster,
                Err(error) if began.elapsed() > LIMIT => return Err(error.into()),
                // There is no event of a process that does not listen yet.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        Ok(Self { cluster, head, nodes: bench, _dir: dir })
    }

    async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&ClusterStatus) -> bool,
    ) -> Result<ClusterStatus, AnyError> {
        let reached = self.cluster.wait_until(LIMIT, wanted).await;
        reached.ok_or_else(|| format!("never: {what}").into())
    }

    /// Asks until there is an answer.
    async fn answers(&self, actor: &str) -> Result<(), AnyError> {
        let (began, named) = (Instant::now(), self.cluster.named::<Echo>(actor));
        while let Err(error) = named.ask(Ping(1)).await {
            if began.elapsed() > LIMIT {
                return Err(format!("{actor}: {error}").into());
            }
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        Ok(())
    }

    /// The same once the process that had the actor is not taken for the next one any more.
    async fn answers_anew(&self, actor: &str, old: Option<u32>) -> Result<(), AnyError> {
        self.until("its death is known", |status| status.actor(actor).is_some_and(|a| a.pid != old)).await?;
        self.answers(actor).await
    }

    async fn spawn(&self, specs: Vec<ActorSpec>) -> Result<ClusterStatus, AnyError> {
        let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        self.cluster.apply(specs).await?;
        self.until("actors are ready", |status| {
            names.iter().all(|name| status.actor(name).is_some_and(|actor| actor.state == ActorState::Ready))
        })
        .await
    }
}

fn start_node(i: usize, endpoint: &str, dir: &Path) -> Result<Proc, AnyError> {
    let name = format!("n{i}");
    let run = dir.join(&name);
    Proc::start(&["node", &name, endpoint, &run.to_string_lossy()], &dir.join(format!("{name}.log")))
}

fn echo(name: &str) -> Result<ActorSpec, AnyError> {
    Ok(ActorSpec::new(name, Echo::TYPE, to_bytes(&())?))
}

fn signal(pid: u32, signal: Signal) -> Result<(), AnyError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("a process id")?;
    Ok(kill_process(pid, signal)?)
}

/// Resident memory of a process, MB (10^6 bytes).
fn resident_mb(pid: u32) -> Result<f64, AnyError> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("VmRSS")?.parse()?;
    Ok(kib * 1024.0 / 1e6)
}

async fn measure(wanted: Vec<String>) -> Result<(), AnyError> {
    let is_wanted = |row: &str| wanted.is_empty() || wanted.iter().any(|w| row.contains(w.as_str()));
    if is_wanted("start") {
        start().await?;
    }
    if is_wanted("actors") {
        actors().await?;
    }
    if is_wanted("killed") {
        killed().await?;
    }
    if is_wanted("hung") {
        hung().await?;
    }
    if is_wanted("gang") {
        gang().await?;
    }
    if is_wanted("lost") {
        lost(Loss::Killed).await?;
        lost(Loss::Frozen).await?;
    }
    Ok(())
}

/// From nothing to the first answer of an actor in a process of its own; then the end of all of it.
async fn start() -> Result<(), AnyError> {
    let (mut started, mut status_s, mut stopped) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..LOSSES {
        let began = Instant::now();
        let mut bench = Bench::start(1).await?;
        bench.spawn(vec![echo("first")?]).await?;
        bench.answers("first").await?;
        started.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        bench.cluster.status().await?;
        status_s.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        bench.cluster.shutdown().await?;
        bench.head.0.wait()?;
        for node in &mut bench.nodes {
            node.0.wait()?;
        }
        stopped.push(began.elapsed().as_secs_f64());
    }
    print("start to first remote call", &started, "s");
    print("status, in a client that is connected", &status_s, "ms");
    print("stop", &stopped, "s");
    Ok(())
}

/// Actors in processes of their own: how fast, how large; and the head beside them.
async fn actors() -> Result<(), AnyError> {
    let bench = Bench::start(1).await?;
    bench.spawn(vec![echo("warm")?]).await?;
    print("head, idle", &[resident_mb(bench.head.pid())?], "MB");
    print("node agent, idle", &[resident_mb(bench.nodes[0].pid())?], "MB");
    let mut rates = Vec::new();
    for round in 0..LOSSES {
        let specs = (0..ACTORS).map(|i| echo(&format!("a{round}-{i}"))).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        let began = Instant::now();
        let status = bench.spawn(specs).await?;
        for name in &names {
            bench.answers(name).await?;
        }
        rates.push(f64::from(ACTORS) / began.elapsed().as_secs_f64());
        if round == 0 {
            let pids = status.actors.iter().filter(|actor| names.contains(&actor.name)).filter_map(|a| a.pid);
            let sizes = pids.map(resident_mb).collect::<Result<Vec<_>, _>>()?;
            print("memory of an actor's process", &sizes, "MB");
        }
        for name in &names {
            bench.cluster.remove_actor(name).await?;
        }
        bench.until("actors are gone", |status| status.workers.len() == 1).await?;
    }
    print("actors in their own processes, 50 at once", &rates, "1/s");
    bench.cluster.shutdown().await?;
    Ok(())
}

/// kill -9 of an actor's process until the actor answers again: the first death of each, with the defaults.
async fn killed() -> Result<(), AnyError> {
    let bench = Bench::start(1).await?;
    let mut again = Vec::new();
    for death in 0..DEATHS {
        let name = format!("victim-{death}");
        let status = bench.spawn(vec![echo(&name)?]).await?;
        bench.answers(&name).await?;
        let pid = status.actor(&name).and_then(|actor| actor.pid);
        let began = Instant::now();
        signal(pid.ok_or("a pid")?, Signal::KILL)?;
        bench.answers_anew(&name, pid).await?;
        again.push(began.elapsed().as_secs_f64() * 1e3);
    }
    print("killed actor answers again", &again, "ms");
    bench.cluster.shutdown().await?;
    Ok(())
}

/// A handler that never comes back, with the defaults.
async fn hung() -> Result<(), AnyError> {
    let bench = Bench::start(1).await?;
    let mut again = Vec::new();
    for hang in 0..LOSSES {
        let name = format!("victim-{hang}");
        let status = bench.spawn(vec![echo(&name)?]).await?;
        bench.answers(&name).await?;
        let pid = status.actor(&name).and_then(|actor| actor.pid);
        let began = Instant::now();
        // The error says that it hung; what counts is the next answer.
        let _ = bench.cluster.named::<Echo>(&name).ask(Hang).await;
        bench.answers_anew(&name, pid).await?;
        again.push(began.elapsed().as_secs_f64());
    }
    print("hung actor answers again", &again, "s");
    bench.cluster.shutdown().await?;
    Ok(())
}

/// A gang of which only one fits, made again right after its removal.
async fn gang() -> Result<(), AnyError> {
    let bench = Bench::start(1).await?;
    bench.until("the node", |status| status.nodes.len() == 1).await?;
    let spec = PlacementGroupSpec::new("gang", BUNDLES, Resources::cpus(Quantity::milli(500)));
    let mut times = Vec::new();
    let mut group = bench.cluster.placement_group(spec.clone()).await?;
    group.ready(LIMIT).await?;
    for _ in 0..DEATHS {
        let began = Instant::now();
        group.remove().await?;
        group = bench.cluster.placement_group(spec.clone()).await?;
        group.ready(LIMIT).await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    print("gang of 128 bundles again right after removal", &times, "ms");
    bench.cluster.shutdown().await?;
    Ok(())
}

/// How a node is lost.
#[derive(Clone, Copy)]
enum Loss {
    /// Its agent is killed.
    Killed,
    /// Its agent and its workers are stopped, as a frozen machine is.
    Frozen,
}

/// A node is lost with the defaults: when the head says so, and when its actor answers elsewhere.
async fn lost(loss: Loss) -> Result<(), AnyError> {
    let (mut noticed, mut elsewhere) = (Vec::new(), Vec::new());
    for _ in 0..LOSSES {
        let bench = Bench::start(2).await?;
        bench.until("both nodes", |status| status.nodes.len() == 2).await?;
        let status =
            bench.spawn(vec![ActorSpec { placement: Placement::default(), ..echo("mover")? }]).await?;
        bench.answers("mover").await?;
        let actor = status.actor("mover").ok_or("the actor")?;
        let home = actor.node.clone().ok_or("its node")?;
        let agent = status.nodes.iter().find(|node| node.name == home).ok_or("its agent")?.pid;
        let worker = actor.pid.ok_or("its pid")?;
        let began = Instant::now();
        match loss {
            Loss::Killed => signal(agent, Signal::KILL)?,
            Loss::Frozen => {
                signal(agent, Signal::STOP)?;
                signal(worker, Signal::STOP)?;
            }
        }
        let away = |status: &ClusterStatus| {
            status.nodes.iter().all(|node| node.name != home || !matches!(node.state, NodeState::Ready))
        };
        bench.until("the loss is noticed", away).await?;
        noticed.push(began.elapsed().as_secs_f64());
        let moved = |status: &ClusterStatus| {
            let actor = status.actor("mover");
            actor
                .is_some_and(|a| a.state == ActorState::Ready && a.node.as_deref().is_some_and(|n| n != home))
        };
        bench.until("its actor is elsewhere", moved).await?;
        bench.cluster.forget("mover");
        bench.answers("mover").await?;
        elsewhere.push(began.elapsed().as_secs_f64());
        // A worker that was stopped goes with the benchmark, whoever should have ended it.
        let _ = signal(worker, Signal::KILL);
        let _ = signal(agent, Signal::KILL);
    }
    let what = match loss {
        Loss::Killed => "node agent killed",
        Loss::Frozen => "node frozen",
    };
    print(&format!("{what}: noticed"), &noticed, "s");
    print(&format!("{what}: actor elsewhere"), &elsewhere, "s");
    Ok(())
}
