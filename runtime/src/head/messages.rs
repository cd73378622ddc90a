//! What head, nodes, workers and clients say to each other.
//!
//! Nodes and workers report their whole state, which is small, again and again: a lost or repeated report does no
//! harm, and a restarted head knows everything after one round.

use std::time::Duration;

use bincode::{Decode, Encode};

use super::core::Manner;
pub use super::orders::{CreateActor, DeliverView, Dismiss};
use super::tenure::Superseded;
use crate::actor::wire;
use crate::cluster::status::{ActorState, ClusterStatus, PlacementGroupState, PlacementGroupStatus};
use crate::group::GroupView;
use crate::handle::{ActorAddr, Incarnation, ProcessId};
use crate::package::{Digest, PackageOrder};
use crate::spec::{
    ActorSpec, Capacity, DeathCause, Device, DriverId, InvalidSpec, Labels, PlacementGroupSpec, Progress,
    SupervisorSpec,
};

wire! {
    // To the head.
    NodeReport = "head.node" -> NodeVerdict;
    WorkerReport = "head.worker" -> Result<HeadSeen, Superseded>;
    Apply = "head.apply" -> Result<Applied, ApplyError>;
    Control = "head.control" -> Result<(), String>;
    Watch = "head.watch" -> ClusterStatus;
    Lookup = "head.lookup" -> Option<Located>;
    Find = "head.find" -> Option<Found>;
    IsOver = "head.is_over" -> bool;
    DriverHello = "head.driver" -> Result<HeadSeen, String>;
    DriverBye = "head.driver_bye" -> ();
    FindLog = "head.find_log" -> Result<ActorAddr, String>;
    Shutdown = "head.shutdown" -> ();
    MakePlacementGroup = "head.placement_group" -> Result<(), ApplyError>;
    RemovePlacementGroup = "head.remove_placement_group" -> Result<(), String>;
    DrainNode = "head.drain" -> Result<(), String>;
    UndrainNode = "head.undrain" -> Result<(), String>;
    PutValue = "head.put_value" -> Result<u64, PutError>;
    GetValue = "head.get_value" -> Option<Kept>;
    WatchPlacementGroup = "head.watch_placement_group" -> Option<PlacementGroupStatus>;
    // To a node agent.
    WhoIs = "node.who" -> (String, u64);
    StartWorker = "node.start" -> Result<Result<(), String>, Superseded>;
    StopWorker = "node.stop_worker" -> Result<(), Superseded>;
    PrepareBundles = "node.prepare_bundles" -> Result<Result<(), String>, Superseded>;
    StopNode = "node.stop" -> Result<(), Superseded>;
    WorkerHello = "node.hello" -> HelloReply;
    ReadLog = "node.read_log" -> Result<LogChunk, String>;
    // To a worker.
    CreateActor = "worker.create" -> Result<(), Superseded>;
    DeliverView = "worker.view" -> Result<(), Superseded>;
    Dismiss = "worker.dismiss" -> Result<(), Superseded>;
}

/// What a node is and which workers it has. Its registration, its heartbeat and its news in one.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NodeReport {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Drawn at random by each agent process.
    pub boot: u64,
    /// Rises with each report of the agent, from 1.
    pub seq: u64,
    /// Whether this is the first on a new connection.
    pub registering: bool,
    /// The agent.
    pub addr: ActorAddr,
    /// Process id of the agent.
    pub pid: u32,
    /// The node's devices.
    pub devices: Vec<Device>,
    /// What else the node has.
    pub capacity: Capacity,
    /// Its labels.
    pub labels: Labels,
    /// Packages that it has.
    pub packages: Vec<Digest>,
    /// Whether it stays.
    pub stage: NodeStage,
    /// Its workers: those that run and those whose end the head has not yet heard of.
    pub workers: Vec<WorkerProcess>,
    /// Newest term that it has heard of; 0 for none.
    pub term: u64,
}

/// Whether a node stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum NodeStage {
    /// It takes workers.
    Serving,
    /// It ends its workers.
    Leaving,
    /// It has none left and goes.
    Left,
}

/// A worker process, as its node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WorkerProcess {
    /// Name of its actor.
    pub actor: String,
    /// Incarnation of its actor, which identifies it.
    pub incarnation: Incarnation,
    /// Index of the device it owns.
    pub device: Option<u32>,
    /// Its process id.
    pub pid: u32,
    /// Whether it runs.
    pub status: ProcessStatus,
}

/// Whether a process runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ProcessStatus {
    /// It does.
    Running,
    /// It ended.
    Exited {
        /// Why.
        cause: DeathCause,
        /// The last lines that it wrote.
        last_words: Option<String>,
    },
}

impl ProcessStatus {
    /// One that ended without a word.
    pub fn exited(cause: DeathCause) -> Self {
        Self::Exited { cause, last_words: None }
    }
}

/// The head's answer to a node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum NodeVerdict {
    /// What was reported is known now.
    Accepted(HeadSeen),
    /// A newer head leads.
    Superseded(Superseded),
    /// The node may not join.
    Refused {
        /// Why, and what to do.
        why: String,
    },
}

/// The head that answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HeadSeen {
    /// Its process.
    pub process: ProcessId,
    /// Its term.
    pub term: u64,
    /// Where it and those that stand by listen.
    pub heads: Vec<String>,
}

/// What a worker says of its actor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WorkerReport {
    /// Name of the actor.
    pub actor: String,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Rises with each report of the worker.
    pub seq: u64,
    /// Whether this is the first on a new connection.
    pub registering: bool,
    /// The worker's own address.
    pub addr: ActorAddr,
    /// Its process id.
    pub pid: u32,
    /// Its node.
    pub node: String,
    /// Index of the device it owns.
    pub device: Option<u32>,
    /// How far the actor is.
    pub phase: WorkerPhase,
    /// What the actor announced to its group.
    pub announced: Option<Vec<u8>>,
    /// Highest epoch it has of each group.
    pub views: Vec<(String, u64)>,
    /// The views themselves, when it registers: a restarted head may have lost the last ones.
    pub held: Vec<GroupView>,
    /// Newest term that it has heard of; 0 for none.
    pub term: u64,
}

/// How far a worker's actor is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum WorkerPhase {
    /// The worker waits to hear what to create.
    Waiting,
    /// `Spawn::create` runs.
    Creating(Progress),
    /// The actor takes messages.
    Ready(ActorAddr),
    /// The actor ended.
    Ended(DeathCause),
}

/// Applies specs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Apply {
    /// The specs.
    pub specs: Vec<ActorSpec>,
    /// The supervisors. The same again changes nothing, another of the same name takes its place.
    pub supervisors: Vec<SupervisorSpec>,
    /// What becomes of names that are taken, and of actors that are not listed.
    pub mode: ApplyMode,
    /// Who asks, for causes of death. Empty for nobody in particular.
    pub by: String,
}

impl Apply {
    /// Merges specs in nobody's name.
    pub fn merge(specs: Vec<ActorSpec>) -> Self {
        Self { specs, supervisors: Vec::new(), mode: ApplyMode::Merge, by: String::new() }
    }
}

/// Keeps a value under a key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PutValue {
    /// The key.
    pub key: String,
    /// Revision of what is there; 0 for nothing.
    pub expect: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// Asks for what is kept under a key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GetValue {
    /// The key.
    pub key: String,
}

/// A value with the number of its changes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Kept {
    /// Rises by one with each change, from 1.
    pub revision: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// Why a value is not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum PutError {
    /// The key cannot name anything.
    #[error("{0:?} is no key: it must be 1 to 128 letters, digits, '-', '_' or '.', not starting with '.'")]
    Key(String),
    /// The value is too large.
    #[error("the value has {bytes} bytes, and the head keeps at most {max}")]
    TooLarge {
        /// Its length.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// There are too many.
    #[error("the head keeps at most {max} values")]
    TooMany {
        /// The limit.
        max: u64,
    },
    /// What is there is not what was expected.
    #[error("{key} was changed by somebody else meanwhile")]
    Changed {
        /// The key.
        key: String,
    },
    /// The change took place, but a head that starts anew may not know of it.
    #[error("not durable yet: {0}")]
    NotDurable(String),
}

/// Why an apply is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum ApplyError {
    /// A spec cannot work; nothing was changed.
    #[error(transparent)]
    Spec(InvalidSpec),
    /// The change took place, but a head that starts anew may not know of it.
    #[error("not durable yet: {0}; repeat it")]
    NotDurable(String),
}

/// What becomes of names that are taken, and of actors that are not listed.
///
/// Unless it says otherwise: the same spec of a name that is taken changes nothing, but revives a dead actor; another
/// spec restarts it; what is not listed stays.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ApplyMode {
    /// As above.
    Merge,
    /// What an earlier exact set of that namespace listed, and this one does not, is removed.
    Exactly {
        /// The namespace.
        namespace: String,
    },
    /// A name that is taken by an actor that lives, or will again, is refused.
    New,
    /// An actor that lives, or will again, stays as it is, whatever its spec is.
    KeepPresent,
}

/// What an apply changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, serde::Serialize)]
pub struct Applied {
    /// New actors.
    pub started: u32,
    /// Actors with another spec, or that were dead.
    pub restarted: u32,
    /// Actors that are as they were.
    pub unchanged: u32,
    /// Actors that were not listed.
    pub removed: u32,
}

/// Does something to one actor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Control {
    /// Name of the actor.
    pub actor: String,
    /// What to do.
    pub action: ControlAction,
    /// Who asks, for the cause of death.
    pub by: String,
}

/// What to do to an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum ControlAction {
    /// End it; it stays dead.
    Stop(Manner),
    /// End it and start it again.
    Restart,
    /// End it and forget its spec.
    Remove,
    /// It names a supervisor: end all beneath it and forget them.
    RemoveSupervisor,
}

/// Asks how an actor can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Find {
    /// Its name.
    pub actor: String,
}

/// How an actor can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Found {
    /// `RemoteActor::TYPE`.
    pub type_name: String,
    /// How it is.
    pub state: ActorState,
    /// Where it is, if it is ready.
    pub addr: Option<ActorAddr>,
}

/// A driver registers, or says that it is still there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DriverHello {
    /// Which it is.
    pub id: DriverId,
    /// What it calls itself.
    pub name: String,
    /// Its process.
    pub process: ProcessId,
    /// Whether it has never been registered.
    pub first: bool,
}

/// A driver ends, and what it owns with it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DriverBye {
    /// Which it is.
    pub id: DriverId,
    /// How it ends.
    pub why: String,
}

/// Asks for the status as soon as its version is above `since`, or at the end of the wait.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Watch {
    /// The version that is known already; 0 for an answer at once.
    pub since: u64,
    /// Longest wait, milliseconds.
    pub wait_ms: u64,
}

/// Empties a node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DrainNode {
    /// Its name.
    pub node: String,
    /// How long actors stay that fit nowhere else, milliseconds.
    pub grace_ms: u64,
    /// Whether its agent ends when nothing is left on it.
    pub leave: bool,
}

/// Has a drained node take actors again.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct UndrainNode {
    /// Its name.
    pub node: String,
}

/// Reserves bundles.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MakePlacementGroup {
    /// What to reserve.
    pub spec: PlacementGroupSpec,
}

/// Gives a placement group's bundles back and ends the actors in them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RemovePlacementGroup {
    /// Its name.
    pub name: String,
}

/// Asks how a placement group is, as soon as that is not what was seen, or at the end of the wait.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WatchPlacementGroup {
    /// Its name.
    pub name: String,
    /// How it was when it was asked last.
    pub seen: Option<PlacementGroupState>,
    /// Longest wait, milliseconds.
    pub wait_ms: u64,
}

/// Asks whether an actor will not be started any more with these arguments: dead for good, gone, or of another spec.
/// Answered as soon as it is so, or at the end of the wait.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct IsOver {
    /// Its name.
    pub actor: String,
    /// SHA-256 of the arguments.
    pub args: Digest,
    /// Longest wait, milliseconds.
    pub wait_ms: u64,
}

/// Asks for the address of a ready actor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Lookup {
    /// Its name.
    pub actor: String,
}

/// Where a ready actor is, and what its spec says of calls.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Located {
    /// Its address.
    pub addr: ActorAddr,
    /// `ActorSpec::max_pending_calls`.
    pub max_pending_calls: Option<u32>,
    /// `ActorSpec::max_task_retries`.
    pub max_task_retries: u32,
}

/// Asks for the node agent that keeps an actor's log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FindLog {
    /// Name of the actor.
    pub actor: String,
}

/// Ends the cluster: workers, then nodes, then the head. Answered when all nodes are gone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Shutdown;

/// Has a node start a worker process. Answered when the process was started; the same order again does nothing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StartWorker {
    /// Name of the actor it is for.
    pub actor: String,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The device it owns.
    pub device: Option<Device>,
    /// The package that it runs, and where it is.
    pub package: Option<PackageOrder>,
    /// How long its process may be silent; `None` for ever.
    pub hang_timeout: Option<Duration>,
    /// `NodeReport::seq` of the last report that the head had seen. A node refuses an order that is older than its
    /// last registration: the head has read from that that the worker does not exist.
    pub report_seq: u64,
    /// Term of the head that orders it.
    pub term: u64,
}

/// Has a node confirm that it serves, before bundles there are counted on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PrepareBundles {
    /// Name of the placement group.
    pub group: String,
    /// Which attempt of the head.
    pub epoch: u64,
    /// As in `StartWorker`.
    pub report_seq: u64,
    /// Term of the head that asks.
    pub term: u64,
}

/// Has a node end a worker process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StopWorker {
    /// The worker.
    pub incarnation: Incarnation,
    /// How.
    pub manner: Manner,
    /// Term of the head that orders it.
    pub term: u64,
}

/// Asks a node agent for its name and its boot. A head asks at the address that a report names before it takes the first
/// one: so it knows that orders will arrive there, and with TLS that the certificate there is a node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WhoIs;

/// Has a node end its workers and itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StopNode {
    /// Term of the head that orders it.
    pub term: u64,
}

/// A worker registers at its node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WorkerHello {
    /// The worker.
    pub incarnation: Incarnation,
    /// Where it listens.
    pub endpoint: String,
}

/// The node's answer to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HelloReply {
    /// Whether it keeps the worker. If not, the worker exits.
    pub known: bool,
    /// The node agent's process.
    pub node: ProcessId,
}

/// Reads an actor's log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ReadLog {
    /// Name of the actor.
    pub actor: String,
    /// First byte wanted; `u64::MAX` for the last `max` bytes.
    pub offset: u64,
    /// Most bytes wanted.
    pub max: u32,
    /// When nothing is there yet: how long to wait for it, milliseconds.
    pub wait_ms: u64,
}

/// A piece of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct LogChunk {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Where to go on reading. Lower than before after the log was rotated.
    pub next: u64,
}
