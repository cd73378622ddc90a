//! Why a message was not accepted, and why an ask has no answer.

use std::fmt;

use crate::mailbox::Failure;

/// Why a message was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The actor has as many messages waiting as it may.
    #[error("the actor's mailbox is full")]
    MailboxFull,
    /// The process has no such actor; it may have stopped.
    #[error("no such actor in the process")]
    NoSuchActor,
    /// The actor was restarted since the address was taken.
    #[error("the address is of another incarnation of the actor")]
    WrongIncarnation,
    /// Another process took over the endpoint.
    #[error("another process listens at the endpoint")]
    WrongProcess,
    /// The message does not stand in the actor's table of messages.
    #[error("the actor does not accept this message")]
    UnknownMessage,
    /// Too many bytes already wait to be sent to the peer.
    #[error("the queue to the peer is full")]
    QueueFull,
    /// The process stands by for another one that runs the actor, at that address; empty if none is known.
    #[error("stands by for {}", if .0.is_empty() { "a leader that is not known yet" } else { .0.as_str() })]
    Elsewhere(String),
    /// No connection could be made.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The message is larger than a frame may be, or cannot be encoded at all.
    #[error("cannot be sent: {0}")]
    Unsendable(String),
    /// The actor's process cannot read the message: another version of it, or JSON that does not fit.
    #[error("the actor cannot read it: {0}")]
    Malformed(String),
    /// The token of the handle (`Handle::with_cancel`) was cancelled before the message was sent.
    #[error("cancelled")]
    Cancelled,
    /// The handle (`Handle::with_max_pending`) has as many asks under way as it may.
    #[error("the handle has {0} asks under way, and may have no more")]
    TooManyPending(u64),
}

impl Refusal {
    /// Whether the same message to the same address may be accepted later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::MailboxFull
            | Self::QueueFull
            | Self::Elsewhere(_)
            | Self::Unreachable(_)
            | Self::TooManyPending(_) => true,
            Self::NoSuchActor
            | Self::WrongIncarnation
            | Self::WrongProcess
            | Self::UnknownMessage
            | Self::Unsendable(_)
            | Self::Malformed(_)
            | Self::Cancelled => false,
        }
    }

    pub(crate) fn code(&self) -> (u8, &str) {
        match self {
            Self::MailboxFull => (1, ""),
            Self::NoSuchActor => (2, ""),
            Self::WrongIncarnation => (3, ""),
            Self::WrongProcess => (4, ""),
            Self::UnknownMessage => (5, ""),
            Self::QueueFull => (6, ""),
            Self::Unreachable(why) => (7, why),
            Self::Unsendable(why) => (8, why),
            Self::Elsewhere(leader) => (9, leader),
            Self::Malformed(why) => (10, why),
            // Said by handles only, never over the wire.
            Self::Cancelled | Self::TooManyPending(_) => (11, ""),
        }
    }

    pub(crate) fn from_code(code: u8, text: &str) -> Option<Self> {
        Some(match code {
            1 => Self::MailboxFull,
            2 => Self::NoSuchActor,
            3 => Self::WrongIncarnation,
            4 => Self::WrongProcess,
            5 => Self::UnknownMessage,
            6 => Self::QueueFull,
            7 => Self::Unreachable(text.to_owned()),
            8 => Self::Unsendable(text.to_owned()),
            9 => Self::Elsewhere(text.to_owned()),
            10 => Self::Malformed(text.to_owned()),
            11 => Self::Cancelled,
            _ => return None,
        })
    }
}

/// The name of a message's type as users wrote it: without the path.
fn name_of<M>() -> &'static str {
    let path = std::any::type_name::<M>();
    let end = path.find('<').unwrap_or(path.len());
    path[..end].rfind("::").map_or(path, |at| &path[at + 2..])
}

/// A message that was not accepted, with the reason.
#[derive(thiserror::Error)]
#[error("{} refused: {reason}", name_of::<M>())]
pub struct Refused<M> {
    /// The message, as it was given.
    pub message: M,
    /// Why.
    pub reason: Refusal,
}

impl<M> fmt::Debug for Refused<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why an `ask` has no answer.
///
/// Only `Refused` says that the actor certainly did not see the message.
#[derive(thiserror::Error)]
pub enum AskError<M> {
    /// The message was not accepted; here it is again.
    #[error(transparent)]
    Refused(Refused<M>),
    /// The deadline passed. The actor may or may not have handled the message.
    #[error("no answer to {} before the deadline", name_of::<M>())]
    Deadline,
    /// The token of the handle (`Handle::with_cancel`) was cancelled. The actor may have handled the message.
    #[error("the ask of {} was cancelled", name_of::<M>())]
    Cancelled,
    /// The connection to the actor's process broke while the message was on its way.
    #[error("lost the process that was asked: {0}")]
    PeerLost(String),
    /// The actor stopped before it answered.
    #[error("the actor stopped before it answered")]
    Stopped,
    /// The actor panicked before it answered.
    #[error("the actor panicked: {0}")]
    Panicked(String),
    /// The handler dropped its reply.
    #[error("the handler of {} gave no reply", name_of::<M>())]
    NoReply,
    /// The answer could not be encoded, or did not decode.
    #[error("codec: {0}")]
    Codec(String),
    /// The handler returned an error, in its words. Only where the caller does not know the type of the result, as in
    /// `JsonHandle::ask`.
    #[error("the actor returned an error: {0}")]
    Handler(String),
}

impl<M> fmt::Debug for AskError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<M> AskError<M> {
    /// The message, where it came back.
    pub fn into_message(self) -> Option<M> {
        match self {
            Self::Refused(refused) => Some(refused.message),
            _ => None,
        }
    }

    pub(super) fn new(failure: Failure, message: Option<M>) -> Self {
        match (failure, message) {
            (Failure::Refused(reason), Some(message)) => Self::Refused(Refused { message, reason }),
            (Failure::Refused(reason), None) => Self::PeerLost(reason.to_string()),
            (Failure::Expired, _) => Self::Deadline,
            (Failure::Stopped, _) => Self::Stopped,
            (Failure::Panicked(message), _) => Self::Panicked(message),
            (Failure::NoReply, _) => Self::NoReply,
            (Failure::Codec(why), _) => Self::Codec(why),
            (Failure::Handler(why), _) => Self::Handler(why),
            (Failure::Cancelled, _) => Self::Cancelled,
            (Failure::PeerLost(why), _) => Self::PeerLost(why),
        }
    }
}
