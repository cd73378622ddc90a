//! Concurrency groups, and the bound on asks under way on the caller's side.

use std::sync::Arc;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{AskError, Handle, Refusal};
use tokio::sync::{Semaphore, mpsc};

use super::{Rig, soon};

struct Worker {
    begun: mpsc::UnboundedSender<u32>,
    release: Arc<Semaphore>,
}

impl Actor for Worker {
    type Context = Context<Self>;
}

impl RemoteActor for Worker {
    const TYPE: &'static str = "worker";

    fn messages(m: &mut Accepts<Self>) {
        m.group("io", 2, |m| m.accept::<Fetch>().accept_cancellable::<Load>()).accept::<Status>();
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

message!(Fetch, "fetch");
message!(Load, "load");
message!(Status, "status");

impl Worker {
    fn work(&self, number: u32) -> ResponseFuture<()> {
        self.begun.send(number).unwrap();
        let release = self.release.clone();
        Box::pin(async move { release.acquire().await.unwrap().forget() })
    }
}

impl Handler<Fetch> for Worker {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, Fetch(number): Fetch, _: &mut Context<Self>) -> Self::Result {
        self.work(number)
    }
}

impl Handler<Load> for Worker {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, Load(number): Load, _: &mut Context<Self>) -> Self::Result {
        self.work(number)
    }
}

impl Handler<Status> for Worker {
    type Result = ();
    fn handle(&mut self, _: Status, _: &mut Context<Self>) {}
}

struct Stage {
    rig: Rig,
    begun: mpsc::UnboundedReceiver<u32>,
    release: Arc<Semaphore>,
}

async fn stage(capacity: usize) -> Stage {
    let (told, begun) = mpsc::unbounded_channel();
    let release = Arc::new(Semaphore::new(0));
    let worker = Worker { begun: told, release: release.clone() };
    Stage { rig: Rig::start(capacity, move || worker).await, begun, release }
}

impl Stage {
    async fn begins(&mut self, number: u32) {
        assert_eq!(soon(self.begun.recv()).await, Some(number));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_group_waits_and_holds_up_nobody_else() {
    let mut stage = stage(2).await;
    for handle in stage.rig.handles::<Worker>() {
        for number in 1..=2 {
            handle.tell(Fetch(number)).unwrap();
            stage.begins(number).await;
        }
        // Their places are held by tells as well: these two wait.
        handle.tell(Fetch(3)).unwrap();
        handle.tell(Fetch(4)).unwrap();
        soon(handle.ask(Status(0))).await.unwrap();
        assert!(stage.begun.try_recv().is_err(), "more than two of the group are under way");
        // The group's mailbox is full, that of the others is not.
        match soon(handle.ask(Fetch(5))).await {
            Err(AskError::Refused(refused)) => assert_eq!(refused.reason, Refusal::MailboxFull),
            other => panic!("{other:?}"),
        }
        soon(handle.ask(Status(0))).await.unwrap();
        stage.release.add_permits(1);
        stage.begins(3).await;
        stage.release.add_permits(1);
        stage.begins(4).await;
        stage.release.add_permits(2);
        // Both places are free again.
        stage.release.add_permits(1);
        soon(handle.ask(Fetch(6))).await.unwrap();
        stage.begins(6).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_message_gives_its_place_back_when_its_work_has_ended() {
    let mut stage = stage(16).await;
    for handle in stage.rig.handles::<Worker>() {
        let ask = |message| {
            let handle: Handle<Worker> = handle.clone();
            tokio::spawn(async move { handle.ask(message).await.unwrap() })
        };
        let load = tokio::spawn({
            let handle = handle.clone();
            async move { handle.ask(Load(1)).await.unwrap() }
        });
        stage.begins(1).await;
        let fetch = ask(Fetch(2));
        stage.begins(2).await;
        handle.tell(Fetch(3)).unwrap();
        handle.tell(Fetch(4)).unwrap();
        // This one's work goes on, so its place is not free.
        fetch.abort();
        stage.rig.pass().await;
        soon(handle.ask(Status(0))).await.unwrap();
        assert!(stage.begun.try_recv().is_err());
        // This one's ends.
        load.abort();
        stage.begins(3).await;
        stage.release.add_permits(2);
        stage.begins(4).await;
        stage.release.add_permits(1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_may_bound_what_it_has_under_way() {
    let mut stage = stage(16).await;
    for handle in stage.rig.handles::<Worker>() {
        let bounded = handle.with_max_pending(1);
        let pending = tokio::spawn({
            let bounded = bounded.clone();
            async move { bounded.ask(Fetch(1)).await }
        });
        stage.begins(1).await;
        match bounded.ask(Status(2)).await {
            Err(AskError::Refused(refused)) => {
                assert_eq!((refused.message, refused.reason), (Status(2), Refusal::TooManyPending(1)));
            }
            other => panic!("{other:?}"),
        }
        soon(handle.ask(Status(2))).await.unwrap();
        stage.release.add_permits(1);
        soon(pending).await.unwrap().unwrap();
        soon(bounded.ask(Status(3))).await.unwrap();
    }
}
