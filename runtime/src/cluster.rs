//! A client's view of the cluster: apply specs, watch, find actors, read logs, shut down.

pub mod status;

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::Handler;

use self::status::ClusterStatus;
use crate::actor::{RemoteActor, WireMessage};
use crate::handle::{ActorAddr, ActorId, AskError, Handle, Refusal};
use crate::head::HeadActor;
pub use crate::head::messages::{Applied, LogChunk};
use crate::head::messages::{
    Apply, ApplyMode, Control, ControlAction, FindLog, Lookup, ReadLog, Shutdown, Watch,
};
use crate::node::NodeActor;
use crate::spec::{ActorSpec, InvalidSpec};
use crate::system::{Secret, System, SystemConfig, SystemError};

/// Limit of a question to the head.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// The head, or a node, says no.
    #[error("{0}")]
    Refused(String),
    /// The actor is not ready.
    #[error("actor {0} is not ready")]
    NotReady(String),
}

/// A client. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    system: System,
    head: Handle<HeadActor>,
    /// Addresses that were looked up.
    known: Arc<Mutex<HashMap<String, ActorAddr>>>,
}

impl Cluster {
    /// Connects to the head at `host:port`; fails if it does not answer.
    pub async fn connect(head: &str, token: Option<Secret>) -> Result<Self, ClusterError> {
        let mut config = SystemConfig::loopback();
        config.token = token;
        let cluster = Self::with_system(System::start(config).await?, head);
        cluster.status().await?;
        Ok(cluster)
    }

    /// A client that uses a system which is there already. Connects when it is used.
    pub fn with_system(system: System, head: &str) -> Self {
        let head = system.handle_at(head, ActorId::HEAD);
        Self { system, head, known: Arc::default() }
    }

    /// The system that it uses.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// Where the head listens.
    pub fn head(&self) -> &str {
        &self.head.addr().endpoint
    }

    /// Applies specs, all or none. The same spec again changes nothing, but revives a dead actor; another spec of a
    /// known name restarts it. Actors that are not listed stay.
    pub async fn apply(&self, specs: Vec<ActorSpec>) -> Result<Applied, ClusterError> {
        Ok(self.ask(Apply { specs, mode: ApplyMode::Merge }).await??)
    }

    /// Applies specs and removes every actor that is not listed.
    pub async fn apply_exactly(&self, specs: Vec<ActorSpec>) -> Result<Applied, ClusterError> {
        Ok(self.ask(Apply { specs, mode: ApplyMode::Exactly }).await??)
    }

    /// The cluster at this moment.
    pub async fn status(&self) -> Result<ClusterStatus, ClusterError> {
        self.watch(0, Duration::ZERO).await
    }

    /// The cluster as soon as it differs from version `since`, or after `wait`.
    pub async fn watch(&self, since: u64, wait: Duration) -> Result<ClusterStatus, ClusterError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let head = self.head.with_deadline(wait.saturating_add(ANSWER_TIMEOUT));
        head.ask(Watch { since, wait_ms }).await.map_err(|error| self.no_answer(&error))
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
        let found = self.ask(Lookup { actor: actor.to_owned() }).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &found {
            Some(addr) => known.insert(actor.to_owned(), addr.clone()),
            None => known.remove(actor),
        };
        Ok(found)
    }

    /// A handle to the present incarnation of an actor, from memory if it was looked up before.
    pub async fn handle<A: RemoteActor>(&self, actor: &str) -> Result<Handle<A>, ClusterError> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(actor).cloned();
        let addr = match known {
            Some(addr) => addr,
            None => self.lookup(actor).await?.ok_or_else(|| ClusterError::NotReady(actor.to_owned()))?,
        };
        Ok(self.system.handle(addr))
    }

    /// Forgets a looked-up address; the next `handle` asks the head.
    pub fn forget(&self, actor: &str) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(actor);
    }

    /// A handle by name, which follows the actor from incarnation to incarnation.
    pub fn named<A>(&self, actor: impl Into<String>) -> Named<A> {
        Named { cluster: self.clone(), actor: actor.into(), kind: PhantomData }
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
        let actor = actor.to_owned();
        let node = self.ask(FindLog { actor: actor.clone() }).await?.map_err(ClusterError::Refused)?;
        let node: Handle<NodeActor> = self.system.handle(node);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let node = node.with_deadline(wait.saturating_add(ANSWER_TIMEOUT));
        let read = node.ask(ReadLog { actor, offset, max, wait_ms }).await;
        read.map_err(|error| ClusterError::Refused(error.to_string()))?.map_err(ClusterError::Refused)
    }

    /// Ends an actor; it stays dead until it is applied again or restarted.
    pub async fn stop_actor(&self, actor: &str) -> Result<(), ClusterError> {
        self.control(actor, ControlAction::Stop).await
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
        match self.head.ask(Shutdown).await {
            // The head goes as soon as the last node has gone, maybe before its answer is out.
            Ok(()) | Err(AskError::Stopped | AskError::PeerLost(_) | AskError::NoReply) => Ok(()),
            Err(error) => Err(self.no_answer(&error)),
        }
    }

    async fn control(&self, actor: &str, action: ControlAction) -> Result<(), ClusterError> {
        self.forget(actor);
        let done = self.ask(Control { actor: actor.to_owned(), action }).await?;
        done.map_err(ClusterError::Refused)
    }

    async fn ask<M>(&self, message: M) -> Result<M::Result, ClusterError>
    where
        M: WireMessage,
        HeadActor: Handler<M>,
    {
        self.head.with_deadline(ANSWER_TIMEOUT).ask(message).await.map_err(|error| self.no_answer(&error))
    }

    fn no_answer<M>(&self, error: &AskError<M>) -> ClusterError {
        ClusterError::Head { head: self.head().to_owned(), why: error.to_string() }
    }
}

/// A handle by name, which follows the actor from incarnation to incarnation.
pub struct Named<A> {
    cluster: Cluster,
    actor: String,
    kind: PhantomData<fn() -> A>,
}

impl<A> Clone for Named<A> {
    fn clone(&self) -> Self {
        Self { cluster: self.cluster.clone(), actor: self.actor.clone(), kind: PhantomData }
    }
}

/// Why a message to a named actor has no answer.
#[derive(thiserror::Error)]
pub enum NamedError<M> {
    /// The head could not say where the actor is.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The actor was found.
    #[error(transparent)]
    Ask(AskError<M>),
}

impl<M> std::fmt::Debug for NamedError<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl<A: RemoteActor> Named<A> {
    /// Asks the present incarnation. When the one that was known is gone and has certainly not seen the message, the
    /// head is asked for the present one and the message sent to that, once.
    pub async fn ask<M>(&self, message: M) -> Result<M::Result, NamedError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let message = match self.cluster.handle::<A>(&self.actor).await?.ask(message).await {
            Err(AskError::Refused(refused)) if is_gone(&refused.reason) => refused.message,
            Err(error) => {
                if matches!(error, AskError::PeerLost(_) | AskError::Stopped | AskError::Panicked(_)) {
                    self.cluster.forget(&self.actor);
                }
                return Err(NamedError::Ask(error));
            }
            Ok(answer) => return Ok(answer),
        };
        self.cluster.forget(&self.actor);
        self.cluster.handle::<A>(&self.actor).await?.ask(message).await.map_err(NamedError::Ask)
    }
}

/// Whether the refusal says that the incarnation is not there any more.
fn is_gone(reason: &Refusal) -> bool {
    match reason {
        Refusal::NoSuchActor
        | Refusal::WrongIncarnation
        | Refusal::WrongProcess
        | Refusal::Unreachable(_) => true,
        Refusal::MailboxFull | Refusal::UnknownMessage | Refusal::QueueFull | Refusal::Unsendable(_) => false,
    }
}
