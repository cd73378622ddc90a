//! A worker process: hosts the actor that the head creates on it.
//!
//! It stands on its own: it serves while the head or the node agent is away, and reports when they are back. Only when
//! no agent has turned up for the grace period does it end, so that nothing is left behind.

mod code;
mod hang;
mod host;
mod links;
mod views;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use self::host::WorkerActor;
use self::host::{Ending, Host};
use crate::actor::ActorTypes;
use crate::cluster::Cluster;
use crate::handle::{ActorId, Incarnation};
use crate::node::files::{self, RunDir, WorkerRecord};
use crate::spec::DeathCause;
use crate::system::{Secret, SpawnError, SpawnOptions, System, SystemConfig, SystemError};

/// Has a worker end when its actor has handled what it has. SIGTERM does not wait for that.
pub(crate) const FINISH: Signal = Signal::USR1;

/// How long the head is given to hear of the actor's end, and then peers to take their last answers.
const LAST_WORD: Duration = Duration::from_millis(500);

/// What a worker is told by its node: where its record lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Name of the actor it is for. Only for whoever reads the list of processes.
    pub actor: String,
    /// Incarnation of the actor.
    pub incarnation: Incarnation,
    /// `<run_dir>/workers/<incarnation>.json`, written by the node.
    pub record: PathBuf,
}

impl WorkerConfig {
    /// Reads `--actor NAME --incarnation N --record PATH`, which the node puts after its worker command.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, WorkerError> {
        let (mut actor, mut incarnation, mut record) = (None, None, None);
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| WorkerError::Args(format!("{name} has no value")))?;
            match name.as_str() {
                "--actor" => actor = Some(value),
                "--incarnation" => {
                    let parsed =
                        value.parse().map_err(|_| WorkerError::Args(format!("incarnation {value:?}")))?;
                    incarnation = Some(Incarnation(parsed));
                }
                "--record" => record = Some(PathBuf::from(value)),
                _ => return Err(WorkerError::Args(format!("unknown argument {name}"))),
            }
        }
        let missing = |name: &str| WorkerError::Args(format!("{name} is missing"));
        Ok(Self {
            actor: actor.ok_or_else(|| missing("--actor"))?,
            incarnation: incarnation.ok_or_else(|| missing("--incarnation"))?,
            record: record.ok_or_else(|| missing("--record"))?,
        })
    }

    pub(crate) fn to_args(actor: &str, incarnation: Incarnation, record: &Path) -> Vec<String> {
        let record = record.to_string_lossy().into_owned();
        let args = ["--actor", actor, "--incarnation", &incarnation.to_string(), "--record", &record];
        args.map(str::to_owned).to_vec()
    }
}

/// Why a worker could not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It was not started by a node.
    #[error("worker arguments: {0}; a worker is started by its node agent")]
    Args(String),
    /// Its record cannot be read.
    #[error("worker record {path}: {source}")]
    Record {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// It cannot listen.
    #[error(transparent)]
    System(#[from] SystemError),
    /// It cannot be reached.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Signals cannot be listened to.
    #[error("cannot listen to signals: {0}")]
    Signals(std::io::Error),
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Why.
    pub cause: DeathCause,
}

impl Ended {
    /// The exit code of the process: 0 if this was meant to be.
    pub fn code(&self) -> i32 {
        i32::from(!self.cause.is_intended())
    }
}

/// Runs a worker to its end. The caller then exits with `Ended::code`, by `std::process::exit`: threads that the
/// actor left behind do not matter any more.
pub async fn run(config: WorkerConfig, types: ActorTypes) -> Result<Ended, WorkerError> {
    crate::panics::watch();
    let (record, dir, token) = read(&config)?;
    let mut settings = SystemConfig::new(SocketAddr::new(record.bind, 0));
    settings.advertise.clone_from(&record.advertise);
    settings.token = token;
    settings.tls.clone_from(&record.tls);
    let system = System::start(settings).await?;
    system.objects().at_store(dir.objects());
    let cluster = Cluster::with_system(system.clone(), &record.head);
    let cluster = match record.package.clone() {
        Some(package) => cluster.with_package(package),
        None => cluster,
    };
    let host = Arc::new(Host::new(record, system.clone(), cluster, types));
    let hosted = host.clone();
    system.spawn(SpawnOptions::well_known(ActorId::WORKER), move || WorkerActor::new(hosted))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(WorkerError::Signals)?;
    let mut finish = signal(SignalKind::user_defined1()).map_err(WorkerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(WorkerError::Signals)?;
    let head = links::to_head(host.clone());
    let node = links::to_node(host.clone(), dir);
    tokio::pin!(head, node);
    let ending = tokio::select! {
        () = &mut head => unreachable_link(),
        ending = &mut node => ending,
        ending = host.over() => ending,
        _ = terminate.recv() => Ending::Terminated,
        _ = interrupt.recv() => Ending::Terminated,
        _ = finish.recv() => Ending::Finishing,
    };
    let cause = match ending {
        Ending::Actor(cause) => {
            host.note_end(cause.clone());
            tokio::select! {
                () = &mut head => {}
                () = host.end_reported() => {}
                () = tokio::time::sleep(LAST_WORD) => {}
            }
            cause
        }
        Ending::Finishing => {
            tokio::select! {
                () = host.finish_actor() => {}
                _ = terminate.recv() => host.stop_actor().await,
                // It is still heard of meanwhile.
                () = &mut head => {}
                _ = &mut node => {}
            }
            DeathCause::stopped("it was to finish")
        }
        Ending::Terminated => {
            host.stop_actor().await;
            DeathCause::stopped("SIGTERM")
        }
        Ending::Fenced(why) => DeathCause::Failed { message: why },
    };
    tracing::info!(%cause, "worker ends");
    // Answers that are on their way, such as the cause to those who asked a panicked actor, still go out. One that hangs has
    // none, and would be waited for in vain.
    let hangs = matches!(cause, DeathCause::Hung { .. });
    if !hangs && tokio::time::timeout(LAST_WORD, system.shutdown()).await.is_err() {
        tracing::warn!("some connections did not close in time");
    }
    Ok(Ended { cause })
}

fn unreachable_link() -> Ending {
    Ending::Fenced("the system of this process was shut down".into())
}

fn read(config: &WorkerConfig) -> Result<(WorkerRecord, RunDir, Option<Secret>), WorkerError> {
    let failed = |path: &Path, source| WorkerError::Record { path: path.display().to_string(), source };
    let record: WorkerRecord = files::read(&config.record).map_err(|error| failed(&config.record, error))?;
    let dir = RunDir::of_worker(&config.record)
        .ok_or_else(|| failed(&config.record, std::io::Error::other("it lies in no run directory")))?;
    let token = match &record.token_file {
        Some(path) => Some(Secret::new(std::fs::read(path).map_err(|error| failed(path, error))?)),
        None => None,
    };
    Ok((record, dir, token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_survive_the_command_line() {
        let args = WorkerConfig::to_args("rank-0", Incarnation(7), Path::new("/run/x/workers/7.json"));
        let config = WorkerConfig::from_args(args).unwrap();
        assert_eq!((config.actor.as_str(), config.incarnation), ("rank-0", Incarnation(7)));
        assert!(
            WorkerConfig::from_args(["--actor".to_owned()]).unwrap_err().to_string().contains("has no value")
        );
    }
}
