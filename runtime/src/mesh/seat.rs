//! What a rank of a mesh knows of its place, and its way to its peers.

use crate::actor::RemoteActor;
use crate::handle::ActorAddr;
use crate::system::System;

use super::dims::{Dims, Point};
use super::handle::Mesh;

/// A rank's place in its mesh. Cheap to clone.
#[derive(Clone)]
pub struct MeshSeat {
    pub(crate) system: System,
    pub(crate) name: String,
    pub(crate) dims: Dims,
    pub(crate) rank: u32,
    pub(crate) peers: std::sync::Arc<[Option<ActorAddr>]>,
}

impl MeshSeat {
    /// Name of the mesh.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Where it is in the mesh.
    pub fn point(&self) -> Point {
        self.dims.point_of(self.rank).expect("a spec's rank is within its mesh")
    }

    /// Addresses of all ranks, by rank, as of this rank's start; they are there in `Spawn::create` already. `None` is a
    /// peer that had no process then (one that died for good, or has no place). An address is good for messages once
    /// its actor was created; a message before that is refused, and one to a peer that was restarted since never
    /// reaches the new one.
    pub fn peers(&self) -> &[Option<ActorAddr>] {
        &self.peers
    }

    /// The mesh, to cast and gather over: possible once all ranks were created, so in a handler, not in `Spawn::create`.
    pub fn mesh<A: RemoteActor>(&self) -> Mesh<A> {
        self.system.mesh(&self.name, self.dims.clone())
    }
}
