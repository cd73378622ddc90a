//! What a user's actor has of another deployment of its application: asks it typed messages, whichever replica answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix::Handler;
use futures_util::Stream;
use heliostat_runtime::actor::{ActorCx, CreateError, RemoteActor, StreamMessage, WireMessage};
use heliostat_runtime::handle::{AskError, Replies, Window};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::attend::{Whose, attend};
use super::call::{self, Begun, CallError};
use super::pool::{Place, Pool};
use crate::serve::replica::ReplicaArgs;

/// The replicas of another deployment of the application, to ask. Cheap to clone; usable from any thread. Clones share what
/// the deployment's bounds count; it knows of every change of the replicas for as long as one of them is there.
pub struct DeploymentHandle<A> {
    pool: Pool<A>,
    deadline: Option<Duration>,
    attendant: Arc<AbortOnDropHandle<()>>,
}

impl<A> Clone for DeploymentHandle<A> {
    fn clone(&self) -> Self {
        let attendant = Arc::clone(&self.attendant);
        Self { pool: self.pool.clone(), deadline: self.deadline, attendant }
    }
}

impl<A: RemoteActor> DeploymentHandle<A> {
    /// Of the deployment that is called as the actor's type, in the application of the replica that `args` and `cx` are of.
    pub(in crate::serve) fn new(args: &ReplicaArgs, cx: &ActorCx) -> Result<Self, CreateError> {
        let cluster = cx.cluster().cloned();
        let cluster =
            cluster.ok_or_else(|| CreateError::Failed("this process is in no cluster".to_owned()))?;
        let whose = Whose {
            application: args.application.clone(),
            deployment: A::TYPE.to_owned(),
            caller: rand::random(),
        };
        let pool = Pool::new(cx.system().clone());
        let attendant = AbortOnDropHandle::new(tokio::spawn(attend(pool.clone(), cluster, whose)));
        Ok(Self { pool, deadline: None, attendant: Arc::new(attendant) })
    }

    /// The same, but each call, and what it waits for, may take so long.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }

    /// Sends a message to one of the replicas and waits for its answer.
    ///
    /// Of two that are drawn the one with fewer calls of this handle gets it, and none has more of them at once than
    /// `max_ongoing_requests`; others wait, `max_queued_requests` at most. What certainly reached no actor is tried on
    /// another replica; where none serves the next one is waited for. Dropping the future cancels the call, as
    /// [`Handle::ask`](heliostat_runtime::handle::Handle::ask) says.
    ///
    /// # Errors
    /// No replica took the message, or the one that did gave no answer.
    pub async fn ask<M>(&self, message: M) -> Result<M::Result, CallError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        call::ask(&self.pool, message, self.until()).await
    }

    /// Sends a message that is answered by a stream, and returns once the first item is there. The deadline is for the whole
    /// of it.
    ///
    /// # Errors
    /// As [`Self::ask`]: no item has come.
    pub async fn stream<M>(&self, message: M) -> Result<CallReplies<A, M>, CallError<M>>
    where
        A: Handler<M>,
        M: StreamMessage,
    {
        let begun = call::begin(&self.pool, message, self.until(), Window::default()).await?;
        let Begun { place, first, replies } = begun;
        Ok(CallReplies { first, replies, place })
    }

    fn until(&self) -> Option<Instant> {
        self.deadline.map(|deadline| Instant::now() + deadline)
    }
}

/// The items that answer a message; a `futures::Stream` of them. After an error, or `None`, it is over.
///
/// Dropping it cancels the call. The replica has it as one under way until then.
#[must_use = "dropping a stream cancels it"]
pub struct CallReplies<A, M: StreamMessage> {
    first: Option<M::Item>,
    replies: Replies<M>,
    place: Place<A>,
}

impl<A, M: StreamMessage> CallReplies<A, M> {
    /// The number of the replica that answers.
    pub fn replica(&self) -> u64 {
        self.place.number()
    }
}

impl<A, M: StreamMessage> Unpin for CallReplies<A, M> {}

impl<A, M: StreamMessage> Stream for CallReplies<A, M> {
    type Item = Result<M::Item, AskError<M>>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let next = Pin::new(&mut self.replies).poll_next(task);
        if let Poll::Ready(Some(Err(why))) = &next {
            self.place.failed(matches!(why, AskError::PeerLost(_) | AskError::Stopped));
        }
        next
    }
}
