//! The actors that the scenarios run.

use std::time::{SystemTime, UNIX_EPOCH};

use actix::{Actor, Context, Handler, MessageResult, ResponseFuture};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, ActorTypes, CreateError, RemoteActor, Spawn, WireMessage};
use heliostat_runtime::group::GroupView;
use heliostat_runtime::spec::{ActorSpec, GroupMember, Progress, Resources};
use heliostat_runtime::supervisor::{ChildDied, Verdict};
use heliostat_runtime::wire::to_bytes;

use crate::causes::{Newborn, Sufferer};
use crate::kept::{self, Reader};
use crate::mesh::MeshRank;
use crate::objects::Vault;

/// Counts, and remembers the views it was sent.
pub(crate) struct Counter {
    value: u64,
    seen: Vec<Seen>,
}

#[derive(Encode, Decode, Default, Clone)]
pub(crate) struct CounterArgs {
    /// The error to fail with.
    pub(crate) fail: Option<String>,
}

/// A view as it arrived.
#[derive(Encode, Decode, Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) epoch: u64,
    pub(crate) complete: bool,
    /// Incarnation of each rank; 0 for one that is not ready.
    pub(crate) incarnations: Vec<u64>,
    pub(crate) at_us: u64,
}

#[derive(Encode, Decode, Clone)]
pub(crate) struct Add(pub(crate) u64);
#[derive(Encode, Decode)]
pub(crate) struct Views;
#[derive(Encode, Decode)]
pub(crate) struct Crash;

impl actix::Message for Add {
    type Result = u64;
}
impl WireMessage for Add {
    const NAME: &'static str = "add";
}
impl actix::Message for Views {
    type Result = Vec<Seen>;
}
impl WireMessage for Views {
    const NAME: &'static str = "views";
}
impl actix::Message for Crash {
    type Result = ();
}
impl WireMessage for Crash {
    const NAME: &'static str = "crash";
}

pub(crate) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

impl Actor for Counter {
    type Context = Context<Self>;
}

impl RemoteActor for Counter {
    const TYPE: &'static str = "counter";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Add>().accept::<Views>().accept::<Crash>().accept::<GroupView>();
    }
}

impl Spawn for Counter {
    type Args = CounterArgs;

    async fn create(args: CounterArgs, cx: ActorCx) -> Result<Self, CreateError> {
        println!("creating {}", cx.name());
        cx.progress(Progress { phase: "counting".into(), done: 1, total: 2 });
        if let Some(why) = args.fail {
            return Err(CreateError::Failed(why));
        }
        cx.announce(cx.name().as_bytes().to_vec());
        Ok(Self { value: 0, seen: Vec::new() })
    }
}

impl Handler<Add> for Counter {
    type Result = u64;

    fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 {
        self.value += n;
        self.value
    }
}

impl Handler<Views> for Counter {
    type Result = MessageResult<Views>;

    fn handle(&mut self, _: Views, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.seen.clone())
    }
}

impl Handler<Crash> for Counter {
    type Result = ();

    fn handle(&mut self, _: Crash, _: &mut Context<Self>) {
        panic!("crashed on request");
    }
}

impl Handler<GroupView> for Counter {
    type Result = ();

    fn handle(&mut self, view: GroupView, _: &mut Context<Self>) {
        if let Some(last) = self.seen.last() {
            assert!(view.epoch >= last.epoch, "epoch {} after {}", view.epoch, last.epoch);
        }
        let incarnation = |member: &heliostat_runtime::group::Member| {
            member.addr.as_ref().map_or(0, |addr| addr.incarnation.0)
        };
        self.seen.push(Seen {
            epoch: view.epoch,
            complete: view.is_complete(),
            incarnations: view.members.iter().map(incarnation).collect(),
            at_us: now_us(),
        });
    }
}

pub(crate) fn types() -> ActorTypes {
    ActorTypes::new()
        .with::<Counter>()
        .with::<MeshRank>()
        .with::<Boss>()
        .with::<Other>()
        .with::<Sufferer>()
        .with::<Newborn>()
        .with::<Vault>()
        .with::<Reader>()
        .with_functions(kept::functions())
}

/// Spawns counters that end with it, and decides what follows from the death of children.
pub(crate) struct Boss {
    cx: ActorCx,
    asked: Vec<ChildDied>,
}

#[derive(Encode, Decode)]
pub(crate) struct SpawnOne(pub(crate) String);
#[derive(Encode, Decode)]
pub(crate) struct Asked;

impl actix::Message for SpawnOne {
    type Result = Result<(), String>;
}
impl WireMessage for SpawnOne {
    const NAME: &'static str = "spawn_one";
}
impl actix::Message for Asked {
    type Result = Vec<ChildDied>;
}
impl WireMessage for Asked {
    const NAME: &'static str = "asked";
}

impl Actor for Boss {
    type Context = Context<Self>;
}

impl RemoteActor for Boss {
    const TYPE: &'static str = "boss";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<SpawnOne>().accept::<ChildDied>().accept::<Asked>();
    }
}

impl Spawn for Boss {
    type Args = ();

    async fn create((): (), cx: ActorCx) -> Result<Self, CreateError> {
        Ok(Self { cx, asked: Vec::new() })
    }
}

impl Handler<SpawnOne> for Boss {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, SpawnOne(name): SpawnOne, _: &mut Context<Self>) -> Self::Result {
        let cluster = self.cx.cluster().unwrap().clone();
        Box::pin(async move {
            cluster.spawn::<Counter>(plain(&name)).await.map(drop).map_err(|error| error.to_string())
        })
    }
}

impl Handler<ChildDied> for Boss {
    type Result = Verdict;

    fn handle(&mut self, died: ChildDied, _: &mut Context<Self>) -> Verdict {
        self.asked.push(died);
        match self.asked.len() {
            1 => Verdict::RestartAll,
            _ => Verdict::Stop,
        }
    }
}

impl Handler<Asked> for Boss {
    type Result = MessageResult<Asked>;

    fn handle(&mut self, _: Asked, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.asked.clone())
    }
}

/// Has the messages of nobody.
pub(crate) struct Other;

impl Actor for Other {
    type Context = Context<Self>;
}

impl RemoteActor for Other {
    const TYPE: &'static str = "other";

    fn messages(_: &mut Accepts<Self>) {}
}

impl Spawn for Other {
    type Args = ();

    async fn create((): (), _: ActorCx) -> Result<Self, CreateError> {
        Ok(Self)
    }
}

/// A counter without a device.
pub(crate) fn plain(name: &str) -> ActorSpec {
    ActorSpec { resources: Resources::default(), ..counter(name) }
}

/// A counter that needs a device.
pub(crate) fn counter(name: &str) -> ActorSpec {
    let args = to_bytes(&CounterArgs::default()).unwrap();
    let mut spec = ActorSpec::new(name, "counter", args);
    spec.resources = Resources::device();
    spec
}

/// Ranks of a group of counters, named `rank-0`, ...
pub(crate) fn ranks(size: u32) -> Vec<ActorSpec> {
    let rank = |rank| ActorSpec {
        group: Some(GroupMember { group: "ranks".into(), rank, size }),
        ..counter(&format!("rank-{rank}"))
    };
    (0..size).map(rank).collect()
}

/// A counter without a device that is sent the views of the ranks.
pub(crate) fn watcher() -> ActorSpec {
    ActorSpec { subscribe: vec!["ranks".into()], resources: Resources::default(), ..counter("watcher") }
}
