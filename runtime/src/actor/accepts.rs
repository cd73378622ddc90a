//! The visible table of what may be sent to an actor, and how each message is taken.

use std::marker::PhantomData;

use actix::{Handler, ResponseActFuture, ResponseFuture};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{RemoteActor, StreamMessage, WireMessage};
use crate::mailbox::{Limit, Table, deliver_json, deliver_json_result};
use crate::mesh::MeshTable;

/// A `Result` whose value has JSON and whose error has words.
pub trait Fallible {
    /// The value.
    type Ok: Serialize;

    /// The value, or the error in words.
    fn into_result(self) -> Result<Self::Ok, String>;
}

impl<T: Serialize, E: std::fmt::Display> Fallible for Result<T, E> {
    type Ok = T;

    fn into_result(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// Table of the messages that an actor accepts.
pub struct Accepts<A> {
    table: Table,
    pub(crate) mesh: MeshTable,
    /// The concurrency group that messages are added to; 0 for none.
    lane: usize,
    actor: PhantomData<fn() -> A>,
}

impl<A: RemoteActor> Accepts<A> {
    /// Adds a message type.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: WireMessage,
    {
        let free = self.table.add::<A, M>(self.lane);
        self.mesh.insert::<A, M>();
        self.added(free, M::NAME)
    }

    /// Adds a message type whose handler's work ends when nobody waits for its answer any more: the future that the
    /// handler returned is dropped at its next await. The work of a `tell` goes on to its end.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_cancellable<M>(&mut self) -> &mut Self
    where
        A: Handler<M, Result = ResponseFuture<M::Result>>,
        M: WireMessage,
    {
        let free = self.table.add_cancellable::<A, M>(self.lane);
        self.mesh.insert::<A, M>();
        self.added(free, M::NAME)
    }

    /// The same for a handler whose work needs the actor.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_cancellable_act<M>(&mut self) -> &mut Self
    where
        A: Handler<M, Result = ResponseActFuture<A, M::Result>>,
        M: WireMessage,
    {
        let free = self.table.add_cancellable_act::<A, M>(self.lane);
        self.mesh.insert::<A, M>();
        self.added(free, M::NAME)
    }

    /// Adds a message type that is answered by a stream.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_stream<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: StreamMessage,
    {
        let free = self.table.add_stream::<A, M>(self.lane);
        self.added(free, M::NAME)
    }

    /// Declares a concurrency group with the messages that `accept` adds: at most `limit` of them are under way at once,
    /// from the call of the handler to its reply, or to the end of its stream. Others of the group wait, in order and in
    /// a mailbox of their own, and hold up nobody else.
    ///
    /// # Panics
    /// If the name is taken, `limit` is 0, or it is called within another group.
    pub fn group(
        &mut self,
        name: &'static str,
        limit: usize,
        accept: impl FnOnce(&mut Self) -> &mut Self,
    ) -> &mut Self {
        assert!(limit > 0, "group {name:?} of {} would never handle a message: its limit is 0", A::TYPE);
        assert!(self.lane == 0, "group {name:?} of {} is declared within another group", A::TYPE);
        let lane = self.table.group(name, Limit(limit));
        self.lane = lane.unwrap_or_else(|| panic!("{} has two groups named {name:?}", A::TYPE));
        accept(self);
        self.lane = 0;
        self
    }

    /// Limits how many messages that are in no group are under way at once. 1 handles them strictly one after the
    /// other, asynchronous handlers too. Without it there is no limit.
    ///
    /// # Panics
    /// If `limit` is 0.
    pub fn max_concurrency(&mut self, limit: usize) -> &mut Self {
        assert!(limit > 0, "{} would never handle a message: max_concurrency is 0", A::TYPE);
        self.table.limit(Limit(limit));
        self
    }

    fn added(&mut self, free: bool, name: &str) -> &mut Self {
        assert!(free, "{} accepts two messages named {name:?}", A::TYPE);
        self
    }

    /// Adds a message type and offers it to callers that speak JSON too: the REST API, Python, `Cluster::json`. The
    /// message is what serde reads, the answer what serde writes.
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_json<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: WireMessage<Result: Serialize> + DeserializeOwned,
    {
        self.accept::<M>().offer_json::<M>()
    }

    /// The same for a message whose result is a `Result`: a caller in JSON gets the value of `Ok` alone, and an `Err`
    /// as a failed call with the error's words (`AskError::Handler`).
    ///
    /// # Panics
    /// If the name is already taken by another message of this actor.
    pub fn accept_json_result<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: WireMessage<Result: Fallible> + DeserializeOwned,
    {
        self.accept::<M>().offer_json_result::<M>()
    }

    /// Offers a message that was accepted already, such as a cancellable one, to callers that speak JSON.
    pub fn offer_json<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: WireMessage<Result: Serialize> + DeserializeOwned,
    {
        self.table.add_json(M::NAME, deliver_json::<A, M>);
        self
    }

    /// The same for a message whose result is a `Result`.
    pub fn offer_json_result<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: WireMessage<Result: Fallible> + DeserializeOwned,
    {
        self.table.add_json(M::NAME, deliver_json_result::<A, M>);
        self
    }

    pub(crate) fn table() -> Table {
        let mut accepts =
            Self { table: Table::default(), mesh: MeshTable::default(), lane: 0, actor: PhantomData };
        A::messages(&mut accepts);
        accepts.table.mesh = accepts.mesh;
        accepts.table
    }
}
