//! What each replica of a deployment runs: a model on a whole group of ranks, or an actor of a user.

use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_runtime::package::PackageId;
use heliostat_runtime::spec::{ActorSpec, LabelSelector, Resources, RestartPolicy};
use heliostat_runtime::wire::to_bytes;

use super::replica::ReplicaArgs;
use crate::deployment::{DeployError, ModelDeployment, ReplicaNames};

/// What a replica runs.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Workload {
    /// A model.
    Model(Box<ModelDeployment>),
    /// An actor of a user.
    Actor(Box<ActorDeployment>),
}

/// An actor of a user as a deployment.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ActorDeployment {
    /// Name of the application.
    pub application: String,
    /// Name of the deployment.
    pub deployment: String,
    /// The program.
    pub package: PackageId,
    /// `RemoteActor::TYPE` in it.
    pub actor_type: String,
    /// What it is created with, JSON.
    pub args: String,
    /// What it is told once it lives, JSON; changes without a restart.
    pub user_config: Option<String>,
    /// HTTP requests of the application go there.
    pub ingress: bool,
    /// What its process needs.
    pub resources: Resources,
    /// What the labels of its node must be.
    pub selector: LabelSelector,
    /// How its health is looked after.
    pub health: HealthChecks,
    /// Messages that wait at most.
    pub mailbox_capacity: u32,
    /// Its restarts.
    pub restart: RestartPolicy,
}

/// Ray's `health_check_period_s` and `health_check_timeout_s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HealthChecks {
    /// From one to the next.
    pub period: Duration,
    /// How long one may take; also for new settings.
    pub timeout: Duration,
}

impl Default for HealthChecks {
    /// Ray's.
    fn default() -> Self {
        Self { period: Duration::from_secs(10), timeout: Duration::from_secs(30) }
    }
}

impl Workload {
    /// Whether what runs for `other` could serve for it as it is: only live settings differ.
    pub fn has_processes_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Model(own), Self::Model(other)) => own.has_processes_of(other),
            (Self::Actor(own), Self::Actor(other)) => own.has_processes_of(other),
            (Self::Model(_), Self::Actor(_)) | (Self::Actor(_), Self::Model(_)) => false,
        }
    }

    /// The model, if it is one.
    pub fn model(&self) -> Option<&ModelDeployment> {
        match self {
            Self::Model(model) => Some(model),
            Self::Actor(_) => None,
        }
    }

    /// The actor of a user, if it is one.
    pub fn actor(&self) -> Option<&ActorDeployment> {
        match self {
            Self::Model(_) => None,
            Self::Actor(actor) => Some(actor),
        }
    }

    /// DP ranks of a replica.
    pub fn dp(&self) -> u32 {
        self.model().map_or(0, |model| model.topology.dp as u32)
    }

    /// Names of the actors of a replica; the first stands for it.
    pub fn actors(&self, names: &ReplicaNames) -> Vec<String> {
        match self {
            Self::Model(model) => model.actors(names),
            Self::Actor(_) => vec![names.replica()],
        }
    }

    /// The actors of replica `number`. `first_rank` is the number by which the ingress knows its first DP rank.
    ///
    /// # Errors
    /// What is missing, damaged or does not fit.
    pub fn specs(
        &self,
        names: &ReplicaNames,
        number: u64,
        first_rank: u32,
    ) -> Result<Vec<ActorSpec>, DeployError> {
        match self {
            Self::Model(model) => model.specs(names, first_rank),
            Self::Actor(actor) => Ok(vec![actor.spec(names.replica(), number)?]),
        }
    }
}

impl From<ModelDeployment> for Workload {
    fn from(model: ModelDeployment) -> Self {
        Self::Model(Box::new(model))
    }
}

impl From<ActorDeployment> for Workload {
    fn from(actor: ActorDeployment) -> Self {
        Self::Actor(Box::new(actor))
    }
}

impl ActorDeployment {
    fn has_processes_of(&self, other: &Self) -> bool {
        let live = Self {
            user_config: other.user_config.clone(),
            health: other.health,
            ingress: other.ingress,
            ..self.clone()
        };
        live == *other
    }

    fn spec(&self, name: String, replica: u64) -> Result<ActorSpec, DeployError> {
        let args = ReplicaArgs {
            application: self.application.clone(),
            deployment: self.deployment.clone(),
            replica,
            args: self.args.clone(),
        };
        let args = to_bytes(&args).map_err(|why| DeployError::Encode(name.clone(), why))?;
        Ok(ActorSpec {
            package: Some(self.package.clone()),
            resources: self.resources.clone(),
            selector: self.selector.clone(),
            mailbox_capacity: self.mailbox_capacity,
            restart: self.restart,
            ..ActorSpec::new(name, &self.actor_type, args)
        })
    }
}
