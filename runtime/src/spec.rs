//! What users ask the cluster for: actors, their resources, where they go and how often they are restarted.
//!
//! Plain data. It never decides anything: `head::placement` and `head::supervise` do.

mod bundles;
mod death;
mod labels;
mod lifetime;
mod resources;
mod supervision;

use std::time::Duration;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

pub use self::bundles::{Bundle, PlacementGroupSpec, Strategy};
pub use self::labels::{HOST_LABEL, InvalidRule, LabelRule, LabelSelector, Labels, NODE_LABEL, check_labels};
pub(crate) use self::resources::bytes;
pub use self::resources::{Capacity, InvalidQuantity, Quantity, Resources};
use crate::mesh::Dims;
use crate::objects::ArgRefs;
use crate::package::PackageId;

pub use self::death::DeathCause;
pub use self::lifetime::{DEFAULT_NAMESPACE, DriverId, Lifetime, Owner, full_name, split_name};
pub(crate) use self::lifetime::{is_full_name, is_name};
pub use self::supervision::{Seat, SupervisorSpec, SupervisorStrategy, Verdict};

/// One actor that the cluster keeps alive.
///
/// Applying the same spec twice changes nothing; applying another spec of the same name restarts the actor with it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActorSpec {
    /// Unique in its namespace; letters, digits, `-`, `_` and `.`, since it also names the log file. In another than the
    /// default namespace, `namespace/name`.
    pub name: String,
    /// `RemoteActor::TYPE` of an actor in the worker's table of types.
    pub type_name: String,
    /// `Spawn::Args`, encoded by the wire's codec.
    pub args: Vec<u8>,
    /// The refs in `args`, where [`ActorSpec::of`] made them; only in the process that made the spec.
    pub refs: ArgRefs,
    /// The package that its worker runs; without one the node's own program.
    pub package: Option<PackageId>,
    /// What the worker process needs.
    pub resources: Resources,
    /// Where it may go.
    pub placement: Placement,
    /// What the labels of its node must be.
    pub selector: LabelSelector,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// The group it is a rank of.
    pub group: Option<GroupMember>,
    /// The shape of the mesh that its group is, if it is one; the group's size is then that of the shape.
    pub mesh: Option<Dims>,
    /// Names of further groups whose views are delivered to this actor; `serve.*` is every group whose name begins so.
    pub subscribe: Vec<String>,
    /// Messages that wait at most; one more is refused and handed back.
    pub mailbox_capacity: u32,
    /// How long its thread may be kept from taking messages, by a handler that blocks or computes: after that time another
    /// one is there, so it ends a twentieth earlier. `None`: for ever. What a handler awaits does not count.
    pub hang_timeout: Option<Duration>,
    /// Calls of one handle by name that may be under way; one more is refused. `None`: no limit.
    pub max_pending_calls: Option<u32>,
    /// How often a message that may be handled twice (`Idempotent`) is sent again by a handle by name after the process
    /// that had it was lost.
    pub max_task_retries: u32,
    /// How long it is there.
    pub lifetime: Lifetime,
    /// Its place below a supervisor, which then decides what follows from its death, and not `restart`.
    pub seat: Option<Seat>,
    /// It is part of an exact set: a later set of its namespace that does not list it removes it. Set by
    /// [`Cluster::apply_exactly`](crate::cluster::Cluster::apply_exactly).
    pub in_set: bool,
}

impl ActorSpec {
    /// Messages that wait at most, unless the spec says otherwise.
    pub const MAILBOX_CAPACITY: u32 = 1024;
    /// How long an actor's thread may be kept from taking messages, unless the spec says otherwise.
    pub const HANG_TIMEOUT: Duration = Duration::from_secs(10);

    /// A spec with defaults: no device, anywhere, restarted, in no group.
    pub fn new(name: impl Into<String>, type_name: impl Into<String>, args: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            type_name: type_name.into(),
            args,
            refs: ArgRefs::default(),
            package: None,
            resources: Resources::default(),
            placement: Placement::Anywhere,
            selector: LabelSelector::default(),
            restart: RestartPolicy::default(),
            group: None,
            mesh: None,
            subscribe: Vec::new(),
            mailbox_capacity: Self::MAILBOX_CAPACITY,
            hang_timeout: Some(Self::HANG_TIMEOUT),
            max_pending_calls: None,
            max_task_retries: 0,
            lifetime: Lifetime::Caller,
            seat: None,
            in_set: false,
        }
    }

    /// Says what is wrong with the spec, so that a mistake is refused before anything starts.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        let fail = |why: String| Err(InvalidSpec::actor(&self.name, why));
        if !is_full_name(&self.name) {
            return fail(name_rule("the name"));
        }
        if self.type_name.is_empty() {
            return fail("the actor type is empty".into());
        }
        if self.mailbox_capacity == 0 {
            return fail("mailbox_capacity is 0: no message could ever be delivered".into());
        }
        if self.resources.devices > 1 {
            return fail(format!(
                "it asks for {} devices, a worker owns at most one",
                self.resources.devices
            ));
        }
        if self.hang_timeout.is_some_and(|limit| limit < Duration::from_millis(100)) {
            return fail("hang_timeout is less than 100 ms: a busy machine alone would exceed it".into());
        }
        if self.max_pending_calls == Some(0) {
            return fail("max_pending_calls is 0: no call could ever be made".into());
        }
        self.resources.validate().or_else(fail)?;
        self.selector.validate().or_else(fail)?;
        if matches!(self.placement, Placement::Bundle { .. }) && !self.selector.is_empty() {
            return fail("a bundle has its own label selector; leave that of the actor empty".into());
        }
        if let Some(member) = &self.group {
            if !is_name(&member.group) {
                return fail(format!("group name {:?} is not a valid name", member.group));
            }
            if member.rank >= member.size {
                return fail(format!("rank {} is not below the group size {}", member.rank, member.size));
            }
        }
        self.validate_mesh().or_else(fail)
    }

    fn validate_mesh(&self) -> Result<(), String> {
        let Some(dims) = &self.mesh else { return Ok(()) };
        dims.validate().map_err(|error| error.to_string())?;
        match &self.group {
            Some(member) if member.size == dims.ranks() => Ok(()),
            Some(member) => Err(format!("group size {} is not that of the mesh {dims}", member.size)),
            None => Err(format!("it is of a mesh {dims} but of no group, which would name the mesh")),
        }
    }
}

fn name_rule(what: &str) -> String {
    format!(
        "{what} must be 1 to 128 letters, digits, '-', '_' or '.', not starting with '.'; a namespace may stand before \
         it, as in \"training/a\""
    )
}

/// A spec that cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
#[error("{what} {name:?}: {why}")]
pub struct InvalidSpec {
    /// What it would be: an actor or a placement group.
    pub what: String,
    /// Its name.
    pub name: String,
    /// What is wrong and what would be right.
    pub why: String,
}

impl InvalidSpec {
    /// Of an actor.
    pub fn actor(name: &str, why: impl Into<String>) -> Self {
        Self { what: "actor".into(), name: name.to_owned(), why: why.into() }
    }

    /// Of a supervisor.
    pub fn supervisor(name: &str, why: impl Into<String>) -> Self {
        Self { what: "supervisor".into(), name: name.to_owned(), why: why.into() }
    }

    /// Of a placement group.
    pub fn placement_group(name: &str, why: impl Into<String>) -> Self {
        Self { what: "placement group".into(), name: name.to_owned(), why: why.into() }
    }
}

/// Where an actor may be placed, among the nodes that have what it needs and whose labels its selector matches.
#[derive(
    Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub enum Placement {
    /// The head picks: with a device the first node that has one free, else the node with the fewest actors. A restarted
    /// actor goes back to where it was, if it can.
    #[default]
    Anywhere,
    /// The node with the fewest actors, also for actors with a device.
    Spread,
    /// Only on this node.
    Node(String),
    /// On this node if it has room, else as `Anywhere`.
    NodePreferred(String),
    /// Only on this device of this node.
    Device {
        /// Name of the node.
        node: String,
        /// Index of the device on its node.
        index: u32,
    },
    /// In what a placement group reserved. The actor's selector must be empty: its bundle has one.
    Bundle {
        /// Name of the placement group.
        group: String,
        /// Index of the bundle; without it, the first that has room.
        index: Option<u32>,
    },
}

/// A device of a node, as the node's configuration lists it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Device {
    /// Index on its node, from 0.
    pub index: u32,
    /// What it is.
    pub kind: DeviceKind,
}

impl Device {
    /// A share of the node's CPU with that many threads, as device `index`.
    pub fn cpu(index: u32, threads: u32) -> Self {
        Self { index, kind: DeviceKind::Cpu { threads } }
    }

    /// The GPU with that ordinal, as device `index`.
    pub fn cuda(index: u32, ordinal: u32) -> Self {
        Self { index, kind: DeviceKind::Cuda { ordinal } }
    }

    /// Its ordinal, if it is a GPU.
    pub fn gpu(&self) -> Option<u32> {
        match self.kind {
            DeviceKind::Cpu { .. } => None,
            DeviceKind::Cuda { ordinal } => Some(ordinal),
        }
    }
}

/// What a device is. Closed: the engine has a backend for each.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A share of the node's CPU.
    Cpu {
        /// Threads the worker may compute with.
        threads: u32,
    },
    /// A CUDA device.
    Cuda {
        /// Its number among those that the node agent's driver shows; workers inherit the agent's CUDA_VISIBLE_DEVICES.
        ordinal: u32,
    },
}

/// How often and how fast an actor is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// Restarts within `window` after which one more death is final.
    pub max_restarts: u32,
    /// The window that `max_restarts` counts in.
    pub window: Duration,
    /// Delay before the second restart in the window; it doubles with each further one. The first is immediate.
    pub backoff_min: Duration,
    /// The delay never grows beyond this.
    pub backoff_max: Duration,
}

impl Default for RestartPolicy {
    /// 10 restarts in 60 s, delays 0, 100 ms, 200 ms, ... 5 s.
    fn default() -> Self {
        Self {
            max_restarts: 10,
            window: Duration::from_secs(60),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

impl RestartPolicy {
    /// Never restarts: the first death is final.
    pub fn never() -> Self {
        Self { max_restarts: 0, ..Self::default() }
    }
}

/// An actor's seat in a group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct GroupMember {
    /// Name of the group.
    pub group: String,
    /// Rank in the group, below `size`.
    pub rank: u32,
    /// Number of ranks of the group.
    pub size: u32,
}

/// How far an actor is with starting, as it says itself (loading weights, compiling, ...).
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing, in a word or two.
    pub phase: String,
    /// Units done (bytes, for weights).
    pub done: u64,
    /// Units in all; 0 when unknown.
    pub total: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_names_the_mistake() {
        let spec = ActorSpec::new("rank-0", "rank", vec![]);
        assert_eq!(spec.validate(), Ok(()));
        let why = |spec: ActorSpec| spec.validate().unwrap_err().to_string();
        assert!(why(ActorSpec { name: "a b".into(), ..spec.clone() }).contains("letters, digits"));
        assert!(why(ActorSpec { name: "..".into(), ..spec.clone() }).contains("not starting with"));
        let group = Some(GroupMember { group: "ep".into(), rank: 4, size: 4 });
        assert!(why(ActorSpec { group, ..spec.clone() }).contains("rank 4 is not below the group size 4"));
        assert!(why(ActorSpec { mailbox_capacity: 0, ..spec }).contains("mailbox_capacity"));
    }
}
