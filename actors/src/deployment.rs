//! One model served by one group: which actors it takes, and with which arguments.
//!
//! Pure: a checked description in, actor specs out. The head keeps the specs alive.

use std::net::SocketAddr;
use std::path::PathBuf;

use bincode::Encode;
use heliostat_engine::checkpoint::{Checkpoint, CheckpointError};
use heliostat_engine::config::{ConfigError, ModelConfig};
use heliostat_engine::ep::{Topology, TopologyError};
use heliostat_engine::eplb::ModelLayers;
use heliostat_engine::eplb::map::{Layout, MapError, MapShape, PlacementStrategy};
use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::spec::{ActorSpec, GroupMember, Resources, RestartPolicy};

use crate::eplb::{Eplb, EplbArgs, EplbConfig};
use crate::http::HttpDoor;
use crate::ingress_actor::{IngressActor, IngressArgs};
use crate::jobs::{JobsActor, JobsArgs};
use crate::rank::{EngineArgs, LinkArgs, Rank, RankArgs};

/// Name of the group of ranks.
pub const GROUP: &str = "ep";
/// Name of the EPLB actor.
pub const EPLB: &str = "eplb";
/// Name of the ingress actor.
pub const INGRESS: &str = "ingress";

/// Name of the jobs actor.
pub const JOBS: &str = "jobs";

/// Name of a rank's actor.
pub fn rank_name(rank: u32) -> String {
    format!("rank-{rank}")
}

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Checkpoint directory, on every node.
    pub model: PathBuf,
    /// Name in the HTTP API.
    pub model_name: String,
    /// Shape of the group.
    pub topology: Topology,
    /// Slots beyond one per expert, over all ranks.
    pub redundant_experts: u32,
    /// Initial layout as SGLang's `physical_to_logical_map` JSON, or none for `strategy`.
    pub initial_layout: Option<String>,
    /// Initial layout without a file.
    pub strategy: PlacementStrategy,
    /// One rank's engine.
    pub engine: EngineArgs,
    /// How the ranks talk.
    pub links: LinkArgs,
    /// Load balancing.
    pub eplb: EplbConfig,
    /// Where HTTP is served.
    pub http: SocketAddr,
    /// Largest request body, bytes.
    pub body_bytes_max: u64,
    /// Which HTTP clients come in.
    pub door: HttpDoor,
    /// Restarts of every actor.
    pub restart: RestartPolicy,
}

/// A deployment that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// config.json does not describe a model that is supported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint is incomplete or damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The group cannot have this shape.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The experts do not fit the slots, or the initial layout is wrong.
    #[error("expert layout: {0}")]
    Layout(#[from] MapError),
    /// The model has no experts.
    #[error("the model at {0} has no MoE layer: nothing to spread over expert-parallel ranks")]
    Dense(PathBuf),
    /// Arguments that do not encode.
    #[error("cannot encode the arguments of actor {0}: {1}")]
    Encode(String, heliostat_runtime::wire::CodecError),
}

impl Deployment {
    /// Checks model and layout on this machine and returns the actors: the ranks, the EPLB actor, the ingress.
    ///
    /// # Errors
    /// What is missing, damaged or does not fit.
    pub fn specs(&self) -> Result<Vec<ActorSpec>, DeployError> {
        let config = ModelConfig::from_dir(&self.model)?;
        Checkpoint::open(&self.model)?.validate(&config)?;
        let layout = self.layout(&config)?;
        let mut specs = Vec::new();
        let size = self.topology.size() as u32;
        for rank in 0..size {
            let args = RankArgs {
                rank,
                topology: self.topology.clone(),
                model: self.model.clone(),
                layout: layout.clone(),
                engine: self.engine.clone(),
                links: self.links.clone(),
            };
            let mut spec = self.spec(&rank_name(rank), Rank::TYPE, &args)?;
            spec.resources = Resources::device();
            spec.group = Some(GroupMember { group: GROUP.to_owned(), rank, size });
            specs.push(spec);
        }
        let eplb = EplbArgs { layout, topology: self.topology.clone(), config: self.eplb.clone() };
        specs.push(ActorSpec { subscribe: vec![GROUP.into()], ..self.spec(EPLB, Eplb::TYPE, &eplb)? });
        let ingress = IngressArgs {
            model: self.model.clone(),
            model_name: self.model_name.clone(),
            bind: self.http,
            dp: self.topology.dp as u32,
            max_model_len: self.engine.max_model_len,
            block_size: self.engine.block_size,
            max_waiting: self.engine.max_waiting,
            body_bytes_max: self.body_bytes_max,
            door: self.door.clone(),
        };
        let spec = self.spec(INGRESS, IngressActor::TYPE, &ingress)?;
        specs.push(ActorSpec { subscribe: vec![GROUP.into()], mailbox_capacity: 65_536, ..spec });
        Ok(specs)
    }

    fn spec(&self, name: &str, type_name: &str, args: &impl Encode) -> Result<ActorSpec, DeployError> {
        spec(name, type_name, args, self.restart)
    }

    /// The layout before any load is known.
    fn layout(&self, config: &ModelConfig) -> Result<Layout, DeployError> {
        let moe_layers = config.moe_layers();
        if moe_layers == 0 {
            return Err(DeployError::Dense(self.model.clone()));
        }
        let experts = config.moe.num_experts as u32;
        let shape =
            MapShape { experts, slots: experts + self.redundant_experts, ranks: self.topology.ep as u32 };
        let shape = shape.validate()?;
        Ok(match &self.initial_layout {
            Some(json) => {
                let moe: Vec<usize> =
                    (0..moe_layers).map(|moe_layer| config.layer_of_moe(moe_layer)).collect();
                let layers = ModelLayers { num_hidden_layers: config.num_layers, moe_layers: &moe };
                Layout::from_sglang_json(json, shape, layers)?
            }
            None => Layout::initial(moe_layers, shape, self.strategy)?,
        })
    }
}

/// The jobs actor, which needs no model.
///
/// # Errors
/// Arguments that do not encode.
pub fn jobs_spec(args: &JobsArgs, restart: RestartPolicy) -> Result<ActorSpec, DeployError> {
    spec(JOBS, JobsActor::TYPE, args, restart)
}

fn spec(
    name: &str,
    type_name: &str,
    args: &impl Encode,
    restart: RestartPolicy,
) -> Result<ActorSpec, DeployError> {
    let args =
        heliostat_runtime::wire::to_bytes(args).map_err(|why| DeployError::Encode(name.to_owned(), why))?;
    Ok(ActorSpec { restart, ..ActorSpec::new(name, type_name, args) })
}
