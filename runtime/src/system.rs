//! One process's part of the cluster: its listener, its connections and the actors it hosts.
//!
//! A system owns the threads that its actors run on (actix arbiters). Its sockets are served by the tokio runtime it
//! was started in. Nothing here is global: a process may hold several systems, as tests do.

mod arbiters;
mod config;
pub(crate) mod gate;
pub(crate) mod home;
mod peers;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use actix::dev::ContextFut;
use actix::{Arbiter, AsyncContext, Context};
use futures_util::FutureExt;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::actor::{CreateError, RemoteActor};
use crate::handle::{ActorAddr, ActorId, Handle, Incarnation, JsonHandle, ProcessId};
pub use crate::mailbox::ActorEnd;
use crate::mailbox::{Entry, Pump, Registry};
use crate::mesh::Meshes;
use crate::objects::Table;
use crate::panics;
pub use crate::panics::Panic;
use crate::wire::FRAME_BYTES_MAX;
use crate::wire::conn::{Conn, Limits};
use crate::wire::handshake::Hello;
pub use crate::wire::handshake::Secret;
use crate::wire::link::{self, Link, RefusedPeers, now_ms};
use crate::wire::reader::RefusedTells;
use crate::wire::tls::Tls;
pub use crate::wire::tls::{TlsError, TlsFiles};

use arbiters::Arbiters;
pub use config::{SpawnError, SpawnOptions, SystemConfig, SystemError};
use gate::Gate;
use home::Home;
use peers::Peers;
pub use peers::{PeerEvent, PeerEvents};

/// How long a shutdown waits for actors, and then for peers to take what is queued.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// The system of this process. Cheap to clone.
#[derive(Clone)]
pub struct System {
    shared: Arc<Shared>,
}

/// A system, without keeping it alive: for actors that it owns itself.
#[derive(Clone)]
pub(crate) struct WeakSystem(Weak<Shared>);

impl WeakSystem {
    pub(crate) fn upgrade(&self) -> Option<System> {
        Some(System { shared: self.0.upgrade()? })
    }
}

/// What all parts of a system share.
pub(crate) struct Shared {
    pub(crate) process: ProcessId,
    pub(crate) token: Option<Secret>,
    pub(crate) tls: Option<Tls>,
    pub(crate) limits: Limits,
    pub(crate) connect_timeout: Duration,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) registry: Arc<Registry>,
    pub(crate) peers: Peers,
    pub(crate) tasks: TaskTracker,
    pub(crate) refused_tells: RefusedTells,
    pub(crate) refused_peers: RefusedPeers,
    /// Places for messages that are told and may come back.
    returnable: Arc<Semaphore>,
    endpoint: String,
    gate: Arc<Gate>,
    silence_max: Duration,
    links: Mutex<HashMap<String, Arc<Link>>>,
    conns: Mutex<Vec<Weak<Conn>>>,
    meshes: Meshes,
    pub(crate) objects: Arc<Table>,
    arbiters: Arbiters,
    /// Where connections are read from now on, if not by the runtime.
    home: OnceLock<Arc<Home>>,
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

    pub(crate) fn home(&self) -> Option<&Arc<Home>> {
        self.home.get()
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
        if config.token.as_ref().is_some_and(Secret::is_empty) {
            return Err(SystemError::TokenEmpty);
        }
        if bind.ip().is_unspecified() && config.advertise.is_none() {
            return Err(SystemError::AdvertiseRequired { bind });
        }
        if config.frame_bytes_max > FRAME_BYTES_MAX {
            return Err(SystemError::FrameLimit(config.frame_bytes_max));
        }
        let tls = config.tls.map(Tls::load).transpose()?;
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
            tls,
            limits: Limits {
                frame_bytes_max: config.frame_bytes_max,
                queue_bytes_max: config.queue_bytes_max,
            },
            connect_timeout: config.connect_timeout,
            runtime: tokio::runtime::Handle::current(),
            registry: Arc::default(),
            peers: Peers::new(),
            tasks: TaskTracker::new(),
            refused_tells: RefusedTells::default(),
            refused_peers: RefusedPeers::default(),
            returnable: Arc::new(Semaphore::new(config.returnable_max)),
            objects: Table::new(config.process, endpoint.clone()),
            endpoint,
            gate: Gate::new(config.connections_max.max(1)),
            silence_max: config.silence_max,
            links: Mutex::default(),
            conns: Mutex::default(),
            meshes: Meshes::default(),
            arbiters: Arbiters::start(config.arbiters.max(1))?,
            home: OnceLock::new(),
            stop: CancellationToken::new(),
        });
        shared.tasks.spawn(accept(shared.clone(), listener));
        shared.tasks.spawn(watch_silence(shared.clone()));
        shared.objects.attach(WeakSystem(Arc::downgrade(&shared)));
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

    /// A handle to the actor at that address for callers that speak JSON.
    pub fn json_handle(&self, addr: ActorAddr) -> JsonHandle {
        JsonHandle::new(self.clone(), addr)
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
                    Err(panic) => entry.record_end(ActorEnd::Panicked(panics::caught(&*panic))),
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
        self.shared.arbiters.on_fresh(move |pulse| {
            actix::spawn(async move {
                let made = AssertUnwindSafe(async { create().await }).catch_unwind().await;
                let made = match made {
                    Ok(made) => made,
                    Err(panic) => Err(CreateError::Panicked(panics::caught(&*panic))),
                };
                let registered = made.and_then(|actor| {
                    Ok((actor, system.register::<A>(options).map_err(CreateError::Spawn)?))
                });
                match registered {
                    Ok((actor, (entry, pump))) => {
                        entry.settle_on(Arbiter::current(), pulse);
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

    /// Makes an actor with a thread of its own the one that this process is for: connections made from now on (without TLS)
    /// are read on that thread, so that a message for the actor wakes one thread and not two. While a handler holds the
    /// thread the process's runtime reads them. False if the actor is not here or has no such thread, or another one is at home.
    pub fn read_at(&self, actor: &ActorAddr) -> bool {
        let Ok(entry) = self.shared.registry.find(actor.actor, actor.incarnation) else { return false };
        let Some((thread, pulse)) = entry.own_thread() else { return false };
        let home = Home::new(thread.clone(), pulse.clone());
        if self.shared.home.set(home.clone()).is_err() {
            return false;
        }
        let stop = self.shared.stop.clone();
        let watch = async move { stop.run_until_cancelled(home.watch()).await };
        self.shared.tasks.spawn_on(watch, &self.shared.runtime);
        true
    }

    /// Asks a local actor to stop; what waits in its mailbox is dropped. False if it is not here.
    pub fn stop_actor(&self, id: ActorId, incarnation: Incarnation) -> bool {
        self.shared.registry.find(id, incarnation).map(|entry| entry.stop()).is_ok()
    }

    /// Asks a local actor to take nothing new and to stop when it has handled what it has: messages that wait, and calls
    /// that have no answer yet. False if it is not here.
    pub fn finish_actor(&self, id: ActorId, incarnation: Incarnation) -> bool {
        self.shared.registry.find(id, incarnation).map(|entry| entry.finish()).is_ok()
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
        self.shared.peers.subscribe()
    }

    /// Whether there is a connection with that process.
    pub fn is_connected(&self, process: ProcessId) -> bool {
        self.shared.peers.has(process)
    }

    /// Stops the actors, says goodbye to the peers and closes everything.
    pub async fn shutdown(&self) {
        let shared = &self.shared;
        shared.stop.cancel();
        shared.objects.stop();
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
        shared.arbiters.stop();
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
        // Processes come and go, each at a port of its own.
        links.retain(|_, link| Arc::strong_count(link) > 1 || link.is_connected());
        let link = Arc::new(Link::new(endpoint, Arc::downgrade(&self.shared)));
        links.insert(endpoint.to_owned(), link.clone());
        link
    }

    pub(crate) fn downgrade(&self) -> WeakSystem {
        WeakSystem(Arc::downgrade(&self.shared))
    }

    /// The objects of this process.
    pub(crate) fn objects(&self) -> &Arc<Table> {
        &self.shared.objects
    }

    pub(crate) fn meshes(&self) -> &Meshes {
        &self.shared.meshes
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    pub(crate) fn returnable(&self) -> Arc<Semaphore> {
        self.shared.returnable.clone()
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
        let panic = panics::caught(&*panic);
        tracing::error!(actor = %entry.id, incarnation = %entry.incarnation, kind = entry.type_name, %panic, "actor panicked");
        // Unless its handler did: then more is known already.
        entry.record_end(ActorEnd::Panicked(panic));
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
                let place = match shared.gate.enter(from.ip()) {
                    Ok(place) => place,
                    Err(full) => {
                        shared.refused_peers.note(from, &full);
                        continue;
                    }
                };
                let serving = link::serve(shared.clone(), stream, from, place);
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
