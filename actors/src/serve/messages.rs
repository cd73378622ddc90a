//! All messages of the serve controller, and of the ingresses and replicas that it tells what is served.

use std::path::PathBuf;

use actix::Message;
use bincode::{Decode, Encode};
use heliostat_runtime::actor::{Items, StreamMessage};
use heliostat_runtime::handle::ActorAddr;

use super::calls::counts::CallCounts;
use super::target::Backpressure;
use crate::deployment::Duty;
use crate::messages::wire;

wire! {
    DeployApps => "serve.deploy",
    DeleteApps => "serve.delete",
    GetDetails => "serve.details",
    GetTable => "serve.table",
    ReportCalls => "serve.calls",
    GetCalls => "serve.get_calls",
    SetTable => "ingress.table",
}

// ---- to the controller ---------------------------------------------------------------------------------------------

/// Serve what this document says, Ray's `ServeDeploySchema` as JSON, and nothing else but cluster.toml's model.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "Result<(), DeployRefused>")]
pub struct DeployApps {
    /// The document.
    pub json: String,
}

/// Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum DeployRefused {
    /// The document says what is wrong or not supported; each line names where.
    #[error("{0}")]
    Document(String),
    /// The cluster cannot keep it at present.
    #[error("the deployment cannot be kept: {0}; try again")]
    NotKept(String),
}

/// Drain and end all applications.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Result<(), DeployRefused>")]
pub struct DeleteApps;

/// All that is known, as Ray's `ServeInstanceDetails` in JSON.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "String")]
pub struct GetDetails;

/// What is served, for an ingress that starts.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "Welcome")]
pub struct GetTable {
    /// Name of the ingress.
    pub ingress: String,
}

/// What an ingress starts with.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Welcome {
    /// What is served.
    pub table: Table,
    /// The port that it had before, if it has one of its own.
    pub port: Option<u16>,
}

/// The replicas of a deployment of users' actors, now and whenever they change, for another replica that asks them. None:
/// there is no such deployment.
#[derive(Clone, Debug, Encode, Decode)]
pub struct WatchDeployment {
    /// Name of the application.
    pub application: String,
    /// Name of the deployment.
    pub deployment: String,
    /// The number of the handle, which no other has.
    pub caller: u64,
}

impl Message for WatchDeployment {
    type Result = Items<Option<TableActors>>;
}

impl StreamMessage for WatchDeployment {
    type Item = Option<TableActors>;
    const NAME: &'static str = "serve.watch";
}

/// What a handle has under way, from whoever watches its deployment.
#[derive(Clone, Debug, PartialEq, Encode, Decode, Message)]
#[rtype(result = "()")]
pub struct ReportCalls {
    /// Name of the application.
    pub application: String,
    /// Name of the deployment.
    pub deployment: String,
    /// The number of the handle.
    pub caller: u64,
    /// Calls under way and waiting.
    pub load: u64,
    /// Calls at each replica that takes nothing new, by number.
    pub draining: Vec<(u64, u64)>,
    /// What became of its calls.
    pub counts: CallCounts,
}

/// What became of the calls of all handles, by application and deployment.
#[derive(Clone, Copy, Debug, Encode, Decode, Message)]
#[rtype(result = "Vec<((String, String), CallCounts)>")]
pub struct GetCalls;

// ---- to the ingress ------------------------------------------------------------------------------------------------

/// Serve exactly this from now on. Answered with what is in flight under it.
#[derive(Clone, Debug, Encode, Decode, Message)]
#[rtype(result = "TableReport")]
pub struct SetTable {
    /// What is served.
    pub table: Table,
    /// Take no connections any more: this ingress ends when nothing is open.
    pub leaving: bool,
    /// How far the order of sequences is at other ingresses, by application and deployment: all keep in step, so that
    /// none goes before the others.
    pub turns: Vec<(String, String, u64)>,
}

/// Everything that is served.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Table {
    /// By name.
    pub apps: Vec<TableApp>,
}

/// An application.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct TableApp {
    /// Its name.
    pub name: String,
    /// Start of its paths; none: no HTTP.
    pub route_prefix: Option<String>,
    /// Those of models, by name.
    pub deployments: Vec<TableDeployment>,
    /// Those of users' actors, by name.
    pub actors: Vec<TableActors>,
}

/// A deployment of actors of a user.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TableActors {
    /// Its name.
    pub name: String,
    /// HTTP requests of the application go there.
    pub ingress: bool,
    /// Requests that each replica may have at once.
    pub max_ongoing_requests: u32,
    /// Requests that may wait for a replica; none: as many as come.
    pub max_queued_requests: Option<u32>,
    /// How one more is refused, where that is written.
    pub backpressure: Option<Backpressure>,
    /// Requests may wait for the first replica: one is started for them.
    pub may_wait: bool,
    /// Why there is none, as far as is known.
    pub message: String,
    /// Its replicas.
    pub replicas: Vec<TableActorReplica>,
}

/// A replica that is an actor of a user.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TableActorReplica {
    /// Its number.
    pub number: u64,
    /// Where it is; none while it may not have requests.
    pub addr: Option<ActorAddr>,
    /// It takes nothing new, and ends when it has nothing left.
    pub draining: bool,
}

/// A deployment of a model.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct TableDeployment {
    /// Its name.
    pub name: String,
    /// What of a sequence it takes.
    pub duty: Duty,
    /// The model that it serves.
    pub model: TableModel,
    /// Requests that may be in flight at once; none: no bound but the queues of the ranks.
    pub in_flight_max: Option<u64>,
    /// How one more is refused, where that is written.
    pub backpressure: Option<Backpressure>,
    /// Requests may wait for the first replica: one is started for them.
    pub may_wait: bool,
    /// Its replicas that have ranks.
    pub replicas: Vec<TableReplica>,
}

/// What an ingress must know of a model.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TableModel {
    /// Names in the API; at least one.
    pub names: Vec<String>,
    /// Checkpoint directory, for tokenizer and template.
    pub path: PathBuf,
    /// Tokens per sequence.
    pub max_model_len: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Sequences that may wait at one rank.
    pub max_waiting: u32,
}

/// A replica: a whole DP x EP group.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TableReplica {
    /// Its number.
    pub number: u64,
    /// The group of its ranks.
    pub group: String,
    /// The number by which its first DP rank is known; the others follow.
    pub first_rank: u32,
    /// Its DP ranks.
    pub dp: u32,
    /// It takes nothing new, and ends when it has nothing left.
    pub draining: bool,
}

/// What is in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct TableReport {
    /// Sequences, or requests, in flight, waiting ones included, by application and deployment.
    pub loads: Vec<(String, String, u64)>,
    /// Sequences, or requests, at each replica that takes nothing new, by number.
    pub draining: Vec<(u64, u64)>,
    /// Deployments that cannot be served here, and why.
    pub problems: Vec<(String, String, String)>,
    /// How far the order of sequences is here, by application and deployment.
    pub turns: Vec<(String, String, u64)>,
    /// HTTP requests that are open.
    pub open: u64,
    /// The port that it listens on.
    pub port: u16,
}
