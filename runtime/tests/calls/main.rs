//! What a call can do beyond an ask and its answer, here and over TCP: each file is one such thing.

#![allow(clippy::unwrap_used, reason = "a helper that fails should fail its test")]

mod json;

use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::handle::{ActorAddr, ActorId, Handle, Incarnation};
use heliostat_runtime::system::{SpawnOptions, System, SystemConfig};

/// An actor in a system of its own, and a second system.
struct Rig {
    home: System,
    away: System,
    addr: ActorAddr,
}

impl Rig {
    async fn start<A: RemoteActor>(capacity: usize, actor: impl FnOnce() -> A + Send + 'static) -> Self {
        let home = System::start(SystemConfig::loopback()).await.unwrap();
        let away = System::start(SystemConfig::loopback()).await.unwrap();
        let options = SpawnOptions {
            id: ActorId::named("subject"),
            incarnation: Incarnation(1),
            mailbox_capacity: capacity,
        };
        let addr = home.spawn(options, actor).unwrap();
        Self { home, away, addr }
    }

    /// A handle in the actor's process and one over TCP.
    fn handles<A: RemoteActor>(&self) -> [Handle<A>; 2] {
        [self.home.handle(self.addr.clone()), self.away.handle(self.addr.clone())]
    }
}
