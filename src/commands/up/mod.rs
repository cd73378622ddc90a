//! `helio up`: starts the cluster's processes on this machine, shows how far they are, keeps them alive and ends them.
//!
//! It holds the run directory's lock. What it knows of the product's actors is the head's status, and the ingress's word
//! that it serves.

mod detach;
pub(crate) mod family;
mod report;
mod watch;

use crate::args;
use crate::cluster::Access;
use crate::config::{Config, Devices, Node, State};
use crate::deploy;
use crate::failure::{self, Failure, NOT_STARTED, say};
use crate::rundir::{Lock, Owner, RunDir, tail};
use anyhow::{Context, Result};
use family::{Death, Family, HEAD, Next};
use heliostat_runtime::system::TlsFiles;
use report::{Display, Ready, Report, Row};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use watch::{Wanted, Watch};

/// How long nodes may take to end their workers, jobs to end, and the head to end itself, before they are killed.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Lines of a log that are shown with an error.
const TAIL_LINES: usize = 12;

/// Runs `helio up`.
pub(crate) async fn run(args: &args::Up) -> Result<()> {
    if args.daemon {
        detach::leave_session()?;
    }
    let config = Config::load(args.file.as_deref())?;
    let run = RunDir::new(&config.run_dir)?;
    run.create()?;
    if args.detach && !args.daemon {
        return detach::run(args, &run);
    }
    let mut display = if args.daemon { Display::Json } else { Display::for_stderr() };
    let result = foreground(&config, &run, &mut display, args.daemon).await;
    if let (true, Err(error)) = (args.daemon, &result) {
        let _ = display.show(&Report::Failed { code: failure::code(error), message: failure::text(error) });
    }
    result
}

async fn foreground(config: &Config, run: &RunDir, display: &mut Display, daemon: bool) -> Result<()> {
    let _lock = take(run)?;
    // Whatever is wrong with the model's files is better said before anything runs.
    let plan = deploy::plan(config).map_err(|e| Failure::error(NOT_STARTED, failure::text(&e)))?;
    check_ports(config)?;
    for text in config.in_clear() {
        display.show(&Report::Note { text: format!("warning: {text}") })?;
    }
    let may_be_left = match &config.state {
        State::Embedded { dir } => dir.exists(),
        State::Etcd { .. } => true,
    };
    let mut signals = Signals::new()?;
    let mut family = Family::new(run.clone(), deploy::restart(config))?;
    let ready = Ready {
        cluster: config.name.clone(),
        model: config.model.as_ref().filter(|model| model.deploy).map(|model| model.name.clone()),
        dashboard: config.dashboard_url(),
        url: config.serve_url(),
        head: config.bind.to_string(),
        run_dir: run.path().display().to_string(),
        took_ms: 0,
    };
    let mut supervisor = Supervisor { config, run, family: &mut family, display, daemon };
    let wanted =
        Wanted { names: plan.names(), serves: ready.model.is_some(), ingresses: plan.ingresses, may_be_left };
    let outcome = supervisor.serve(&mut signals, ready, wanted).await;
    let _ = display.show(&Report::Note { text: "stopping".into() });
    signals.stop(family, &Access::of(config)).await;
    run.clear_owner();
    outcome
}

/// Takes the run directory, or says who has it.
fn take(run: &RunDir) -> Result<Lock> {
    if let Some(lock) = run.lock()? {
        return Ok(lock);
    }
    let who = run.owner().map_or_else(String::new, |o| {
        format!(": cluster {} (pid {}, {}, head {})", o.cluster, o.pid, o.url, o.head)
    });
    let dir = run.path().display();
    let fix = "stop it with `helio down`, or set another `run_dir` in [cluster]";
    Err(Failure::error(failure::FAILED, format!("a cluster already runs in {dir}{who}; {fix}")))
}

/// Refuses ports that others listen on, before anything is started.
fn check_ports(config: &Config) -> Result<()> {
    let http = SocketAddr::new(config.serve.host, config.serve.port);
    let mut ports = vec![(config.bind, "`bind` in [head]"), (http, "`port` in [serve]")];
    let dashboard = SocketAddr::new(config.dashboard.host, config.dashboard.port);
    ports.extend(config.dashboard.enabled.then_some((dashboard, "`port` in [dashboard]")));
    for (address, key) in ports {
        TcpListener::bind(address).map(drop).map_err(|e| {
            let why = if e.kind() == std::io::ErrorKind::AddrInUse {
                "something listens there".into()
            } else {
                e.to_string()
            };
            Failure::error(NOT_STARTED, format!("cannot listen on {address}: {why}; change {key}"))
        })?;
    }
    Ok(())
}

/// How starting ended well.
enum Startup {
    /// All actors are ready.
    Ready,
    /// Somebody asked to stop before that.
    Stopped,
}

/// What `up` does between taking the lock and stopping the family.
struct Supervisor<'a> {
    config: &'a Config,
    run: &'a RunDir,
    family: &'a mut Family,
    display: &'a mut Display,
    daemon: bool,
}

impl Supervisor<'_> {
    async fn serve(&mut self, signals: &mut Signals, mut ready: Ready, wanted: Wanted) -> Result<()> {
        let started = Instant::now();
        self.prepare(&ready)?;
        self.start()?;
        let mut watch = Watch::start(Access::of(self.config), wanted);
        match self.until_ready(signals, &mut watch).await? {
            Startup::Stopped => return Ok(()),
            Startup::Ready => {}
        }
        ready.took_ms = started.elapsed().as_millis() as u64;
        self.display.show(&Report::Ready(ready.clone()))?;
        if self.daemon {
            detach::close_stdout()?;
        } else {
            report::welcome(&ready, false);
        }
        self.while_serving(signals).await
    }

    /// Writes what commands and children need to find.
    fn prepare(&self, ready: &Ready) -> Result<()> {
        let owner = Owner {
            pid: std::process::id(),
            cluster: ready.cluster.clone(),
            head: ready.head.clone(),
            url: ready.url.clone(),
        };
        self.run.set_owner(&owner)?;
        self.run.set_address(&Access::of(self.config).address)?;
        self.run.set_tls(self.config.security.as_ref())?;
        self.run.set_token(self.config.token.as_ref())
    }

    fn start(&mut self) -> Result<()> {
        let snapshot = self.run.path().join("cluster.toml");
        self.run.write_private("cluster.toml", &self.config.effective)?;
        self.family.add(HEAD, head_args(&snapshot, self.run))?;
        for node in &self.config.nodes {
            match &node.host {
                None => self.family.add(&node.name, node_args(self.config, node, self.run))?,
                Some(host) => {
                    let text = format!("node {}: on {host}, run: {}", node.name, by_hand(self.config, node));
                    self.display.show(&Report::Note { text })?;
                }
            }
        }
        Ok(())
    }

    /// Shows progress until all actors are ready. A death before that ends the start.
    async fn until_ready(&mut self, signals: &mut Signals, watch: &mut Watch) -> Result<Startup> {
        loop {
            tokio::select! {
                heard = signals.next() => match heard {
                    Heard::Stop => return Ok(Startup::Stopped),
                    Heard::Child => {
                        if let Some(death) = self.family.reap().first() {
                            return Err(self.not_started(death));
                        }
                    }
                },
                seen = watch.next() => {
                    let mut rows = self.process_rows();
                    rows.extend(seen.rows);
                    self.display.show(&Report::Progress { rows })?;
                    if let Some(why) = seen.failed {
                        return Err(Failure::error(NOT_STARTED, why));
                    }
                    if seen.ready {
                        return Ok(Startup::Ready);
                    }
                }
            }
        }
    }

    /// Keeps the family alive until somebody asks to stop.
    async fn while_serving(&mut self, signals: &mut Signals) -> Result<()> {
        loop {
            let due = self.family.next_restart().map(tokio::time::Instant::from_std);
            let restart = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = restart => self.family.restart_due(),
                heard = signals.next() => match heard {
                    Heard::Stop => return Ok(()),
                    Heard::Child => self.handle_deaths()?,
                },
            }
        }
    }

    /// Says who died; fails where one died too often.
    fn handle_deaths(&mut self) -> Result<()> {
        for death in self.family.reap() {
            match death.next {
                Next::Restart => say(format_args!("{} {}, restarting it", death.name, death.cause)),
                Next::GiveUp => return Err(self.gave_up(&death)),
                Next::Left => say(format_args!(
                    "{} has left the cluster; it is back when the cluster is started again",
                    death.name
                )),
            }
        }
        Ok(())
    }

    fn process_rows(&self) -> Vec<Row> {
        let names = std::iter::once(HEAD).chain(self.config.nodes.iter().map(|n| n.name.as_str()));
        let row = |name: &str| {
            let pid = self.family.pid(name)?;
            Some(Row { name: name.into(), place: format!("pid {pid}"), state: report::RowState::Ready })
        };
        names.filter_map(row).collect()
    }

    fn not_started(&self, death: &Death) -> anyhow::Error {
        Failure::error(
            NOT_STARTED,
            format!("{} {} while starting:\n{}", death.name, death.cause, self.tail(death)),
        )
    }

    fn gave_up(&self, death: &Death) -> anyhow::Error {
        let limit = format!(
            "{} times in {} s",
            self.config.supervision.max_restarts, self.config.supervision.window_s
        );
        let message =
            format!("{} {} and was restarted {limit} before:\n{}", death.name, death.cause, self.tail(death));
        Failure::error(failure::FAILED, message)
    }

    fn tail(&self, death: &Death) -> String {
        tail(&self.run.log_path(&death.name), TAIL_LINES)
    }
}

fn head_args(snapshot: &Path, run: &RunDir) -> Vec<String> {
    let path = |p: &Path| p.display().to_string();
    vec!["head".into(), path(snapshot), "--run-dir".into(), path(run.path())]
}

fn node_args(config: &Config, node: &Node, run: &RunDir) -> Vec<String> {
    let dir = run.path().join("nodes").join(&node.name);
    let mut args: Vec<String> = vec!["node".into(), "--join".into(), Access::of(config).address];
    args.extend(["--name".into(), node.name.clone()]);
    args.extend(node.devices.args());
    args.extend(node.offer_args());
    args.extend(config.objects.args());
    args.extend(["--run-dir".into(), dir.display().to_string()]);
    args.extend(["--worker-grace".into(), config.supervision.worker_grace_s.to_string()]);
    args.extend(["--heartbeat".into(), config.supervision.heartbeat_ms.to_string()]);
    if config.token.is_some() {
        args.extend(["--token-file".into(), run.token_path().display().to_string()]);
    }
    args.extend(config.security.iter().flat_map(args::Tls::to_args));
    args
}

/// What to run on another machine.
fn by_hand(config: &Config, node: &Node) -> String {
    let token = if config.token.is_some() { " --token-file FILE" } else { "" };
    let tls = match &config.security {
        None => String::new(),
        Some(TlsFiles { server_name: None, .. }) => " --tls DIR".into(),
        Some(TlsFiles { server_name: Some(name), .. }) => format!(" --tls DIR --tls-server-name {name}"),
    };
    // Threads are those of this machine; the other one has its own cores.
    let devices = match node.devices {
        Devices::Cpu { count, .. } => format!("--devices cpu={count}"),
        Devices::Cuda { .. } => node.devices.args().join(" "),
    };
    let heads: Vec<String> =
        std::iter::once(config.bind.to_string()).chain(config.peers.iter().cloned()).collect();
    let offer = node.offer_args().into_iter().chain(config.objects.args());
    let offer: String = offer.map(|arg| format!(" {arg}")).collect();
    format!("helio node --join {} --name {} {devices}{offer}{token}{tls}", heads.join(","), node.name)
}

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// Somebody asks to stop.
    Stop,
    /// One or several children have ended.
    Child,
}

/// The signals that `up` listens to.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    child: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            child: listen(SignalKind::child())?,
        })
    }

    /// The next signal.
    async fn next(&mut self) -> Heard {
        tokio::select! {
            _ = self.interrupt.recv() => Heard::Stop,
            _ = self.terminate.recv() => Heard::Stop,
            _ = self.hangup.recv() => Heard::Stop,
            _ = self.child.recv() => Heard::Child,
        }
    }

    /// Ends the cluster, nodes on other machines included, then the family. A second request to stop kills what is left
    /// at once.
    async fn stop(&mut self, family: Family, access: &Access) {
        tokio::select! {
            _ = tokio::time::timeout(STOP_GRACE, shut_down(access)) => {}
            () = self.stop_requested() => {}
        }
        let hurry = Arc::new(AtomicBool::new(false));
        let flag = hurry.clone();
        let mut stopping = tokio::task::spawn_blocking(move || family.stop(STOP_GRACE, &flag));
        loop {
            tokio::select! {
                _ = &mut stopping => return,
                () = self.stop_requested() => hurry.store(true, Ordering::Relaxed),
            }
        }
    }

    async fn stop_requested(&mut self) {
        while self.next().await != Heard::Stop {}
    }
}

/// Asks the head to end the cluster. Where it cannot, the signals that follow do.
async fn shut_down(access: &Access) {
    if let Ok(cluster) = access.connect().await
        && let Err(e) = cluster.shutdown().await
    {
        tracing::warn!("the head could not end the cluster: {e}");
    }
}
