//! A message on its way through a mailbox: with its deadline and whoever waits for the answer.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use actix::Handler;
use actix::dev::MessageResponse;
use tokio::sync::oneshot;

use super::ActorEnd;
use super::answer::{Asker, Failure};
use crate::actor::{RemoteActor, WireMessage};

/// A message of any type for an actor.
pub(super) trait Deliver<A: RemoteActor>: Send {
    fn deliver(self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>);
}

pub(super) struct Envelope<M: WireMessage> {
    pub(super) message: M,
    pub(super) expires_at: Option<Instant>,
    pub(super) asker: Asker<M::Result>,
}

impl<A, M> Deliver<A> for Envelope<M>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage,
{
    fn deliver(self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>) {
        let Self { message, expires_at, asker } = *self;
        if expires_at.is_some_and(|at| Instant::now() >= at) {
            return asker.send(Err(Failure::Expired));
        }
        let (reply, mut replied) = match asker.waits() {
            true => {
                let (reply, replied) = oneshot::channel();
                (Some(reply), Some(replied))
            }
            false => (None, None),
        };
        // Caught only to answer the asker with the cause; the panic goes on and ends the actor.
        let handled = catch_unwind(AssertUnwindSafe(|| actor.handle(message, ctx).handle(ctx, reply)));
        if let Err(panic) = handled {
            let (message, lifetime) = (panic_message(&*panic), asker.lifetime.clone());
            // Answered before the end is known: a worker may exit as soon as it is.
            asker.send(Err(Failure::Panicked(message.clone())));
            lifetime.end(ActorEnd::Panicked(message));
            resume_unwind(panic);
        }
        let Some(replied_now) = replied.as_mut() else { return };
        match replied_now.try_recv() {
            Ok(value) => asker.send(Ok(value)),
            Err(oneshot::error::TryRecvError::Closed) => asker.send(Err(Failure::NoReply)),
            Err(oneshot::error::TryRecvError::Empty) => {
                actix::spawn(async move {
                    if let Some(replied) = replied
                        && let Ok(value) = replied.await
                    {
                        asker.send(Ok(value));
                    }
                });
            }
        }
    }
}

/// The text of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
