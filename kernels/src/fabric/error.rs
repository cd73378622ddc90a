//! What can go wrong on a link.

use std::io;
use std::time::Duration;

use super::frame::Tag;

/// Why a call on the fabric failed. All but [`FabricError::Timeout`] end the epoch: drop the fabric and connect anew.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// Another thread called [`super::Abort::abort`].
    #[error("the fabric was aborted (reason {reason})")]
    Aborted {
        /// What the caller of `abort` gave.
        reason: u64,
    },
    /// The process of a rank ended, or the connection to it broke.
    #[error("rank {rank} is lost: its connection closed")]
    PeerLost {
        /// The rank.
        rank: usize,
    },
    /// A rank did not send a frame, or made no room for one, in time.
    #[error("timed out after {waited:?} waiting for {}{}", name_rank(*.rank), name_tag(*.tag))]
    Timeout {
        /// The rank, if the call named one.
        rank: Option<usize>,
        /// The frame, if the call named one.
        tag: Option<Tag>,
        /// How long the call waited.
        waited: Duration,
    },
    /// Not all ranks were linked in time.
    #[error("ranks {missing:?} were not linked for epoch {epoch} within {waited:?}: {last}")]
    ConnectTimeout {
        /// The epoch.
        epoch: u64,
        /// Ranks without a link.
        missing: Vec<usize>,
        /// How long the call waited.
        waited: Duration,
        /// What the last attempt failed with.
        last: String,
    },
    /// A rank sent something that it must not send.
    #[error("rank {rank} broke the protocol: {what}")]
    Protocol {
        /// The rank.
        rank: usize,
        /// What is wrong.
        what: String,
    },
    /// A newer epoch has begun; this one can no longer be connected.
    #[error("epoch {epoch} is over: rank {rank} is at epoch {newer}")]
    StaleEpoch {
        /// The epoch of the call.
        epoch: u64,
        /// The epoch that was seen.
        newer: u64,
        /// Where it was seen.
        rank: usize,
    },
    /// The caller's arguments make no sense.
    #[error("bad argument: {0}")]
    Argument(String),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The refusal.
        source: io::Error,
    },
}

impl FabricError {
    /// An operating-system error with what was being done.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }
}

fn name_rank(rank: Option<usize>) -> String {
    rank.map_or_else(|| "any rank".to_owned(), |rank| format!("rank {rank}"))
}

fn name_tag(tag: Option<Tag>) -> String {
    tag.map_or_else(String::new, |tag| format!(" ({tag})"))
}
