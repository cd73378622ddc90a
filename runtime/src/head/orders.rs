//! What a head orders of a worker, each under its term: who obeys a newer head refuses an older one's.

use bincode::{Decode, Encode};

use crate::group::GroupView;
use crate::handle::{ActorAddr, Incarnation};
use crate::spec::{ActorSpec, Device};

/// Has a worker create its actor; a worker that has already begun ignores it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CreateActor {
    /// The worker.
    pub incarnation: Incarnation,
    /// What to create.
    pub spec: ActorSpec,
    /// The device it owns.
    pub device: Option<Device>,
    /// For a rank of a mesh: where its peers are or will be, by rank. `None` for those that have no process.
    pub peers: Vec<Option<ActorAddr>>,
    /// Term of the head that orders it.
    pub term: u64,
}

/// Has a worker deliver a view to its actor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeliverView {
    /// The view.
    pub view: GroupView,
    /// Term of the head that sends it.
    pub term: u64,
}

/// Tells a worker to exit at once.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Dismiss {
    /// Why.
    pub why: String,
    /// Term of the head that orders it.
    pub term: u64,
}
