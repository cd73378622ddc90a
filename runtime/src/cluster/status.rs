//! What a cluster looks like from outside. Plain data, made by the head.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::group::MemberState;
use crate::handle::Incarnation;
use crate::spec::{
    DeathCause, Device, DriverId, Labels, Lifetime, Progress, Quantity, Resources, Seat, Strategy,
    SupervisorSpec,
};

/// The whole cluster at one moment.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize)]
pub struct ClusterStatus {
    /// Rises with every change.
    pub version: u64,
    /// The head.
    pub head: HeadStatus,
    /// All nodes, by name.
    pub nodes: Vec<NodeStatus>,
    /// All worker processes.
    pub workers: Vec<WorkerStatus>,
    /// All actors, by name.
    pub actors: Vec<ActorStatus>,
    /// All groups, by name.
    pub groups: Vec<GroupStatus>,
    /// All placement groups, by name.
    pub placement_groups: Vec<PlacementGroupStatus>,
    /// All supervisors, by name.
    pub supervisors: Vec<SupervisorSpec>,
    /// All drivers that are there.
    pub drivers: Vec<DriverStatus>,
    /// Where the head keeps its state.
    pub state_store: StoreHealth,
}

impl ClusterStatus {
    /// The actor of that name.
    pub fn actor(&self, name: &str) -> Option<&ActorStatus> {
        self.actors.iter().find(|actor| actor.name == name)
    }

    /// The group of that name.
    pub fn group(&self, name: &str) -> Option<&GroupStatus> {
        self.groups.iter().find(|group| group.name == name)
    }
}

/// The head.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct HeadStatus {
    /// Where it listens.
    pub endpoint: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Whether the cluster is being shut down.
    pub closing: bool,
    /// Whether it was restarted and still waits for nodes to report.
    pub recovering: bool,
    /// Its term of the election; grows from one leader to the next.
    pub term: u64,
    /// Where heads may be that stand by, and this one.
    pub heads: Vec<String>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Whether it is heard of.
    pub state: NodeState,
    /// Where its agent listens.
    pub endpoint: String,
    /// Process id of its agent.
    pub pid: u32,
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory, bytes.
    pub memory: u64,
    /// What else it has, by name.
    pub resources: BTreeMap<String, Quantity>,
    /// What of its CPUs, memory and other resources is set aside.
    pub used: Resources,
    /// Its labels.
    pub labels: Labels,
    /// Its devices.
    pub devices: Vec<DeviceStatus>,
}

/// Whether a node is heard of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum NodeState {
    /// It reports.
    Ready,
    /// It takes no actors, and those that are there go elsewhere.
    Draining {
        /// Actors that are still there.
        actors: u32,
    },
    /// It takes no actors and has none.
    Drained,
    /// It ends its workers and goes.
    Leaving,
    /// It is silent; its actors are kept for a while.
    Unreachable {
        /// How that was noticed.
        why: String,
    },
    /// It was silent for too long; its actors are elsewhere or wait for a place.
    Lost {
        /// How that was noticed.
        why: String,
    },
}

/// A device of a node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct DeviceStatus {
    /// The device.
    pub device: Device,
    /// Name of the actor that owns it.
    pub owner: Option<String>,
}

/// A worker process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct WorkerStatus {
    /// Name of the actor it hosts.
    pub actor: String,
    /// Incarnation of that actor.
    pub incarnation: Incarnation,
    /// Its node.
    pub node: String,
    /// Its process id, once the node has started it.
    pub pid: Option<u32>,
    /// What it does.
    pub state: WorkerState,
}

/// What a worker process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// It was ordered from its node.
    Ordered,
    /// It creates its actor.
    Starting,
    /// Its actor takes messages.
    Ready,
    /// It is to end.
    Stopping,
}

/// An actor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct ActorStatus {
    /// Its name.
    pub name: String,
    /// Its type.
    pub type_name: String,
    /// How it is.
    pub state: ActorState,
    /// How often the supervisor has restarted it.
    pub restarts: u64,
    /// Why the incarnation before this one ended.
    pub last_death: Option<DeathCause>,
    /// The last lines that the process of that incarnation wrote.
    pub last_words: Option<String>,
    /// Its last incarnation; 0 before the first.
    pub incarnation: Incarnation,
    /// Its group.
    pub group: Option<String>,
    /// Its rank in the group.
    pub rank: Option<u32>,
    /// Where it runs.
    pub node: Option<String>,
    /// Index of the device it owns.
    pub device: Option<u32>,
    /// Process id of its worker.
    pub pid: Option<u32>,
    /// Where its process listens, once it is ready.
    pub endpoint: Option<String>,
    /// How long it is there.
    pub lifetime: Lifetime,
    /// Its place below a supervisor.
    pub seat: Option<Seat>,
}

impl ActorStatus {
    /// An actor that was never started, detached, in no group.
    pub fn new(name: impl Into<String>, type_name: impl Into<String>, state: ActorState) -> Self {
        Self {
            name: name.into(),
            type_name: type_name.into(),
            state,
            restarts: 0,
            last_death: None,
            last_words: None,
            incarnation: Incarnation(0),
            group: None,
            rank: None,
            node: None,
            device: None,
            pid: None,
            endpoint: None,
            lifetime: Lifetime::Detached,
            seat: None,
        }
    }
}

impl ActorStatus {
    /// Keeps backtraces and last words if they fit into what is `left`, which they then take.
    pub(crate) fn keep_details(&mut self, left: &mut usize) {
        let words = self.last_words.as_ref().map_or(0, String::len);
        let last = self.last_death.as_ref().map_or(0, DeathCause::detail_bytes);
        let wanted = match &self.state {
            ActorState::Dead { cause } => words + last + cause.detail_bytes(),
            _ => words + last,
        };
        match left.checked_sub(wanted) {
            Some(rest) => *left = rest,
            None => {
                self.last_words = None;
                self.last_death = self.last_death.take().map(DeathCause::brief);
                if let ActorState::Dead { cause } = &mut self.state {
                    *cause = cause.clone().brief();
                }
            }
        }
    }
}

/// A registered driver.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct DriverStatus {
    /// Which it is.
    pub id: DriverId,
    /// What it calls itself.
    pub name: String,
    /// Whether there is a connection with it.
    pub connected: bool,
    /// Actors and supervisors that end with it.
    pub owned: u32,
}

/// How an actor is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ActorState {
    /// It has no place.
    Pending {
        /// Why not.
        reason: String,
    },
    /// Its process starts, or creates it.
    Starting {
        /// How far it is.
        progress: Progress,
    },
    /// It takes messages.
    Ready,
    /// It is started again after a pause.
    Restarting {
        /// Restarts in the window.
        attempt: u32,
        /// When, from now, milliseconds.
        in_ms: u64,
    },
    /// Its process is to end.
    Stopping,
    /// It is not started again.
    Dead {
        /// Why it ended.
        cause: DeathCause,
    },
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// Membership epoch; 0 before it was complete for the first time.
    pub epoch: u64,
    /// Whether all ranks serve now.
    pub complete: bool,
    /// Its ranks, as they are now.
    pub members: Vec<MemberStatus>,
}

/// A rank of a group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct MemberStatus {
    /// Its rank.
    pub rank: u32,
    /// Name of the actor.
    pub actor: Option<String>,
    /// Whether it can be reached.
    pub state: MemberState,
}

/// A placement group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PlacementGroupStatus {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: PlacementGroupState,
    /// How its bundles lie to each other.
    pub strategy: Strategy,
    /// The label whose value is the same for all its nodes.
    pub topology: Option<String>,
    /// Its bundles, by index.
    pub bundles: Vec<BundleStatus>,
}

/// How a placement group is, by Ray's words.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PlacementGroupState {
    /// Its bundles have no places.
    Pending {
        /// Why not.
        reason: String,
    },
    /// They have, and the nodes or the state store are still to confirm it.
    Prepared {
        /// Who.
        reason: String,
    },
    /// All bundles can be used.
    Created,
    /// Some bundles were lost; the others can be used.
    Rescheduling {
        /// What the lost ones wait for.
        reason: String,
    },
}

/// A bundle of a placement group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct BundleStatus {
    /// Its index.
    pub index: u32,
    /// What it reserves.
    pub resources: Resources,
    /// Where it is.
    pub node: Option<String>,
    /// Indices of its devices there.
    pub devices: Vec<u32>,
    /// Actors in it.
    pub actors: Vec<String>,
}

/// How the state store is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct StoreHealth {
    /// Which store it is.
    pub kind: String,
    /// Writes that wait.
    pub queued: u64,
    /// Why the last write failed, while writes fail. The head goes on from memory.
    pub error: Option<String>,
}
