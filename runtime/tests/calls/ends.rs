//! The ends of actors as callers see them: a panic of work that goes on after its handler, and an end that lets it go on.

use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, Context, Handler, Message, ResponseActFuture, ResponseFuture, WrapFuture,
};
use bincode::{Decode, Encode};
use futures_util::StreamExt;
use heliostat_runtime::actor::{Accepts, Items, RemoteActor, StreamMessage, WireMessage};
use heliostat_runtime::handle::{AskError, Handle, Refusal};
use heliostat_runtime::system::ActorEnd;

use super::{Rig, soon};

#[derive(Default)]
struct Subject {
    handled: u32,
}

macro_rules! message {
    ($name:ident $fields:tt -> $result:ty, $wire:literal) => {
        #[derive(Encode, Decode)]
        struct $name $fields;
        impl Message for $name {
            type Result = $result;
        }
        impl WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}

message!(Late() -> (), "late");
message!(LateAct() -> (), "late_act");
message!(LateCancellable() -> (), "late_cancellable");
message!(Slow(u64) -> u32, "slow");
message!(Block(u64) -> (), "block");

#[derive(Encode, Decode)]
struct Flow;
impl Message for Flow {
    type Result = Items<u32>;
}
impl StreamMessage for Flow {
    type Item = u32;
    const NAME: &'static str = "flow";
}

impl Actor for Subject {
    type Context = Context<Self>;
}

impl RemoteActor for Subject {
    const TYPE: &'static str = "subject";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Late>().accept::<LateAct>().accept_cancellable::<LateCancellable>();
        m.accept::<Slow>().accept::<Block>().accept_stream::<Flow>();
    }
}

async fn late() {
    tokio::task::yield_now().await;
    panic!("later");
}

impl Handler<Late> for Subject {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, _: Late, _: &mut Context<Self>) -> Self::Result {
        Box::pin(late())
    }
}

impl Handler<LateAct> for Subject {
    type Result = ResponseActFuture<Self, ()>;
    fn handle(&mut self, _: LateAct, _: &mut Context<Self>) -> Self::Result {
        Box::pin(late().into_actor(self).map(|(), _, _| ()))
    }
}

impl Handler<LateCancellable> for Subject {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, _: LateCancellable, _: &mut Context<Self>) -> Self::Result {
        Box::pin(late())
    }
}

impl Handler<Flow> for Subject {
    type Result = Items<u32>;
    fn handle(&mut self, _: Flow, _: &mut Context<Self>) -> Items<u32> {
        let items = futures_util::stream::iter(0..3).then(async |n| {
            if n == 2 {
                late().await;
            }
            n
        });
        Items::new(items)
    }
}

impl Handler<Slow> for Subject {
    type Result = ResponseFuture<u32>;
    fn handle(&mut self, Slow(ms): Slow, _: &mut Context<Self>) -> Self::Result {
        self.handled += 1;
        let handled = self.handled;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            handled
        })
    }
}

impl Handler<Block> for Subject {
    type Result = ();
    fn handle(&mut self, Block(ms): Block, _: &mut Context<Self>) {
        std::thread::sleep(Duration::from_millis(ms));
    }
}

fn panicked<M>(error: AskError<M>) {
    assert!(matches!(&error, AskError::Panicked(why) if why == "later"), "{error}");
}

async fn end_of<F: Future<Output = ()>>(which: usize, work: impl FnOnce(Handle<Subject>) -> F) {
    let rig = Rig::start(16, Subject::default).await;
    let handle = rig.handles::<Subject>()[which].clone();
    let end = rig.home.watch_local(rig.addr.actor, rig.addr.incarnation);
    work(handle).await;
    assert_eq!(soon(end).await, Some(ActorEnd::Panicked("later".into())));
}

/// The asker hears the panic, the actor ends by it, whichever kind of future it was in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_after_an_await_ends_the_actor() {
    for which in [0, 1] {
        end_of(which, async |handle| panicked(soon(handle.ask(Late())).await.unwrap_err())).await;
        end_of(which, async |handle| panicked(soon(handle.ask(LateAct())).await.unwrap_err())).await;
        end_of(which, async |handle| panicked(soon(handle.ask(LateCancellable())).await.unwrap_err())).await;
        end_of(which, async |handle| handle.tell(Late()).unwrap()).await;
        end_of(which, async |handle| handle.tell(LateCancellable()).unwrap()).await;
        end_of(which, async |handle| {
            let mut flow = handle.stream(Flow);
            assert_eq!(soon(flow.next()).await.unwrap().unwrap(), 0);
            assert_eq!(soon(flow.next()).await.unwrap().unwrap(), 1);
            let error = soon(flow.next()).await.unwrap().unwrap_err();
            assert!(error.to_string().contains("later"), "{error}");
        })
        .await;
    }
}

/// What waits and what is at work is answered; what comes later is refused; then it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_actor_that_is_to_finish_answers_what_it_has() {
    let rig = Rig::start(16, Subject::default).await;
    let [here, there] = rig.handles::<Subject>();
    let end = rig.home.watch_local(rig.addr.actor, rig.addr.incarnation);
    let ask = |handle: &Handle<Subject>, ms| {
        let handle = handle.clone();
        tokio::spawn(async move { handle.ask(Slow(ms)).await })
    };
    let at_work = [ask(&here, 400), ask(&there, 400)];
    while here.ask(Slow(0)).await.unwrap() < 3 {}
    here.tell(Block(200)).unwrap();
    let waiting = [ask(&here, 100), ask(&there, 100)];
    rig.pass().await;
    assert!(rig.home.finish_actor(rig.addr.actor, rig.addr.incarnation));
    for handle in [&here, &there] {
        match soon(handle.ask(Slow(0))).await {
            Err(AskError::Refused(refused)) => assert_eq!(refused.reason, Refusal::NoSuchActor),
            other => panic!("{other:?}"),
        }
    }
    for asked in at_work.into_iter().chain(waiting) {
        soon(asked).await.unwrap().unwrap();
    }
    assert_eq!(soon(end).await, Some(ActorEnd::Stopped));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_heard_on_when_the_thread_it_was_read_on_has_ended() {
    let rig = Rig::start(8, Subject::default).await;
    let [_, away] = rig.handles::<Subject>();
    // Read on the actor's thread.
    soon(away.ask(Slow(0))).await.unwrap();
    let ended = rig.home.watch_local(rig.addr.actor, rig.addr.incarnation);
    assert!(rig.home.stop_actor(rig.addr.actor, rig.addr.incarnation));
    assert_eq!(soon(ended).await, Some(ActorEnd::Stopped));
    let mut events = rig.away.peer_events();
    rig.pass().await;
    let refused = soon(away.ask(Slow(0))).await.unwrap_err();
    assert!(matches!(refused, AskError::Refused(_)), "{refused:?}");
    // Over the same connection.
    assert!(rig.away.is_connected(rig.home.process()));
    assert!(soon(async { futures_util::poll!(Box::pin(events.next())).is_pending() }).await);
}
