//! Answers: every asker gets one, whatever becomes of the actor.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bincode::Encode;
use tokio::sync::oneshot;

use super::Lifetime;
use super::table::{JsonOf, JsonText};
use crate::handle::Refusal;
use crate::wire::answer::RemoteAnswer;
use crate::wire::frame::{RemoteFailure, Want};

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Failure {
    Refused(Refusal),
    Expired,
    Stopped,
    Panicked(String),
    NoReply,
    Codec(String),
    Handler(String),
    Cancelled,
    PeerLost(String),
}

impl From<RemoteFailure> for Failure {
    fn from(failure: RemoteFailure) -> Self {
        match failure {
            RemoteFailure::Expired => Self::Expired,
            RemoteFailure::Stopped => Self::Stopped,
            RemoteFailure::Panicked(message) => Self::Panicked(message),
            RemoteFailure::NoReply => Self::NoReply,
            RemoteFailure::Codec(why) => Self::Codec(why),
            RemoteFailure::Handler(why) => Self::Handler(why),
        }
    }
}

/// What is said of a failure over the wire.
pub(super) fn remote_failure(failure: Failure) -> RemoteFailure {
    match failure {
        Failure::Expired => RemoteFailure::Expired,
        Failure::Panicked(message) => RemoteFailure::Panicked(message),
        Failure::NoReply => RemoteFailure::NoReply,
        Failure::Codec(why) => RemoteFailure::Codec(why),
        Failure::Handler(why) => RemoteFailure::Handler(why),
        Failure::Stopped | Failure::Cancelled | Failure::Refused(_) | Failure::PeerLost(_) => {
            RemoteFailure::Stopped
        }
    }
}

/// Where an answer goes.
pub(crate) enum Answer<T> {
    /// It was a `tell`.
    None,
    /// To an asker in this process.
    Local(oneshot::Sender<Result<T, Failure>>),
    /// Over the wire.
    Remote(RemoteAnswer),
    /// As JSON, to whoever waits for that.
    Json(Box<(Answer<JsonText>, JsonOf<T>)>),
}

impl<T: Encode> Answer<T> {
    fn send(self, outcome: Result<T, Failure>) {
        match (self, outcome) {
            (Self::None, _) => {}
            (Self::Local(asker), outcome) => drop(asker.send(outcome)),
            (Self::Remote(asker), Ok(value)) => asker.reply(&value),
            (Self::Remote(asker), Err(failure)) => asker.fail(&remote_failure(failure)),
            (Self::Json(asker), outcome) => {
                let (asker, json_of) = *asker;
                asker.send(outcome.and_then(json_of));
            }
        }
    }

    /// What `of_json` was called on, if this is its outcome.
    pub(super) fn into_json(self) -> Answer<JsonText> {
        match self {
            Self::Json(asker) => asker.0,
            Self::None | Self::Local(_) | Self::Remote(_) => Answer::None,
        }
    }
}

impl<T> Answer<T> {
    /// Whether there was an asker and it is gone.
    fn is_cancelled(&self) -> bool {
        match self {
            Self::None => false,
            Self::Local(asker) => asker.is_closed(),
            // What was told is handled, also if its sender is gone.
            Self::Remote(asker) => asker.want() != Want::Receipt && asker.served().is_cancelled(),
            Self::Json(asker) => asker.0.is_cancelled(),
        }
    }

    fn poll_cancelled(&mut self, task: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::None => Poll::Pending,
            Self::Local(asker) => asker.poll_closed(task),
            Self::Remote(asker) => asker.served().poll_cancelled(task),
            Self::Json(asker) => asker.0.poll_cancelled(task),
        }
    }
}

impl Answer<JsonText> {
    /// An answer of a type that becomes JSON on its way.
    pub(super) fn of_json<T>(self, json_of: JsonOf<T>) -> Answer<T> {
        match self {
            Self::None => Answer::None,
            asker => Answer::Json(Box::new((asker, json_of))),
        }
    }
}

/// An answer that is certainly given: if nothing else, dropping it says how the actor ended.
pub(super) struct Asker<T: Encode> {
    pub(super) answer: Answer<T>,
    pub(super) lifetime: Arc<Lifetime>,
}

impl<T: Encode> Asker<T> {
    /// Whether there was an asker and it is gone.
    pub(super) fn is_cancelled(&self) -> bool {
        self.answer.is_cancelled()
    }

    /// Waits until the asker is gone.
    pub(super) async fn cancelled(&mut self) {
        poll_fn(|task| self.answer.poll_cancelled(task)).await;
    }

    pub(super) fn waits(&self) -> bool {
        !matches!(self.answer, Answer::None)
    }

    /// The handler gets the message now: a sender that wants to know only this is told, and waits for nothing more.
    pub(super) fn receipt(mut self) -> Self {
        match std::mem::replace(&mut self.answer, Answer::None) {
            Answer::Remote(answer) if answer.want() == Want::Receipt => answer.reply(&()),
            answer => self.answer = answer,
        }
        self
    }

    /// Takes the answer out; nobody is told of anything.
    pub(super) fn into_answer(mut self) -> Answer<T> {
        std::mem::replace(&mut self.answer, Answer::None)
    }

    pub(super) fn send(mut self, outcome: Result<T, Failure>) {
        std::mem::replace(&mut self.answer, Answer::None).send(outcome);
    }
}

impl<T: Encode> Drop for Asker<T> {
    fn drop(&mut self) {
        if self.waits() {
            std::mem::replace(&mut self.answer, Answer::None).send(Err(self.lifetime.failure()));
        }
    }
}
