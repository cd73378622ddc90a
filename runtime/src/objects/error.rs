//! Why an object cannot be put or got.

use bincode::{Decode, Encode};

use super::ObjectId;
use crate::wire::CodecError;

/// Why an object cannot be put or got.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum ObjectError {
    /// Its owner, the process that put it, is gone, and the object with it.
    #[error("object {object} is lost with its owner: {why}")]
    OwnerDied {
        /// The object.
        object: ObjectId,
        /// How the owner ended.
        why: String,
    },
    /// Nobody had a ref to it any more.
    #[error(
        "object {object} was freed: nobody had a ref to it that counts; keep one until the object is read"
    )]
    Freed {
        /// The object.
        object: ObjectId,
    },
    /// Where it is cannot be reached.
    #[error("object {object} is out of reach at {at}: {why}")]
    Unreachable {
        /// The object.
        object: ObjectId,
        /// Where it is.
        at: String,
        /// What went wrong.
        why: String,
    },
    /// Neither the store nor its disk has room.
    #[error(
        "the object store of this node is full: {asked} bytes are asked for, {used} of {capacity} are in use by objects \
         that somebody reads or that cannot be spilled ({disk}); drop refs, or raise `memory` or `spill_bytes` \
         in [objects] (`--objects`, `--spill` of `helio node`)"
    )]
    StoreFull {
        /// What was asked for.
        asked: u64,
        /// What is in use.
        used: u64,
        /// What there is.
        capacity: u64,
        /// Why no room was made by spilling.
        disk: String,
    },
    /// It is larger than the whole store.
    #[error(
        "an object of {asked} bytes is larger than the store of this node, {capacity} bytes: raise `memory` in [objects] \
         (`--objects` of `helio node`)"
    )]
    TooLarge {
        /// What was asked for.
        asked: u64,
        /// What there is.
        capacity: u64,
    },
    /// Too much is asked of the store at once.
    #[error("the object store of this node is busy with {0} requests; try again")]
    Busy(usize),
    /// The store of this node does not answer.
    #[error("the object store of this node is away: {0}; it comes back with the node agent")]
    StoreAway(String),
    /// Memory or a file fails.
    #[error("object memory: {0}")]
    Io(String),
    /// The value cannot be encoded, or the object is not such a value.
    #[error("{0}")]
    Codec(String),
}

impl ObjectError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::StoreFull { .. } | Self::Busy(_) | Self::StoreAway(_) => true,
            Self::OwnerDied { .. }
            | Self::Freed { .. }
            | Self::TooLarge { .. }
            | Self::Io(_)
            | Self::Codec(_) => false,
        }
    }

    pub(super) fn io(error: impl std::fmt::Display) -> Self {
        Self::Io(error.to_string())
    }
}

impl From<CodecError> for ObjectError {
    fn from(error: CodecError) -> Self {
        Self::Codec(error.to_string())
    }
}
