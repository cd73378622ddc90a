//! The way to an actor, whatever its type: straight into its mailbox or over a connection, with a deadline.
//!
//! It knows nothing of message types beyond how they are encoded.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::{ActorAddr, Refusal};
use crate::mailbox::{Entry, Failure};
use crate::system::System;
use crate::wire::calls::{Waiter, Waiting};
use crate::wire::conn::Forget;
use crate::wire::frame::{CallHead, Want};
use crate::wire::from_bytes;
use crate::wire::link::Link;

/// Where an actor is and how long a message to it is good for. Cheap to clone.
#[derive(Clone)]
pub(super) struct Way {
    target: Arc<Target>,
    deadline: Option<Duration>,
    cancel: Option<CancellationToken>,
    pending: Option<(Arc<Semaphore>, usize)>,
}

struct Target {
    system: System,
    addr: ActorAddr,
    place: Place,
}

/// Where the actor is.
pub(super) enum Place {
    /// In this process; the entry is looked up once.
    Local(OnceLock<Arc<Entry>>),
    /// Behind a connection.
    Remote(Arc<Link>),
}

impl Way {
    pub(super) fn new(system: System, addr: ActorAddr) -> Self {
        let place = match system.is_here(&addr) {
            true => Place::Local(OnceLock::new()),
            false => Place::Remote(system.link(&addr.endpoint)),
        };
        Self { target: Arc::new(Target { system, addr, place }), deadline: None, cancel: None, pending: None }
    }

    pub(super) fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }

    pub(super) fn with_cancel(&self, cancel: CancellationToken) -> Self {
        Self { cancel: Some(cancel), ..self.clone() }
    }

    pub(super) fn with_max_pending(&self, max: usize) -> Self {
        Self { pending: Some((Arc::new(Semaphore::new(max)), max)), ..self.clone() }
    }

    /// Refuses an ask that is cancelled before it is sent, or is one too many. What is returned is held until it has
    /// its answer.
    pub(super) fn begin(&self) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
        if self.cancel.as_ref().is_some_and(CancellationToken::is_cancelled) {
            return Err(Refusal::Cancelled);
        }
        let Some((pending, max)) = &self.pending else { return Ok(None) };
        pending.clone().try_acquire_owned().map(Some).map_err(|_| Refusal::TooManyPending(*max as u64))
    }

    pub(super) fn system(&self) -> &System {
        &self.target.system
    }

    pub(super) fn addr(&self) -> &ActorAddr {
        &self.target.addr
    }

    pub(super) fn place(&self) -> &Place {
        &self.target.place
    }

    /// The actor, if it is in this process.
    pub(super) fn entry(&self, cached: &OnceLock<Arc<Entry>>) -> Result<Arc<Entry>, Refusal> {
        if let Some(entry) = cached.get()
            && !entry.has_ended()
        {
            return Ok(entry.clone());
        }
        let entry =
            self.target.system.registry().find(self.target.addr.actor, self.target.addr.incarnation)?;
        // An address of any incarnation may find another one later: then the cache misses, which is only slower.
        let _ = cached.set(entry.clone());
        Ok(entry)
    }

    /// Waits for an answer of this process.
    pub(super) async fn answer_here<T>(
        &self,
        answered: oneshot::Receiver<Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.within_limits(answered).await?.unwrap_or(Err(Failure::Stopped))
    }

    /// Sends a message over the connection. Not async, so that the future of an ask does not hold a reference to it.
    pub(super) fn ask_over<T>(&self, link: &Link, id: u64, message: &impl Encode) -> Result<Asked<T>, Failure>
    where
        T: Decode<()> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let conn = link.conn();
        let waiting = Waiting { waiter: Box::new(Asking::<T>(answer)), inlet: None };
        let head = self.head(id, Want::Answer);
        let call = conn.call(&head, message, Some(waiting)).map_err(Failure::Refused)?;
        Ok(Asked { answered, _forget: conn.forget_on_drop(call) })
    }

    /// Waits for the answer that comes over the connection.
    pub(super) async fn answer_over<T>(&self, asked: Result<Asked<T>, Failure>) -> Result<T, Failure> {
        let Asked { answered, _forget } = asked?;
        match self.within_limits(answered).await? {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::PeerLost("the connection closed".into())),
        }
    }

    /// Sends a message over the connection and waits for nothing.
    pub(super) fn tell_over(&self, link: &Link, id: u64, message: &impl Encode) -> Result<(), Refusal> {
        link.conn().call(&self.head(id, Want::Nothing), message, None).map(drop)
    }

    /// When a message that is sent now is not to be handled any more.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.deadline.and_then(|deadline| Instant::now().checked_add(deadline))
    }

    /// Awaits `future`, at most until the deadline and while it is not cancelled. Works outside a tokio context too.
    async fn within_limits<F: Future>(&self, future: F) -> Result<F::Output, Failure> {
        match &self.cancel {
            None => self.within_deadline(future).await,
            Some(cancel) => tokio::select! {
                biased;
                outcome = self.within_deadline(future) => outcome,
                () = cancel.cancelled() => Err(Failure::Cancelled),
            },
        }
    }

    async fn within_deadline<F: Future>(&self, future: F) -> Result<F::Output, Failure> {
        match self.deadline {
            None => Ok(future.await),
            Some(deadline) => {
                let timed = {
                    let _context = self.target.system.runtime().enter();
                    tokio::time::timeout(deadline, future)
                };
                timed.await.map_err(|_| Failure::Expired)
            }
        }
    }

    /// A timer that ends at the deadline, if there is one. Works outside a tokio context too.
    pub(super) fn sleep(&self) -> Option<tokio::time::Sleep> {
        let _context = self.target.system.runtime().enter();
        self.deadline.map(tokio::time::sleep)
    }

    /// Whom a message is for and until when.
    pub(super) fn head(&self, message: u64, want: Want) -> CallHead {
        let addr = &self.target.addr;
        CallHead {
            call: 0,
            actor: addr.actor.0,
            incarnation: addr.incarnation.0,
            process: addr.process.0,
            message,
            deadline_us: self.deadline.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX).max(1)),
            want,
        }
    }
}

/// An ask that was sent. Dropping it cancels it.
pub(super) struct Asked<T> {
    answered: oneshot::Receiver<Result<T, Failure>>,
    _forget: Forget,
}

/// The asker of a call over the wire.
struct Asking<T>(oneshot::Sender<Result<T, Failure>>);

impl<T: Decode<()> + Send + 'static> Waiter for Asking<T> {
    fn reply(self: Box<Self>, payload: &[u8]) {
        let _ = self.0.send(from_bytes(payload).map_err(|e| Failure::Codec(e.to_string())));
    }

    fn fail(self: Box<Self>, failure: Failure) {
        let _ = self.0.send(Err(failure));
    }
}
