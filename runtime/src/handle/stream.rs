//! Streams at the asker's side: `Handle::stream`, the window that bounds what is on its way, and the end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use actix::Handler;
use bincode::Decode;
use futures_util::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;

use super::way::{Place, Way};
use super::{AskError, Handle};
use crate::actor::{RemoteActor, StreamMessage};
use crate::mailbox::{Consumer, Failure};
use crate::wire::calls::{Inlet, Waiter, Waiting};
use crate::wire::conn::{Conn, Forget};
use crate::wire::frame::{Want, Window as WireWindow};
use crate::wire::link::Link;
use crate::wire::{from_bytes, name_hash};

/// How much of a stream may be under way: produced, and not yet taken by the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Items; at least 1, which makes producer and consumer take turns.
    pub items: u32,
    /// Bytes; one item may exceed them. Within a process items are not encoded, and only `items` counts.
    pub bytes: u32,
}

impl Default for Window {
    /// 64 items, 4 MiB.
    fn default() -> Self {
        Self { items: 64, bytes: 4 << 20 }
    }
}

impl<A: RemoteActor> Handle<A> {
    /// Sends a message that is answered by a stream, with the default window.
    pub fn stream<M>(&self, message: M) -> Replies<M>
    where
        A: Handler<M>,
        M: StreamMessage,
    {
        self.stream_within(message, Window::default())
    }

    /// Sends a message that is answered by a stream. The producer stops when `window` is full and goes on when the
    /// consumer takes items. Dropping the stream cancels it; a deadline is for the whole of it.
    pub fn stream_within<M>(&self, message: M, window: Window) -> Replies<M>
    where
        A: Handler<M>,
        M: StreamMessage,
    {
        let window = Window { items: window.items.max(1), bytes: window.bytes.max(1) };
        match self.way.place() {
            Place::Local(cached) => {
                let (items, received) = mpsc::channel(window.items as usize);
                let (end, ended) = oneshot::channel();
                let offered = match self.way.entry(cached) {
                    Ok(entry) => {
                        let consumer = Consumer::Local(items, end);
                        entry.offer_stream::<A, M>(message, self.way.expires_at(), consumer)
                    }
                    Err(reason) => Err((message, reason)),
                };
                let source = match offered {
                    Ok(()) => Source::Local(received),
                    Err((message, reason)) => Source::Refused(Some((message, reason))),
                };
                Replies::new(&self.way, source, ended)
            }
            Place::Remote(link) => remote(&self.way, link, message, window),
        }
    }
}

fn remote<M: StreamMessage>(way: &Way, link: &Link, message: M, window: Window) -> Replies<M> {
    let (items, received) = mpsc::channel(window.items as usize);
    let (end, ended) = oneshot::channel();
    let want = Want::Stream(WireWindow { items: window.items, bytes: window.bytes });
    let waiting = Waiting { waiter: Box::new(End(end)), inlet: Some(Arc::new(Received(items))) };
    let conn = link.conn();
    let head = way.head(const { name_hash(M::NAME) }, want);
    let source = match conn.call(&head, &message, Some(waiting)) {
        Ok(call) => {
            let forget = conn.forget_on_drop(call);
            let credit = Credit { conn, call, window, items: 0, bytes: 0 };
            Source::Remote { received, credit, message: Some(message), _forget: forget }
        }
        Err(reason) => Source::Refused(Some((message, reason))),
    };
    Replies::new(way, source, ended)
}

/// The items that answer a message; a `futures::Stream` of them. After an error, or `None`, it is over.
///
/// Dropping it cancels the stream: its producer ends at the next item.
#[must_use = "dropping a stream cancels it"]
pub struct Replies<M: StreamMessage> {
    source: Source<M>,
    ended: oneshot::Receiver<Result<(), Failure>>,
    deadline: Option<Pin<Box<Sleep>>>,
    over: bool,
}

enum Source<M: StreamMessage> {
    Local(mpsc::Receiver<M::Item>),
    Remote {
        received: mpsc::Receiver<(M::Item, usize)>,
        credit: Credit,
        /// Kept until an item says that it was accepted.
        message: Option<M>,
        _forget: Forget,
    },
    /// The message was not accepted.
    Refused(Option<(M, super::Refusal)>),
}

impl<M: StreamMessage> Replies<M> {
    fn new(way: &Way, source: Source<M>, ended: oneshot::Receiver<Result<(), Failure>>) -> Self {
        Self { source, ended, deadline: way.sleep().map(Box::pin), over: false }
    }

    /// The next item; `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Result<M::Item, AskError<M>>> {
        std::future::poll_fn(|task| self.poll_item(task)).await
    }

    fn poll_item(&mut self, task: &mut Context<'_>) -> Poll<Option<Result<M::Item, AskError<M>>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(task).is_ready()
        {
            self.over = true;
            // Cancels it.
            self.source = Source::Refused(None);
            return Poll::Ready(Some(Err(AskError::Deadline)));
        }
        let next = match &mut self.source {
            Source::Local(received) => received.poll_recv(task),
            Source::Remote { received, credit, message, .. } => received.poll_recv(task).map(|next| {
                next.map(|(item, bytes)| {
                    *message = None;
                    credit.took(bytes);
                    item
                })
            }),
            Source::Refused(refused) => {
                self.over = true;
                let refused = refused
                    .take()
                    .map(|(message, reason)| Err(AskError::new(Failure::Refused(reason), Some(message))));
                return Poll::Ready(refused);
            }
        };
        match next {
            Poll::Ready(Some(item)) => Poll::Ready(Some(Ok(item))),
            // All items are taken: how did it end?
            Poll::Ready(None) => Pin::new(&mut self.ended).poll(task).map(|ended| {
                self.over = true;
                match ended.unwrap_or(Err(Failure::Stopped)) {
                    Ok(()) => None,
                    Err(failure) => Some(Err(AskError::new(failure, self.message()))),
                }
            }),
            Poll::Pending => Poll::Pending,
        }
    }

    fn message(&mut self) -> Option<M> {
        match &mut self.source {
            Source::Remote { message, .. } => message.take(),
            Source::Local(_) | Source::Refused(_) => None,
        }
    }
}

impl<M: StreamMessage> Unpin for Replies<M> {}

impl<M: StreamMessage> Stream for Replies<M> {
    type Item = Result<M::Item, AskError<M>>;

    fn poll_next(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_item(task)
    }
}

/// What the consumer has taken and the producer does not know yet.
struct Credit {
    conn: Arc<Conn>,
    call: u64,
    window: Window,
    items: u32,
    bytes: u32,
}

impl Credit {
    /// Notes an item, and tells the producer when half of the window is free again.
    fn took(&mut self, bytes: usize) {
        self.items += 1;
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.items >= self.window.items.div_ceil(2) || self.bytes >= self.window.bytes.div_ceil(2) {
            self.conn.grant(self.call, WireWindow { items: self.items, bytes: self.bytes });
            (self.items, self.bytes) = (0, 0);
        }
    }
}

/// Items as they come over the wire.
struct Received<T>(mpsc::Sender<(T, usize)>);

impl<T: Decode<()> + Send + 'static> Inlet for Received<T> {
    fn item(&self, payload: &[u8]) -> Result<(), Failure> {
        let item = from_bytes(payload).map_err(|error| Failure::Codec(error.to_string()))?;
        match self.0.try_send((item, payload.len())) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            // The channel is as wide as the window.
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(Failure::Codec("the peer sent more items than there was room for".into()))
            }
        }
    }
}

/// The end of a stream that comes over the wire.
struct End(oneshot::Sender<Result<(), Failure>>);

impl Waiter for End {
    fn reply(self: Box<Self>, _: &[u8]) {
        let _ = self.0.send(Ok(()));
    }

    fn fail(self: Box<Self>, failure: Failure) {
        let _ = self.0.send(Err(failure));
    }
}
