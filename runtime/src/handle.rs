//! Addresses and typed handles: `ask` and `tell`, wherever the actor lives.
//!
//! A handle to an actor of this process delivers straight into its mailbox, without encoding. Otherwise the message
//! goes over the connection to the actor's process. Delivery is at most once; a message that was certainly not
//! accepted comes back in the error.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use actix::Handler;
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::actor::{RemoteActor, WireMessage};
use crate::mailbox::{Answer, Entry, Failure};
use crate::system::System;
use crate::wire::conn::Waiter;
use crate::wire::frame::CallHead;
use crate::wire::link::Link;
use crate::wire::{from_bytes, name_hash};

/// Identifies an actor in the whole cluster, over all its incarnations: a hash of its name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ActorId(pub u64);

impl ActorId {
    /// The head, in the head's process.
    pub const HEAD: Self = Self::named("heliostat/head");
    /// The node agent, in its process.
    pub const NODE: Self = Self::named("heliostat/node");
    /// The host of a worker process, in that process.
    pub const WORKER: Self = Self::named("heliostat/worker");

    /// The id of the actor with that name.
    pub const fn named(name: &str) -> Self {
        Self(name_hash(name))
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::HEAD => f.write_str("head"),
            Self::NODE => f.write_str("node"),
            Self::WORKER => f.write_str("worker"),
            Self(id) => write!(f, "{id:016x}"),
        }
    }
}

/// Counts the lives of one actor. A message for an earlier one is refused.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// In an address: whichever incarnation is there. Only for actors at well-known ids.
    pub const ANY: Self = Self(0);
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identifies one run of one process.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ProcessId(pub u64);

impl ProcessId {
    /// In an address: whichever process listens at the endpoint.
    pub const ANY: Self = Self(0);

    /// A fresh id.
    pub fn random() -> Self {
        Self(rand::random_range(1..=u64::MAX))
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Address of one incarnation of an actor. It may be sent in messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct ActorAddr {
    /// Which actor.
    pub actor: ActorId,
    /// Which of its lives.
    pub incarnation: Incarnation,
    /// The process it lives in.
    pub process: ProcessId,
    /// Where that process listens, `host:port`.
    pub endpoint: String,
}

impl fmt::Display for ActorAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}@{}", self.actor, self.incarnation, self.endpoint)
    }
}

/// Why a message was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The actor has as many messages waiting as it may.
    #[error("the actor's mailbox is full")]
    MailboxFull,
    /// The process has no such actor; it may have stopped.
    #[error("no such actor in the process")]
    NoSuchActor,
    /// The actor was restarted since the address was taken.
    #[error("the address is of another incarnation of the actor")]
    WrongIncarnation,
    /// Another process took over the endpoint.
    #[error("another process listens at the endpoint")]
    WrongProcess,
    /// The message does not stand in the actor's table of messages.
    #[error("the actor does not accept this message")]
    UnknownMessage,
    /// Too many bytes already wait to be sent to the peer.
    #[error("the queue to the peer is full")]
    QueueFull,
    /// No connection could be made.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The message is larger than a frame may be, or cannot be encoded at all.
    #[error("cannot be sent: {0}")]
    Unsendable(String),
}

impl Refusal {
    /// Whether the same message to the same address may be accepted later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::MailboxFull | Self::QueueFull | Self::Unreachable(_) => true,
            Self::NoSuchActor
            | Self::WrongIncarnation
            | Self::WrongProcess
            | Self::UnknownMessage
            | Self::Unsendable(_) => false,
        }
    }

    pub(crate) fn code(&self) -> (u8, &str) {
        match self {
            Self::MailboxFull => (1, ""),
            Self::NoSuchActor => (2, ""),
            Self::WrongIncarnation => (3, ""),
            Self::WrongProcess => (4, ""),
            Self::UnknownMessage => (5, ""),
            Self::QueueFull => (6, ""),
            Self::Unreachable(why) => (7, why),
            Self::Unsendable(why) => (8, why),
        }
    }

    pub(crate) fn from_code(code: u8, text: &str) -> Option<Self> {
        Some(match code {
            1 => Self::MailboxFull,
            2 => Self::NoSuchActor,
            3 => Self::WrongIncarnation,
            4 => Self::WrongProcess,
            5 => Self::UnknownMessage,
            6 => Self::QueueFull,
            7 => Self::Unreachable(text.to_owned()),
            8 => Self::Unsendable(text.to_owned()),
            _ => return None,
        })
    }
}

/// A message that was not accepted, with the reason.
#[derive(thiserror::Error)]
#[error("{} refused: {reason}", std::any::type_name::<M>())]
pub struct Refused<M> {
    /// The message, as it was given.
    pub message: M,
    /// Why.
    pub reason: Refusal,
}

impl<M> fmt::Debug for Refused<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why an `ask` has no answer.
///
/// Only `Refused` says that the actor certainly did not see the message.
#[derive(thiserror::Error)]
pub enum AskError<M> {
    /// The message was not accepted; here it is again.
    #[error(transparent)]
    Refused(Refused<M>),
    /// The deadline passed. The actor may or may not have handled the message.
    #[error("no answer to {} before the deadline", std::any::type_name::<M>())]
    Deadline,
    /// The connection to the actor's process broke while the message was on its way.
    #[error("lost the process that was asked: {0}")]
    PeerLost(String),
    /// The actor stopped before it answered.
    #[error("the actor stopped before it answered")]
    Stopped,
    /// The actor panicked before it answered.
    #[error("the actor panicked: {0}")]
    Panicked(String),
    /// The handler dropped its reply.
    #[error("the handler of {} gave no reply", std::any::type_name::<M>())]
    NoReply,
    /// The answer, or the message at its receiver, did not decode.
    #[error("codec: {0}")]
    Codec(String),
}

impl<M> fmt::Debug for AskError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<M> AskError<M> {
    /// The message, where it came back.
    pub fn into_message(self) -> Option<M> {
        match self {
            Self::Refused(refused) => Some(refused.message),
            _ => None,
        }
    }

    fn new(failure: Failure, message: Option<M>) -> Self {
        match (failure, message) {
            (Failure::Refused(reason), Some(message)) => Self::Refused(Refused { message, reason }),
            (Failure::Refused(reason), None) => Self::PeerLost(reason.to_string()),
            (Failure::Expired, _) => Self::Deadline,
            (Failure::Stopped, _) => Self::Stopped,
            (Failure::Panicked(message), _) => Self::Panicked(message),
            (Failure::NoReply, _) => Self::NoReply,
            (Failure::Codec(why), _) => Self::Codec(why),
            (Failure::PeerLost(why), _) => Self::PeerLost(why),
        }
    }
}

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
        self.deadline.map(|deadline| Instant::now() + deadline)
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
