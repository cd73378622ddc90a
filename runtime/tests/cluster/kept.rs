//! Refs in arguments: of actors, for as long as they may be started, and of functions, until they have answered.

use std::path::Path;
use std::time::Duration;

use actix::{Actor, Context, Handler};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn};
use heliostat_runtime::cluster::status::{ActorState, ClusterStatus};
use heliostat_runtime::function::{FunctionCx, FunctionPool, FunctionTable, PoolOptions, RemoteFunction};
use heliostat_runtime::objects::{ObjectError, ObjectRef, StoreStatus};
use heliostat_runtime::spec::{ActorSpec, Placement, RestartPolicy};
use rustix::process::Signal;

use crate::harness::signal;
use crate::objects::{MIB, Read, make, named, no_objects, read, stores, vaults};

/// Reads the objects of its arguments when it is created, and lets go of them.
pub(crate) struct Reader(u64);

impl Actor for Reader {
    type Context = Context<Self>;
}

impl RemoteActor for Reader {
    const TYPE: &'static str = "reader";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Total>();
    }
}

impl Spawn for Reader {
    type Args = Vec<ObjectRef>;

    async fn create(args: Vec<ObjectRef>, cx: ActorCx) -> Result<Self, CreateError> {
        let objects = cx.cluster().unwrap().objects();
        let mut bytes = 0;
        for object in &args {
            bytes += objects.get(object).await.map_err(CreateError::failed)?.len() as u64;
        }
        Ok(Self(bytes))
    }
}

/// Bytes that it has read.
#[derive(actix::Message, bincode::Encode, bincode::Decode, Clone)]
#[rtype(result = "u64")]
pub(crate) struct Total;

impl heliostat_runtime::actor::WireMessage for Total {
    const NAME: &'static str = "total";
}

impl Handler<Total> for Reader {
    type Result = u64;

    fn handle(&mut self, _: Total, _: &mut Context<Self>) -> u64 {
        self.0
    }
}

/// Ends its process until there is that file, and then returns what it was given.
pub(crate) struct Echo;

impl RemoteFunction for Echo {
    const NAME: &'static str = "echo";
    type Args = (String, ObjectRef);
    type Output = ObjectRef;

    fn call((marker, object): Self::Args, _: &FunctionCx) -> ObjectRef {
        if !Path::new(&marker).exists() {
            std::fs::write(&marker, "").unwrap();
            std::process::abort();
        }
        object
    }
}

/// The bytes of all objects behind one another, as a new object.
pub(crate) struct Join;

impl RemoteFunction for Join {
    const NAME: &'static str = "join";
    type Args = Vec<ObjectRef>;
    type Output = Result<ObjectRef, ObjectError>;

    fn call(parts: Self::Args, cx: &FunctionCx) -> Self::Output {
        let mut whole = Vec::new();
        for part in &parts {
            whole.extend_from_slice(&cx.get(part)?);
        }
        cx.put(&whole)
    }
}

pub(crate) fn functions() -> FunctionTable {
    FunctionTable::default().with::<Echo>().with::<Join>()
}

fn state(status: &ClusterStatus) -> (u64, &ActorState) {
    let reader = status.actor("reader").unwrap();
    (reader.restarts, &reader.state)
}

/// An actor is started again and again with refs that nobody else holds, whoever put the objects; they are freed when it is
/// dead for good.
pub(crate) async fn refs_in_arguments() {
    let cluster = vaults(&[0, 0]).await;
    let client = &cluster.cluster;
    let own = client.objects().put(&vec![1; MIB]).await.unwrap();
    let (near, far) = (make(&cluster, "a", MIB, 2).await, make(&cluster, "far", 10, 3).await);
    let args = vec![own, near, far];
    let spec = ActorSpec {
        placement: Placement::Node("n1".into()),
        ..ActorSpec::of::<Reader>("reader", &args).unwrap()
    };
    drop(args);
    let reader = client.spawn::<Reader>(spec.clone()).await.unwrap();
    drop(spec);
    client.ready("reader", Duration::from_secs(30)).await.unwrap();
    for restarts in 1..=2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let status = client.status().await.unwrap();
        signal(status.actor("reader").unwrap().pid.unwrap(), Signal::KILL);
        let again = |status: &ClusterStatus| state(status) == (restarts, &ActorState::Ready);
        cluster.until("the reader is back", again).await;
        assert_eq!(reader.ask(Total).await.unwrap(), 2 * MIB as u64 + 10);
    }
    client.remove_actor("reader").await.unwrap();
    let took = stores(&cluster, "freed", no_objects).await;
    println!("  what an actor's arguments kept is freed {took:?} after its removal");

    // Replaced arguments are given back; an owner that is gone is named by the actor that needs it.
    let (first, second) = (make(&cluster, "b", MIB, 1).await, make(&cluster, "a", MIB, 2).await);
    for object in [first, second] {
        let spec = ActorSpec::of::<Reader>("reader", &vec![object]).unwrap();
        let restart = RestartPolicy { max_restarts: 2, ..spec.restart };
        client.apply(vec![ActorSpec { restart, ..spec }]).await.unwrap();
        client.ready("reader", Duration::from_secs(30)).await.unwrap();
    }
    stores(&cluster, "the first is freed", |stores| stores[0].objects.len() == 1).await;
    let status = client.status().await.unwrap();
    signal(status.actor("a").unwrap().pid.unwrap(), Signal::KILL);
    signal(status.actor("reader").unwrap().pid.unwrap(), Signal::KILL);
    let lost = |status: &ClusterStatus| match state(status).1 {
        ActorState::Dead { cause } => cause.to_string().contains("owner"),
        _ => false,
    };
    cluster.until("the reader says that the owner is gone", lost).await;
    cluster.end().await;
}

/// A call whose worker dies has its objects when it is made again; a ref that it returns counts.
pub(crate) async fn refs_of_functions() {
    let cluster = vaults(&[0]).await;
    let pool = FunctionPool::start(&cluster.cluster, PoolOptions { workers: 1, ..PoolOptions::default() });
    let pool = pool.await.unwrap();
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("marker").to_string_lossy().into_owned();
    let object = make(&cluster, "a", MIB, 4).await;
    let back = pool.call::<Echo>((marker, object)).await.unwrap();
    // Longer than whoever passed it on takes to let go of it.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(read(&cluster, "b", &back).await.unwrap().first, 4);
    assert!(named(&cluster, "a").ask(Read(back.clone())).await.unwrap().is_ok());
    drop(back);
    let took = stores(&cluster, "freed", no_objects).await;
    println!("  freed {took:?} after a function's result was dropped");
    pool.close().await.unwrap();
    cluster.end().await;
}

/// A function reads objects of its own node, of another and of its caller, small ones and large ones, and puts one that its
/// caller reads; without the last ref all are freed.
pub(crate) async fn functions_read_objects() {
    let cluster = vaults(&[0, 0]).await;
    let placement = Placement::Node("n1".into());
    let options = PoolOptions { workers: 1, placement, ..PoolOptions::default() };
    let pool = FunctionPool::start(&cluster.cluster, options).await.unwrap();
    let own = cluster.cluster.objects().put(&[1; 100]).await.unwrap();
    let (other, near) = (make(&cluster, "a", MIB, 2).await, make(&cluster, "far", MIB, 3).await);
    let whole = pool.call::<Join>(vec![own, other, near]).await.unwrap().unwrap();
    let bytes = cluster.cluster.objects().get(&whole).await.unwrap();
    assert_eq!(bytes.len(), 100 + 2 * MIB);
    assert_eq!([bytes[0], bytes[99], bytes[100], bytes[99 + MIB], bytes[100 + MIB]], [1, 1, 2, 2, 3]);

    // What is gone is an error of the call, and the worker goes on.
    let lost = make(&cluster, "b", MIB, 4).await;
    let status = cluster.cluster.status().await.unwrap();
    signal(status.actor("b").unwrap().pid.unwrap(), Signal::KILL);
    let id = lost.id().to_string();
    let is_gone = |stores: &[StoreStatus]| {
        stores.iter().flat_map(|store| &store.objects).all(|object| object.object != id)
    };
    stores(&cluster, "the object goes with its owner", is_gone).await;
    let gone = pool.call::<Join>(vec![lost]).await.unwrap().unwrap_err();
    assert!(matches!(gone, ObjectError::OwnerDied { .. }), "{gone}");
    assert_eq!(pool.call::<Join>(vec![whole.clone()]).await.unwrap().map(drop), Ok(()));
    drop((whole, bytes));
    let took = stores(&cluster, "freed", no_objects).await;
    println!("  freed {took:?} after the last ref was dropped");
    pool.close().await.unwrap();
    cluster.end().await;
}
