//! The calls of one connection: who waits here for an answer of the peer, and what is known here of a call of the
//! peer that is being served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use super::frame::Window;
use crate::mailbox::Failure;

/// Who waits for the answer of a call. A stream's end is its answer.
pub(crate) trait Waiter: Send {
    fn reply(self: Box<Self>, payload: &[u8]);
    fn fail(self: Box<Self>, failure: Failure);
}

/// Where the items of a stream go.
pub(crate) trait Inlet: Send + Sync {
    /// Takes an item; a failure ends the stream.
    fn item(&self, payload: &[u8]) -> Result<(), Failure>;
}

/// A call to the peer that has no answer yet.
pub(crate) struct Waiting {
    pub(crate) waiter: Box<dyn Waiter>,
    pub(crate) inlet: Option<Arc<dyn Inlet>>,
}

/// A call of the peer that is being served: whether the asker still wants the answer, and what room it has for items.
pub(crate) struct Served {
    cancelled: AtomicBool,
    items: AtomicI64,
    bytes: AtomicI64,
    /// Of the one task that serves the call.
    server: AtomicWaker,
}

impl Served {
    pub(super) fn new(window: Window) -> Arc<Self> {
        Arc::new(Self {
            cancelled: AtomicBool::new(false),
            items: AtomicI64::new(window.items.into()),
            bytes: AtomicI64::new(window.bytes.into()),
            server: AtomicWaker::new(),
        })
    }

    /// Nobody waits for the answer any more.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.server.wake();
    }

    /// The asker has room for so much more.
    pub(super) fn grant(&self, window: Window) {
        self.items.fetch_add(window.items.into(), Ordering::AcqRel);
        self.bytes.fetch_add(window.bytes.into(), Ordering::AcqRel);
        self.server.wake();
    }

    pub(super) fn spend(&self, bytes: usize) {
        self.items.fetch_sub(1, Ordering::AcqRel);
        self.bytes.fetch_sub(i64::try_from(bytes).unwrap_or(i64::MAX), Ordering::AcqRel);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn poll_cancelled(&self, task: &mut Context<'_>) -> Poll<()> {
        self.server.register(task.waker());
        match self.is_cancelled() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// Ready when one more item may be sent, however large it is, or the call was cancelled.
    pub(crate) fn poll_room(&self, task: &mut Context<'_>) -> Poll<()> {
        let cancelled = self.poll_cancelled(task);
        match self.items.load(Ordering::Acquire) > 0 && self.bytes.load(Ordering::Acquire) > 0 {
            true => Poll::Ready(()),
            false => cancelled,
        }
    }
}
