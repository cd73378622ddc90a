//! Names of actors, their incarnations, processes and addresses.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::wire::name_hash;

/// Identifies an actor in the whole cluster, over all its incarnations: a hash of its name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ActorId(pub u64);

impl ActorId {
    /// The head, in the head's process.
    pub const HEAD: Self = Self::named("heliostat/head");
    /// The node agent, in its process.
    pub const NODE: Self = Self::named("heliostat/node");
    /// Takes part in the rounds of meshes, in each process that hosts a rank.
    pub const MESH: Self = Self::named("heliostat/mesh");
    /// The objects of a process, or the object store of a node in the process of its agent.
    pub const OBJECTS: Self = Self::named("heliostat/objects");
    /// The packages of the head or of a node, in its process.
    pub const PACKAGES: Self = Self::named("heliostat/packages");
    /// The host of a worker process, in that process.
    pub const WORKER: Self = Self::named("heliostat/worker");

    /// The id of the actor with that name.
    pub const fn named(name: &str) -> Self {
        Self(name_hash(name))
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::HEAD => f.write_str("head"),
            Self::NODE => f.write_str("node"),
            Self::MESH => f.write_str("mesh"),
            Self::OBJECTS => f.write_str("objects"),
            Self::PACKAGES => f.write_str("packages"),
            Self::WORKER => f.write_str("worker"),
            Self(id) => write!(f, "{id:016x}"),
        }
    }
}

/// Counts the lives of one actor. A message for an earlier one is refused.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// In an address: whichever incarnation is there. Only for actors at well-known ids.
    pub const ANY: Self = Self(0);
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identifies one run of one process.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ProcessId(pub u64);

impl ProcessId {
    /// In an address: whichever process listens at the endpoint.
    pub const ANY: Self = Self(0);

    /// A fresh id.
    pub fn random() -> Self {
        Self(rand::random_range(1..=u64::MAX))
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Address of one incarnation of an actor. It may be sent in messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct ActorAddr {
    /// Which actor.
    pub actor: ActorId,
    /// Which of its lives.
    pub incarnation: Incarnation,
    /// The process it lives in.
    pub process: ProcessId,
    /// Where that process listens, `host:port`.
    pub endpoint: String,
}

impl fmt::Display for ActorAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}@{}", self.actor, self.incarnation, self.endpoint)
    }
}
