//! What [`super::Dispatch`] decides: effects for its shell, and the two ways in which a client is turned down.

use std::time::Duration;

use heliostat_engine::request::{Output, RequestId};

use crate::ingress::engine::RankCommand;

/// What the shell must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Hand this to a rank.
    Send(u32, RankCommand),
    /// Hand new tokens to the sequence's client; never a token twice. Its rank and what it brought.
    Deliver(u32, Output),
    /// Tell the client that the sequence has failed.
    Fail(RequestId, Failure),
}

/// Requests that were not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No rank is ready yet.
    #[error("the model is not ready: {}", if missing.is_empty() { "no rank is ready".to_owned() } else { missing.join("; ") })]
    NotReady {
        /// What is waited for.
        missing: Vec<String>,
    },
    /// All queues are full.
    #[error("all queues are full; try again later")]
    QueueFull,
    /// The client has its share of the queues, and others wait for theirs.
    #[error("your share of the queues is full, and others wait; try again later")]
    OverShare,
    /// Even empty queues could not take it.
    #[error("the request is {sequences} sequences, but the queues hold {capacity}: send fewer at once")]
    NeverFits {
        /// Prompts times choices.
        sequences: usize,
        /// What the queues hold.
        capacity: usize,
    },
    /// The client named a rank that does not exist.
    #[error("there is no data-parallel rank {rank}: the group has {size}")]
    NoSuchRank {
        /// The rank.
        rank: u32,
        /// Ranks of the group.
        size: u32,
    },
    /// The rank that the client named is not ready.
    #[error("data-parallel rank {0} is not ready")]
    RankNotReady(u32),
}

/// Why a sequence ended without finishing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Its rank's queue was full, and so were all others.
    #[error("all queues are full; try again later")]
    QueueFull,
    /// No rank could take it for this long.
    #[error("no rank could take the request for {} seconds", .0.as_secs())]
    NoRank(Duration),
    /// Its group lacks a rank and generated nothing for this long.
    #[error("the group generated nothing for {} seconds: {}", waited.as_secs(), missing.join("; "))]
    Stalled {
        /// How long.
        waited: Duration,
        /// What the group lacks.
        missing: Vec<String>,
    },
    /// What served it was removed, and its grace has passed.
    #[error("the deployment was removed before the request ended")]
    Ended,
    /// Its ranks were lost one after the other.
    #[error("the request was moved {0} times because its rank was lost, and lost it again")]
    MovedTooOften(u32),
    /// No rank can run it.
    #[error("{0}")]
    Unservable(String),
    /// It took longer than the server gives a request.
    #[error("the request was not done within {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    /// The rank reported an error.
    #[error("the rank failed: {0}")]
    Rank(String),
}
