//! Addresses and typed handles: `ask` and `tell`, wherever the actor lives.
//!
//! A handle to an actor of this process delivers straight into its mailbox, without encoding. Otherwise the message
//! goes over the connection to the actor's process. Delivery is at most once; a message that was certainly not
//! accepted comes back in the error.

mod addr;
mod error;

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use actix::Handler;
use bincode::Decode;
use tokio::sync::oneshot;

use crate::actor::{RemoteActor, WireMessage};
use crate::mailbox::{Answer, Entry, Failure};
use crate::system::System;
use crate::wire::conn::Waiter;
use crate::wire::frame::CallHead;
use crate::wire::link::Link;
use crate::wire::{from_bytes, name_hash};

pub use addr::{ActorAddr, ActorId, Incarnation, ProcessId};
pub use error::{AskError, Refusal, Refused};

/// A typed handle to an actor. Cheap to clone; usable from any thread.
pub struct Handle<A> {
    target: Arc<Target>,
    deadline: Option<Duration>,
    actor: PhantomData<fn() -> A>,
}

struct Target {
    system: System,
    addr: ActorAddr,
    place: Place,
}

/// Where the actor of a handle is.
enum Place {
    /// In this process; the entry is looked up once.
    Local(OnceLock<Arc<Entry>>),
    /// Behind a connection.
    Remote(Arc<Link>),
}

impl<A> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self { target: self.target.clone(), deadline: self.deadline, actor: PhantomData }
    }
}

impl<A> fmt::Debug for Handle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.target.addr)
    }
}

impl<A> Handle<A> {
    pub(crate) fn new(system: System, addr: ActorAddr) -> Self {
        let place = match system.is_here(&addr) {
            true => Place::Local(OnceLock::new()),
            false => Place::Remote(system.link(&addr.endpoint)),
        };
        Self { target: Arc::new(Target { system, addr, place }), deadline: None, actor: PhantomData }
    }

    /// The address that the handle was made for.
    pub fn addr(&self) -> &ActorAddr {
        &self.target.addr
    }

    /// The same actor, but each ask or tell is good for `deadline` only: the asker gets `AskError::Deadline` after it,
    /// and a message that is not handled by then is dropped.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }
}

impl<A: RemoteActor> Handle<A> {
    /// Sends a message and waits for its answer.
    ///
    /// Without a deadline it waits as long as the actor and its process live. Dropping the future forgets the answer;
    /// the message may be handled nevertheless.
    pub async fn ask<M>(&self, message: M) -> Result<M::Result, AskError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        match &self.target.place {
            Place::Local(cached) => self.ask_local(cached, message).await,
            Place::Remote(link) => self.ask_remote(link, message).await,
        }
    }

    /// Sends a message and waits for nothing. `Ok` means that it is on its way, not that it arrives.
    ///
    /// Needs no async context. Messages of one thread to one actor arrive in the order they were sent.
    pub fn tell<M>(&self, message: M) -> Result<(), Refused<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        match &self.target.place {
            Place::Local(cached) => match self.entry(cached) {
                Ok(entry) => entry.offer::<A, M>(message, self.expires_at(), Answer::None),
                Err(reason) => Err(Refused { message, reason }),
            },
            Place::Remote(link) => {
                let sent = link.conn().tell(&self.head::<M>(), &message);
                sent.map_err(|reason| Refused { message, reason })
            }
        }
    }

    async fn ask_local<M>(&self, cached: &OnceLock<Arc<Entry>>, message: M) -> Result<M::Result, AskError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let entry = match self.entry(cached) {
            Ok(entry) => entry,
            Err(reason) => return Err(AskError::Refused(Refused { message, reason })),
        };
        let (answer, answered) = oneshot::channel();
        entry.offer::<A, M>(message, self.expires_at(), Answer::Local(answer)).map_err(AskError::Refused)?;
        match self.within_deadline(answered).await {
            Some(Ok(Ok(value))) => Ok(value),
            Some(Ok(Err(failure))) => Err(AskError::new(failure, None)),
            Some(Err(_)) => Err(AskError::Stopped),
            None => Err(AskError::Deadline),
        }
    }

    async fn ask_remote<M>(&self, link: &Link, message: M) -> Result<M::Result, AskError<M>>
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let (answer, answered) = oneshot::channel();
        let conn = link.conn();
        let call = match conn.ask(&self.head::<M>(), &message, Box::new(Waiting::<M::Result>(answer))) {
            Ok(call) => call,
            Err(reason) => return Err(AskError::Refused(Refused { message, reason })),
        };
        // Forgets the call when this future is dropped or the deadline passes.
        let _forget = conn.forget_on_drop(call);
        match self.within_deadline(answered).await {
            Some(Ok(Ok(value))) => Ok(value),
            Some(Ok(Err(failure))) => Err(AskError::new(failure, Some(message))),
            Some(Err(_)) => Err(AskError::PeerLost("the connection closed".into())),
            None => Err(AskError::Deadline),
        }
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

    fn entry(&self, cached: &OnceLock<Arc<Entry>>) -> Result<Arc<Entry>, Refusal> {
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

    fn expires_at(&self) -> Option<Instant> {
        self.deadline.and_then(|deadline| Instant::now().checked_add(deadline))
    }

    fn head<M: WireMessage>(&self) -> CallHead {
        let addr = &self.target.addr;
        CallHead {
            call: 0,
            actor: addr.actor.0,
            incarnation: addr.incarnation.0,
            process: addr.process.0,
            message: const { name_hash(M::NAME) },
            deadline_us: self.deadline.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX).max(1)),
        }
    }
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
