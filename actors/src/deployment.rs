//! One model served by one group: which actors it takes, what they are called, and with which arguments.
//!
//! A checked description in, actor specs out. The serve controller decides how many there are, the head keeps them alive.

use std::path::PathBuf;

use bincode::{Decode, Encode};
use heliostat_engine::checkpoint::{Checkpoint, CheckpointError};
use heliostat_engine::config::{ConfigError, ModelConfig};
use heliostat_engine::ep::{Topology, TopologyError};
use heliostat_engine::eplb::ModelLayers;
use heliostat_engine::eplb::map::{Layout, MapError, MapShape, PlacementStrategy};
use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::spec::{
    ActorSpec, GroupMember, LabelSelector, Lifetime, Placement, Resources, RestartPolicy,
};

use crate::eplb::{Eplb, EplbArgs, EplbConfig};
use crate::ingress_actor::{IngressActor, IngressArgs};
use crate::jobs::{JobsActor, JobsArgs};
use crate::rank::{EngineArgs, LinkArgs, Rank, RankArgs};
use crate::serve::{ServeArgs, ServeController};
use crate::telemetry::TelemetryArgs;

/// Name of the group of ranks.
pub const GROUP: &str = "ep";
/// Name of the EPLB actor.
pub const EPLB: &str = "eplb";
/// Name of the first ingress; that of another has its node behind it.
pub const INGRESS: &str = "ingress";

/// Name of the jobs actor.
pub const JOBS: &str = "jobs";

/// Name of the serve controller.
pub const SERVE: &str = "serve";
/// Start of the names of groups that the controller makes.
pub const GROUPS: &str = "serve.";

/// What the actors of one replica are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaNames {
    /// Before the names of its actors.
    pub prefix: String,
    /// The group of its ranks.
    pub group: String,
}

impl ReplicaNames {
    /// Of cluster.toml's model: short.
    pub fn home() -> Self {
        Self { prefix: String::new(), group: GROUP.to_owned() }
    }

    /// Of a replica with that number.
    pub fn numbered(app: &str, deployment: &str, number: u64) -> Self {
        // Both may have letters that no actor's name has; the number tells replicas apart.
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
        let what = if app == deployment { app.to_owned() } else { format!("{app}.{deployment}") };
        let what: String = what.chars().map(plain).take(64).collect();
        let name = format!("{}-{number}", what.trim_start_matches('.'));
        Self { prefix: format!("serve/{name}."), group: format!("{GROUPS}{name}") }
    }

    /// The actor of a rank.
    pub fn rank(&self, rank: u32) -> String {
        rank_name(&self.prefix, rank)
    }

    /// The actor, where the replica is one of a user.
    pub fn replica(&self) -> String {
        format!("{}replica", self.prefix)
    }

    /// The EPLB actor.
    pub fn eplb(&self) -> String {
        format!("{}{EPLB}", self.prefix)
    }
}

/// Name of a rank's actor.
pub fn rank_name(prefix: &str, rank: u32) -> String {
    format!("{prefix}rank-{rank}")
}

/// The EPLB actor of a replica whose ranks are that group.
pub fn eplb_of_group(group: &str) -> String {
    match group.strip_prefix(GROUPS) {
        Some(name) => format!("serve/{name}.{EPLB}"),
        None => EPLB.to_owned(),
    }
}

/// The group of the ranks that an EPLB actor of that name balances.
pub fn group_of_eplb(eplb: &str) -> String {
    let name = eplb.strip_prefix("serve/").and_then(|name| name.strip_suffix(&format!(".{EPLB}")));
    name.map_or_else(|| GROUP.to_owned(), |name| format!("{GROUPS}{name}"))
}

/// Which part of a sequence's life a deployment takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum Duty {
    /// All of it.
    #[default]
    Whole,
    /// The prompt and the first token; another deployment of the application goes on.
    Prefill,
    /// What follows the first token.
    Decode,
}

/// What each replica of a deployment is: a model, served by a whole group of ranks.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ModelDeployment {
    /// Checkpoint directory, on every node.
    pub model: PathBuf,
    /// Name in the HTTP API.
    pub model_name: String,
    /// What of a sequence it takes.
    pub duty: Duty,
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
    /// Where its ranks send traces, if anywhere.
    pub telemetry: Option<TelemetryArgs>,
    /// Whether its ranks go to different nodes where they can.
    pub spread: bool,
    /// What the labels of their nodes must be.
    pub selector: LabelSelector,
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

impl ModelDeployment {
    /// Whether the ranks of `other` could serve for it as they are: only the settings of EPLB change without them.
    pub fn has_processes_of(&self, other: &Self) -> bool {
        Self { eplb: other.eplb.clone(), ..self.clone() } == *other
    }

    /// Names of the actors of a replica.
    pub fn actors(&self, names: &ReplicaNames) -> Vec<String> {
        let ranks = (0..self.topology.size() as u32).map(|rank| names.rank(rank));
        ranks.chain(std::iter::once(names.eplb())).collect()
    }

    /// Checks model and layout on this machine and returns the actors of one replica: the ranks and the EPLB actor.
    /// `first_rank` is the number by which the ingress knows its first DP rank.
    ///
    /// # Errors
    /// What is missing, damaged or does not fit.
    pub fn specs(&self, names: &ReplicaNames, first_rank: u32) -> Result<Vec<ActorSpec>, DeployError> {
        let config = ModelConfig::from_dir(&self.model)?;
        Checkpoint::open(&self.model)?.validate(&config)?;
        let layout = self.layout(&config)?;
        let mut specs = Vec::new();
        let size = self.topology.size() as u32;
        for rank in 0..size {
            let args = RankArgs {
                rank,
                prefix: names.prefix.clone(),
                first_rank,
                topology: self.topology.clone(),
                model: self.model.clone(),
                layout: layout.clone(),
                engine: self.engine.clone(),
                links: self.links.clone(),
                telemetry: self.telemetry.clone(),
            };
            let mut spec = self.spec(&names.rank(rank), Rank::TYPE, &args)?;
            spec.resources = Resources::device();
            spec.group = Some(GroupMember { group: names.group.clone(), rank, size });
            spec.placement = if self.spread { Placement::Spread } else { Placement::Anywhere };
            spec.selector = self.selector.clone();
            specs.push(spec);
        }
        let eplb = EplbArgs { layout, topology: self.topology.clone(), config: self.eplb.clone() };
        let spec = self.spec(&names.eplb(), Eplb::TYPE, &eplb)?;
        specs.push(ActorSpec { subscribe: vec![names.group.clone()], ..spec });
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

/// An ingress on a node, which hears of every group that serves. It outlives the controller that asks for it.
///
/// # Errors
/// Arguments that do not encode.
pub fn ingress_spec(
    name: &str,
    node: &str,
    args: &IngressArgs,
    restart: RestartPolicy,
) -> Result<ActorSpec, DeployError> {
    Ok(ActorSpec {
        subscribe: vec![GROUP.to_owned(), format!("{GROUPS}*")],
        mailbox_capacity: 65_536,
        placement: Placement::Node(node.to_owned()),
        lifetime: Lifetime::Detached,
        ..spec(name, IngressActor::TYPE, args, restart)?
    })
}

/// The serve controller.
///
/// # Errors
/// Arguments that do not encode.
pub fn serve_spec(args: &ServeArgs, restart: RestartPolicy) -> Result<ActorSpec, DeployError> {
    spec(SERVE, ServeController::TYPE, args, restart)
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
