//! One process's part of the cluster: its listener, its connections and the actors it hosts.
//!
//! A system owns the threads that its actors run on (actix arbiters). Its sockets are served by the tokio runtime it
//! was started in. Nothing here is global: a process may hold several systems, as tests do.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use actix::dev::ContextFut;
use actix::{Arbiter, AsyncContext, Context};
use futures_util::FutureExt;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::actor::{CreateError, RemoteActor};
use crate::handle::{ActorAddr, ActorId, Handle, Incarnation, ProcessId};
pub use crate::mailbox::ActorEnd;
use crate::mailbox::{Entry, Pump, Registry, panic_message};
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::conn::{Conn, Limits};
use crate::wire::handshake::Hello;
pub use crate::wire::handshake::Secret;
use crate::wire::link::{self, Link, now_ms};

/// Peer events that a slow subscriber may lag behind.
const PEER_EVENTS_MAX: usize = 1024;
/// How long a shutdown waits for actors, and then for peers to take what is queued.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// How a process takes part in the cluster.
#[derive(Debug, Clone)]
pub struct SystemConfig {
    /// Where to listen; port 0 picks a free one.
    pub bind: SocketAddr,
    /// The host name or address that others connect to; needed when `bind` is a wildcard address.
    pub advertise: Option<String>,
    /// The cluster token. Without it the system listens on loopback only.
    pub token: Option<Secret>,
    /// The identity of this run of the process.
    pub process: ProcessId,
    /// Largest frame sent or accepted; at most `wire::FRAME_BYTES_MAX`.
    pub frame_bytes_max: usize,
    /// Bytes that may wait for one peer; one more message is refused and handed back.
    pub queue_bytes_max: usize,
    /// Limit of connecting and shaking hands.
    pub connect_timeout: Duration,
    /// A peer that says nothing for so long is lost. Live peers say something four times as often.
    pub silence_max: Duration,
    /// Threads shared by the actors that `spawn` starts.
    pub arbiters: usize,
}

impl SystemConfig {
    /// Listens at `bind`, with defaults.
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            advertise: None,
            token: None,
            process: ProcessId::random(),
            frame_bytes_max: FRAME_BYTES_MAX,
            queue_bytes_max: FRAME_BYTES_MAX,
            connect_timeout: Duration::from_secs(5),
            silence_max: Duration::from_secs(20),
            arbiters: 2,
        }
    }

    /// Listens on a free loopback port.
    pub fn loopback() -> Self {
        Self::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

/// Why a system could not start.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// It would be open to everybody.
    #[error(
        "refusing to listen at {bind}, which other hosts can reach, without a cluster token: set one, or bind to 127.0.0.1"
    )]
    TokenRequired {
        /// The address asked for.
        bind: SocketAddr,
    },
    /// Others would not know where to connect to.
    #[error(
        "listening at the wildcard address {bind} needs an address to advertise, by which other hosts reach this one"
    )]
    AdvertiseRequired {
        /// The address asked for.
        bind: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("cannot listen at {bind}: {source}")]
    Bind {
        /// The address asked for.
        bind: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// A bound of the configuration makes no sense.
    #[error("frame_bytes_max is {0}, at most {FRAME_BYTES_MAX} is possible")]
    FrameLimit(usize),
    /// The threads of the actors could not be started.
    #[error("cannot start actor threads: {0}")]
    Threads(String),
}

/// Why an actor could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpawnError {
    /// The same or a later incarnation is there.
    #[error("actor {id} is already here, in incarnation {present}")]
    AlreadyHere {
        /// The actor.
        id: ActorId,
        /// The incarnation that is there.
        present: Incarnation,
    },
    /// The system is shutting down.
    #[error("the process is shutting down")]
    ShuttingDown,
}

/// What happened to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// The first connection with it is there.
    Connected {
        /// The process.
        process: ProcessId,
        /// Where it listens.
        endpoint: String,
    },
    /// The last connection with it is gone. It may be dead, or only cut off.
    Lost {
        /// The process.
        process: ProcessId,
        /// Where it listened.
        endpoint: String,
        /// How that was noticed.
        why: String,
    },
    /// The subscriber was too slow; that many events are gone. Ask `System::is_connected` of whom it matters.
    Missed(u64),
}

/// A subscription to peer events.
pub struct PeerEvents(broadcast::Receiver<PeerEvent>);

impl PeerEvents {
    /// The next event, or `None` once the system is gone.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(PeerEvent::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Which actor to start.
#[derive(Debug, Clone, Copy)]
pub struct SpawnOptions {
    /// Its id.
    pub id: ActorId,
    /// Its incarnation; a later one replaces an earlier one.
    pub incarnation: Incarnation,
    /// Messages that wait at most.
    pub mailbox_capacity: usize,
}

impl SpawnOptions {
    /// An actor at a well-known id, of which there is one per process.
    pub fn well_known(id: ActorId) -> Self {
        Self { id, incarnation: Incarnation(1), mailbox_capacity: 4096 }
    }
}

/// The system of this process. Cheap to clone.
#[derive(Clone)]
pub struct System {
    shared: Arc<Shared>,
}

/// What all parts of a system share.
pub(crate) struct Shared {
    pub(crate) process: ProcessId,
    pub(crate) token: Option<Secret>,
    pub(crate) limits: Limits,
    pub(crate) connect_timeout: Duration,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) registry: Arc<Registry>,
    pub(crate) peers: Peers,
    pub(crate) tasks: TaskTracker,
    endpoint: String,
    silence_max: Duration,
    links: Mutex<HashMap<String, Arc<Link>>>,
    conns: Mutex<Vec<Weak<Conn>>>,
    arbiters: Arbiters,
    stop: CancellationToken,
}

impl Shared {
    pub(crate) fn hello(&self) -> Hello {
        Hello {
            process: self.process,
            endpoint: self.endpoint.clone(),
            has_token: self.token.is_some(),
            nonce: rand::random(),
        }
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Keeps an eye on a connection: pings, silence, shutdown.
    pub(crate) fn adopt(&self, conn: &Arc<Conn>) {
        let mut conns = self.conns.lock().unwrap_or_else(PoisonError::into_inner);
        conns.retain(|conn| conn.strong_count() > 0);
        conns.push(Arc::downgrade(conn));
    }

    fn conns(&self) -> Vec<Arc<Conn>> {
        self.conns.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}

impl System {
    /// Starts listening. Must be called in a tokio runtime, which then serves the sockets.
    pub async fn start(config: SystemConfig) -> Result<Self, SystemError> {
        let bind = config.bind;
        if !bind.ip().is_loopback() && config.token.is_none() {
            return Err(SystemError::TokenRequired { bind });
        }
        if bind.ip().is_unspecified() && config.advertise.is_none() {
            return Err(SystemError::AdvertiseRequired { bind });
        }
        if config.frame_bytes_max > FRAME_BYTES_MAX {
            return Err(SystemError::FrameLimit(config.frame_bytes_max));
        }
        let failed = |source| SystemError::Bind { bind, source };
        let listener = TcpListener::bind(bind).await.map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let endpoint = match &config.advertise {
            Some(host) if host.contains(':') && !host.starts_with('[') => {
                format!("[{host}]:{}", local.port())
            }
            Some(host) => format!("{host}:{}", local.port()),
            None => local.to_string(),
        };
        let shared = Arc::new(Shared {
            process: config.process,
            token: config.token,
            limits: Limits {
                frame_bytes_max: config.frame_bytes_max,
                queue_bytes_max: config.queue_bytes_max,
            },
            connect_timeout: config.connect_timeout,
            runtime: tokio::runtime::Handle::current(),
            registry: Arc::default(),
            peers: Peers::new(),
            tasks: TaskTracker::new(),
            endpoint,
            silence_max: config.silence_max,
            links: Mutex::default(),
            conns: Mutex::default(),
            arbiters: Arbiters::start(config.arbiters.max(1))?,
            stop: CancellationToken::new(),
        });
        shared.tasks.spawn(accept(shared.clone(), listener));
        shared.tasks.spawn(watch_silence(shared.clone()));
        Ok(Self { shared })
    }

    /// Where this process listens, as others reach it: `host:port`.
    pub fn endpoint(&self) -> &str {
        &self.shared.endpoint
    }

    /// The identity of this run of the process.
    pub fn process(&self) -> ProcessId {
        self.shared.process
    }

    /// A handle to the actor at that address, here or elsewhere. Connects when the first message is sent.
    pub fn handle<A: RemoteActor>(&self, addr: ActorAddr) -> Handle<A> {
        Handle::new(self.clone(), addr)
    }

    /// A handle to a well-known actor of which only the place is known, such as the head.
    pub fn handle_at<A: RemoteActor>(&self, endpoint: &str, actor: ActorId) -> Handle<A> {
        let endpoint = endpoint.to_owned();
        self.handle(ActorAddr { actor, incarnation: Incarnation::ANY, process: ProcessId::ANY, endpoint })
    }

    /// Starts an actor on one of the system's threads. Messages may be sent to it at once.
    pub fn spawn<A: RemoteActor>(
        &self,
        options: SpawnOptions,
        actor: impl FnOnce() -> A + Send + 'static,
    ) -> Result<ActorAddr, SpawnError> {
        let (entry, pump) = self.register(options)?;
        let addr = self.addr(&entry);
        let arbiter = self.shared.arbiters.next();
        arbiter.spawn_fn(move || {
            actix::spawn(async move {
                let made = std::panic::catch_unwind(AssertUnwindSafe(actor));
                match made {
                    Ok(actor) => run_actor(entry, pump, actor).await,
                    Err(panic) => entry.record_end(ActorEnd::Panicked(panic_message(&*panic))),
                }
            });
        });
        Ok(addr)
    }

    /// Creates an actor on a thread of its own and starts it there. It is registered once `create` returned.
    pub async fn spawn_async<A, F>(
        &self,
        options: SpawnOptions,
        create: impl FnOnce() -> F + Send + 'static,
    ) -> Result<ActorAddr, CreateError>
    where
        A: RemoteActor,
        F: Future<Output = Result<A, CreateError>> + 'static,
    {
        let (created, outcome) = oneshot::channel();
        let system = self.clone();
        self.shared.arbiters.on_fresh(move || {
            actix::spawn(async move {
                let made = AssertUnwindSafe(async { create().await }).catch_unwind().await;
                let made = match made {
                    Ok(made) => made,
                    Err(panic) => Err(CreateError::Panicked(panic_message(&*panic))),
                };
                let registered = made.and_then(|actor| {
                    Ok((actor, system.register::<A>(options).map_err(CreateError::Spawn)?))
                });
                match registered {
                    Ok((actor, (entry, pump))) => {
                        let _ = created.send(Ok(system.addr(&entry)));
                        run_actor(entry, pump, actor).await;
                    }
                    Err(error) => drop(created.send(Err(error))),
                }
                Arbiter::current().stop();
            });
        });
        outcome.await.unwrap_or(Err(CreateError::Spawn(SpawnError::ShuttingDown)))
    }

    /// Makes an actor that runs elsewhere (on actix-web's threads, say) reachable; call it in `Actor::started`.
    pub fn attach<A: RemoteActor>(
        &self,
        options: SpawnOptions,
        ctx: &mut Context<A>,
    ) -> Result<ActorAddr, SpawnError> {
        let (entry, pump) = self.register(options)?;
        ctx.spawn(pump);
        Ok(self.addr(&entry))
    }

    /// Asks a local actor to stop; what waits in its mailbox is dropped. False if it is not here.
    pub fn stop_actor(&self, id: ActorId, incarnation: Incarnation) -> bool {
        self.shared.registry.find(id, incarnation).map(|entry| entry.stop()).is_ok()
    }

    /// Waits for the end of a local actor and says how it ended. `None` if it is not here (any more).
    pub fn watch_local(
        &self,
        id: ActorId,
        incarnation: Incarnation,
    ) -> impl Future<Output = Option<ActorEnd>> + Send + 'static {
        let watch = self.shared.registry.find(id, incarnation).ok().map(|entry| entry.watch());
        async move { ended(watch?).await }
    }

    /// Subscribes to the coming and going of other processes.
    pub fn peer_events(&self) -> PeerEvents {
        PeerEvents(self.shared.peers.events.subscribe())
    }

    /// Whether there is a connection with that process.
    pub fn is_connected(&self, process: ProcessId) -> bool {
        self.shared.peers.lock().contains_key(&process)
    }

    /// Stops the actors, says goodbye to the peers and closes everything.
    pub async fn shutdown(&self) {
        let shared = &self.shared;
        shared.stop.cancel();
        let actors = shared.registry.all();
        let ends: Vec<_> = actors.iter().map(|entry| ended(entry.watch())).collect();
        actors.iter().for_each(|entry| entry.stop());
        if timeout(SHUTDOWN_PATIENCE, futures_util::future::join_all(ends)).await.is_err() {
            tracing::warn!("some actors did not stop in time");
        }
        let conns = shared.conns();
        for conn in &conns {
            conn.goodbye("shutting down");
        }
        let sent = futures_util::future::join_all(conns.iter().map(|conn| conn.drained_to(0)));
        if timeout(SHUTDOWN_PATIENCE, sent).await.is_err() {
            tracing::warn!("some peers did not take all that was queued for them");
        }
        conns.iter().for_each(|conn| conn.close("this process is shutting down"));
        shared.tasks.close();
        if timeout(SHUTDOWN_PATIENCE, shared.tasks.wait()).await.is_err() {
            tracing::warn!("some connections did not close in time");
        }
        shared.arbiters.system.stop();
    }

    pub(crate) fn is_here(&self, addr: &ActorAddr) -> bool {
        addr.process == self.shared.process
            || (addr.process == ProcessId::ANY && addr.endpoint == self.shared.endpoint)
    }

    pub(crate) fn link(&self, endpoint: &str) -> Arc<Link> {
        let mut links = self.shared.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(endpoint) {
            return link.clone();
        }
        let link = Arc::new(Link::new(endpoint, Arc::downgrade(&self.shared)));
        links.insert(endpoint.to_owned(), link.clone());
        link
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.shared.runtime
    }

    fn register<A: RemoteActor>(&self, options: SpawnOptions) -> Result<(Arc<Entry>, Pump<A>), SpawnError> {
        let SpawnOptions { id, incarnation, mailbox_capacity } = options;
        if self.shared.stopping() {
            return Err(SpawnError::ShuttingDown);
        }
        let (entry, pump) = Entry::new::<A>(id, incarnation, mailbox_capacity, &self.shared.registry);
        match self.shared.registry.insert(entry.clone()) {
            Ok(()) => Ok((entry, pump)),
            Err(present) => Err(SpawnError::AlreadyHere { id, present }),
        }
    }

    fn addr(&self, entry: &Entry) -> ActorAddr {
        ActorAddr {
            actor: entry.id,
            incarnation: entry.incarnation,
            process: self.shared.process,
            endpoint: self.shared.endpoint.clone(),
        }
    }
}

/// Runs an actor to its end and records how it ended.
async fn run_actor<A: RemoteActor>(entry: Arc<Entry>, pump: Pump<A>, actor: A) {
    let mut ctx = Context::new();
    ctx.spawn(pump);
    let running: ContextFut<A, Context<A>> = ctx.into_future(actor);
    let mut running = Box::pin(AssertUnwindSafe(running).catch_unwind());
    if let Err(panic) = running.as_mut().await {
        let message = panic_message(&*panic);
        tracing::error!(actor = %entry.id, incarnation = %entry.incarnation, kind = entry.type_name, message, "actor panicked");
        entry.record_end(ActorEnd::Panicked(message));
    }
}

async fn ended(mut watch: watch::Receiver<Option<ActorEnd>>) -> Option<ActorEnd> {
    watch.wait_for(Option::is_some).await.ok().and_then(|end| end.clone())
}

async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                let serving = link::serve(shared.clone(), stream, from);
                let stop = shared.stop.clone();
                shared.tasks.spawn(async move {
                    // After the stop connections end by their own close.
                    tokio::select! {
                        () = serving => {}
                        () = async { stop.cancelled().await; tokio::time::sleep(3 * SHUTDOWN_PATIENCE).await } => {}
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, mostly: others may be closed soon.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Pings every peer and closes connections on which nothing was heard for too long.
async fn watch_silence(shared: Arc<Shared>) {
    let silence_max = u64::try_from(shared.silence_max.as_millis()).unwrap_or(u64::MAX);
    loop {
        tokio::select! {
            () = tokio::time::sleep(shared.silence_max / 4) => {}
            () = shared.stop.cancelled() => return,
        }
        for conn in shared.conns().into_iter().filter(|conn| conn.is_open()) {
            let silent = now_ms().saturating_sub(conn.heard_ms());
            if silent > silence_max {
                conn.close(&format!("nothing heard for {silent} ms"));
            } else {
                conn.ping();
            }
        }
    }
}

/// The processes that there are connections with.
pub(crate) struct Peers {
    connections: Mutex<HashMap<ProcessId, usize>>,
    events: broadcast::Sender<PeerEvent>,
}

impl Peers {
    fn new() -> Self {
        Self { connections: Mutex::default(), events: broadcast::Sender::new(PEER_EVENTS_MAX) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ProcessId, usize>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connected(&self, peer: &Hello) {
        let mut connections = self.lock();
        let count = connections.entry(peer.process).or_default();
        *count += 1;
        if *count == 1 {
            let (process, endpoint) = (peer.process, peer.endpoint.clone());
            // Sent under the lock, so that events of one process are in order. Nobody may listen.
            let _ = self.events.send(PeerEvent::Connected { process, endpoint });
        }
    }

    pub(crate) fn disconnected(&self, peer: &Hello, why: &str) {
        let mut connections = self.lock();
        let Some(count) = connections.get_mut(&peer.process) else { return };
        *count -= 1;
        if *count == 0 {
            connections.remove(&peer.process);
            let (process, endpoint) = (peer.process, peer.endpoint.clone());
            let _ = self.events.send(PeerEvent::Lost { process, endpoint, why: why.to_owned() });
        }
    }
}

/// The threads that actors run on.
struct Arbiters {
    system: actix::System,
    pool: Vec<actix::ArbiterHandle>,
    turn: AtomicUsize,
    stopped: AtomicBool,
}

impl Arbiters {
    fn start(count: usize) -> Result<Self, SystemError> {
        let (started, outcome) = std::sync::mpsc::channel();
        let failed = |error: String| SystemError::Threads(error);
        std::thread::Builder::new()
            .name("heliostat-actix".to_owned())
            .spawn(move || {
                let runner = actix::System::new();
                let pool: Result<Vec<_>, _> =
                    (0..count).map(|_| Arbiter::try_new().map(|arbiter| arbiter.handle())).collect();
                let ok = pool.is_ok();
                let sent = started.send(pool.map(|pool| (actix::System::current(), pool)));
                if ok
                    && sent.is_ok()
                    && let Err(error) = runner.run()
                {
                    tracing::error!(%error, "actor threads ended");
                }
            })
            .map_err(|e| failed(e.to_string()))?;
        let (system, pool) =
            outcome.recv().map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        Ok(Self { system, pool, turn: AtomicUsize::new(0), stopped: AtomicBool::new(false) })
    }

    fn next(&self) -> &actix::ArbiterHandle {
        &self.pool[self.turn.fetch_add(1, Ordering::Relaxed) % self.pool.len()]
    }

    /// Runs `work` on a new thread of the system.
    fn on_fresh(&self, work: impl FnOnce() + Send + 'static) {
        self.system.arbiter().spawn_fn(move || match Arbiter::try_new() {
            Ok(arbiter) => drop(arbiter.spawn_fn(work)),
            // Dropping the work tells whoever waits for it.
            Err(error) => tracing::error!(%error, "cannot start an actor thread"),
        });
    }
}

impl Drop for Arbiters {
    fn drop(&mut self) {
        if !self.stopped.swap(true, Ordering::Relaxed) {
            self.system.stop();
        }
    }
}
