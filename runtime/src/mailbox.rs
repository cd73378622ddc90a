//! The mailbox of a registered actor: a bounded queue that refuses, and the pump that feeds it to the actor.
//!
//! actix's own mailbox stays for what an actor sends to itself. Messages that come through a handle use this one,
//! because it gives refused messages back, drops expired ones, and tells every asker how the actor ended.

mod answer;
mod envelope;
mod lanes;
mod queue;
mod registry;
mod returned;
mod run;
mod stream;
mod table;

use std::any::{Any, TypeId};
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Instant;

use actix::fut::ActorFuture;
use actix::{ActorContext, AsyncContext, Handler};
use futures_util::task::AtomicWaker;
use tokio::sync::watch;

use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::handle::{ActorId, Incarnation, Refusal, Refused};
use crate::mesh::MeshTable;
use crate::panics::Panic;
use crate::system::home::Pulse;
use crate::wire::answer::RemoteAnswer;
use crate::wire::frame::Want;
use crate::wire::{from_bytes, name_hash};

use answer::Asker;
pub(crate) use answer::{Answer, Failure};
use envelope::Envelope;
pub(crate) use lanes::Limit;
use queue::Mailbox;
pub(crate) use registry::Registry;
pub(crate) use returned::ReturnTo;
pub(crate) use stream::Consumer;
use table::NotTaken;
pub(crate) use table::{JSON_CALL, JsonFrame, JsonText, Table, deliver_json, deliver_json_result};

/// Messages delivered before other work of the arbiter gets a turn.
const DELIVERIES_PER_POLL: usize = 64;

/// How a local actor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorEnd {
    /// It stopped by itself or was told to.
    Stopped,
    /// It panicked.
    Panicked(Panic),
}

/// A message that was not queued, with whoever waits for its answer.
struct Returned<M: WireMessage> {
    message: M,
    answer: Answer<M::Result>,
    reason: Refusal,
}

/// One registered actor of this process.
pub(crate) struct Entry {
    pub(crate) id: ActorId,
    pub(crate) incarnation: Incarnation,
    pub(crate) type_name: &'static str,
    mailbox: Box<dyn Any + Send + Sync>,
    table: Arc<Table>,
    lifetime: Arc<Lifetime>,
    /// The thread that is its own, if it has one.
    thread: OnceLock<(actix::ArbiterHandle, Arc<Pulse>)>,
}

/// When and how an actor ends; outlives its entry.
struct Lifetime {
    /// Nothing more is accepted. Set before `end` is told and before the mailbox is emptied.
    ended: AtomicBool,
    end: watch::Sender<Option<ActorEnd>>,
    stop: AtomicBool,
    /// Nothing more is accepted, and it stops when nothing is left to do.
    finishing: AtomicBool,
    /// Calls whose handlers have returned and whose answers are yet to come.
    at_work: AtomicUsize,
    pump: AtomicWaker,
    /// A panic of work beside the context, which is to go on in it.
    raised: Mutex<Option<Box<dyn Any + Send>>>,
    /// Wire id of the message that the handler has now; 0 for none.
    handling: AtomicU64,
}

/// A call has its answer yet to come, until this drops.
struct Work(Arc<Lifetime>);

impl Drop for Work {
    fn drop(&mut self) {
        if self.0.at_work.fetch_sub(1, Ordering::AcqRel) == 1 && self.0.finishing.load(Ordering::Acquire) {
            self.0.pump.wake();
        }
    }
}

/// A handler runs, until this drops.
struct Handling<'a>(&'a Lifetime);

impl Drop for Handling<'_> {
    fn drop(&mut self) {
        self.0.handling.store(0, Ordering::Relaxed);
    }
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

    /// Has a panic go on in the actor's context, which ends it.
    fn raise(&self, panic: Box<dyn Any + Send>) {
        *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        self.pump.wake();
    }

    /// Whether it was to finish, and has.
    fn is_finished(&self) -> bool {
        self.finishing.load(Ordering::Acquire) && self.at_work.load(Ordering::Acquire) == 0
    }

    /// A call has its answer yet to come, until what is returned drops.
    fn begin_work(self: &Arc<Self>) -> Work {
        self.at_work.fetch_add(1, Ordering::AcqRel);
        Work(self.clone())
    }

    /// Notes the message that a handler is given now.
    fn handling(&self, message: u64) -> Handling<'_> {
        self.handling.store(message, Ordering::Relaxed);
        Handling(self)
    }

    /// Waits until the actor has ended.
    async fn ended(&self) {
        // The sender lives as long as this.
        let _ = self.end.subscribe().wait_for(Option::is_some).await;
    }

    fn failure(&self) -> Failure {
        match &*self.end.borrow() {
            None => Failure::NoReply,
            Some(ActorEnd::Stopped) => Failure::Stopped,
            Some(ActorEnd::Panicked(panic)) => Failure::Panicked(panic.message.clone()),
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
            finishing: AtomicBool::new(false),
            at_work: AtomicUsize::new(0),
            pump: AtomicWaker::new(),
            raised: Mutex::default(),
            handling: AtomicU64::new(0),
        });
        let table = registry.table(TypeId::of::<A>(), Accepts::<A>::table);
        let mailbox = Arc::new(Mailbox::<A>::new(&table.limits(), capacity, lifetime.clone()));
        let entry = Arc::new(Self {
            id,
            incarnation,
            type_name: A::TYPE,
            mailbox: Box::new(mailbox.clone()),
            table,
            lifetime: lifetime.clone(),
            thread: OnceLock::new(),
        });
        let pump = Pump { mailbox, lifetime, id, registry: Arc::downgrade(registry) };
        (entry, pump)
    }

    /// What rounds of a mesh do with the actor's messages.
    pub(crate) fn mesh(&self) -> &MeshTable {
        &self.table.mesh
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lifetime.ended.load(Ordering::Acquire)
    }

    /// Notes that the actor lives on this thread and no other does.
    pub(crate) fn settle_on(&self, thread: actix::ArbiterHandle, pulse: Arc<Pulse>) {
        let _ = self.thread.set((thread, pulse));
    }

    /// The thread that is its own, if it has one.
    pub(crate) fn thread(&self) -> Option<&actix::ArbiterHandle> {
        self.own_thread().map(|(thread, _)| thread)
    }

    /// The same, with what tells whether it is busy.
    pub(crate) fn own_thread(&self) -> Option<&(actix::ArbiterHandle, Arc<Pulse>)> {
        self.thread.get()
    }

    /// Name of the message that its handler has at this moment.
    pub(crate) fn handling(&self) -> Option<&'static str> {
        self.table.name(self.lifetime.handling.load(Ordering::Relaxed))
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

    /// Asks the actor to take nothing new and to stop when it has handled what it has.
    pub(crate) fn finish(&self) {
        self.lifetime.finishing.store(true, Ordering::Release);
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
        let queued = self.enqueue::<A, M>(message, expires_at, answer);
        queued.map_err(|Returned { message, reason, .. }| Refused { message, reason })
    }

    /// Puts a message into the mailbox or gives it back, with whoever waits for its answer.
    fn enqueue<A, M>(
        &self,
        message: M,
        expires_at: Option<Instant>,
        answer: Answer<M::Result>,
    ) -> Result<(), Returned<M>>
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage,
    {
        let run = self.table.run::<A, M>(const { name_hash(M::NAME) });
        let (Some(mailbox), Some(run)) = (self.mailbox_of::<A>(), run) else {
            return Err(Returned { message, answer, reason: Refusal::UnknownMessage });
        };
        let asker = Asker { answer, lifetime: self.lifetime.clone() };
        let (run, lane) = run;
        mailbox.push(lane, Box::new(Envelope { message, expires_at, asker, run })).map_err(
            |(envelope, reason)| {
                let Envelope { message, asker, .. } = *envelope;
                Returned { message, answer: asker.into_answer(), reason }
            },
        )
    }

    /// Puts a message in JSON into the mailbox, or says why not and who is to hear of it.
    pub(crate) fn offer_json(
        &self,
        message: &str,
        text: &[u8],
        expires_at: Option<Instant>,
        answer: Answer<JsonText>,
    ) -> Result<(), NotTaken> {
        match self.table.json(message) {
            Ok(deliver) => deliver(self, text, expires_at, answer),
            Err(reason) => Err((reason, answer)),
        }
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
        let want = answer.as_ref().map_or(Want::Nothing, RemoteAnswer::want);
        match self.table.deliver(message, want) {
            Some(deliver) => deliver(self, payload, expires_at, answer),
            None => refuse(answer, Refusal::UnknownMessage),
        }
    }

    /// Puts an encoded message into the mailbox, for senders that do not know the type of the actor.
    pub(crate) fn offer_encoded(&self, message: &str, payload: &[u8]) -> Result<(), Refusal> {
        let deliver = self.table.deliver(name_hash(message), Want::Nothing).ok_or(Refusal::UnknownMessage)?;
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
fn deliver_frame<A, M>(
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
    let lane = entry.table.lane(const { name_hash(M::NAME) });
    if let Some(reason) = mailbox.refuses(lane) {
        return refuse(answer, reason);
    }
    match from_bytes::<M>(payload) {
        Ok(message) => {
            let answer = answer.map_or(Answer::None, Answer::Remote);
            match entry.enqueue::<A, M>(message, expires_at, answer) {
                Ok(()) => Ok(()),
                Err(Returned { answer: Answer::Remote(answer), reason, .. }) => refuse(Some(answer), reason),
                Err(Returned { reason, .. }) => Err(reason),
            }
        }
        Err(error) => {
            tracing::warn!(actor = %entry.id, message = M::NAME, %error, "a message does not decode");
            refuse(answer, Refusal::Malformed(error.to_string()))
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
        let raised = this.lifetime.raised.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = raised {
            resume_unwind(panic);
        }
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
            match this.mailbox.pop() {
                Some((delivery, slot)) => delivery.deliver(actor, ctx, slot),
                None => {
                    if this.lifetime.is_finished() {
                        ctx.stop();
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Pending
    }
}

impl<A: RemoteActor> Drop for Pump<A> {
    fn drop(&mut self) {
        let how = match std::thread::panicking() {
            true => ActorEnd::Panicked("a panic outside the message handlers".into()),
            false => ActorEnd::Stopped,
        };
        // Before the queue empties, so that the askers in it hear the cause.
        self.lifetime.end(how);
        drop(self.mailbox.drain());
        if let Some(registry) = self.registry.upgrade() {
            registry.remove(self.id, &self.lifetime);
        }
    }
}
