//! A handle for callers that speak JSON and do not know the type of the actor: the REST API, Python, scripts.
//!
//! What an actor takes is what it offers with `Accepts::accept_json`; anything else is refused by name.

use std::fmt;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;

use super::way::{Place, Way};
use super::{ActorAddr, AskError, Refusal, Refused};
use crate::mailbox::{Answer, Failure, JSON_CALL, JsonFrame, JsonText};
use crate::system::System;

/// A handle that sends and receives JSON. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct JsonHandle {
    way: Way,
}

/// A message in JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct JsonMessage {
    /// Its name: `WireMessage::NAME`.
    pub message: String,
    /// What it holds.
    pub value: Box<Value>,
}

impl fmt::Debug for JsonHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JsonHandle({})", self.way.addr())
    }
}

impl JsonHandle {
    pub(crate) fn new(system: System, addr: ActorAddr) -> Self {
        Self { way: Way::new(system, addr) }
    }

    /// The address that the handle was made for.
    pub fn addr(&self) -> &ActorAddr {
        self.way.addr()
    }

    /// The same actor, but each ask or tell is good for `deadline` only, as `Handle::with_deadline` has it.
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { way: self.way.with_deadline(deadline) }
    }

    /// Sends the message of that name and waits for its answer, with the guarantees of `Handle::ask`.
    pub async fn ask(&self, message: &str, value: Value) -> Result<Value, AskError<JsonMessage>> {
        let asked = match self.way.place() {
            Place::Local(cached) => match self.way.entry(cached) {
                Ok(entry) => {
                    let (answer, answered) = oneshot::channel();
                    let expires_at = self.way.expires_at();
                    match entry.offer_json(
                        message,
                        text_of(&value).as_slice(),
                        expires_at,
                        Answer::Local(answer),
                    ) {
                        Ok(()) => self.way.answer_here(answered).await,
                        Err((reason, _)) => Err(Failure::Refused(reason)),
                    }
                }
                Err(reason) => Err(Failure::Refused(reason)),
            },
            Place::Remote(link) => {
                let asked = self.way.ask_over(link, JSON_CALL, &frame_of(message, &value));
                self.way.answer_over(asked).await
            }
        };
        let value_of = |JsonText(text): JsonText| {
            serde_json::from_slice(&text).map_err(|error| Failure::Codec(error.to_string()))
        };
        asked.and_then(value_of).map_err(|failure| {
            AskError::new(failure, Some(JsonMessage { message: message.to_owned(), value: Box::new(value) }))
        })
    }

    /// Sends the message of that name and waits for nothing, with the guarantees of `Handle::tell`.
    pub fn tell(&self, message: &str, value: Value) -> Result<(), Refused<JsonMessage>> {
        let told = match self.way.place() {
            Place::Local(cached) => self.way.entry(cached).and_then(|entry| {
                let offered = entry.offer_json(
                    message,
                    text_of(&value).as_slice(),
                    self.way.expires_at(),
                    Answer::None,
                );
                offered.map_err(|(reason, _)| reason)
            }),
            Place::Remote(link) => self.way.tell_over(link, JSON_CALL, &frame_of(message, &value)),
        };
        told.map_err(|reason: Refusal| Refused {
            message: JsonMessage { message: message.to_owned(), value: Box::new(value) },
            reason,
        })
    }
}

fn text_of(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn frame_of(message: &str, value: &Value) -> JsonFrame {
    JsonFrame { message: message.to_owned(), value: JsonText(text_of(value)) }
}
