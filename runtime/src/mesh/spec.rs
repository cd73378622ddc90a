//! Meshes as clients ask the cluster for them: spawned, found and removed as one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::dims::{Dims, ShapeError};
use super::error::MeshError;
use super::handle::Mesh;
use super::messages::{MeshNow, RemoveMesh, WatchMesh};
use crate::actor::Spawn;
use crate::backoff::Backoff;
use crate::cluster::status::{ActorState, ClusterStatus};
use crate::cluster::{Cluster, ClusterError};
use crate::group::GroupView;
use crate::spec::{ActorSpec, GroupMember, Placement, Seat, SupervisorSpec, SupervisorStrategy};

/// How long the head lets a follower wait before it answers with what is known already.
const FOLLOW_WAIT: Duration = Duration::from_secs(10);

/// A mesh to spawn: so many actors of one type, with one spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSpec {
    /// Unique in the cluster; the ranks are named after it, `NAME-RANK`.
    pub name: String,
    /// Its shape.
    pub dims: Dims,
    /// What all ranks have in common: resources, placement, restarts, mailbox. Name and group are filled in.
    pub rank: ActorSpec,
    /// What follows from the death of a rank: then the mesh is supervised as one, with `rank.restart` as the limit, by a
    /// supervisor of its name. Without it each rank is restarted by itself.
    pub strategy: Option<SupervisorStrategy>,
    /// The placement group that it is spread over, if it is.
    pub over: Option<Over>,
}

/// A placement group that carries the ranks of a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Over {
    /// Its name.
    pub group: String,
    /// Ranks in each bundle, in rank order: bundle 0 has the first of them.
    pub ranks_per_bundle: u32,
}

impl MeshSpec {
    /// Ranks of type `A`, all with the same arguments; each learns its own place by `ActorCx::mesh`.
    pub fn new<A: Spawn>(name: &str, dims: Dims, args: &A::Args) -> Result<Self, MeshError> {
        let rank = ActorSpec::of::<A>(name, args).map_err(|error| MeshError::Codec(error.to_string()))?;
        Ok(Self { name: name.to_owned(), dims, rank, strategy: None, over: None })
    }

    /// The same, supervised as one.
    pub fn supervised(self, strategy: SupervisorStrategy) -> Self {
        Self { strategy: Some(strategy), ..self }
    }

    /// The same, over the bundles of that placement group: `ranks_per_bundle` ranks in each.
    pub fn over(self, group: impl Into<String>, ranks_per_bundle: u32) -> Self {
        Self { over: Some(Over { group: group.into(), ranks_per_bundle }), ..self }
    }

    /// The supervisor of the ranks, if they are supervised as one.
    pub fn supervisor(&self) -> Option<SupervisorSpec> {
        let strategy = self.strategy.clone()?;
        Some(SupervisorSpec {
            restart: self.rank.restart,
            lifetime: self.rank.lifetime.clone(),
            seat: self.rank.seat.clone(),
            ..SupervisorSpec::new(&self.name, strategy)
        })
    }

    /// The specs of the ranks, in order. Apply them with others for a deployment that is more than a mesh.
    pub fn ranks(&self) -> Result<Vec<ActorSpec>, ShapeError> {
        self.dims.validate()?;
        let size = self.dims.ranks();
        let place = |rank: u32| match &self.over {
            Some(over) => Placement::Bundle {
                group: over.group.clone(),
                index: Some(rank / over.ranks_per_bundle.max(1)),
            },
            None => self.rank.placement.clone(),
        };
        let spec = |rank| ActorSpec {
            name: format!("{}-{rank}", self.name),
            group: Some(GroupMember { group: self.name.clone(), rank, size }),
            mesh: Some(self.dims.clone()),
            placement: place(rank),
            // In a mesh that is supervised as one the supervisor has the seat that the ranks were to have.
            seat: match &self.strategy {
                Some(_) => Some(Seat::new(&self.name, rank)),
                None => self.rank.seat.clone(),
            },
            ..self.rank.clone()
        };
        Ok((0..size).map(spec).collect())
    }
}

impl Cluster {
    /// Spawns all ranks of a mesh, or none, and waits until all are ready. A mesh that was spawned with the same spec
    /// before is taken as it is. A rank that dies for good, or `limit`, is an error, which removes what this call
    /// created.
    pub async fn spawn_mesh<A: Spawn>(&self, spec: &MeshSpec, limit: Duration) -> Result<Mesh<A>, MeshError> {
        let specs = spec.ranks()?;
        let ranks = specs.len();
        let applied = match self.apply_tree(specs, spec.supervisor().into_iter().collect()).await {
            Ok(applied) => applied,
            Err(error) => return Err(self.refused(spec, error).await),
        };
        let mut outcome = Err("not all ranks were ready in time".to_owned());
        let over = |status: &ClusterStatus| verdict(status, &spec.name).is_some();
        if let Some(status) = self.wait_until(limit, over).await {
            outcome = verdict(&status, &spec.name).unwrap_or(outcome);
        } else if let Ok(status) = self.status().await {
            outcome = Err(late(&status, &spec.name, limit));
        }
        match outcome {
            Ok(()) => self.mesh(&spec.name).await,
            Err(why) => {
                let mut why = why;
                if applied.started as usize == ranks
                    && let Err(error) = self.remove_mesh(&spec.name).await
                {
                    why.push_str(&format!("; and it could not be removed again: {error}"));
                }
                Err(MeshError::Spawn { mesh: spec.name.clone(), why })
            }
        }
    }

    /// Why the specs of a mesh were not applied: mostly because there is one of another size.
    async fn refused(&self, spec: &MeshSpec, error: ClusterError) -> MeshError {
        if matches!(error, ClusterError::Spec(_))
            && let Ok(now) = self.watch_mesh(&spec.name, None).await
            && now.dims.ranks() != spec.dims.ranks()
        {
            let (known, wanted) = (now.dims.to_string(), spec.dims.to_string());
            return MeshError::OtherShape { mesh: spec.name.clone(), known, wanted };
        }
        error.into()
    }

    /// A mesh that was spawned before. The handle follows it from epoch to epoch.
    pub async fn mesh<A>(&self, name: &str) -> Result<Mesh<A>, MeshError> {
        let now = self.watch_mesh(name, None).await?;
        let (told, views) = watch::channel(known(&now));
        let (cluster, mesh, mut epoch) = (self.clone(), name.to_owned(), Some(now.view.epoch));
        let follower = self.system().runtime().spawn(async move {
            let mut backoff = Backoff::reconnect();
            loop {
                match cluster.watch_mesh(&mesh, epoch).await {
                    Ok(now) => {
                        backoff.reset();
                        // An earlier epoch is of a mesh that was removed and spawned anew, or of a head, restarted, that
                        // has yet to hear of the newest. Ranks are the judges of who is late.
                        if epoch != Some(now.view.epoch) {
                            epoch = Some(now.view.epoch);
                            told.send_replace(known(&now));
                        }
                    }
                    Err(error) => {
                        if matches!(error, MeshError::Unknown(_)) && told.send_replace(None).is_some() {
                            tracing::debug!(mesh, "the mesh was removed");
                        }
                        (epoch, _) = (None, backoff.pause().await);
                    }
                }
            }
        });
        let follower = AbortOnDropHandle::new(follower);
        Ok(Mesh::new(self.system().clone(), (name, now.dims), views, Some(follower)))
    }

    /// Ends all ranks of a mesh and forgets them.
    pub async fn remove_mesh(&self, name: &str) -> Result<(), ClusterError> {
        self.ask(RemoveMesh { mesh: name.to_owned() }).await?.map_err(ClusterError::Refused)
    }

    async fn watch_mesh(&self, name: &str, epoch: Option<u64>) -> Result<MeshNow, MeshError> {
        // What is not known yet is news at once.
        let wait = if epoch.is_some() { FOLLOW_WAIT } else { Duration::ZERO };
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let watch = WatchMesh { mesh: name.to_owned(), epoch, wait_ms };
        self.ask_within(watch, wait, true).await?.map_err(MeshError::Unknown)
    }
}

/// The view, once there is one.
fn known(now: &MeshNow) -> Option<Arc<GroupView>> {
    (now.view.epoch > 0).then(|| Arc::new(now.view.clone()))
}

/// Whether the mesh is up, or will not be; `None` while that is open.
fn verdict(status: &ClusterStatus, mesh: &str) -> Option<Result<(), String>> {
    if status.group(mesh).is_some_and(|group| group.complete && group.epoch > 0) {
        return Some(Ok(()));
    }
    let ranks = || status.actors.iter().filter(|actor| actor.group.as_deref() == Some(mesh));
    ranks().find_map(|actor| match &actor.state {
        ActorState::Dead { cause } => Some(Err(format!("rank {} ({}) {cause}", actor.rank?, actor.name))),
        _ => None,
    })
}

/// Which rank is not ready, and how it is. One without a place before all others: these may wait for it.
fn late(status: &ClusterStatus, mesh: &str, limit: Duration) -> String {
    let ranks = status.actors.iter().filter(|actor| actor.group.as_deref() == Some(mesh));
    let waiting = ranks.filter_map(|actor| {
        let (weight, how) = match &actor.state {
            ActorState::Ready | ActorState::Dead { .. } => return None,
            ActorState::Pending { reason } => (0, format!("has no place: {reason}")),
            ActorState::Restarting { attempt, .. } => {
                let cause = actor.last_death.as_ref().map_or(String::new(), |cause| format!("{cause}, and "));
                (1, format!("{cause}is started again (attempt {attempt})"))
            }
            ActorState::Stopping => (2, "is stopping".to_owned()),
            ActorState::Starting { progress } => (3, format!("is starting: {}", progress.phase)),
        };
        Some((weight, actor.rank?, format!("rank {} ({}) {how}", actor.rank?, actor.name)))
    });
    let how = waiting.min().map_or("its view is on its way".to_owned(), |(_, _, how)| how);
    format!("not ready within {limit:?}: {how}")
}
