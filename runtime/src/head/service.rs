//! Starting and ending a head.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::actor::{HeadActor, Parts};
use super::core::{Command, HeadState, Patience};
use super::keeper::{Keeper, LoadError};
use crate::handle::ActorId;
use crate::state::StateConfig;
use crate::system::{Secret, SpawnError, SpawnOptions, System, SystemConfig, SystemError};

/// Longest wait for the store when the head ends.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// Longest wait for the store when the head starts.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// What a head is.
#[derive(Debug, Clone)]
pub struct HeadConfig {
    /// Where it listens. Nodes and clients are given this address, so the port should not be 0.
    pub bind: SocketAddr,
    /// Host name or address by which other hosts reach it; needed when `bind` is a wildcard.
    pub advertise: Option<String>,
    /// Where it keeps what must survive it.
    pub state: StateConfig,
    /// The cluster token.
    pub token: Option<Secret>,
    /// How patient it is with nodes.
    pub patience: Patience,
}

impl HeadConfig {
    /// A head with defaults.
    pub fn new(bind: SocketAddr, state: StateConfig) -> Self {
        Self { bind, advertise: None, state, token: None, patience: Patience::default() }
    }
}

/// Why a head could not start.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// Its state cannot be read.
    #[error(transparent)]
    State(#[from] LoadError),
    /// Its first write failed.
    #[error("the state store does not take writes: {0}")]
    NotDurable(String),
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

/// A running head.
pub struct HeadHandle {
    system: System,
    keeper: Keeper,
    closed: watch::Receiver<bool>,
}

/// Starts a head: reads what an earlier one kept, then waits for nodes and workers to report.
pub async fn run(config: HeadConfig) -> Result<HeadHandle, HeadError> {
    let (keeper, records) = Keeper::open(&config.state).await?;
    let mut system = SystemConfig::new(config.bind);
    system.advertise = config.advertise;
    system.token = config.token;
    let system = System::start(system).await?;
    let started = Instant::now();
    let recovered = records.len();
    let (core, commands) = HeadState::recover(config.patience, Duration::ZERO, records);
    for command in commands {
        if let Command::Persist(write) = command {
            keeper.write(&write);
        }
    }
    if !keeper.flushed(START_PATIENCE).await {
        return Err(HeadError::NotDurable(keeper.health().error.unwrap_or_else(|| "no answer".into())));
    }
    let (closed, watched) = watch::channel(false);
    let parts = Parts { core, system: system.clone(), keeper: keeper.clone(), started, closed };
    system.spawn(SpawnOptions::well_known(ActorId::HEAD), move || HeadActor::new(parts))?;
    tracing::info!(endpoint = system.endpoint(), recovered, "head started");
    Ok(HeadHandle { system, keeper, closed: watched })
}

impl HeadHandle {
    /// Where it listens.
    pub fn endpoint(&self) -> &str {
        self.system.endpoint()
    }

    /// Waits until the cluster was shut down and all nodes are gone.
    pub async fn closed(&self) {
        // An error means that the actor is gone, and the cluster has no head either way.
        let _ = self.closed.clone().wait_for(|closed| *closed).await;
    }

    /// Ends the head alone. Nodes and workers go on and come back to the next head.
    pub async fn stop(&self) {
        self.keeper.flushed(FLUSH_PATIENCE).await;
        self.system.shutdown().await;
    }

    /// Serves until SIGTERM or SIGINT, which end the head alone, or until the cluster was shut down.
    pub async fn serve(&self) -> Result<(), HeadError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(HeadError::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(HeadError::Signals)?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.closed() => {}
        }
        self.stop().await;
        Ok(())
    }
}
