//! The way to an actor, whatever its type: straight into its mailbox or over a connection, with a deadline.
//!
//! It knows nothing of message types beyond how they are encoded.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use tokio::sync::oneshot;

use super::{ActorAddr, Refusal};
use crate::mailbox::{Entry, Failure};
use crate::system::System;
use crate::wire::conn::{Forget, Waiter};
use crate::wire::frame::CallHead;
use crate::wire::from_bytes;
use crate::wire::link::Link;

/// Where an actor is and how long a message to it is good for. Cheap to clone.
#[derive(Clone)]
pub(super) struct Way {
    target: Arc<Target>,
    deadline: Option<Duration>,
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
        Self { target: Arc::new(Target { system, addr, place }), deadline: None }
    }

    pub(super) fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
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
        self.within_deadline(answered)
            .await
            .unwrap_or(Ok(Err(Failure::Expired)))
            .unwrap_or(Err(Failure::Stopped))
    }

    /// Sends a message over the connection. Not async, so that the future of an ask does not hold a reference to it.
    pub(super) fn ask_over<T>(&self, link: &Link, id: u64, message: &impl Encode) -> Result<Asked<T>, Failure>
    where
        T: Decode<()> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let conn = link.conn();
        let call =
            conn.ask(&self.head(id), message, Box::new(Waiting::<T>(answer))).map_err(Failure::Refused)?;
        Ok(Asked { answered, _forget: conn.forget_on_drop(call) })
    }

    /// Waits for the answer that comes over the connection.
    pub(super) async fn answer_over<T>(&self, asked: Result<Asked<T>, Failure>) -> Result<T, Failure> {
        // The call is forgotten when this future is dropped or the deadline passes.
        let Asked { answered, _forget } = asked?;
        match self.within_deadline(answered).await {
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(Failure::PeerLost("the connection closed".into())),
            None => Err(Failure::Expired),
        }
    }

    /// Sends a message over the connection and waits for nothing.
    pub(super) fn tell_over(&self, link: &Link, id: u64, message: &impl Encode) -> Result<(), Refusal> {
        link.conn().tell(&self.head(id), message)
    }

    /// When a message that is sent now is not to be handled any more.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.deadline.and_then(|deadline| Instant::now().checked_add(deadline))
    }

    /// Awaits `future`, at most until the deadline. Works outside a tokio context too.
    async fn within_deadline<F: Future>(&self, future: F) -> Option<F::Output> {
        match self.deadline {
            None => Some(future.await),
            Some(deadline) => {
                let timed = {
                    let _context = self.target.system.runtime().enter();
                    tokio::time::timeout(deadline, future)
                };
                timed.await.ok()
            }
        }
    }

    fn head(&self, message: u64) -> CallHead {
        let addr = &self.target.addr;
        CallHead {
            call: 0,
            actor: addr.actor.0,
            incarnation: addr.incarnation.0,
            process: addr.process.0,
            message,
            deadline_us: self.deadline.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX).max(1)),
        }
    }
}

/// An ask that was sent.
pub(super) struct Asked<T> {
    answered: oneshot::Receiver<Result<T, Failure>>,
    _forget: Forget,
}

/// The asker of a call over the wire.
struct Waiting<T>(oneshot::Sender<Result<T, Failure>>);

impl<T: Decode<()> + Send + 'static> Waiter for Waiting<T> {
    fn reply(self: Box<Self>, payload: &[u8]) {
        let _ = self.0.send(from_bytes(payload).map_err(|e| Failure::Codec(e.to_string())));
    }

    fn fail(self: Box<Self>, failure: Failure) {
        let _ = self.0.send(Err(failure));
    }
}
