//! Handles by name: they follow an actor from incarnation to incarnation.
//!
//! A message that was certainly not seen goes to the incarnation that is there now, once. Nothing else is repeated.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use actix::Handler;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Cluster, ClusterError, Located, SpawnFailed};
use crate::actor::{RemoteActor, WireMessage};
use crate::backoff::Backoff;
use crate::handle::{AskError, JsonMessage, Refusal, Refused};

impl Cluster {
    /// A handle by name, which follows the actor from incarnation to incarnation.
    pub fn named<A>(&self, actor: impl Into<String>) -> Named<A> {
        Named { cluster: self.clone(), actor: actor.into(), limits: Arc::default(), kind: PhantomData }
    }

    /// The same for a caller that speaks JSON and need not know the type of the actor. Such callers make a handle for each call,
    /// so all handles of this process to an actor count as one where calls have a limit.
    pub fn json(&self, actor: impl Into<String>) -> NamedJson {
        let actor = actor.into();
        let limits = self.json_limits(&self.full(&actor));
        NamedJson { cluster: self.clone(), actor, limits, deadline: None }
    }

    /// The limits that handles of the actor share while there are any.
    fn json_limits(&self, actor: &str) -> Arc<OnceLock<Limits>> {
        let mut known = self.json.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limits) = known.get(actor).and_then(Weak::upgrade) {
            return limits;
        }
        known.retain(|_, limits| limits.strong_count() > 0);
        let limits = Arc::default();
        known.insert(actor.to_owned(), Arc::downgrade(&limits));
        limits
    }

    /// Asks an actor a message in JSON: `json(actor).ask(message, value)`.
    pub async fn ask_json(
        &self,
        actor: &str,
        message: &str,
        value: Value,
    ) -> Result<Value, NamedError<JsonMessage>> {
        self.json(actor).ask(message, value).await
    }
}

/// A handle by name, which follows the actor from incarnation to incarnation.
pub struct Named<A> {
    cluster: Cluster,
    actor: String,
    /// What the actor's spec says of calls. Known with the actor's place.
    limits: Arc<OnceLock<Limits>>,
    kind: PhantomData<fn() -> A>,
}

/// A message that does no harm when it is handled twice, by one actor or by two incarnations of it.
pub trait Idempotent: WireMessage + Clone {}

/// How long an actor whose process was lost may take to be back, for a message that is sent again.
const BACK_PATIENCE: Duration = Duration::from_secs(120);

/// What is so of all calls of a handle and its clones.
pub(super) struct Limits {
    /// Those that may be under way, and how many that are.
    pending: Option<(Semaphore, u32)>,
    max_task_retries: u32,
}

impl<A> Clone for Named<A> {
    fn clone(&self) -> Self {
        let (cluster, actor, limits) = (self.cluster.clone(), self.actor.clone(), self.limits.clone());
        Self { cluster, actor, limits, kind: PhantomData }
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
        let Self { cluster, actor, .. } = self;
        let _place = match begin(&self.limits, &cluster.locate(actor).await?) {
            Ok(place) => place,
            Err(reason) => return Err(NamedError::Ask(AskError::Refused(Refused { message, reason }))),
        };
        let asked = cluster.handle::<A>(actor).await?.ask(message).await;
        match cluster.settle(actor, asked) {
            Settled::Done(outcome) => outcome.map_err(NamedError::Ask),
            Settled::Again(message) => {
                cluster.handle::<A>(actor).await?.ask(message).await.map_err(NamedError::Ask)
            }
        }
    }

    /// Asks a message that may be handled twice. When the process that had it is lost, or ends before it answers, the
    /// message goes to the next incarnation, as often as the actor's spec allows (`max_task_retries`); that one is
    /// waited for. After a panic it does not: it may be what every incarnation dies of.
    pub async fn ask_again<M>(&self, message: M) -> Result<M::Result, NamedError<M>>
    where
        A: Handler<M>,
        M: Idempotent,
    {
        let (mut left, mut backoff, mut since) = (None, Backoff::reconnect(), Instant::now());
        loop {
            let error = match self.ask(message.clone()).await {
                Err(error) if is_lost(&error) => error,
                outcome => return outcome,
            };
            // Only what may have been handled counts as a retry.
            if matches!(&error, NamedError::Ask(AskError::PeerLost(_) | AskError::Stopped)) {
                let left =
                    left.get_or_insert_with(|| self.limits.get().map_or(0, |limits| limits.max_task_retries));
                if *left == 0 {
                    return Err(error);
                }
                *left -= 1;
                since = Instant::now();
                backoff.reset();
            } else if since.elapsed() > BACK_PATIENCE {
                return Err(error);
            }
            // The head may not have noticed yet.
            backoff.pause().await;
            self.back().await?;
        }
    }

    /// Waits until there is an incarnation again.
    async fn back(&self) -> Result<(), ClusterError> {
        self.cluster.forget(&self.actor);
        match self.cluster.ready(&self.actor, BACK_PATIENCE).await {
            Ok(()) => Ok(()),
            Err(SpawnFailed::Cluster(error)) => Err(error),
            Err(SpawnFailed::Dead { actor, cause }) => Err(ClusterError::Dead { actor, cause }),
            Err(late @ SpawnFailed::Late { .. }) => Err(ClusterError::Refused(late.to_string())),
        }
    }
}

/// Takes a place among the calls that may be under way.
fn begin<'l>(
    limits: &'l OnceLock<Limits>,
    located: &Located,
) -> Result<Option<SemaphorePermit<'l>>, Refusal> {
    let limits = limits.get_or_init(|| Limits {
        pending: located.max_pending_calls.map(|max| (Semaphore::new(max as usize), max)),
        max_task_retries: located.max_task_retries,
    });
    let Some((places, max)) = &limits.pending else { return Ok(None) };
    places.try_acquire().map(Some).map_err(|_| Refusal::TooManyPending((*max).into()))
}

impl<A> Named<A> {
    /// Name of the actor.
    pub fn name(&self) -> &str {
        &self.actor
    }

    /// Ends the actor when it has handled what it has, or after `grace`; see `Cluster::finish_actor`.
    pub async fn stop(&self, grace: Duration) -> Result<(), ClusterError> {
        self.cluster.finish_actor(&self.actor, grace).await
    }

    /// Ends the actor's process at once.
    pub async fn kill(&self) -> Result<(), ClusterError> {
        self.cluster.kill_actor(&self.actor).await
    }
}

/// Whether the actor may or may not have handled the message, and lives no more.
fn is_lost<M>(error: &NamedError<M>) -> bool {
    match error {
        NamedError::Ask(AskError::PeerLost(_) | AskError::Stopped) => true,
        NamedError::Ask(AskError::Refused(refused)) => is_gone(&refused.reason),
        NamedError::Cluster(ClusterError::NotReady(_)) => true,
        NamedError::Ask(_) | NamedError::Cluster(_) => false,
    }
}

/// A handle by name for callers that speak JSON. The actor offers messages to them with `Accepts::accept_json`.
#[derive(Clone)]
pub struct NamedJson {
    cluster: Cluster,
    actor: String,
    limits: Arc<OnceLock<Limits>>,
    deadline: Option<Duration>,
}

impl NamedJson {
    /// The same actor, but each ask or tell is good for `deadline` only, as `Handle::with_deadline` has it.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }

    /// Asks the present incarnation the message of that name (`WireMessage::NAME`) and waits for its answer. Follows
    /// the actor like `Named::ask`.
    pub async fn ask(&self, message: &str, value: Value) -> Result<Value, NamedError<JsonMessage>> {
        let _place = match begin(&self.limits, &self.cluster.locate(&self.actor).await?) {
            Ok(place) => place,
            Err(reason) => {
                let message = JsonMessage { message: message.to_owned(), value: Box::new(value) };
                return Err(NamedError::Ask(AskError::Refused(Refused { message, reason })));
            }
        };
        let asked = self.handle().await?.ask(message, value).await;
        match self.cluster.settle(&self.actor, asked) {
            Settled::Done(outcome) => outcome.map_err(NamedError::Ask),
            Settled::Again(JsonMessage { message, value }) => {
                self.handle().await?.ask(&message, *value).await.map_err(NamedError::Ask)
            }
        }
    }

    /// Sends the message and waits for nothing. `Ok` means that it is on its way.
    pub async fn tell(&self, message: &str, value: Value) -> Result<(), NamedError<JsonMessage>> {
        let told = self.handle().await?.tell(message, value);
        match self.cluster.settle(&self.actor, told.map_err(AskError::Refused)) {
            Settled::Done(outcome) => outcome.map_err(NamedError::Ask),
            Settled::Again(JsonMessage { message, value }) => {
                let told = self.handle().await?.tell(&message, *value);
                told.map_err(|refused| NamedError::Ask(AskError::Refused(refused)))
            }
        }
    }

    async fn handle(&self) -> Result<crate::handle::JsonHandle, ClusterError> {
        let handle = self.cluster.system().json_handle(self.cluster.addr(&self.actor).await?);
        Ok(match self.deadline {
            Some(deadline) => handle.with_deadline(deadline),
            None => handle,
        })
    }
}

/// What is left to do after the known incarnation was asked.
enum Settled<T, M> {
    Done(Result<T, AskError<M>>),
    /// It is gone and has not seen the message: the present one may.
    Again(M),
}

impl Cluster {
    /// Forgets an address that is good no more, and says whether the message may go to the next one.
    fn settle<T, M>(&self, actor: &str, asked: Result<T, AskError<M>>) -> Settled<T, M> {
        match asked {
            Err(AskError::Refused(refused)) if is_gone(&refused.reason) => {
                self.forget(actor);
                Settled::Again(refused.message)
            }
            Err(error) => {
                if matches!(error, AskError::PeerLost(_) | AskError::Stopped | AskError::Panicked(_)) {
                    self.forget(actor);
                }
                Settled::Done(Err(error))
            }
            Ok(answer) => Settled::Done(Ok(answer)),
        }
    }
}

/// Whether the refusal says that the incarnation is not there any more.
pub(crate) fn is_gone(reason: &Refusal) -> bool {
    match reason {
        Refusal::NoSuchActor
        | Refusal::WrongIncarnation
        | Refusal::WrongProcess
        | Refusal::Elsewhere(_)
        | Refusal::Unreachable(_) => true,
        Refusal::MailboxFull
        | Refusal::UnknownMessage
        | Refusal::QueueFull
        | Refusal::Unsendable(_)
        | Refusal::Malformed(_)
        | Refusal::Cancelled
        | Refusal::TooManyPending(_) => false,
    }
}
