//! Addresses and typed handles: `ask` and `tell`, wherever the actor lives.
//!
//! A handle to an actor of this process delivers straight into its mailbox, without encoding. Otherwise the message
//! goes over the connection to the actor's process. Delivery is at most once; a message that was certainly not
//! accepted comes back in the error.

mod addr;
mod error;
mod json;
mod returned;
mod stream;
mod way;

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use actix::Handler;
use tokio::sync::oneshot;
pub use tokio_util::sync::CancellationToken;

use crate::actor::{RemoteActor, WireMessage};
use crate::mailbox::Answer;
use crate::system::System;
use crate::wire::name_hash;

pub use addr::{ActorAddr, ActorId, Incarnation, ProcessId};
pub use error::{AskError, Refusal, Refused};
pub use json::{JsonHandle, JsonMessage};
pub use returned::{Undeliverable, Undelivered};
pub use stream::{Replies, Window};
use way::{Place, Way};

/// A typed handle to an actor. Cheap to clone; usable from any thread.
pub struct Handle<A> {
    way: Way,
    actor: PhantomData<fn() -> A>,
}

impl<A> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self { way: self.way.clone(), actor: PhantomData }
    }
}

impl<A> fmt::Debug for Handle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.way.addr())
    }
}

impl<A> Handle<A> {
    pub(crate) fn new(system: System, addr: ActorAddr) -> Self {
        Self { way: Way::new(system, addr), actor: PhantomData }
    }

    /// The address that the handle was made for.
    pub fn addr(&self) -> &ActorAddr {
        self.way.addr()
    }

    /// The same actor, but each ask or tell is good for `deadline` only: the asker gets `AskError::Deadline` after it,
    /// and a message that is not handled by then is dropped.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { way: self.way.with_deadline(deadline), actor: PhantomData }
    }

    /// The same actor, but cancelling `token` cancels every ask that is under way, as if its future were dropped; the
    /// asker gets `AskError::Cancelled`.
    pub fn with_cancel(&self, token: CancellationToken) -> Self {
        Self { way: self.way.with_cancel(token), actor: PhantomData }
    }

    /// The same actor, but at most `max` asks of this handle and its clones are under way at once; one more is refused
    /// (`TooManyPending`) and handed back.
    pub fn with_max_pending(&self, max: usize) -> Self {
        Self { way: self.way.with_max_pending(max), actor: PhantomData }
    }
}

impl<A: RemoteActor> Handle<A> {
    /// Sends a message and waits for its answer.
    ///
    /// Without a deadline it waits as long as the actor and its process live. Dropping the future cancels the call: a
    /// message that still waits in the mailbox is not handled, and work that the actor accepted as cancellable
    /// (`Accepts::accept_cancellable`) ends. What has been handled already is not undone.
    pub async fn ask<M>(&self, message: M) -> Result<M::Result, AskError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let _pending = match self.way.begin() {
            Ok(pending) => pending,
            Err(reason) => return Err(AskError::Refused(Refused { message, reason })),
        };
        let cached = match self.way.place() {
            Place::Local(cached) => cached,
            Place::Remote(link) => {
                let asked = self.way.ask_over(link, const { name_hash(M::NAME) }, &message);
                let answered = self.way.answer_over(asked).await;
                return answered.map_err(|failure| AskError::new(failure, Some(message)));
            }
        };
        let entry = match self.way.entry(cached) {
            Ok(entry) => entry,
            Err(reason) => return Err(AskError::Refused(Refused { message, reason })),
        };
        let (answer, answered) = oneshot::channel();
        let offered = entry.offer::<A, M>(message, self.way.expires_at(), Answer::Local(answer));
        drop(entry);
        offered.map_err(AskError::Refused)?;
        self.way.answer_here(answered).await.map_err(|failure| AskError::new(failure, None))
    }

    /// Sends a message and waits for nothing. `Ok` means that it is on its way, not that it arrives.
    ///
    /// Needs no async context. Messages of one thread to one actor arrive in the order they were sent.
    pub fn tell<M>(&self, message: M) -> Result<(), Refused<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        match self.way.place() {
            Place::Local(cached) => match self.way.entry(cached) {
                Ok(entry) => entry.offer::<A, M>(message, self.way.expires_at(), Answer::None),
                Err(reason) => Err(Refused { message, reason }),
            },
            Place::Remote(link) => {
                let sent = self.way.tell_over(link, const { name_hash(M::NAME) }, &message);
                sent.map_err(|reason| Refused { message, reason })
            }
        }
    }
}
