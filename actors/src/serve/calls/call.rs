//! One call: finds a place, sends the message there, and tries another replica where the first certainly had nothing of it.
//!
//! A call that a replica may have begun is not tried again: whether it may be done twice only its caller knows.

use std::time::Duration;

use actix::Handler;
use heliostat_runtime::actor::{RemoteActor, StreamMessage, WireMessage};
use heliostat_runtime::handle::{AskError, Handle, Refusal, Replies, Window};
use tokio::time::Instant;

use super::pool::{Place, Pool};
use crate::serve::replica::HttpResponse;

/// Why a call has no answer.
///
/// Only `NotSent` says that certainly no replica saw the message.
#[derive(thiserror::Error)]
pub enum CallError<M> {
    /// No replica took it; here it is again.
    #[error("{why}")]
    NotSent {
        /// As it was given.
        message: M,
        /// Why.
        why: NoPlace,
    },
    /// A replica had it, or may have.
    #[error("replica {replica}: {why}")]
    Failed {
        /// Its number.
        replica: u64,
        /// What became of it there.
        why: AskError<M>,
    },
}

impl<M> std::fmt::Debug for CallError<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl<M> From<CallError<M>> for HttpResponse {
    /// For an actor that answers HTTP and cannot without that call: 503 where another moment may be better, 504 after a
    /// deadline, 500 after a panic, else 502.
    fn from(why: CallError<M>) -> Self {
        let said = format!("{why}\n");
        match why {
            CallError::NotSent { .. } => Self::text(503, said).header("retry-after", "1"),
            CallError::Failed { why: AskError::Deadline, .. } => Self::text(504, said),
            CallError::Failed { why: AskError::Panicked(_), .. } => Self::text(500, said),
            CallError::Failed { .. } => Self::text(502, said),
        }
    }
}

/// No replica takes a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// So many calls of this caller wait, and no more may.
    #[error("no replica is free, and as many requests wait as may ({0}, `max_queued_requests`)")]
    Full(u64),
    /// None serves.
    #[error("no replica serves: {0}")]
    NotReady(String),
    /// None was free before the deadline.
    #[error("no replica was free before the deadline")]
    Late,
}

/// A call that has the first of its answers.
pub(crate) struct Begun<A, M: StreamMessage> {
    /// Held for as long as the call goes on.
    pub(crate) place: Place<A>,
    /// None: it ended without one.
    pub(crate) first: Option<M::Item>,
    /// The others.
    pub(crate) replies: Replies<M>,
}

/// Sends a message that is answered by a stream, and waits for the first item. Dropping it, or what it returns, cancels the
/// call.
///
/// # Errors
/// No replica took it, or the one that did failed before its first item.
pub(crate) async fn begin<A, M>(
    pool: &Pool<A>,
    mut message: M,
    until: Option<Instant>,
    window: Window,
) -> Result<Begun<A, M>, CallError<M>>
where
    A: RemoteActor + Handler<M>,
    M: StreamMessage,
{
    let mut tried = Vec::new();
    loop {
        let mut place = match place(pool, &tried, until).await {
            Ok(place) => place,
            Err(why) => return Err(CallError::NotSent { message, why }),
        };
        let mut replies = handle(&place, until).stream_within(message, window);
        let first = match replies.next().await.transpose() {
            Ok(first) => first,
            Err(why) => {
                message = again(&mut place, why)?;
                tried.push(place.seat);
                continue;
            }
        };
        place.reached();
        return Ok(Begun { place, first, replies });
    }
}

/// Sends a message and waits for its answer. Dropping it cancels the call.
///
/// # Errors
/// No replica took it, or the one that did gave no answer.
pub(super) async fn ask<A, M>(
    pool: &Pool<A>,
    mut message: M,
    until: Option<Instant>,
) -> Result<M::Result, CallError<M>>
where
    A: RemoteActor + Handler<M>,
    M: WireMessage,
{
    let mut tried = Vec::new();
    loop {
        let mut place = match place(pool, &tried, until).await {
            Ok(place) => place,
            Err(why) => return Err(CallError::NotSent { message, why }),
        };
        match handle(&place, until).ask(message).await {
            Ok(answer) => {
                place.reached();
                return Ok(answer);
            }
            Err(why) => message = again(&mut place, why)?,
        }
        tried.push(place.seat);
    }
}

async fn place<A>(
    pool: &Pool<A>,
    tried: &[super::balance::Seat],
    until: Option<Instant>,
) -> Result<Place<A>, NoPlace> {
    match until {
        None => pool.place(tried).await,
        Some(until) => tokio::time::timeout_at(until, pool.place(tried)).await.unwrap_or(Err(NoPlace::Late)),
    }
}

fn handle<A>(place: &Place<A>, until: Option<Instant>) -> Handle<A> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    left.map_or_else(|| place.handle.clone(), |left: Duration| place.handle.with_deadline(left))
}

/// The message, where another replica may have it.
fn again<A, M>(place: &mut Place<A>, why: AskError<M>) -> Result<M, CallError<M>> {
    match why {
        AskError::Refused(refused) if may_pass(&refused.reason) => {
            tracing::debug!(replica = place.number(), "a call is tried elsewhere: {}", refused.reason);
            place.passed();
            Ok(refused.message)
        }
        why => {
            place.failed(matches!(why, AskError::PeerLost(_) | AskError::Stopped));
            Err(CallError::Failed { replica: place.number(), why })
        }
    }
}

/// Whether another replica may take what one did not.
fn may_pass(reason: &Refusal) -> bool {
    match reason {
        Refusal::MailboxFull
        | Refusal::NoSuchActor
        | Refusal::WrongIncarnation
        | Refusal::WrongProcess
        | Refusal::QueueFull
        | Refusal::Elsewhere(_)
        | Refusal::Unreachable(_)
        | Refusal::TooManyPending(_) => true,
        Refusal::UnknownMessage | Refusal::Unsendable(_) | Refusal::Malformed(_) | Refusal::Cancelled => {
            false
        }
    }
}
