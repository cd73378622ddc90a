//! The mailbox of a registered actor: a bounded queue that refuses, and the pump that feeds it to the actor.
//!
//! actix's own mailbox stays for what an actor sends to itself. Messages that come through a handle use this one,
//! because it gives refused messages back, drops expired ones, and tells every asker how the actor ended.

mod answer;
mod envelope;
mod registry;

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Instant;

use actix::fut::ActorFuture;
use actix::{ActorContext, AsyncContext, Handler};
use futures_util::task::AtomicWaker;
use tokio::sync::watch;

use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::handle::{ActorId, Incarnation, Refusal, Refused};
use crate::mesh::MeshTable;
use crate::wire::answer::RemoteAnswer;
use crate::wire::frame::RemoteFailure;
use crate::wire::{from_bytes, name_hash};

use answer::Asker;
pub(crate) use answer::{Answer, Failure};
pub(crate) use envelope::panic_message;
use envelope::{Deliver, Envelope};
pub(crate) use registry::Registry;

/// Messages delivered before other work of the arbiter gets a turn.
const DELIVERIES_PER_POLL: usize = 64;

/// How a local actor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorEnd {
    /// It stopped by itself or was told to.
    Stopped,
    /// It panicked, with this message.
    Panicked(String),
}

/// Delivers one frame's payload to an actor.
pub(crate) type DeliverFn = fn(&Entry, &[u8], Option<Instant>, Option<RemoteAnswer>) -> Result<(), Refusal>;

/// Message id to delivery.
pub(crate) type Table = HashMap<u64, DeliverFn>;

/// The bounded queue. Not a channel: what is pushed after the end must be dropped at once, so that its asker hears it.
struct Mailbox<A> {
    queue: Mutex<Queue<A>>,
    capacity: usize,
    lifetime: Arc<Lifetime>,
}

type Queue<A> = VecDeque<Box<dyn Deliver<A>>>;

impl<A: RemoteActor> Mailbox<A> {
    fn lock(&self) -> MutexGuard<'_, Queue<A>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why one more message would be refused.
    fn refuses(&self, queue: &Queue<A>) -> Option<Refusal> {
        if self.lifetime.ended.load(Ordering::Acquire) {
            Some(Refusal::NoSuchActor)
        } else if queue.len() >= self.capacity {
            Some(Refusal::MailboxFull)
        } else {
            None
        }
    }

    /// Queues what `make` returns of `message`, or gives the message back.
    fn push<M>(&self, message: M, make: impl FnOnce(M) -> Box<dyn Deliver<A>>) -> Result<(), Refused<M>> {
        let mut queue = self.lock();
        if let Some(reason) = self.refuses(&queue) {
            return Err(Refused { message, reason });
        }
        let was_empty = queue.is_empty();
        queue.push_back(make(message));
        drop(queue);
        if was_empty {
            self.lifetime.pump.wake();
        }
        Ok(())
    }
}

/// One registered actor of this process.
pub(crate) struct Entry {
    pub(crate) id: ActorId,
    pub(crate) incarnation: Incarnation,
    pub(crate) type_name: &'static str,
    mailbox: Box<dyn Any + Send + Sync>,
    table: Table,
    /// What rounds of a mesh do with the actor's messages.
    pub(crate) mesh: MeshTable,
    lifetime: Arc<Lifetime>,
}

/// When and how an actor ends; outlives its entry.
struct Lifetime {
    /// Nothing more is accepted. Set before `end` is told and before the mailbox is emptied.
    ended: AtomicBool,
    end: watch::Sender<Option<ActorEnd>>,
    stop: AtomicBool,
    pump: AtomicWaker,
}

impl Lifetime {
    /// Records how the actor ended; the first word counts.
    fn end(&self, how: ActorEnd) {
        self.ended.store(true, Ordering::Release);
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(how);
            first
        });
    }

    fn failure(&self) -> Failure {
        match &*self.end.borrow() {
            None => Failure::NoReply,
            Some(ActorEnd::Stopped) => Failure::Stopped,
            Some(ActorEnd::Panicked(message)) => Failure::Panicked(message.clone()),
        }
    }
}

impl Entry {
    /// A mailbox for `A` and the pump to spawn into its context.
    pub(crate) fn new<A: RemoteActor>(
        id: ActorId,
        incarnation: Incarnation,
        capacity: usize,
        registry: &Arc<Registry>,
    ) -> (Arc<Self>, Pump<A>) {
        let lifetime = Arc::new(Lifetime {
            ended: AtomicBool::new(false),
            end: watch::Sender::new(None),
            stop: AtomicBool::new(false),
            pump: AtomicWaker::new(),
        });
        let queue = Mutex::new(VecDeque::new());
        let mailbox = Arc::new(Mailbox::<A> { queue, capacity: capacity.max(1), lifetime: lifetime.clone() });
        let (table, mesh) = Accepts::<A>::tables();
        let entry = Arc::new(Self {
            id,
            incarnation,
            type_name: A::TYPE,
            mailbox: Box::new(mailbox.clone()),
            table,
            mesh,
            lifetime: lifetime.clone(),
        });
        let pump = Pump { mailbox, lifetime, id, registry: Arc::downgrade(registry) };
        (entry, pump)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lifetime.ended.load(Ordering::Acquire)
    }

    pub(crate) fn record_end(&self, how: ActorEnd) {
        self.lifetime.end(how);
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<ActorEnd>> {
        self.lifetime.end.subscribe()
    }

    /// Asks the actor to stop; what waits in its mailbox is dropped.
    pub(crate) fn stop(&self) {
        self.lifetime.stop.store(true, Ordering::Release);
        self.lifetime.pump.wake();
    }

    /// Puts a message into the mailbox or gives it back.
    pub(crate) fn offer<A, M>(
        &self,
        message: M,
        expires_at: Option<Instant>,
        answer: Answer<M::Result>,
    ) -> Result<(), Refused<M>>
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage,
    {
        let accepted = self.table.contains_key(&const { name_hash(M::NAME) });
        let Some(mailbox) = self.mailbox_of::<A>().filter(|_| accepted) else {
            return Err(Refused { message, reason: Refusal::UnknownMessage });
        };
        let make = |message| -> Box<dyn Deliver<A>> {
            let asker = Asker { answer, lifetime: self.lifetime.clone() };
            Box::new(Envelope { message, expires_at, asker })
        };
        mailbox.push(message, make)
    }

    fn mailbox_of<A: RemoteActor>(&self) -> Option<&Mailbox<A>> {
        self.mailbox.downcast_ref::<Arc<Mailbox<A>>>().map(|mailbox| &**mailbox)
    }

    /// Delivers a frame that came over the wire. A refusal has been told to the asker, if there is one.
    pub(crate) fn deliver(
        &self,
        message: u64,
        payload: &[u8],
        expires_at: Option<Instant>,
        answer: Option<RemoteAnswer>,
    ) -> Result<(), Refusal> {
        match self.table.get(&message) {
            Some(deliver) => deliver(self, payload, expires_at, answer),
            None => refuse(answer, Refusal::UnknownMessage),
        }
    }

    /// Puts an encoded message into the mailbox, for senders that do not know the type of the actor.
    pub(crate) fn offer_encoded(&self, message: &str, payload: &[u8]) -> Result<(), Refusal> {
        let deliver = self.table.get(&name_hash(message)).ok_or(Refusal::UnknownMessage)?;
        deliver(self, payload, None, None)
    }
}

/// Tells a remote asker, if there is one, that the message was not accepted. Always an error.
pub(crate) fn refuse(answer: Option<RemoteAnswer>, reason: Refusal) -> Result<(), Refusal> {
    if let Some(answer) = answer {
        answer.refuse(&reason);
    }
    Err(reason)
}

/// The entry of a `Table` for actor `A` and message `M`: decode, then into the mailbox.
pub(crate) fn deliver_frame<A, M>(
    entry: &Entry,
    payload: &[u8],
    expires_at: Option<Instant>,
    answer: Option<RemoteAnswer>,
) -> Result<(), Refusal>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage,
{
    let mailbox = entry.mailbox_of::<A>().expect("an entry's table is of its actor");
    // Asked first, because a full mailbox should not cost the decoding.
    let refused = mailbox.refuses(&mailbox.lock());
    if let Some(reason) = refused {
        return refuse(answer, reason);
    }
    match from_bytes::<M>(payload) {
        Ok(message) => {
            let mut answer = answer.map_or(Answer::None, Answer::Remote);
            let make = |message| -> Box<dyn Deliver<A>> {
                let answer = std::mem::replace(&mut answer, Answer::None);
                Box::new(Envelope {
                    message,
                    expires_at,
                    asker: Asker { answer, lifetime: entry.lifetime.clone() },
                })
            };
            let pushed = mailbox.push(message, make);
            let refused = pushed.map_err(|refused| refused.reason);
            if let (Err(reason), Answer::Remote(answer)) = (&refused, answer) {
                answer.refuse(reason);
            }
            refused
        }
        Err(error) => {
            tracing::warn!(actor = %entry.id, message = M::NAME, %error, "a message does not decode");
            if let Some(answer) = answer {
                answer.fail(&RemoteFailure::Codec(error.to_string()));
            }
            Err(Refusal::Unsendable(error.to_string()))
        }
    }
}

/// Runs inside the actor's context and hands it one message after the other. Its drop is the end of the actor.
pub(crate) struct Pump<A: RemoteActor> {
    mailbox: Arc<Mailbox<A>>,
    lifetime: Arc<Lifetime>,
    id: ActorId,
    registry: Weak<Registry>,
}

impl<A: RemoteActor> ActorFuture<A> for Pump<A> {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        actor: &mut A,
        ctx: &mut actix::Context<A>,
        task: &mut Context<'_>,
    ) -> Poll<()> {
        let this = self.get_mut();
        this.lifetime.pump.register(task.waker());
        let mut left = DELIVERIES_PER_POLL;
        // `waiting` is also true once the actor stops.
        while !ctx.waiting() {
            // Taken, because the actor may refuse to stop.
            if this.lifetime.stop.swap(false, Ordering::AcqRel) {
                ctx.stop();
                return Poll::Pending;
            }
            if left == 0 {
                task.waker().wake_by_ref();
                return Poll::Pending;
            }
            left -= 1;
            let next = this.mailbox.lock().pop_front();
            match next {
                Some(delivery) => delivery.deliver(actor, ctx),
                None => return Poll::Pending,
            }
        }
        Poll::Pending
    }
}

impl<A: RemoteActor> Drop for Pump<A> {
    fn drop(&mut self) {
        let how = match std::thread::panicking() {
            true => ActorEnd::Panicked("a panic outside the message handlers".to_owned()),
            false => ActorEnd::Stopped,
        };
        // Before the queue empties, so that the askers in it hear the cause.
        self.lifetime.end(how);
        let left = std::mem::take(&mut *self.mailbox.lock());
        drop(left);
        if let Some(registry) = self.registry.upgrade() {
            registry.remove(self.id, &self.lifetime);
        }
    }
}
