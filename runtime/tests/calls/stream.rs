//! Streams: order, back-pressure, and every way in which they end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use bincode::{Decode, Encode};
use futures_util::{StreamExt, stream};
use heliostat_runtime::actor::{Accepts, Items, RemoteActor, StreamMessage};
use heliostat_runtime::handle::{AskError, Handle, Refusal, Window};
use heliostat_runtime::system::System;
use tokio::sync::Notify;

use super::{Rig, soon};

/// What the source did, for the test.
#[derive(Default)]
struct Watched {
    produced: AtomicU64,
    dropped: Notify,
}

struct Source(Arc<Watched>);

impl Actor for Source {
    type Context = Context<Self>;
}

impl RemoteActor for Source {
    const TYPE: &'static str = "source";

    fn messages(m: &mut Accepts<Self>) {
        m.accept_stream::<Count>().accept_stream::<Blobs>().accept_stream::<Broken>();
    }
}

macro_rules! message {
    ($name:ident $fields:tt -> $item:ty, $wire:literal) => {
        #[derive(Debug, PartialEq, Encode, Decode)]
        struct $name $fields;

        impl Message for $name {
            type Result = Items<$item>;
        }

        impl StreamMessage for $name {
            type Item = $item;
            const NAME: &'static str = $wire;
        }
    };
}

message!(Count(u64) -> u64, "count");
message!(Blobs(usize) -> Vec<u8>, "blobs");
message!(Broken() -> u8, "broken");
message!(Unlisted() -> u8, "unlisted");

struct OnDrop(Arc<Watched>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.dropped.notify_one();
    }
}

impl Handler<Count> for Source {
    type Result = Items<u64>;
    fn handle(&mut self, Count(to): Count, _: &mut Context<Self>) -> Items<u64> {
        let (watched, guard) = (self.0.clone(), OnDrop(self.0.clone()));
        Items::new(stream::iter(0..to).map(move |i| {
            let _ = &guard;
            watched.produced.fetch_add(1, Ordering::SeqCst);
            i
        }))
    }
}

impl Handler<Blobs> for Source {
    type Result = ResponseFuture<Items<Vec<u8>>>;
    fn handle(&mut self, Blobs(bytes): Blobs, _: &mut Context<Self>) -> Self::Result {
        let watched = self.0.clone();
        let blobs = stream::repeat_with(move || {
            watched.produced.fetch_add(1, Ordering::SeqCst);
            vec![7; bytes]
        });
        Box::pin(async move { Items::new(blobs) })
    }
}

impl Handler<Broken> for Source {
    type Result = Items<u8>;
    fn handle(&mut self, _: Broken, _: &mut Context<Self>) -> Items<u8> {
        panic!("no source");
    }
}

impl Handler<Unlisted> for Source {
    type Result = Items<u8>;
    fn handle(&mut self, _: Unlisted, _: &mut Context<Self>) -> Items<u8> {
        Items::new(stream::empty())
    }
}

async fn rig() -> (Rig, Arc<Watched>) {
    let watched = Arc::new(Watched::default());
    let source = Source(watched.clone());
    (Rig::start(16, move || source).await, watched)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn items_come_in_order_and_then_the_end() {
    let (rig, _) = rig().await;
    for handle in rig.handles::<Source>() {
        for window in [Window { items: 1, bytes: 1 }, Window { items: 7, bytes: 64 }, Window::default()] {
            let items: Vec<u64> =
                handle.stream_within(Count(1000), window).map(|item| item.unwrap()).collect().await;
            assert!(items.into_iter().eq(0..1000), "{window:?}");
        }
        let mut empty = handle.stream(Count(0));
        assert!(soon(empty.next()).await.is_none());
        assert!(soon(empty.next()).await.is_none(), "over is over");
    }
}

/// Waits until `produced` has come to rest at what is allowed: it must reach it, and not go beyond while many other
/// messages pass.
async fn rests_at(rig: &Rig, handle: &Handle<Source>, watched: &Watched, produced: u64) {
    let reached = async {
        while watched.produced.load(Ordering::SeqCst) < produced {
            tokio::task::yield_now().await;
        }
    };
    soon(reached).await;
    for _ in 0..20 {
        rig.pass().await;
        let items: Vec<_> = handle.stream(Count(0)).collect().await;
        assert!(items.is_empty());
    }
    assert_eq!(watched.produced.load(Ordering::SeqCst), produced);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_consumer_stops_the_producer_and_nobody_else() {
    let (rig, watched) = rig().await;
    for handle in rig.handles::<Source>() {
        watched.produced.store(0, Ordering::SeqCst);
        let mut items = handle.stream_within(Count(u64::MAX), Window { items: 4, bytes: 1 << 20 });
        rests_at(&rig, &handle, &watched, 4).await;
        for i in 0..2 {
            assert_eq!(soon(items.next()).await.unwrap().unwrap(), i);
        }
        // Half of the window is free.
        rests_at(&rig, &handle, &watched, 6).await;
        drop(items);
        soon(watched.dropped.notified()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_items_are_bounded_by_bytes() {
    let (rig, watched) = rig().await;
    let handle: Handle<Source> = rig.away.handle(rig.addr.clone());
    let mut blobs = handle.stream_within(Blobs(1 << 20), Window { items: 1000, bytes: 3 << 20 });
    rests_at(&rig, &handle, &watched, 3).await;
    for _ in 0..50 {
        assert_eq!(soon(blobs.next()).await.unwrap().unwrap().len(), 1 << 20);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_not_accepted_gives_its_message_back() {
    let (rig, _) = rig().await;
    for handle in rig.handles::<Source>() {
        match soon(handle.stream(Unlisted()).next()).await {
            Some(Err(AskError::Refused(refused))) => {
                assert_eq!((refused.message, refused.reason), (Unlisted(), Refusal::UnknownMessage));
            }
            other => panic!("{other:?}"),
        }
    }
}

async fn last<T>(items: &mut heliostat_runtime::handle::Replies<T>) -> AskError<T>
where
    T: StreamMessage<Item: std::fmt::Debug>,
{
    let end = async {
        loop {
            match items.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => return error,
                None => panic!("a clean end"),
            }
        }
    };
    soon(end).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_with_its_actor() {
    for remote in [false, true] {
        let (rig, watched) = rig().await;
        let handle = rig.handles::<Source>()[usize::from(remote)].clone();
        let mut items = handle.stream(Count(u64::MAX));
        soon(items.next()).await.unwrap().unwrap();
        assert!(rig.home.stop_actor(rig.addr.actor, rig.addr.incarnation));
        assert!(matches!(last(&mut items).await, AskError::Stopped));
        assert!(soon(items.next()).await.is_none());
        soon(watched.dropped.notified()).await;
    }
    for remote in [false, true] {
        let (rig, _) = rig().await;
        let handle = rig.handles::<Source>()[usize::from(remote)].clone();
        let mut items = handle.stream(Count(u64::MAX));
        soon(items.next()).await.unwrap().unwrap();
        let panicked = last(&mut handle.stream(Broken())).await;
        assert!(matches!(panicked, AskError::Panicked(why) if why == "no source"));
        assert!(matches!(last(&mut items).await, AskError::Panicked(why) if why == "no source"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_with_either_process_and_at_its_deadline() {
    let (rig, watched) = rig().await;
    for handle in rig.handles::<Source>() {
        let mut items = handle
            .with_deadline(Duration::from_millis(50))
            .stream_within(Count(u64::MAX), Window { items: 1, bytes: 1 });
        soon(items.next()).await.unwrap().unwrap();
        let late = async {
            tokio::time::sleep(Duration::from_millis(60)).await;
            last(&mut items).await
        };
        assert!(matches!(soon(late).await, AskError::Deadline));
        soon(watched.dropped.notified()).await;
    }
    let third = System::start(heliostat_runtime::system::SystemConfig::loopback()).await.unwrap();
    let mut items = third.handle::<Source>(rig.addr.clone()).stream(Count(u64::MAX));
    soon(items.next()).await.unwrap().unwrap();
    third.shutdown().await;
    soon(watched.dropped.notified()).await;
    let mut items = rig.away.handle::<Source>(rig.addr.clone()).stream(Count(u64::MAX));
    soon(items.next()).await.unwrap().unwrap();
    rig.home.shutdown().await;
    assert!(matches!(last(&mut items).await, AskError::Stopped | AskError::PeerLost(_)));
}
