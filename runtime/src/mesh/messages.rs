//! What goes between the processes of a mesh in a round, and what clients ask the head about meshes.

use std::sync::Arc;

use actix::Message;
use bincode::{Decode, Encode};

use super::dims::{Dims, Slice};
use super::error::RankFailure;
use super::tree::Part;
use crate::actor::WireMessage;
use crate::group::GroupView;

/// What becomes of the answers of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) enum Kind {
    /// There are none: a rank has done its part when its mailbox has the message.
    Cast,
    /// All come back.
    Gather,
    /// They are reduced on the way.
    Reduce,
}

/// What all stops of a round have in common.
#[derive(Debug, Encode, Decode)]
pub(super) struct Round {
    pub(super) mesh: String,
    /// MS-2: ranks of another epoch take no part.
    pub(super) epoch: u64,
    pub(super) slice: Slice,
    pub(super) fan_out: u32,
    pub(super) kind: Kind,
    /// Hash of `WireMessage::NAME`.
    pub(super) message: u64,
    /// The message, encoded once by the caller.
    pub(super) payload: Arc<[u8]>,
}

/// Has the first stop of a subtree do its part.
#[derive(Debug, Clone, Encode, Decode)]
pub(super) struct Down {
    pub(super) round: Arc<Round>,
    /// The subtree: first stop and the one after the last.
    pub(super) stops: (u32, u32),
    /// The time left to answer in; 0 for no limit.
    pub(super) left_us: u64,
}

/// What comes back from a subtree.
#[derive(Debug, Default, Encode, Decode)]
pub(super) struct Up {
    pub(super) parts: Vec<Part<Vec<u8>>>,
    pub(super) failed: Vec<RankFailure>,
}

/// Why a stop took no part. Nobody in its subtree has seen the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub(super) enum Declined {
    #[error("the mesh is in epoch {epoch} already")]
    Stale { epoch: u64 },
    #[error("the process has not heard of epoch {epoch} of the mesh")]
    Unheard { epoch: u64 },
    #[error("the process has {0} rounds under way, which is the limit")]
    Busy(u32),
    #[error("the round makes no sense in its epoch: {0}")]
    Malformed(String),
}

impl Message for Down {
    type Result = Result<Up, Declined>;
}

impl WireMessage for Down {
    const NAME: &'static str = "mesh.down";
}

/// Asks the head for a mesh: at once if its epoch is not `epoch`, else as soon as that changes or the wait is over.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WatchMesh {
    /// Name of the mesh.
    pub mesh: String,
    /// The epoch that is known already.
    pub epoch: Option<u64>,
    /// Longest wait, milliseconds.
    pub wait_ms: u64,
}

/// A mesh at this moment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MeshNow {
    /// Its shape.
    pub dims: Dims,
    /// Who is in it; epoch 0 and nobody before it was complete for the first time.
    pub view: GroupView,
}

impl Message for WatchMesh {
    type Result = Result<MeshNow, String>;
}

impl WireMessage for WatchMesh {
    const NAME: &'static str = "head.watch_mesh";
}

/// Ends all ranks of a mesh and forgets them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RemoveMesh {
    /// Name of the mesh.
    pub mesh: String,
}

impl Message for RemoveMesh {
    type Result = Result<(), String>;
}

impl WireMessage for RemoveMesh {
    const NAME: &'static str = "head.remove_mesh";
}
