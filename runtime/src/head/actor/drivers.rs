//! Programs that own actors: they say hello, and that they end.

use actix::{Context, Handler, ResponseFuture};

use super::HeadActor;
use crate::head::core::Event;
use crate::head::messages::{DriverBye, DriverHello, HeadSeen};

impl Handler<DriverHello> for HeadActor {
    type Result = ResponseFuture<Result<HeadSeen, String>>;

    fn handle(&mut self, hello: DriverHello, ctx: &mut Context<Self>) -> Self::Result {
        let DriverHello { id, name, process, first } = hello;
        if let Err(why) = self.core.admits_driver(id, first) {
            return Box::pin(async move { Err(why) });
        }
        self.feed(Event::DriverHello { id, name, process, first }, ctx);
        // Its connection may have broken before this was read.
        if !self.system.is_connected(process) && process != self.system.process() {
            self.feed(Event::ProcessLost(process), ctx);
        }
        let seen = self.seen(0).map_err(|superseded| superseded.to_string());
        match (first, seen) {
            // What it is about to own must not be orphaned by a head that never heard of it.
            (true, Ok(seen)) => self.durably(seen),
            (_, seen) => Box::pin(async move { seen }),
        }
    }
}

impl Handler<DriverBye> for HeadActor {
    type Result = ();

    fn handle(&mut self, bye: DriverBye, ctx: &mut Context<Self>) {
        self.feed(Event::DriverEnded { id: bye.id, why: bye.why }, ctx);
    }
}
