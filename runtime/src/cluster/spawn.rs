//! Waiting for actors of one's own program, and the registry of packages that they run from.

use std::time::Duration;

use super::status::{ActorState, ClusterStatus};
use super::{Cluster, ClusterError};
use crate::actor::Spawn;
use crate::objects::encode_args;
use crate::package::{
    ListPackages, PackageId, PackageStatus, RegisterMode, RegisterPackage, RegistryError, RemovePackage,
};
use crate::spec::{ActorSpec, DeathCause};
use crate::wire::CodecError;

/// Why an actor was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnFailed {
    /// The head says no, or does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// It ended, and is not started again.
    #[error("actor {actor} is dead: {cause}")]
    Dead {
        /// Its name.
        actor: String,
        /// Why it ended.
        cause: DeathCause,
    },
    /// It takes longer than the limit; it may be ready later.
    #[error("actor {actor} is not ready after {} s: {state}", .limit.as_secs_f32())]
    Late {
        /// Its name.
        actor: String,
        /// The limit.
        limit: Duration,
        /// What it waits for.
        state: String,
    },
}

impl ActorSpec {
    /// A spec for an actor of that type, with defaults. Objects to which `args` have refs are kept for as long as the actor
    /// may be started (OB-5).
    pub fn of<A: Spawn>(name: impl Into<String>, args: &A::Args) -> Result<Self, CodecError> {
        let (args, refs) = encode_args(args)?;
        Ok(Self { refs, ..Self::new(name, A::TYPE, args) })
    }
}

impl Cluster {
    /// The same client for a process that runs this package: the actors that it starts run the package.
    pub fn with_package(mut self, package: PackageId) -> Self {
        self.package = Some(package);
        self
    }

    /// The package of this process; none for `helio` and for what is no program of a user.
    pub fn package(&self) -> Option<&PackageId> {
        self.package.as_ref()
    }

    /// Waits until an actor takes messages.
    pub async fn ready(&self, actor: &str, limit: Duration) -> Result<(), SpawnFailed> {
        let name = self.full(actor);
        let state = |status: &ClusterStatus| status.actor(&name).map(|actor| actor.state.clone());
        let settled = |status: &ClusterStatus| {
            matches!(state(status), None | Some(ActorState::Ready | ActorState::Dead { .. }))
        };
        let last = match self.wait_until(limit, settled).await {
            Some(status) => state(&status),
            None => state(&self.status().await?),
        };
        let late = |state: String| SpawnFailed::Late { actor: actor.to_owned(), limit, state };
        match last {
            Some(ActorState::Ready) => Ok(()),
            Some(ActorState::Dead { cause }) => Err(SpawnFailed::Dead { actor: actor.to_owned(), cause }),
            Some(ActorState::Pending { reason }) => Err(late(reason)),
            Some(other) => Err(late(format!("{other:?}"))),
            None => Err(ClusterError::Refused(format!("no actor is named {actor:?}")).into()),
        }
    }

    /// All packages of the cluster.
    pub async fn packages(&self) -> Result<Vec<PackageStatus>, ClusterError> {
        self.ask(ListPackages).await
    }

    /// Enters a package that was uploaded into the registry.
    pub async fn register_package(&self, id: PackageId, mode: RegisterMode) -> Result<(), PackageError> {
        Ok(self.ask(RegisterPackage { id, mode }).await??)
    }

    /// Takes a package out of the registry.
    pub async fn remove_package(&self, name: &str, version: &str) -> Result<(), PackageError> {
        let remove = RemovePackage { name: name.to_owned(), version: version.to_owned() };
        Ok(self.ask(remove).await??)
    }
}

/// Why the registry did not do it.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The head does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The registry says no.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}
