//! What becomes of a message whose asker is gone.

use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::Duration;

use actix::fut::ActorFutureExt;
use actix::{Actor, Context, Handler, Message, ResponseActFuture, ResponseFuture, WrapFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{AskError, Handle, Refusal};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Rig, soon};

/// What the actor did.
#[derive(Debug, PartialEq)]
enum Event {
    Begun(u32),
    /// The work was dropped before its end.
    Dropped(u32),
    Ended(u32),
}

type Events = mpsc::UnboundedSender<Event>;

struct Worker {
    events: Events,
    release: Arc<Notify>,
    hold: blocking::Receiver<()>,
}

impl Actor for Worker {
    type Context = Context<Self>;
}

impl RemoteActor for Worker {
    const TYPE: &'static str = "worker";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_cancellable::<Work>().accept_cancellable_act::<WorkAct>();
        m.accept::<Plain>().accept::<Hold>().accept::<Ping>();
    }
}

macro_rules! message {
    ($name:ident, $wire:literal) => {
        #[derive(Debug, PartialEq, Message, Encode, Decode)]
        #[rtype(result = "()")]
        struct $name(u32);

        impl WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}

message!(Work, "work");
message!(WorkAct, "work_act");
message!(Plain, "plain");
message!(Hold, "hold");
message!(Ping, "ping");

/// Says how it ends.
struct Guard {
    number: u32,
    events: Events,
    ended: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let event = if self.ended { Event::Ended(self.number) } else { Event::Dropped(self.number) };
        let _ = self.events.send(event);
    }
}

impl Worker {
    fn work(&self, number: u32) -> impl Future<Output = ()> + use<> {
        self.events.send(Event::Begun(number)).unwrap();
        let guard = Guard { number, events: self.events.clone(), ended: false };
        let release = self.release.clone();
        async move {
            let mut guard = guard;
            release.notified().await;
            guard.ended = true;
            drop(guard);
        }
    }
}

impl Handler<Work> for Worker {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, Work(number): Work, _: &mut Context<Self>) -> Self::Result {
        Box::pin(self.work(number))
    }
}

impl Handler<WorkAct> for Worker {
    type Result = ResponseActFuture<Self, ()>;
    fn handle(&mut self, WorkAct(number): WorkAct, _: &mut Context<Self>) -> Self::Result {
        Box::pin(self.work(number).into_actor(self).map(|(), _, _| ()))
    }
}

impl Handler<Plain> for Worker {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, Plain(number): Plain, _: &mut Context<Self>) -> Self::Result {
        Box::pin(self.work(number))
    }
}

impl Handler<Hold> for Worker {
    type Result = ();
    fn handle(&mut self, Hold(number): Hold, _: &mut Context<Self>) {
        self.events.send(Event::Begun(number)).unwrap();
        self.hold.recv().unwrap();
    }
}

impl Handler<Ping> for Worker {
    type Result = ();
    fn handle(&mut self, Ping(number): Ping, _: &mut Context<Self>) {
        self.events.send(Event::Begun(number)).unwrap();
    }
}

struct Stage {
    rig: Rig,
    events: mpsc::UnboundedReceiver<Event>,
    release: Arc<Notify>,
    /// Lets a `Hold` go on.
    unhold: blocking::Sender<()>,
}

async fn stage(capacity: usize) -> Stage {
    let (told, events) = mpsc::unbounded_channel();
    let (unhold, hold) = blocking::channel();
    let release = Arc::new(Notify::new());
    let worker = Worker { events: told, release: release.clone(), hold };
    Stage { rig: Rig::start(capacity, move || worker).await, events, release, unhold }
}

impl Stage {
    async fn expect(&mut self, event: Event) {
        assert_eq!(soon(self.events.recv()).await, Some(event));
    }
}

/// Asks in the background.
fn ask<M>(handle: &Handle<Worker>, message: M) -> tokio::task::JoinHandle<Result<(), AskError<M>>>
where
    M: WireMessage<Result = ()>,
    Worker: Handler<M>,
{
    let handle = handle.clone();
    tokio::spawn(async move { handle.ask(message).await })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_an_ask_ends_its_work() {
    let mut stage = stage(16).await;
    for handle in stage.rig.handles() {
        let asked = ask(&handle, Work(1));
        stage.expect(Event::Begun(1)).await;
        asked.abort();
        stage.expect(Event::Dropped(1)).await;
        let asked = ask(&handle, WorkAct(2));
        stage.expect(Event::Begun(2)).await;
        asked.abort();
        stage.expect(Event::Dropped(2)).await;
        // Not dropped, it ends.
        let asked = ask(&handle, WorkAct(3));
        stage.expect(Event::Begun(3)).await;
        stage.release.notify_one();
        soon(asked).await.unwrap().unwrap();
        stage.expect(Event::Ended(3)).await;
        // What was not accepted as cancellable goes on.
        let asked = ask(&handle, Plain(4));
        stage.expect(Event::Begun(4)).await;
        asked.abort();
        stage.rig.pass().await;
        stage.release.notify_one();
        stage.expect(Event::Ended(4)).await;
        // So does the work of a tell.
        handle.tell(Work(5)).unwrap();
        stage.expect(Event::Begun(5)).await;
        stage.release.notify_one();
        stage.expect(Event::Ended(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_message_of_a_dropped_ask_is_not_handled() {
    let mut stage = stage(16).await;
    for handle in stage.rig.handles() {
        handle.tell(Hold(0)).unwrap();
        stage.expect(Event::Begun(0)).await;
        let asked = ask(&handle, Ping(1));
        stage.rig.pass().await;
        asked.abort();
        assert!(asked.await.unwrap_err().is_cancelled());
        stage.rig.pass().await;
        stage.unhold.send(()).unwrap();
        soon(handle.ask(Ping(2))).await.unwrap();
        stage.expect(Event::Begun(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_messages_make_room_in_a_full_mailbox() {
    let mut stage = stage(2).await;
    for handle in stage.rig.handles() {
        handle.tell(Hold(0)).unwrap();
        stage.expect(Event::Begun(0)).await;
        let asked = [ask(&handle, Ping(1)), ask(&handle, Ping(2))];
        stage.rig.pass().await;
        stage.rig.pass().await;
        for asked in asked {
            asked.abort();
            assert!(asked.await.unwrap_err().is_cancelled());
        }
        stage.rig.pass().await;
        let kept = ask(&handle, Ping(3));
        stage.rig.pass().await;
        stage.unhold.send(()).unwrap();
        soon(kept).await.unwrap().unwrap();
        stage.expect(Event::Begun(3)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_ends_with_the_process_that_asked_for_it() {
    let mut stage = stage(16).await;
    let [_, remote] = stage.rig.handles();
    let asked = ask(&remote, Work(1));
    stage.expect(Event::Begun(1)).await;
    stage.rig.away.shutdown().await;
    stage.expect(Event::Dropped(1)).await;
    assert!(asked.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_cancels_what_is_asked_with_it() {
    let mut stage = stage(16).await;
    for handle in stage.rig.handles() {
        let token = CancellationToken::new();
        let asked = ask(&handle.with_cancel(token.clone()), Work(1));
        stage.expect(Event::Begun(1)).await;
        token.cancel();
        assert!(matches!(soon(asked).await.unwrap(), Err(AskError::Cancelled)));
        stage.expect(Event::Dropped(1)).await;
        // It is not even sent.
        match handle.with_cancel(token).ask(Ping(2)).await {
            Err(AskError::Refused(refused)) => {
                assert_eq!((refused.message, refused.reason), (Ping(2), Refusal::Cancelled));
            }
            other => panic!("{other:?}"),
        }
        let hasty = handle.with_deadline(Duration::from_millis(50));
        assert!(matches!(hasty.ask(Work(3)).await, Err(AskError::Deadline)));
        stage.expect(Event::Begun(3)).await;
        stage.expect(Event::Dropped(3)).await;
    }
}
