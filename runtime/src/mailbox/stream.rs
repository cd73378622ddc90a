//! Streams at the actor's side: an item is produced when the consumer has room for it, and nothing once it is gone.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use actix::Handler;
use bincode::Encode;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};

use super::answer::{Failure, remote_failure};
use super::envelope::{Deliver, end_by_panic, end_by_panic_of_work};
use super::queue::Slot;
use super::run::{RunFn, Running, Watch};
use super::{Entry, Lifetime, RemoteAnswer, refuse};
use crate::actor::{Items, RemoteActor, StreamMessage};
use crate::handle::Refusal;
use crate::wire::{from_bytes, name_hash};

/// Where the items of a stream go. It is certainly told how the stream ends: if nothing else, by its drop.
pub(crate) struct Outlet<T> {
    consumer: Option<Consumer<T>>,
    lifetime: Arc<Lifetime>,
}

/// Who reads the items.
pub(crate) enum Consumer<T> {
    /// In this process: a channel as wide as its window, and how it ended.
    Local(mpsc::Sender<T>, oneshot::Sender<Result<(), Failure>>),
    /// Over the wire.
    Remote(RemoteAnswer),
}

impl<T: Encode> Outlet<T> {
    pub(super) fn new(consumer: Consumer<T>, lifetime: Arc<Lifetime>) -> Self {
        Self { consumer: Some(consumer), lifetime }
    }

    /// Takes the consumer out; it is told of nothing.
    pub(super) fn into_consumer(mut self) -> Option<Consumer<T>> {
        self.consumer.take()
    }

    fn is_gone(&self) -> bool {
        match &self.consumer {
            None => true,
            Some(Consumer::Local(items, _)) => items.is_closed(),
            Some(Consumer::Remote(answer)) => answer.served().is_cancelled(),
        }
    }

    /// Waits until the consumer is gone.
    async fn gone(&self) {
        match &self.consumer {
            None => {}
            Some(Consumer::Local(items, _)) => items.closed().await,
            Some(Consumer::Remote(answer)) => poll_fn(|task| answer.served().poll_cancelled(task)).await,
        }
    }

    /// Waits until there is room for an item, or the consumer is gone.
    async fn room(&self) {
        match &self.consumer {
            None => {}
            // The permit is given back at once: this is the only sender.
            Some(Consumer::Local(items, _)) => drop(items.reserve().await),
            Some(Consumer::Remote(answer)) => poll_fn(|task| answer.served().poll_room(task)).await,
        }
    }

    /// Sends an item for which there is room.
    async fn item(&self, item: T) -> Result<(), Failure> {
        match &self.consumer {
            None => Ok(()),
            Some(Consumer::Local(items, _)) => {
                // Fails only if the consumer is gone, which is noticed next.
                let _ = items.send(item).await;
                Ok(())
            }
            Some(Consumer::Remote(answer)) => answer.item(&item).await.map_err(Failure::from),
        }
    }

    /// The last word on the stream.
    pub(super) fn end(&mut self, outcome: Result<(), Failure>) {
        match (self.consumer.take(), outcome) {
            (None, _) => {}
            (Some(Consumer::Local(_, end)), outcome) => drop(end.send(outcome)),
            (Some(Consumer::Remote(answer)), Ok(())) => answer.reply(&()),
            (Some(Consumer::Remote(answer)), Err(failure)) => answer.fail(&remote_failure(failure)),
        }
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        let Some(consumer) = self.consumer.take() else { return };
        let failure = self.lifetime.failure();
        match consumer {
            Consumer::Local(_, end) => drop(end.send(Err(failure))),
            Consumer::Remote(answer) => answer.fail(&remote_failure(failure)),
        }
    }
}

/// A `StreamMessage` in the mailbox.
pub(super) struct StreamEnvelope<A: RemoteActor, M: StreamMessage> {
    pub(super) message: M,
    pub(super) expires_at: Option<Instant>,
    pub(super) outlet: Outlet<M::Item>,
    pub(super) run: RunFn<A, M>,
}

impl<A: RemoteActor, M: StreamMessage> Deliver<A> for StreamEnvelope<A, M> {
    fn deliver(self: Box<Self>, actor: &mut A, ctx: &mut actix::Context<A>, slot: Option<Slot>) {
        let Self { message, expires_at, mut outlet, run } = *self;
        if outlet.is_gone() {
            return drop(outlet.into_consumer());
        }
        if expires_at.is_some_and(|at| Instant::now() >= at) {
            return outlet.end(Err(Failure::Expired));
        }
        let lifetime = outlet.lifetime.clone();
        let ran = {
            let _handling = lifetime.handling(const { name_hash(M::NAME) });
            catch_unwind(AssertUnwindSafe(|| run(actor, message, ctx, Watch::Reply)))
        };
        match ran {
            Ok(running) => drop(actix::spawn(produce(running, outlet, slot))),
            Err(panic) => {
                end_by_panic(&lifetime, panic, |failure| outlet.end(Err(failure)));
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        self.outlet.is_gone()
    }
}

/// Waits for the stream and sends it to its end: its own, its consumer's or its actor's.
async fn produce<T: Encode + 'static>(running: Running<Items<T>>, mut outlet: Outlet<T>, slot: Option<Slot>) {
    // Held to the end of the stream.
    let _slot = slot;
    let lifetime = outlet.lifetime.clone();
    let outcome = tokio::select! {
        biased;
        () = outlet.gone() => Ok(None),
        // The outlet's drop says how.
        () = lifetime.ended() => return,
        outcome = AssertUnwindSafe(send_all(running, &outlet)).catch_unwind() => outcome,
    };
    match outcome {
        Ok(Some(outcome)) => outlet.end(outcome),
        Ok(None) => drop(outlet.into_consumer()),
        Err(panic) => end_by_panic_of_work(&lifetime, panic, |failure| outlet.end(Err(failure))),
    }
}

/// How the stream ended; `None` when the consumer is gone.
async fn send_all<T: Encode + 'static>(
    running: Running<Items<T>>,
    outlet: &Outlet<T>,
) -> Option<Result<(), Failure>> {
    let items = match running {
        Running::Done(items) => items,
        Running::Replying(items) | Running::ReplyingCancellable(items) => {
            items.await.map_err(|_| Failure::NoReply)
        }
        Running::Working(work) | Running::Cancellable(work) => Ok(work.await),
        Running::Unwatched => Err(Failure::NoReply),
    };
    let mut items = match items {
        Ok(items) => items,
        Err(failure) => return Some(Err(failure)),
    };
    loop {
        outlet.room().await;
        // Asked each time: a stream that is always ready would never let others have a turn.
        if outlet.is_gone() {
            return None;
        }
        match items.next().await {
            Some(item) => match outlet.item(item).await {
                Ok(()) => {}
                Err(failure) => return Some(Err(failure)),
            },
            None => return Some(Ok(())),
        }
    }
}

/// A message that was not queued, with who was to read the stream.
struct Returned<M: StreamMessage> {
    message: M,
    consumer: Option<Consumer<M::Item>>,
    reason: Refusal,
}

impl Entry {
    /// Puts a message that is answered by a stream into the mailbox or gives it back.
    pub(crate) fn offer_stream<A, M>(
        &self,
        message: M,
        expires_at: Option<Instant>,
        consumer: Consumer<M::Item>,
    ) -> Result<(), (M, Refusal)>
    where
        A: RemoteActor + Handler<M>,
        M: StreamMessage,
    {
        let queued = self.enqueue_stream::<A, M>(message, expires_at, consumer);
        queued.map_err(|Returned { message, reason, .. }| (message, reason))
    }

    fn enqueue_stream<A, M>(
        &self,
        message: M,
        expires_at: Option<Instant>,
        consumer: Consumer<M::Item>,
    ) -> Result<(), Returned<M>>
    where
        A: RemoteActor + Handler<M>,
        M: StreamMessage,
    {
        let run = self.table.run::<A, M>(const { name_hash(M::NAME) });
        let (Some(mailbox), Some(run)) = (self.mailbox_of::<A>(), run) else {
            return Err(Returned { message, consumer: Some(consumer), reason: Refusal::UnknownMessage });
        };
        let outlet = Outlet::new(consumer, self.lifetime.clone());
        let (run, lane) = run;
        let queued = mailbox.push(lane, Box::new(StreamEnvelope { message, expires_at, outlet, run }));
        queued.map_err(|(envelope, reason)| {
            let StreamEnvelope { message, outlet, .. } = *envelope;
            Returned { message, consumer: outlet.into_consumer(), reason }
        })
    }
}

/// Delivers a frame whose message is answered by a stream. A refusal has been told to the asker.
pub(super) fn deliver_stream_frame<A, M>(
    entry: &Entry,
    payload: &[u8],
    expires_at: Option<Instant>,
    answer: Option<RemoteAnswer>,
) -> Result<(), Refusal>
where
    A: RemoteActor + Handler<M>,
    M: StreamMessage,
{
    let Some(answer) = answer else { return Err(Refusal::UnknownMessage) };
    match from_bytes::<M>(payload) {
        Ok(message) => match entry.enqueue_stream::<A, M>(message, expires_at, Consumer::Remote(answer)) {
            Ok(()) => Ok(()),
            Err(Returned { consumer: Some(Consumer::Remote(answer)), reason, .. }) => {
                refuse(Some(answer), reason)
            }
            Err(Returned { reason, .. }) => Err(reason),
        },
        Err(error) => refuse(Some(answer), Refusal::Malformed(error.to_string())),
    }
}
