//! Messages of a `tell` that could not be delivered, and their way back to a handler of the sender.
//!
//! The sender's process keeps the message until the receiver's says that the handler has it. How many are kept is
//! bounded; one more is refused at once.

use std::sync::{Arc, Mutex, PoisonError};

use actix::{Handler, Message, Recipient};

use super::way::Place;
use super::{ActorAddr, Handle, Refusal, Refused};
use crate::actor::{RemoteActor, WireMessage};
use crate::mailbox::{Failure, ReturnTo};
use crate::wire::calls::{Waiter, Waiting};
use crate::wire::frame::Want;
use crate::wire::name_hash;

/// A message that was told and came back. Its sender handles it like any other message.
#[derive(Debug, Clone, PartialEq)]
pub struct Undelivered<M> {
    /// The message, as it was given.
    pub message: M,
    /// Whom it was for.
    pub to: ActorAddr,
    /// Why it came back.
    pub why: Undeliverable,
}

impl<M> Message for Undelivered<M> {
    type Result = ();
}

/// Why a message came back. Except for `PeerLost` the handler has certainly not seen it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Undeliverable {
    /// The actor did not accept it.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// Its deadline passed in the mailbox.
    #[error("its deadline passed before it was handled")]
    Expired,
    /// The actor stopped with the message in its mailbox.
    #[error("the actor stopped before it handled it")]
    Stopped,
    /// The actor panicked at another message before this one was handled.
    #[error("the actor panicked before it handled it: {0}")]
    Panicked(String),
    /// The connection broke before the receiver said that it has it; it may have been handled.
    #[error("lost the process that it was sent to: {0}")]
    PeerLost(String),
}

impl From<Failure> for Undeliverable {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(reason) => Self::Refused(reason),
            Failure::Expired => Self::Expired,
            Failure::Panicked(message) => Self::Panicked(message),
            Failure::PeerLost(why) => Self::PeerLost(why),
            Failure::Codec(why) | Failure::Handler(why) => Self::Refused(Refusal::Malformed(why)),
            Failure::Stopped | Failure::NoReply | Failure::Cancelled => Self::Stopped,
        }
    }
}

impl<A: RemoteActor> Handle<A> {
    /// Sends a message and waits for nothing; if it does not reach the handler it comes back to `to` as an
    /// `Undelivered`, such as to the actor that sends: `ctx.address().recipient()`. What is refused at once comes back
    /// in the error. Messages come back in no particular order.
    ///
    /// Costs a receipt of the receiver's process for each message. As many as `SystemConfig::returnable_max` may be
    /// without one; one more is refused (`QueueFull`).
    pub fn tell_or_return<M>(&self, message: M, to: Recipient<Undelivered<M>>) -> Result<(), Refused<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let Some(back) = self.way_back(to) else {
            return Err(Refused { message, reason: Refusal::QueueFull });
        };
        match self.way.place() {
            Place::Local(cached) => match self.way.entry(cached) {
                Ok(entry) => entry.offer_returnable::<A, M>(message, self.way.expires_at(), back),
                Err(reason) => Err(Refused { message, reason }),
            },
            Place::Remote(link) => {
                let receipt = Receipt(Arc::new(Mutex::new(Slot::Sending(back))));
                let waiting = Waiting { waiter: Box::new(Receipt(receipt.0.clone())), inlet: None };
                let head = self.way.head(const { name_hash(M::NAME) }, Want::Receipt);
                match link.conn().call(&head, &message, Some(waiting)) {
                    Ok(_) => {
                        receipt.keep(message);
                        Ok(())
                    }
                    Err(reason) => Err(Refused { message, reason }),
                }
            }
        }
    }

    /// What brings a message back to `to`; `None` if too many are under way.
    fn way_back<M: WireMessage>(&self, to: Recipient<Undelivered<M>>) -> Option<ReturnTo<M>> {
        let permit = self.way.system().returnable().try_acquire_owned().ok()?;
        let (addr, runtime) = (self.addr().clone(), self.way.system().runtime().clone());
        Some(Box::new(move |message, failure| {
            let undelivered = Undelivered { message, to: addr, why: failure.into() };
            runtime.spawn(async move {
                // Kept until it is handled: a sender that is slow to take its messages back sends no more of them.
                let _permit = permit;
                if to.send(undelivered).await.is_err() {
                    tracing::debug!(message = M::NAME, "undelivered, and its sender is gone");
                }
            });
        }))
    }
}

/// A message between its sending and its receipt.
struct Receipt<M>(Arc<Mutex<Slot<M>>>);

enum Slot<M> {
    /// It is being sent.
    Sending(ReturnTo<M>),
    /// It is sent.
    Sent(M, ReturnTo<M>),
    /// It came back while it was being sent.
    Failed(Failure, ReturnTo<M>),
    Done,
}

impl<M> Receipt<M> {
    fn take(&self) -> Slot<M> {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), Slot::Done)
    }

    /// The message was sent: keeps it for its way back.
    fn keep(&self, message: M) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *slot, Slot::Done) {
            Slot::Sending(back) => *slot = Slot::Sent(message, back),
            Slot::Failed(failure, back) => back(message, failure),
            Slot::Sent(..) | Slot::Done => {}
        }
    }
}

impl<M: Send> Waiter for Receipt<M> {
    fn reply(self: Box<Self>, _: &[u8]) {
        drop(self.take());
    }

    fn fail(self: Box<Self>, failure: Failure) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *slot, Slot::Done) {
            Slot::Sent(message, back) => back(message, failure),
            Slot::Sending(back) => *slot = Slot::Failed(failure, back),
            Slot::Failed(..) | Slot::Done => {}
        }
    }
}
