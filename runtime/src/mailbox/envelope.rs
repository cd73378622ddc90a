//! A message on its way through a mailbox: with its deadline and whoever waits for the answer.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use futures_util::FutureExt;

use super::answer::{Asker, Failure};
use super::queue::Slot;
use super::run::{RunFn, Running, Watch};
use super::{ActorEnd, Lifetime};
use crate::actor::{RemoteActor, WireMessage};
use crate::panics;
use crate::wire::name_hash;

/// A message of any type for an actor.
pub(super) trait Deliver<A: RemoteActor>: Send {
    /// Runs the handler; `slot` is given back when its work is done.
    fn deliver(self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>, slot: Option<Slot>);

    /// Whether nobody waits for the answer any more, so that it need not be delivered.
    fn is_cancelled(&self) -> bool;
}

pub(super) struct Envelope<A: RemoteActor, M: WireMessage> {
    pub(super) message: M,
    pub(super) expires_at: Option<Instant>,
    pub(super) asker: Asker<M::Result>,
    pub(super) run: RunFn<A, M>,
}

impl<A: RemoteActor, M: WireMessage> Deliver<A> for Envelope<A, M> {
    fn deliver(self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>, slot: Option<Slot>) {
        let Self { message, expires_at, asker, run } = *self;
        if asker.is_cancelled() {
            return drop(asker.into_answer());
        }
        if expires_at.is_some_and(|at| Instant::now() >= at) {
            return asker.send(Err(Failure::Expired));
        }
        let asker = asker.receipt();
        let watch = Watch::of(asker.waits() || slot.is_some());
        let ran = {
            let _handling = asker.lifetime.handling(const { name_hash(M::NAME) });
            catch_unwind(AssertUnwindSafe(|| run(actor, message, ctx, watch)))
        };
        match ran {
            Ok(running) => settle(running, asker, slot),
            Err(panic) => {
                let lifetime = asker.lifetime.clone();
                end_by_panic(&lifetime, panic, |failure| asker.send(Err(failure)));
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        self.asker.is_cancelled()
    }
}

/// Sees to it that the asker gets the reply, and holds the slot until the work is done.
pub(super) fn settle<T>(running: Running<T>, mut asker: Asker<T>, slot: Option<Slot>)
where
    T: bincode::Encode + Send + 'static,
{
    match running {
        Running::Unwatched => {}
        Running::Done(outcome) => asker.send(outcome),
        // If there is no value, dropping the asker says why.
        Running::Replying(replied) => {
            let held = (slot, asker.lifetime.begin_work());
            actix::spawn(async move {
                let _held = held;
                if let Ok(value) = replied.await {
                    asker.send(Ok(value));
                }
            });
        }
        Running::ReplyingCancellable(replied) => {
            let held = (slot, asker.lifetime.begin_work());
            actix::spawn(async move {
                let _held = held;
                tokio::select! {
                    replied = replied => if let Ok(value) = replied { asker.send(Ok(value)) },
                    () = asker.cancelled() => drop(asker.into_answer()),
                }
            });
        }
        Running::Working(work) => {
            let held = (slot, asker.lifetime.begin_work());
            actix::spawn(async move {
                let _held = held;
                let worked = AssertUnwindSafe(work).catch_unwind().await;
                finish(worked, asker);
            });
        }
        Running::Cancellable(work) => {
            let held = (slot, asker.lifetime.begin_work());
            actix::spawn(async move {
                let _held = held;
                tokio::select! {
                    worked = AssertUnwindSafe(work).catch_unwind() => finish(worked, asker),
                    () = asker.cancelled() => drop(asker.into_answer()),
                }
            });
        }
    }
}

/// The work of a handler is over, by its reply or by a panic.
fn finish<T: bincode::Encode>(worked: Result<T, Box<dyn Any + Send>>, asker: Asker<T>) {
    match worked {
        Ok(value) => asker.send(Ok(value)),
        Err(panic) => {
            let lifetime = asker.lifetime.clone();
            end_by_panic_of_work(&lifetime, panic, |failure| asker.send(Err(failure)));
        }
    }
}

/// A handler has panicked: the asker is told with the cause, then the panic goes on and ends the actor.
pub(super) fn end_by_panic(lifetime: &Lifetime, panic: Box<dyn Any + Send>, tell: impl FnOnce(Failure)) -> ! {
    note_panic(lifetime, &*panic, tell);
    resume_unwind(panic);
}

/// The same for work beside the actor's context, in which the panic then goes on.
pub(super) fn end_by_panic_of_work(
    lifetime: &Lifetime,
    panic: Box<dyn Any + Send>,
    tell: impl FnOnce(Failure),
) {
    note_panic(lifetime, &*panic, tell);
    lifetime.raise(panic);
}

fn note_panic(lifetime: &Lifetime, panic: &(dyn Any + Send), tell: impl FnOnce(Failure)) {
    let panic = panics::caught(panic);
    // Before the end is known: a worker may exit as soon as it is.
    tell(Failure::Panicked(panic.message.clone()));
    lifetime.end(ActorEnd::Panicked(panic));
}
