//! Messages that are answered by a stream of items, and what their handlers return.
//!
//! How far a producer may run ahead of its consumer is decided by the consumer's window, not here.

use std::pin::Pin;
use std::task::{Context, Poll};

use actix::dev::{MessageResponse, OneshotSender};
use actix::{Actor, Message};
use bincode::{Decode, Encode};
use futures_util::Stream;

/// A message that is answered by a stream. It is an actix message whose result is `Items`.
pub trait StreamMessage: Message<Result = Items<Self::Item>> + Encode + Decode<()> + Send + 'static {
    /// What the stream is of. A `Result`, if the handler can fail on its way.
    type Item: Encode + Decode<()> + Send + 'static;

    /// Its name on the wire; unique among the messages of an actor.
    const NAME: &'static str;
}

/// What a handler of a `StreamMessage` returns: a stream that lives on the actor's thread.
///
/// It is polled only while the consumer has room, and dropped when the consumer is gone or the actor ends. It has no
/// access to the actor: for that send items into a bounded channel and return its receiving half.
pub struct Items<T>(Pin<Box<dyn Stream<Item = T>>>);

impl<T> Items<T> {
    /// Wraps any stream.
    pub fn new(stream: impl Stream<Item = T> + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl<T: 'static> From<tokio::sync::mpsc::Receiver<T>> for Items<T> {
    /// The receiving half of a channel; senders see it closed when the consumer is gone.
    fn from(mut receiver: tokio::sync::mpsc::Receiver<T>) -> Self {
        Self::new(futures_util::stream::poll_fn(move |task| receiver.poll_recv(task)))
    }
}

impl<T> Stream for Items<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.as_mut().poll_next(task)
    }
}

impl<A: Actor, M: Message<Result = Self>, T: 'static> MessageResponse<A, M> for Items<T> {
    fn handle(self, _: &mut A::Context, asker: Option<OneshotSender<Self>>) {
        if let Some(asker) = asker {
            // Nobody waits any more: the stream is not begun.
            let _ = asker.send(self);
        }
    }
}
