//! An actor for the tests of the system's door.

use std::time::Duration;

use actix::{Actor, Context, Handler, Message, MessageResult, ResponseFuture, Running};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, ActorCx, CreateError, RemoteActor, Spawn, WireMessage};
use heliostat_runtime::handle::{ActorId, Incarnation};
use heliostat_runtime::spec::Progress;
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};

/// Counts, remembers order, sleeps, blocks, panics.
#[derive(Default)]
pub(crate) struct Probe {
    pub(crate) total: u64,
    pub(crate) seen: Vec<u64>,
    /// Does not stop when it is told to.
    pub(crate) stubborn: bool,
}

impl Actor for Probe {
    type Context = Context<Self>;

    fn stopping(&mut self, _: &mut Context<Self>) -> Running {
        match self.stubborn {
            true => Running::Continue,
            false => Running::Stop,
        }
    }
}

impl RemoteActor for Probe {
    const TYPE: &'static str = "probe";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Add>().accept::<Note>().accept::<Seen>().accept::<Echo>();
        m.accept::<Block>().accept::<Later>().accept::<Panic>();
    }
}

impl Spawn for Probe {
    type Args = u64;

    async fn create(total: u64, cx: ActorCx) -> Result<Self, CreateError> {
        cx.progress(Progress { phase: "counting".into(), done: 0, total });
        tokio::time::sleep(Duration::from_millis(1)).await;
        match total {
            404 => Err(CreateError::Failed("not found".into())),
            500 => panic!("internal"),
            total => Ok(Self { total, ..Self::default() }),
        }
    }
}

macro_rules! message {
    ($(#[$doc:meta])* $name:ident $fields:tt -> $result:ty, $wire:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Encode, Decode)]
        pub(crate) struct $name $fields;
        impl Message for $name {
            type Result = $result;
        }
        impl WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}

message!(/** Adds and returns the total. */ Add(pub(crate) u64) -> u64, "add");
message!(/** Appends a number; has no answer worth waiting for. */ Note(pub(crate) u64) -> (), "note");
message!(/** What was noted. */ Seen() -> Vec<u64>, "seen");
message!(/** Returns the bytes. */ Echo(pub(crate) Vec<u8>) -> Vec<u8>, "echo");
message!(/** Blocks the actor's thread for so many milliseconds. */ Block(pub(crate) u64) -> (), "block");
message!(/** Answers after so many milliseconds, without blocking. */ Later(pub(crate) u64) -> u64, "later");
message!(/** Panics with this text. */ Panic(pub(crate) String) -> (), "panic");
message!(/** Not in the actor's table. */ Unlisted(pub(crate) u64) -> u64, "unlisted");

impl Handler<Add> for Probe {
    type Result = u64;
    fn handle(&mut self, m: Add, _: &mut Context<Self>) -> u64 {
        self.total += m.0;
        self.total
    }
}

impl Handler<Unlisted> for Probe {
    type Result = u64;
    fn handle(&mut self, m: Unlisted, _: &mut Context<Self>) -> u64 {
        m.0
    }
}

impl Handler<Note> for Probe {
    type Result = ();
    fn handle(&mut self, m: Note, _: &mut Context<Self>) {
        self.seen.push(m.0);
    }
}

impl Handler<Seen> for Probe {
    type Result = MessageResult<Seen>;
    fn handle(&mut self, _: Seen, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.seen.clone())
    }
}

impl Handler<Echo> for Probe {
    type Result = MessageResult<Echo>;
    fn handle(&mut self, m: Echo, _: &mut Context<Self>) -> Self::Result {
        MessageResult(m.0)
    }
}

impl Handler<Block> for Probe {
    type Result = ();
    fn handle(&mut self, m: Block, _: &mut Context<Self>) {
        std::thread::sleep(Duration::from_millis(m.0));
    }
}

impl Handler<Later> for Probe {
    type Result = ResponseFuture<u64>;
    fn handle(&mut self, m: Later, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(m.0)).await;
            m.0
        })
    }
}

impl Handler<Panic> for Probe {
    type Result = ();
    fn handle(&mut self, m: Panic, _: &mut Context<Self>) {
        panic!("{}", m.0);
    }
}

/// A system on a free loopback port.
pub(crate) async fn system() -> System {
    System::start(SystemConfig::loopback()).await.unwrap()
}

/// Options for a test actor of some incarnation.
pub(crate) fn options(name: &str, incarnation: u64, mailbox_capacity: usize) -> SpawnOptions {
    SpawnOptions { id: ActorId::named(name), incarnation: Incarnation(incarnation), mailbox_capacity }
}
