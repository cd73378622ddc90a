//! What a call can do beyond an ask and its answer, here and over TCP: each file is one such thing.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail its test")]

mod cancel;
mod ends;
mod groups;
mod json;
mod stream;
mod undelivered;

use std::time::Duration;

use actix::{Actor, Context, Handler, Message};
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Accepts, RemoteActor, WireMessage};
use heliostat_runtime::handle::{ActorAddr, ActorId, Handle, Incarnation};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};

/// An actor in a system of its own, where it is at home and connections are read on its thread, and a second system.
struct Rig {
    home: System,
    away: System,
    addr: ActorAddr,
}

impl Rig {
    async fn start<A: RemoteActor>(capacity: usize, actor: impl FnOnce() -> A + Send + 'static) -> Self {
        // A thread for the bystander and one for another actor.
        let home = System::start(SystemConfig { arbiters: 2, ..SystemConfig::loopback() }).await.unwrap();
        let away = System::start(SystemConfig::loopback()).await.unwrap();
        let options = SpawnOptions {
            id: ActorId::named("subject"),
            incarnation: Incarnation(1),
            mailbox_capacity: capacity,
        };
        let addr = home.spawn_async(options, move || async move { Ok(actor()) }).await.unwrap();
        assert!(home.read_at(&addr));
        let bystander = SpawnOptions { id: ActorId::named("bystander"), ..options };
        home.spawn(bystander, || Bystander).unwrap();
        Self { home, away, addr }
    }

    /// Waits until the actor's process has read what was sent to it before. The actor may be busy.
    async fn pass(&self) {
        let bystander = ActorAddr { actor: ActorId::named("bystander"), ..self.addr.clone() };
        for system in [&self.home, &self.away] {
            soon(system.handle::<Bystander>(bystander.clone()).ask(Passed)).await.unwrap();
        }
    }

    /// A handle in the actor's process and one over TCP.
    fn handles<A: RemoteActor>(&self) -> [Handle<A>; 2] {
        [self.home.handle(self.addr.clone()), self.away.handle(self.addr.clone())]
    }
}

/// An actor on another thread.
struct Bystander;

#[derive(Message, Encode, Decode)]
#[rtype(result = "()")]
struct Passed;

impl WireMessage for Passed {
    const NAME: &'static str = "passed";
}

impl Actor for Bystander {
    type Context = Context<Self>;
}

impl RemoteActor for Bystander {
    const TYPE: &'static str = "bystander";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<Passed>();
    }
}

impl Handler<Passed> for Bystander {
    type Result = ();
    fn handle(&mut self, _: Passed, _: &mut Context<Self>) {}
}

/// What should be there at once; fails the test if it is not there for long.
async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("it does not come")
}
