//! A client's view of the cluster: apply specs, watch, find actors, read logs, shut down.

mod driver;
pub(crate) mod named;
mod owned;
pub mod placement_group;
mod spawn;
pub mod status;
pub mod values;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use actix::Handler;

use self::named::Limits;
pub use self::named::{Idempotent, Named, NamedError, NamedJson};
pub use self::placement_group::PlacementGroup;
pub use self::spawn::{PackageError, SpawnFailed};
use self::status::ClusterStatus;
use crate::actor::{RemoteActor, WireMessage};
use crate::backoff::Backoff;
use crate::handle::{ActorAddr, ActorId, AskError, Handle, Refusal, Refused};
use crate::head::HeadActor;
use crate::head::core::Manner;
use crate::head::finder::Heads;
pub use crate::head::messages::{Applied, LogChunk};
use crate::head::messages::{
    ApplyError, ApplyMode, Control, ControlAction, FindLog, Located, Lookup, ReadLog, Shutdown, Watch,
};
use crate::node::NodeActor;
use crate::package::PackageId;
use crate::spec::{ActorSpec, DEFAULT_NAMESPACE, DeathCause, InvalidSpec, Owner};
use crate::system::{Secret, System, SystemConfig, SystemError, TlsFiles};

/// Limit of a question to the head.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit of one attempt where another head may answer.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// After so long without a head the cluster counts as ended, when that was asked for.
const TAKEOVER_MAX: Duration = Duration::from_secs(4);
/// Longest wait for news of one head where another may have taken over.
const WATCH_PART: Duration = Duration::from_secs(2);

/// Why a request to the cluster failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// This process cannot take part.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The head does not answer.
    #[error("the head at {head} does not answer: {why}")]
    Head {
        /// Where it should be.
        head: String,
        /// What went wrong.
        why: String,
    },
    /// A spec cannot work.
    #[error(transparent)]
    Spec(#[from] InvalidSpec),
    /// It took place, but may be lost with the head.
    #[error("not durable yet: {0}; repeat it")]
    NotDurable(String),
    /// The head, or a node, says no.
    #[error("{0}")]
    Refused(String),
    /// The actor is not ready.
    #[error("actor {0} is not ready")]
    NotReady(String),
    /// No actor has that name.
    #[error("no actor is named {name:?} in namespace {namespace:?}")]
    NoSuchActor {
        /// Its short name.
        name: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// No placement group has that name.
    #[error("there is no placement group {0:?}")]
    NoSuchPlacementGroup(String),
    /// The actor is of another type than was asked for.
    #[error("actor {actor} is a {found:?}, not a {wanted:?}")]
    WrongType {
        /// The actor.
        actor: String,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// The actor is dead and is not started again by itself.
    #[error("actor {actor} is dead: {cause}")]
    Dead {
        /// The actor.
        actor: String,
        /// Why it ended.
        cause: DeathCause,
    },
}

/// By what a client proves that it may talk to a cluster.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The cluster token.
    pub token: Option<Secret>,
    /// Certificates, where the cluster has some.
    pub tls: Option<TlsFiles>,
}

/// A client. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    system: System,
    heads: Arc<Mutex<Heads>>,
    /// A head that stood by, and the leader that it named.
    stood_by: Arc<Mutex<Option<(String, String)>>>,
    /// Addresses that were looked up.
    known: Arc<Mutex<HashMap<String, Located>>>,
    /// What is so of the calls in JSON that are under way, by actor.
    json: Arc<Mutex<HashMap<String, Weak<OnceLock<Limits>>>>>,
    /// Where names are looked for that say no namespace.
    namespace: Arc<str>,
    /// What actors belong to that do not say how long they are there.
    owner: Option<Owner>,
    /// Who asks, for causes of death.
    by: Arc<str>,
    /// What this process runs, where that is a package.
    package: Option<PackageId>,
}

pub use self::driver::Driver;

impl Cluster {
    /// Connects to the head at `host:port`; fails if it does not answer. Several heads, with commas between, are tried
    /// in turn until the leader is found.
    pub async fn connect(head: &str, token: Option<Secret>) -> Result<Self, ClusterError> {
        Self::connect_with(head, Credentials { token, tls: None }).await
    }

    /// The same with all that a client may have to show.
    pub async fn connect_with(head: &str, credentials: Credentials) -> Result<Self, ClusterError> {
        let mut config = SystemConfig::loopback();
        config.token = credentials.token;
        config.tls = credentials.tls;
        let cluster = Self::with_system(System::start(config).await?, head);
        cluster.status().await?;
        Ok(cluster)
    }

    /// A client that uses a system which is there already. Connects when it is used.
    pub fn with_system(system: System, head: &str) -> Self {
        let heads = Arc::new(Mutex::new(Heads::new(head)));
        Self {
            system,
            heads,
            stood_by: Arc::default(),
            known: Arc::default(),
            json: Arc::default(),
            namespace: DEFAULT_NAMESPACE.into(),
            owner: None,
            by: owned::this_process().into(),
            package: None,
        }
    }

    /// The system that it uses.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// Where the head listens that leads, as far as is known.
    pub fn head(&self) -> String {
        self.heads().current().to_owned()
    }

    /// A head that was asked and stood by, and the leader that it named (empty if it knew none).
    pub fn stood_by(&self) -> Option<(String, String)> {
        self.stood_by.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All heads that it knows, the present one first.
    pub(crate) fn known_heads(&self) -> String {
        self.heads().list()
    }

    fn heads(&self) -> MutexGuard<'_, Heads> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn head_handle(&self) -> Handle<HeadActor> {
        self.system.handle_at(&self.head(), ActorId::HEAD)
    }

    /// The present head leads, and these are the others.
    pub(crate) fn found(&self, others: &[String]) {
        let mut heads = self.heads();
        heads.found();
        heads.learn(others.iter().map(String::as_str));
    }

    /// The present head does not lead; whether the next one may be tried at once.
    pub(crate) fn missed(&self, leader: &str) -> bool {
        self.heads().missed(leader)
    }

    /// Applies specs, all or none. The same spec again changes nothing, but revives a dead actor; another spec of a
    /// known name restarts it. Actors that are not listed stay. Specs without a package get that of this process.
    pub async fn apply(&self, specs: Vec<ActorSpec>) -> Result<Applied, ClusterError> {
        self.apply_tree(specs, Vec::new()).await
    }

    /// Applies specs as a set, and removes what was part of an earlier set of this namespace and is not listed. What
    /// was applied or spawned otherwise stays.
    pub async fn apply_exactly(&self, specs: Vec<ActorSpec>) -> Result<Applied, ClusterError> {
        let specs = specs.into_iter().map(|spec| ActorSpec { in_set: true, ..spec }).collect();
        let mode = ApplyMode::Exactly { namespace: self.namespace.to_string() };
        self.apply_as(specs, Vec::new(), mode).await
    }

    /// The cluster at this moment.
    pub async fn status(&self) -> Result<ClusterStatus, ClusterError> {
        self.watch(0, Duration::ZERO).await
    }

    /// The cluster as soon as it differs from version `since`, or after `wait`.
    pub async fn watch(&self, since: u64, wait: Duration) -> Result<ClusterStatus, ClusterError> {
        let started = Instant::now();
        loop {
            let left = wait.saturating_sub(started.elapsed());
            // A leader that is frozen says nothing for ever.
            let part = if self.heads().are_several() { left.min(WATCH_PART) } else { left };
            let wait_ms = u64::try_from(part.as_millis()).unwrap_or(u64::MAX);
            let status = self.ask_within(Watch { since, wait_ms }, part, true).await?;
            self.found(&status.head.heads);
            if since == 0 || status.version != since || part == left {
                return Ok(status);
            }
        }
    }

    /// Waits until the status is as wanted and returns it. `None` if it is not within `limit`, or the head is away
    /// for that long.
    pub async fn wait_until(
        &self,
        limit: Duration,
        wanted: impl Fn(&ClusterStatus) -> bool,
    ) -> Option<ClusterStatus> {
        let waiting = async {
            let (mut since, mut backoff) = (0, crate::backoff::Backoff::reconnect());
            loop {
                match self.watch(since, Duration::from_secs(10)).await {
                    Ok(status) if wanted(&status) => return status,
                    Ok(status) => {
                        since = status.version;
                        backoff.reset();
                    }
                    Err(_) => backoff.pause().await,
                }
            }
        };
        tokio::time::timeout(limit, waiting).await.ok()
    }

    /// Address of a ready actor, from the head. The answer is remembered for `handle`.
    pub async fn lookup(&self, actor: &str) -> Result<Option<ActorAddr>, ClusterError> {
        let actor = self.full(actor);
        let found = self.ask(Lookup { actor: actor.clone() }).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &found {
            Some(located) => known.insert(actor, located.clone()),
            None => known.remove(&actor),
        };
        Ok(found.map(|located| located.addr))
    }

    /// A handle to the present incarnation of an actor, from memory if it was looked up before.
    pub async fn handle<A: RemoteActor>(&self, actor: &str) -> Result<Handle<A>, ClusterError> {
        Ok(self.system.handle(self.addr(actor).await?))
    }

    /// The address of the present incarnation, from memory if it was looked up before.
    async fn addr(&self, actor: &str) -> Result<ActorAddr, ClusterError> {
        Ok(self.locate(actor).await?.addr)
    }

    /// The same with what the actor's spec says of calls.
    async fn locate(&self, actor: &str) -> Result<Located, ClusterError> {
        let remembered =
            || self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&self.full(actor)).cloned();
        if let Some(known) = remembered() {
            return Ok(known);
        }
        self.lookup(actor).await?;
        remembered().ok_or_else(|| ClusterError::NotReady(actor.to_owned()))
    }

    /// Forgets a looked-up address; the next `handle` asks the head.
    pub fn forget(&self, actor: &str) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.full(actor));
    }

    /// A piece of an actor's log from byte `offset` on, at most `max` bytes; `offset` `u64::MAX` for its end. If there
    /// is nothing yet, waits for it up to `wait`.
    pub async fn logs(
        &self,
        actor: &str,
        offset: u64,
        max: u32,
        wait: Duration,
    ) -> Result<LogChunk, ClusterError> {
        let actor = self.full(actor);
        let node = self.ask(FindLog { actor: actor.clone() }).await?.map_err(ClusterError::Refused)?;
        let node: Handle<NodeActor> = self.system.handle(node);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let node = node.with_deadline(wait.saturating_add(ANSWER_TIMEOUT));
        let read = node.ask(ReadLog { actor, offset, max, wait_ms }).await;
        read.map_err(|error| ClusterError::Refused(error.to_string()))?.map_err(ClusterError::Refused)
    }

    /// Ends an actor; it stays dead until it is applied again or restarted.
    pub async fn stop_actor(&self, actor: &str) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Stop(Manner::Graceful)).await
    }

    /// Ends an actor that may handle first what it has, for at most `grace`: messages that wait, and calls that have no
    /// answer yet. It takes nothing new, and stays dead.
    pub async fn finish_actor(&self, actor: &str, grace: Duration) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Stop(Manner::Finish(grace))).await
    }

    /// Ends an actor's process at once, by SIGKILL. It stays dead.
    pub async fn kill_actor(&self, actor: &str) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Stop(Manner::Kill)).await
    }

    /// Ends an actor, if it lives, and starts a new incarnation; a dead one is revived.
    pub async fn restart_actor(&self, actor: &str) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Restart).await
    }

    /// Ends an actor and forgets its spec.
    pub async fn remove_actor(&self, actor: &str) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Remove).await
    }

    /// Ends the cluster: all workers, then all nodes, then the head. Its specs are forgotten. Returns when all nodes
    /// are gone.
    pub async fn shutdown(&self) -> Result<(), ClusterError> {
        loop {
            match self.head_handle().ask(Shutdown).await {
                Ok(()) => return Ok(()),
                // The head goes as soon as the last node has gone, maybe before its answer is out.
                Err(AskError::Stopped | AskError::PeerLost(_) | AskError::NoReply) => {
                    // Unless it was lost: then another one leads soon, or does already.
                    let another = tokio::time::timeout(TAKEOVER_MAX, self.status());
                    if !self.heads().are_several() || !matches!(another.await, Ok(Ok(_))) {
                        return Ok(());
                    }
                }
                Err(AskError::Refused(Refused { reason: Refusal::Elsewhere(_), .. })) => {
                    self.status().await?;
                }
                Err(error) => return Err(self.no_answer(&error)),
            }
        }
    }

    async fn control(&self, actor: &str, action: ControlAction) -> Result<(), ClusterError> {
        self.forget(actor);
        // A restart is not harmless twice.
        let again = action != ControlAction::Restart;
        let control = Control { actor: self.full(actor), action, by: self.by.to_string() };
        let done = self.ask_within(control, Duration::ZERO, again).await?;
        done.map_err(ClusterError::Refused)
    }

    pub(crate) async fn ask<M>(&self, message: M) -> Result<M::Result, ClusterError>
    where
        M: WireMessage + Clone,
        HeadActor: Handler<M>,
    {
        self.ask_within(message, Duration::ZERO, true).await
    }

    /// Asks the leader, which may take `wait` for its answer, and looks for it where that one does not lead. A message
    /// that may have been handled is sent to another head only if it may be sent `again`.
    pub(crate) async fn ask_within<M>(
        &self,
        message: M,
        wait: Duration,
        again: bool,
    ) -> Result<M::Result, ClusterError>
    where
        M: WireMessage + Clone,
        HeadActor: Handler<M>,
    {
        let (started, mut backoff) = (Instant::now(), Backoff::reconnect());
        loop {
            let several = self.heads().are_several();
            let limit = wait.saturating_add(if several { ATTEMPT_TIMEOUT } else { ANSWER_TIMEOUT });
            let head = self.head_handle();
            let error = match head.with_deadline(limit).ask(message.clone()).await {
                Ok(answer) => {
                    self.found(&[]);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let failed = ClusterError::Head { head: head.addr().endpoint.clone(), why: error.to_string() };
            let (leader, try_on) = elsewhere(&error, several, again);
            if let Some(leader) = &leader {
                let stood_by = (head.addr().endpoint.clone(), leader.clone());
                self.stood_by.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(stood_by);
            }
            if !try_on || started.elapsed() >= wait.saturating_add(ANSWER_TIMEOUT) {
                return Err(failed);
            }
            if !self.missed(leader.as_deref().unwrap_or_default()) {
                backoff.pause().await;
            }
        }
    }

    fn no_answer<M>(&self, error: &AskError<M>) -> ClusterError {
        ClusterError::Head { head: self.head(), why: error.to_string() }
    }
}

fn not_applied(error: ApplyError) -> ClusterError {
    match error {
        ApplyError::Spec(invalid) => invalid.into(),
        ApplyError::NotDurable(why) => ClusterError::NotDurable(why),
    }
}

/// The leader that the asked head named, and whether another head may be asked.
fn elsewhere<M>(error: &AskError<M>, several: bool, again: bool) -> (Option<String>, bool) {
    match error {
        AskError::Refused(refused) => match &refused.reason {
            Refusal::Elsewhere(leader) => (Some(leader.clone()), true),
            Refusal::Unreachable(_) | Refusal::NoSuchActor | Refusal::WrongProcess => (None, several),
            Refusal::WrongIncarnation
            | Refusal::MailboxFull
            | Refusal::UnknownMessage
            | Refusal::QueueFull
            | Refusal::Unsendable(_)
            | Refusal::Malformed(_)
            | Refusal::Cancelled
            | Refusal::TooManyPending(_) => (None, false),
        },
        AskError::Deadline | AskError::PeerLost(_) | AskError::Stopped | AskError::NoReply => {
            (None, several && again)
        }
        AskError::Panicked(_) | AskError::Codec(_) | AskError::Handler(_) | AskError::Cancelled => {
            (None, false)
        }
    }
}
