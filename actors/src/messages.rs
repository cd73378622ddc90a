//! All messages between the product's actors, by the actor that receives them.
//!
//! Each is one struct with its reply type. `tell` is used where the reply is `()`.

use actix::Message;
use bincode::{Decode, Encode};
use heliostat_engine::cuda::LentPlace;
use heliostat_engine::ep::PlanProgress;
use heliostat_engine::eplb::map::Layout;
use heliostat_engine::eplb::plan::Plan;
use heliostat_engine::request::{Output, RankStats, Request, RequestId};
use heliostat_engine::scheduler::BlockHash;
use heliostat_runtime::handle::{ActorAddr, ProcessId};
use serde::{Deserialize, Serialize};

use crate::eplb::EplbPulse;
use crate::monitor::report::ServingReport;
use crate::monitor::trace::{RankTrace, SequenceSpan};
use crate::telemetry::{Provenance, SpanCounts};

/// Names messages on the wire.
macro_rules! wire {
    ($($message:ty => $name:literal),* $(,)?) => {
        $(impl heliostat_runtime::actor::WireMessage for $message { const NAME: &'static str = $name; })*
    };
}
pub(crate) use wire;

wire! {
    Submit => "rank.submit",
    Abort => "rank.abort",
    ApplyPlan => "rank.apply_plan",
    AbandonPlan => "rank.abandon_plan",
    FetchKv => "rank.fetch_kv",
    FetchExpert => "rank.fetch_expert",
    LendExpert => "rank.lend_expert",
    ReturnExpert => "rank.return_expert",
    BreakDevice => "rank.break_device",
    ReportLoad => "rank.report_load",
    AttachEplb => "rank.attach_eplb",
    AttachIngress => "rank.attach_ingress",
    Ping => "rank.ping",
    StartTrace => "rank.start_trace",
    TakeTrace => "rank.take_trace",
    RankOutputs => "ingress.outputs",
    RankRefused => "ingress.refused",
    GetServing => "ingress.get_serving",
    GetRequests => "ingress.get_requests",
    AwaitServing => "ingress.await_serving",
    StepLoad => "eplb.step_load",
    PlanReport => "eplb.plan_report",
    RankJoined => "eplb.rank_joined",
    GetStatus => "eplb.get_status",
    GetPulse => "eplb.get_pulse",
    Rebalance => "eplb.rebalance",
}

// ---- to a rank -----------------------------------------------------------------------------------------------------

/// Generate this sequence and send its outputs to `reply_to`; a rank that does not take it sends [`RankRefused`].
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct Submit {
    /// The sequence.
    pub request: Request,
    /// The HTTP request that it belongs to.
    pub from: Provenance,
    /// The ingress that gets [`RankOutputs`].
    pub reply_to: ActorAddr,
    /// The rank that computed its prompt, from which its KV blocks may be taken.
    pub kv_at: Option<ActorAddr>,
}

/// Read KV blocks that the rank has cached: those of the longest prefix of `hashes`, as many as go into `bytes_max`.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "KvChunk")]
pub struct FetchKv {
    /// Names of the blocks, in order.
    pub hashes: Vec<BlockHash>,
    /// Bytes of the answer at most; one block comes whatever it takes.
    pub bytes_max: u64,
}

/// What a rank has of the blocks that it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct KvChunk {
    /// How they lie.
    pub form: KvForm,
    /// One block after the other.
    pub bytes: Vec<u8>,
}

/// How KV blocks lie in memory. Ranks of one form read each other's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct KvForm {
    /// As GPUs compute, else as CPUs do.
    pub is_cuda: bool,
    /// Bytes of one block, over all layers.
    pub block_bytes: u64,
}

/// Stop this sequence and free its blocks.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct Abort {
    /// The sequence.
    pub id: RequestId,
}

/// Stage the layers of this plan in order; each commits when all ranks have staged it.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "Result<(), PlanRefused>")]
pub struct ApplyPlan {
    /// What to change.
    pub plan: Plan,
    /// The EPLB actor, which gets [`PlanReport`].
    pub reply_to: ActorAddr,
}

/// A rank does not take a plan.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum PlanRefused {
    /// The plan is not newer than what the rank has seen.
    #[error("plan {plan} is stale: plan {closed} has ended here")]
    Stale {
        /// Epoch of the plan.
        plan: u64,
        /// Newest plan that ended here.
        closed: u64,
    },
    /// Another plan is open.
    #[error("plan {open} is still open")]
    Busy {
        /// Epoch of the open plan.
        open: u64,
    },
    /// The group is not connected at present.
    #[error("the rank is not connected to its group")]
    NotJoined,
    /// The plan does not fit the model or the group.
    #[error("the plan does not fit: {0}")]
    Invalid(String),
}

/// Drop the uncommitted layers of a plan. Takes effect on all ranks at one step.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct AbandonPlan {
    /// Epoch of the plan.
    pub epoch: u64,
}

/// Read a part of an expert's weights.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Result<ExpertChunk, NoSuchExpert>")]
pub struct FetchExpert {
    /// MoE layer index.
    pub moe_layer: u32,
    /// Logical expert.
    pub logical: u32,
    /// Offset into its bytes.
    pub offset: u64,
    /// At most this many bytes.
    pub len: u64,
}

/// A part of an expert's weights.
#[derive(Clone, Debug, Encode, Decode)]
pub struct ExpertChunk {
    /// Length of the whole.
    pub total: u64,
    /// Checksum of the whole.
    pub checksum: u64,
    /// Bytes from the asked offset.
    pub bytes: Vec<u8>,
}

/// The rank holds no copy (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[error("no copy of expert {logical} of MoE layer {moe_layer} lies on this rank")]
pub struct NoSuchExpert {
    /// MoE layer index.
    pub moe_layer: u32,
    /// Logical expert.
    pub logical: u32,
}

/// Keep an expert where it lies on this rank's GPU until [`ReturnExpert`], so that a peer can copy it from there.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Result<Lent, NotLent>")]
pub struct LendExpert {
    /// MoE layer index.
    pub moe_layer: u32,
    /// Logical expert.
    pub logical: u32,
    /// Epoch of the plan that it is wanted for; 0: the peer fills its slots.
    pub plan: u64,
    /// The peer's process.
    pub borrower: ProcessId,
}

/// An expert that stays where it is for a while: see `actors/src/rank/leases.rs`.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Lent {
    /// Names the lease.
    pub lease: u64,
    /// The expert that it is, as its slot says.
    pub moe_layer: u32,
    /// See `moe_layer`.
    pub logical: u32,
    /// Where it lies.
    pub place: LentPlace,
}

/// An expert is not lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum NotLent {
    /// The rank holds no copy (any more).
    #[error(transparent)]
    NotHere(NoSuchExpert),
    /// The copy does not lie on a GPU.
    #[error("the rank keeps its experts on the host")]
    OnHost,
    /// The asker is in none of the rank's memberships.
    #[error("process {0} is no rank of the group at present")]
    NoPeer(ProcessId),
}

/// The copy of a lent expert has ended.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct ReturnExpert {
    /// The lease.
    pub lease: u64,
}

/// Run a kernel that traps, so that the rank's GPU is lost to its process. For tests; refused unless `[devices]
/// fault_injection` is set.
#[derive(Clone, Copy, Debug, Encode, Decode, Deserialize, Message)]
#[rtype(result = "Result<(), NotBroken>")]
pub struct BreakDevice;

/// A rank does not break its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, thiserror::Error)]
pub enum NotBroken {
    /// Nobody asked for faults in the configuration.
    #[error(
        "faults are not injected here: set `fault_injection = true` in [devices], and never where anybody is served"
    )]
    NotAllowed,
}

/// Report the load now that was counted since the last report; `None` on a rank without attention.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "Option<StepLoad>")]
pub struct ReportLoad;

/// Send load, plan reports and joins to this EPLB actor from now on. Answers with the last join, if the rank is in its
/// group, and with what the rank has now.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "Option<RankJoined>")]
pub struct AttachEplb {
    /// The EPLB actor.
    pub eplb: ActorAddr,
}

/// Answered at once by a process that runs, whatever its step thread waits for.
#[derive(Clone, Copy, Debug, Encode, Decode, Deserialize, Message)]
#[rtype(result = "()")]
pub struct Ping;

/// Send [`RankOutputs`] with figures to this ingress from now on, also when none of its sequences runs.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct AttachIngress {
    /// The ingress.
    pub ingress: ActorAddr,
}

/// Record every step from now on, at most so many; a recording that is under way begins anew.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct StartTrace {
    /// Steps that are kept; those after them are not.
    pub steps_max: u32,
}

/// Stop recording, and answer with the steps since [`StartTrace`].
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "RankTrace")]
pub struct TakeTrace;

// ---- to the ingress ------------------------------------------------------------------------------------------------

/// What a step of a DP rank brought to the sequences of this ingress.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct RankOutputs {
    /// The DP rank.
    pub dp: u32,
    /// New tokens and ends.
    pub outputs: Vec<Output>,
    /// Its state after the step.
    pub stats: RankStats,
    /// What became of the spans of its process.
    pub spans: SpanCounts,
}

/// A rank did not take a sequence.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct RankRefused {
    /// The DP rank.
    pub dp: u32,
    /// The sequence.
    pub id: RequestId,
    /// Why.
    pub why: Busy,
}

/// The figures of every model that this ingress serves, with the last ones of its ranks.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Vec<ServingReport>")]
pub struct GetServing;

/// Answered once every application that is served takes requests, and there is one.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct AwaitServing;

/// The sequences that ended last, oldest first.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Vec<SequenceSpan>")]
pub struct GetRequests;

/// A rank does not take the sequence.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum Busy {
    /// Its waiting queue is full; try another rank or later.
    #[error("the rank's queue of {waiting} waiting requests is full")]
    QueueFull {
        /// Length of the queue.
        waiting: u32,
    },
    /// It never could: it has no attention role, or the request cannot fit.
    #[error("the rank cannot run the request: {0}")]
    Unservable(String),
}

// ---- to the EPLB actor ---------------------------------------------------------------------------------------------

/// Tokens that a DP rank routed in some steps.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct StepLoad {
    /// The DP rank.
    pub dp: u32,
    /// Group steps that the counts cover.
    pub steps: u64,
    /// `[moe layer][logical expert]`.
    pub counts: Vec<Vec<u32>>,
}

/// How far a rank is with a plan.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct PlanReport {
    /// The rank.
    pub rank: u32,
    /// Epoch of the plan.
    pub epoch: u64,
    /// Layers staged here.
    pub staged: u32,
    /// Layers committed by the group.
    pub committed: u32,
    /// Set once, when the plan has ended here.
    pub end: Option<PlanEnd>,
    /// Experts and bytes that this rank fetched from others, and from disk.
    pub moved: Moved,
    /// Steps while the plan was open: their number, the longest and the median, microseconds.
    pub steps: StepTimes,
    /// Why staging failed, if it did.
    pub error: Option<String>,
}

/// How a plan ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanEnd {
    /// All layers were committed.
    Committed,
    /// The rest was dropped: a time-out, a failed stage or a rank that was lost.
    RolledBack,
}

/// What staging a plan moved into one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Moved {
    /// Experts that already lay on the rank.
    pub local: u64,
    /// Copied from a peer's GPU to this one.
    pub nvlink: Carried,
    /// Fetched from a peer through the hosts.
    pub host: Carried,
    /// Read from the checkpoint.
    pub disk: Carried,
}

/// What came by one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Carried {
    /// Experts.
    pub experts: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Carried {
    /// Counts one more expert.
    pub fn count(&mut self, bytes: u64) {
        self.add(Self { experts: 1, bytes });
    }

    fn add(&mut self, other: Self) {
        self.experts += other.experts;
        self.bytes += other.bytes;
    }
}

impl Moved {
    /// Adds what others moved.
    pub fn add(&mut self, other: Self) {
        self.local += other.local;
        self.nvlink.add(other.nvlink);
        self.host.add(other.host);
        self.disk.add(other.disk);
    }

    /// What came by each path, with its name.
    pub fn paths(&self) -> [(&'static str, Carried); 3] {
        [("nvlink", self.nvlink), ("host", self.host), ("disk", self.disk)]
    }
}

/// Durations of some steps, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct StepTimes {
    /// How many.
    pub count: u64,
    /// The longest.
    pub longest_us: u64,
    /// The median.
    pub median_us: u64,
    /// The median of the steps before the plan came, for comparison.
    pub before_median_us: u64,
}

/// A rank connected to its group; any open plan was dropped.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct RankJoined {
    /// The rank.
    pub rank: u32,
    /// Its actor.
    pub addr: ActorAddr,
    /// Membership epoch.
    pub membership: u64,
    /// Where the plans stand.
    pub progress: PlanProgress,
    /// The layout that all ranks agreed on.
    pub layout: Layout,
}

/// Everything that `GET /api/eplb` shows, as JSON.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "String")]
pub struct GetStatus;

/// The little of it that changes all the time.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "EplbPulse")]
pub struct GetPulse;

/// Plan and publish a remap now, whatever the gates say.
#[derive(Clone, Debug, Encode, Decode, Deserialize, Message)]
#[rtype(result = "Result<RebalanceStarted, RebalanceRefused>")]
pub struct Rebalance;

/// A remap is under way.
#[derive(Clone, Copy, Debug, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct RebalanceStarted {
    /// Its map epoch.
    pub epoch: u64,
    /// Layers that change.
    pub layers: u32,
    /// Slots whose expert changes.
    pub moves: u32,
}

/// No remap was started.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum RebalanceRefused {
    /// One is under way.
    #[error("map epoch {epoch} is still being applied")]
    InProgress {
        /// Its map epoch.
        epoch: u64,
    },
    /// Nothing was routed yet.
    #[error("no load was recorded yet: send requests first")]
    NoLoad,
    /// The plan equals the present map.
    #[error("the present map is already what the policy wants")]
    NothingToMove,
    /// The policy cannot plan for this group.
    #[error("the policy cannot plan: {why}")]
    Policy {
        /// What it says.
        why: String,
    },
    /// The group is not complete.
    #[error("the group is not ready: {ready} of {size} ranks")]
    NotReady {
        /// Ranks connected.
        ready: u32,
        /// Ranks of the group.
        size: u32,
    },
}

#[cfg(test)]
#[path = "messages_tests.rs"]
mod tests;
