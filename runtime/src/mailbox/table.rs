//! What an actor accepts: by wire id, and by name for callers that speak JSON.
//!
//! It only finds the way to a typed mailbox; what happens there is not its business.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use actix::{Handler, ResponseActFuture, ResponseFuture};
use bincode::{Decode, Encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::run::{RunFn, run, run_cancellable, run_cancellable_act};
use super::stream::deliver_stream_frame;
use super::{Answer, Entry, Limit, RemoteAnswer, refuse};
use crate::actor::{Fallible, RemoteActor, StreamMessage, WireMessage};
use crate::handle::Refusal;
use crate::mesh::MeshTable;
use crate::wire::frame::Want;
use crate::wire::{from_bytes, name_hash};

/// The wire id of a message in JSON, whichever its name is. No message of an actor may have it.
pub(crate) const JSON_CALL: u64 = name_hash("heliostat/json");

/// Delivers one frame's payload to an actor.
pub(crate) type DeliverFn = fn(&Entry, &[u8], Option<Instant>, Option<RemoteAnswer>) -> Result<(), Refusal>;

/// Delivers a message given in JSON; what is refused comes back with whoever waits for the answer.
pub(crate) type JsonFn = fn(&Entry, &[u8], Option<Instant>, Answer<JsonText>) -> Result<(), NotTaken>;

/// A refused JSON message: why, and who is to hear of it.
pub(crate) type NotTaken = (Refusal, Answer<JsonText>);

/// Turns a result into the JSON of the answer, or says in words why there is none.
pub(crate) type JsonOf<T> = fn(T) -> Result<JsonText, super::Failure>;

/// JSON as text. On the wire it is bytes, so that only the two ends look into it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct JsonText(pub(crate) Vec<u8>);

/// A message in JSON on the wire.
#[derive(Debug, Encode, Decode)]
pub(crate) struct JsonFrame {
    pub(crate) message: String,
    pub(crate) value: JsonText,
}

/// What an actor accepts.
#[derive(Default)]
pub(crate) struct Table {
    /// Of messages without a group.
    limit: Option<Limit>,
    /// Names and limits of the groups, which are lanes 1, 2, ...
    groups: Vec<(&'static str, Limit)>,
    messages: HashMap<u64, Accepted>,
    json: BTreeMap<&'static str, JsonFn>,
    /// What rounds of a mesh do with them.
    pub(crate) mesh: MeshTable,
}

/// A message that an actor accepts.
pub(crate) struct Accepted {
    /// `WireMessage::NAME`.
    name: &'static str,
    /// Delivers one that came over the wire.
    deliver: DeliverFn,
    /// The `RunFn` of actor and message.
    run: &'static (dyn Any + Send + Sync),
    /// Whether it is answered by a stream.
    streams: bool,
    /// Its concurrency group; 0 for none.
    lane: usize,
}

impl Table {
    /// Adds a message; false if its id is taken.
    pub(crate) fn add<A, M>(&mut self, lane: usize) -> bool
    where
        A: RemoteActor + Handler<M>,
        M: WireMessage,
    {
        let (deliver, run) =
            (super::deliver_frame::<A, M> as DeliverFn, const { &(run::<A, M> as RunFn<A, M>) });
        self.insert(
            const { name_hash(M::NAME) },
            Accepted { name: M::NAME, deliver, run, streams: false, lane },
        )
    }

    /// Adds a message whose handler's work may be dropped.
    pub(crate) fn add_cancellable<A, M>(&mut self, lane: usize) -> bool
    where
        A: RemoteActor + Handler<M, Result = ResponseFuture<M::Result>>,
        M: WireMessage,
    {
        let run = const { &(run_cancellable::<A, M> as RunFn<A, M>) };
        let deliver = super::deliver_frame::<A, M>;
        self.insert(
            const { name_hash(M::NAME) },
            Accepted { name: M::NAME, deliver, run, streams: false, lane },
        )
    }

    /// The same for work that needs the actor.
    pub(crate) fn add_cancellable_act<A, M>(&mut self, lane: usize) -> bool
    where
        A: RemoteActor + Handler<M, Result = ResponseActFuture<A, M::Result>>,
        M: WireMessage,
    {
        let run = const { &(run_cancellable_act::<A, M> as RunFn<A, M>) };
        let deliver = super::deliver_frame::<A, M>;
        self.insert(
            const { name_hash(M::NAME) },
            Accepted { name: M::NAME, deliver, run, streams: false, lane },
        )
    }

    /// Adds a message that is answered by a stream.
    pub(crate) fn add_stream<A, M>(&mut self, lane: usize) -> bool
    where
        A: RemoteActor + Handler<M>,
        M: StreamMessage,
    {
        let run = const { &(run::<A, M> as RunFn<A, M>) };
        let deliver = deliver_stream_frame::<A, M>;
        self.insert(
            const { name_hash(M::NAME) },
            Accepted { name: M::NAME, deliver, run, streams: true, lane },
        )
    }

    fn insert(&mut self, id: u64, accepted: Accepted) -> bool {
        id != JSON_CALL && self.messages.insert(id, accepted).is_none()
    }

    /// Offers a message that was added to callers that speak JSON.
    pub(crate) fn add_json(&mut self, name: &'static str, deliver: JsonFn) {
        self.json.insert(name, deliver);
    }

    /// How to run the handler of actor `A` for message `M`, if it is accepted.
    pub(super) fn run<A, M>(&self, id: u64) -> Option<(RunFn<A, M>, usize)>
    where
        A: RemoteActor,
        M: actix::Message + 'static,
    {
        let accepted = self.messages.get(&id)?;
        Some((*accepted.run.downcast_ref()?, accepted.lane))
    }

    /// The name of a message that is accepted.
    pub(super) fn name(&self, id: u64) -> Option<&'static str> {
        self.messages.get(&id).map(|accepted| accepted.name)
    }

    /// The lane of a message that is accepted.
    pub(super) fn lane(&self, id: u64) -> usize {
        self.messages.get(&id).map_or(0, |accepted| accepted.lane)
    }

    /// Adds a concurrency group and returns its lane; `None` if there is one of that name.
    pub(crate) fn group(&mut self, name: &'static str, limit: Limit) -> Option<usize> {
        if self.groups.iter().any(|(taken, _)| *taken == name) {
            return None;
        }
        self.groups.push((name, limit));
        Some(self.groups.len())
    }

    /// Limits the messages that are in no group.
    pub(crate) fn limit(&mut self, limit: Limit) {
        self.limit = Some(limit);
    }

    /// The limits of all lanes.
    pub(super) fn limits(&self) -> Vec<Limit> {
        let ungrouped = self.limit.unwrap_or(Limit::NONE);
        std::iter::once(ungrouped).chain(self.groups.iter().map(|(_, limit)| *limit)).collect()
    }

    /// How to deliver a message that came over the wire, if it is accepted and gives what is wanted.
    pub(super) fn deliver(&self, id: u64, want: Want) -> Option<DeliverFn> {
        let wants_stream = matches!(want, Want::Stream(_));
        let accepted = self.messages.get(&id).filter(|accepted| accepted.streams == wants_stream);
        match accepted {
            Some(accepted) => Some(accepted.deliver),
            None if id == JSON_CALL && !wants_stream => Some(deliver_json_frame),
            None => None,
        }
    }

    /// The way of a message in JSON, or a refusal that says which ones there are.
    pub(crate) fn json(&self, name: &str) -> Result<JsonFn, Refusal> {
        self.json.get(name).copied().ok_or_else(|| {
            let known = self.json.keys().copied().collect::<Vec<_>>().join(", ");
            Refusal::Malformed(match known.is_empty() {
                true => {
                    format!("no message {name:?} in JSON: this actor accepts none (Accepts::accept_json)")
                }
                false => format!("no message {name:?} in JSON; there are {known}"),
            })
        })
    }
}

/// The JSON door of actor `A` for message `M`, whose result is its own JSON.
pub(crate) fn deliver_json<A, M>(
    entry: &Entry,
    text: &[u8],
    expires_at: Option<Instant>,
    answer: Answer<JsonText>,
) -> Result<(), NotTaken>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage<Result: Serialize> + DeserializeOwned,
{
    deliver_json_as::<A, M>(entry, text, expires_at, (answer, json_of::<M::Result>))
}

/// The same for a `Result`: its error fails the call instead of being a value.
pub(crate) fn deliver_json_result<A, M>(
    entry: &Entry,
    text: &[u8],
    expires_at: Option<Instant>,
    answer: Answer<JsonText>,
) -> Result<(), NotTaken>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage<Result: Fallible> + DeserializeOwned,
{
    let json_of_result: JsonOf<M::Result> =
        |result| result.into_result().map_err(super::Failure::Handler).and_then(json_of);
    deliver_json_as::<A, M>(entry, text, expires_at, (answer, json_of_result))
}

fn deliver_json_as<A, M>(
    entry: &Entry,
    text: &[u8],
    expires_at: Option<Instant>,
    (answer, json_of): (Answer<JsonText>, JsonOf<M::Result>),
) -> Result<(), NotTaken>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage + DeserializeOwned,
{
    let message: M = match serde_json::from_slice(text) {
        Ok(message) => message,
        Err(error) => {
            return Err((Refusal::Malformed(format!("{:?} in JSON: {error}", M::NAME)), answer));
        }
    };
    match entry.enqueue::<A, M>(message, expires_at, answer.of_json(json_of)) {
        Ok(()) => Ok(()),
        Err(refused) => Err((refused.reason, refused.answer.into_json())),
    }
}

fn json_of<T: Serialize>(value: T) -> Result<JsonText, super::Failure> {
    let text = serde_json::to_vec(&value);
    text.map(JsonText).map_err(|error| super::Failure::Codec(format!("the answer has no JSON: {error}")))
}

/// Delivers a message in JSON that came over the wire. A refusal has been told to the asker, if there is one.
fn deliver_json_frame(
    entry: &Entry,
    payload: &[u8],
    expires_at: Option<Instant>,
    answer: Option<RemoteAnswer>,
) -> Result<(), Refusal> {
    let frame: JsonFrame = match from_bytes(payload) {
        Ok(frame) => frame,
        Err(error) => return refuse(answer, Refusal::Malformed(error.to_string())),
    };
    let answer = answer.map_or(Answer::None, Answer::Remote);
    match entry.offer_json(&frame.message, &frame.value.0, expires_at, answer) {
        Ok(()) => Ok(()),
        Err((reason, Answer::Remote(answer))) => refuse(Some(answer), reason),
        Err((reason, _)) => Err(reason),
    }
}
