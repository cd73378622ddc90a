//! Starting and ending a head: it stands by until it is elected, leads, and ends when it leads no more.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::actor::{HeadActor, Parts};
use super::authority::Authority;
use super::clock::Clock;
use super::core::{Command, HeadState, Patience, Record};
use super::election::{self, Candidate, Elected, Outcome, STORE_PAUSE};
use super::keeper::{Keeper, LoadError};
use super::packages::PackagesConfig;
use super::tenure::Tenure;
use crate::handle::ActorId;
use crate::package::{Door, PackageActor, PackageStore};
use crate::state::{Leadership, LeaseId, StateConfig, StateError, StateStore};
use crate::system::{Secret, SpawnError, SpawnOptions, System, SystemConfig, SystemError, TlsFiles};

/// Longest wait for the store when the head ends.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for the store when the head starts to lead.
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
    /// Certificates for TLS with every peer.
    pub tls: Option<TlsFiles>,
    /// How patient it is with nodes.
    pub patience: Patience,
    /// Where the other heads of the cluster listen. With any, a leader that cannot renew its lease gives no order after
    /// it; without, it goes on from memory until it hears of another.
    pub peers: Vec<String>,
    /// How long a leader that is silent in etcd leads. etcd counts whole seconds, and two at least. Default 2 s.
    pub lease: Duration,
    /// Waits for an etcd that does not answer when the head starts, instead of failing.
    pub await_store: bool,
    /// Where packages are kept. Without it none can be uploaded.
    pub packages: Option<PackagesConfig>,
}

impl HeadConfig {
    /// A head with defaults.
    pub fn new(bind: SocketAddr, state: StateConfig) -> Self {
        Self {
            bind,
            advertise: None,
            state,
            token: None,
            tls: None,
            patience: Patience::default(),
            peers: Vec::new(),
            lease: Duration::from_secs(2),
            await_store: false,
            packages: None,
        }
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
    /// It was elected, and could not lead.
    #[error("{0}")]
    Lead(String),
    /// Its directory of packages cannot be used.
    #[error("packages in {dir}: {why}")]
    Packages {
        /// The directory.
        dir: String,
        /// Why.
        why: String,
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

impl From<StateError> for HeadError {
    fn from(error: StateError) -> Self {
        Self::State(LoadError::Store(error))
    }
}

/// What a head does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It has not read the store yet.
    Starting,
    /// Another leads; whoever comes here is sent there.
    StandsBy {
        /// Where the leader listens.
        leader: String,
    },
    /// It leads.
    Leads {
        /// Its term.
        term: u64,
        /// Whether it took over from another head and found actors to look after.
        succeeds: bool,
    },
    /// It ends.
    Over(Ending),
}

/// Why a head ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// A signal ended it alone.
    Signal,
    /// The cluster was shut down.
    Closed,
    /// It leads no more; a process that starts anew may stand by.
    Deposed(String),
    /// It could not lead.
    Failed(String),
}

/// A running head, which leads or stands by.
pub struct HeadHandle {
    shared: Arc<Shared>,
    _task: Option<AbortOnDropHandle<()>>,
}

struct Shared {
    config: HeadConfig,
    system: System,
    store: StateStore,
    packages: Option<(Arc<PackageStore>, u64)>,
    own: Candidate,
    clock: Clock,
    role: watch::Sender<Role>,
    led: Mutex<Option<Led>>,
}

/// What there is of a head that leads.
#[derive(Clone)]
struct Led {
    keeper: Keeper,
    authority: Arc<Authority>,
    leadership: Leadership,
    lease: Option<LeaseId>,
}

/// Starts a head. Returns when it leads, having read what an earlier one kept, or when it stands by for another.
pub async fn run(config: HeadConfig) -> Result<HeadHandle, HeadError> {
    let store = open(&config).await?;
    let mut system = SystemConfig::new(config.bind);
    system.advertise.clone_from(&config.advertise);
    system.token.clone_from(&config.token);
    system.tls.clone_from(&config.tls);
    let system = System::start(system).await?;
    let own = Candidate {
        endpoint: system.endpoint().to_owned(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
    };
    let packages = open_packages(&config, &system).await?;
    let alone = matches!(config.state, StateConfig::Embedded { .. });
    let shared = Arc::new(Shared {
        config,
        system,
        store,
        packages,
        own,
        clock: Clock::start(),
        role: watch::Sender::new(Role::Starting),
        led: Mutex::default(),
    });
    if alone {
        let elected = election::alone(&shared.store, &shared.own).await?;
        shared.lead(elected).await?;
        return Ok(HeadHandle { shared, _task: None });
    }
    shared.system.registry().redirect(ActorId::HEAD, String::new());
    let task = AbortOnDropHandle::new(tokio::spawn(shared.clone().stand()));
    let mut role = shared.role.subscribe();
    let first = role.wait_for(|role| *role != Role::Starting).await.map(|role| role.clone());
    match first {
        Ok(Role::Over(Ending::Failed(why))) => Err(HeadError::Lead(why)),
        _ => Ok(HeadHandle { shared, _task: Some(task) }),
    }
}

/// Opens the directory of packages and serves it, also while this head stands by.
async fn open_packages(
    config: &HeadConfig,
    system: &System,
) -> Result<Option<(Arc<PackageStore>, u64)>, HeadError> {
    let Some(packages) = &config.packages else { return Ok(None) };
    let failed = |why: String| HeadError::Packages { dir: packages.dir.display().to_string(), why };
    let store = PackageStore::open(&packages.dir, packages.package_bytes_max);
    let store = Arc::new(store.map_err(|error| failed(error.to_string()))?);
    let served = PackageActor::start(system, store.clone(), Door::InAndOut).await;
    served.map_err(|error| failed(error.to_string()))?;
    Ok(Some((store, packages.bytes_max)))
}

async fn open(config: &HeadConfig) -> Result<StateStore, StateError> {
    let mut said = false;
    loop {
        match StateStore::open(&config.state).await {
            Err(StateError::Unavailable(why)) if config.await_store => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(why, "waits for the state store");
                }
                tokio::time::sleep(STORE_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

impl Shared {
    /// Stands by until elected, and then leads.
    async fn stand(self: Arc<Self>) {
        let stands_by = |leader: &str| {
            tracing::info!(endpoint = self.own.endpoint, leader, "stands by");
            self.system.registry().redirect(ActorId::HEAD, leader.to_owned());
            self.role.send_replace(Role::StandsBy { leader: leader.to_owned() });
        };
        let time = (self.config.lease, self.clock.started());
        let outcome = election::elect(&self.store, &self.own, time, stands_by).await;
        let ending = match outcome {
            Ok(Outcome::Elected(elected)) => match self.lead(elected).await {
                Ok(()) => return,
                Err(error) => Ending::Failed(error.to_string()),
            },
            Ok(Outcome::Closed) => Ending::Closed,
            Err(error) => Ending::Failed(error.to_string()),
        };
        self.role.send_replace(Role::Over(ending));
    }

    async fn lead(self: &Arc<Self>, elected: Elected) -> Result<(), HeadError> {
        let term = elected.leadership.term().0;
        let strict = !self.config.peers.is_empty();
        let tenure = match elected.lease {
            Some(_) => Tenure::leased(term, self.config.lease, strict, elected.asked),
            None => Tenure::sole(term),
        };
        let authority = Authority::new(tenure, self.clock.started());
        if let Some(lease) = elected.lease {
            tokio::spawn(authority.clone().renew(self.store.clone(), lease));
        }
        let (keeper, records) = Keeper::open(
            &self.config.state,
            self.store.clone(),
            elected.leadership.clone(),
            authority.clone(),
        )
        .await?;
        let led = Led {
            keeper: keeper.clone(),
            authority: authority.clone(),
            leadership: elected.leadership,
            lease: elected.lease,
        };
        *self.led.lock().unwrap_or_else(PoisonError::into_inner) = Some(led);
        let recovered = records.len();
        let succeeds = elected.succeeds && records.iter().any(|record| matches!(record, Record::Spec(_)));
        let (core, commands) = HeadState::recover(self.config.patience, self.clock.now(), records);
        for command in commands {
            if let Command::Persist(write) = command {
                keeper.write(&write);
            }
        }
        if !keeper.flushed(START_PATIENCE).await {
            return Err(HeadError::NotDurable(keeper.health().error.unwrap_or_else(|| "no answer".into())));
        }
        self.serve(core.in_term(term), keeper, authority)?;
        tracing::info!(endpoint = self.own.endpoint, term, recovered, "head leads");
        self.role.send_replace(Role::Leads { term, succeeds });
        Ok(())
    }

    /// Makes the head reachable, and waits for its end beside it.
    fn serve(
        self: &Arc<Self>,
        core: HeadState,
        keeper: Keeper,
        authority: Arc<Authority>,
    ) -> Result<(), HeadError> {
        let (closed, mut watched) = watch::channel(false);
        let (system, clock) = (self.system.clone(), self.clock);
        let mut heads = vec![self.own.endpoint.clone()];
        heads.extend(self.config.peers.iter().filter(|peer| **peer != self.own.endpoint).cloned());
        let packages = self.packages.clone();
        let parts =
            Parts { core, system, keeper, authority: authority.clone(), heads, clock, closed, packages };
        self.system.spawn(SpawnOptions::well_known(ActorId::HEAD), move || HeadActor::new(parts))?;
        let shared = self.clone();
        tokio::spawn(async move {
            let ending = tokio::select! {
                why = authority.over() => Ending::Deposed(why),
                // An error means that the actor is gone, and the cluster has no head either way.
                _ = watched.wait_for(|closed| *closed) => Ending::Closed,
            };
            shared.role.send_replace(Role::Over(ending));
        });
        Ok(())
    }
}

impl HeadHandle {
    /// Where it listens.
    pub fn endpoint(&self) -> &str {
        self.shared.system.endpoint()
    }

    /// Follows what it does.
    pub fn role(&self) -> watch::Receiver<Role> {
        self.shared.role.subscribe()
    }

    /// Waits until it is to end: the cluster was shut down and all nodes are gone, or it leads no more.
    pub async fn over(&self) -> Ending {
        let mut role = self.role();
        match role.wait_for(|role| matches!(role, Role::Over(_))).await.as_deref() {
            Ok(Role::Over(ending)) => ending.clone(),
            _ => Ending::Closed,
        }
    }

    /// Ends the head alone. Nodes and workers go on and come to the next head, which leads at once.
    pub async fn stop(&self) {
        let shared = &self.shared;
        let led = shared.led.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(led) = led {
            if led.authority.may_act() {
                led.keeper.flushed(FLUSH_PATIENCE).await;
            }
            // Gives up no leadership but its own, so also one that led no more may try.
            let closed = *shared.role.borrow() == Role::Over(Ending::Closed);
            led.authority.end("it ends");
            let resigning = election::resign(&shared.store, led.leadership, led.lease, closed);
            if let Ok(Err(error)) = tokio::time::timeout(FLUSH_PATIENCE, resigning).await {
                tracing::debug!(%error, "did not resign");
            }
        }
        shared.system.shutdown().await;
    }

    /// Serves until SIGTERM or SIGINT, which end the head alone, or until it is over.
    pub async fn serve(&self) -> Result<Ending, HeadError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(HeadError::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(HeadError::Signals)?;
        let ending = tokio::select! {
            _ = terminate.recv() => Ending::Signal,
            _ = interrupt.recv() => Ending::Signal,
            ending = self.over() => ending,
        };
        self.stop().await;
        Ok(ending)
    }
}
