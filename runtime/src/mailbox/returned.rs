//! A message of a `tell` in the mailbox that goes back to its sender if it is not handled.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use actix::Handler;

use super::answer::{Answer, Asker};
use super::envelope::{Deliver, end_by_panic, settle};
use super::queue::Slot;
use super::run::{RunFn, Watch};
use super::{Entry, Failure, Lifetime};
use crate::actor::{RemoteActor, WireMessage};
use crate::handle::{Refusal, Refused};
use crate::wire::name_hash;

/// Brings a message back to its sender.
pub(crate) type ReturnTo<M> = Box<dyn FnOnce(M, Failure) + Send>;

struct Returnable<A: RemoteActor, M: WireMessage> {
    /// Taken when it is handled.
    message: Option<(M, ReturnTo<M>)>,
    expires_at: Option<Instant>,
    lifetime: Arc<Lifetime>,
    run: RunFn<A, M>,
}

impl<A: RemoteActor, M: WireMessage> Deliver<A> for Returnable<A, M> {
    fn deliver(mut self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>, slot: Option<Slot>) {
        let Some((message, back)) = self.message.take() else { return };
        if self.expires_at.is_some_and(|at| Instant::now() >= at) {
            return back(message, Failure::Expired);
        }
        drop(back);
        let (run, watch) = (self.run, Watch::of(slot.is_some()));
        match catch_unwind(AssertUnwindSafe(|| run(actor, message, ctx, watch))) {
            Ok(running) => {
                settle(running, Asker { answer: Answer::None, lifetime: self.lifetime.clone() }, slot)
            }
            Err(panic) => end_by_panic(&self.lifetime, panic, |_| {}),
        }
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

impl<A: RemoteActor, M: WireMessage> Drop for Returnable<A, M> {
    fn drop(&mut self) {
        if let Some((message, back)) = self.message.take() {
            back(message, self.lifetime.failure());
        }
    }
}

impl Entry {
    /// Puts a message into the mailbox, or gives it back at once, or later by `back`.
    pub(crate) fn offer_returnable<A, M>(
        &self,
        message: M,
        expires_at: Option<Instant>,
        back: ReturnTo<M>,
    ) -> Result<(), Refused<M>>
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage,
    {
        let run = self.table.run::<A, M>(const { name_hash(M::NAME) });
        let (Some(mailbox), Some(run)) = (self.mailbox_of::<A>(), run) else {
            return Err(Refused { message, reason: Refusal::UnknownMessage });
        };
        let ((run, lane), lifetime) = (run, self.lifetime.clone());
        let returnable = Returnable { message: Some((message, back)), expires_at, lifetime, run };
        match mailbox.push(lane, Box::new(returnable)) {
            Ok(()) => Ok(()),
            Err((mut returnable, reason)) => match returnable.message.take() {
                Some((message, _)) => Err(Refused { message, reason }),
                None => Ok(()),
            },
        }
    }
}
