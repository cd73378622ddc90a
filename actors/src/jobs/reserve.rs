//! What jobs ask for: a placement group of one bundle per job, taken from the same pool as actors and placed by the head, on
//! any node.
//!
//! It asks the head and tells what it hears; what follows for the job is decided by `core`.

use std::convert::Infallible;
use std::time::Duration;

use heliostat_runtime::backoff::Backoff;
use heliostat_runtime::cluster::status::{PlacementGroupState, PlacementGroupStatus};
use heliostat_runtime::cluster::{Cluster, ClusterError, PlacementGroup};
use heliostat_runtime::spec::{Bundle, Device, InvalidSpec, PlacementGroupSpec, Strategy};
use tokio_util::sync::CancellationToken;

use super::request::Submission;

/// Start of the names of the placement groups of jobs.
const PREFIX: &str = "job.";
/// Longest question to the head whether something is new.
const PART: Duration = Duration::from_secs(60);

/// Between attempts to reach a head that is away.
fn reconnect() -> Backoff {
    Backoff::new(Duration::from_millis(10), Duration::from_millis(500))
}

/// What is heard of what a job asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is set aside.
    Reserved {
        /// On this node.
        node: String,
        /// These devices among it.
        devices: Vec<Device>,
    },
    /// It is not there, and why.
    Waits(String),
    /// It was set aside and is no more, and why: a job that runs must end, one that does not waits again.
    Lost(String),
    /// It never will be, and why.
    Refused(String),
}

/// The resources of the cluster, as the jobs actor asks for them.
pub(super) struct Pool {
    cluster: Cluster,
}

impl Pool {
    /// Those of that cluster.
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster }
    }

    /// Has what a job asks for set aside, and tells how that is, until it is `released`; then it is given back.
    pub(super) async fn hold(
        &self,
        id: &str,
        submission: &Submission,
        released: CancellationToken,
        told: impl Fn(Seen),
    ) {
        if let Some(refused) = released.run_until_cancelled(self.follow(id, submission, &told)).await {
            told(Seen::Refused(refused.to_string()));
            released.cancelled().await;
        }
        self.release(&name(id)).await;
    }

    /// Gives back what was set aside for jobs of which `is_known` knows nothing.
    pub(super) async fn sweep(&self, is_known: impl Fn(&str) -> bool) {
        let mut backoff = reconnect();
        let status = loop {
            match self.cluster.status().await {
                Ok(status) => break status,
                Err(_) => backoff.pause().await,
            }
        };
        for group in status.placement_groups {
            if group.name.strip_prefix(PREFIX).is_some_and(|id| !is_known(id)) {
                self.release(&group.name).await;
            }
        }
    }

    /// Ends only where the head refuses for good.
    async fn follow(&self, id: &str, submission: &Submission, told: impl Fn(Seen)) -> InvalidSpec {
        let mut backoff = reconnect();
        loop {
            match self.attempt(id, submission, &told).await {
                Ok(never) => match never {},
                Err(ClusterError::Spec(refused)) => return refused,
                Err(ClusterError::NoSuchPlacementGroup(name)) => {
                    told(Seen::Lost(format!("placement group {name} was removed")));
                }
                Err(error) => tracing::warn!(job = id, %error, "what a job asks for cannot be asked for now"),
            }
            backoff.pause().await;
        }
    }

    async fn attempt(
        &self,
        id: &str,
        submission: &Submission,
        told: impl Fn(Seen),
    ) -> Result<Infallible, ClusterError> {
        let group = self.group(id, submission).await?;
        let mut status = group.status().await?;
        loop {
            match &status.state {
                PlacementGroupState::Created => {
                    let node = status.bundles.first().and_then(|bundle| bundle.node.clone());
                    let node = node.unwrap_or_default();
                    told(Seen::Reserved { node, devices: self.devices(&status).await? });
                }
                PlacementGroupState::Pending { reason } | PlacementGroupState::Prepared { reason } => {
                    told(Seen::Waits(reason.clone()));
                }
                PlacementGroupState::Rescheduling { reason } => told(Seen::Lost(reason.clone())),
            }
            let seen = status.state.clone();
            while status.state == seen {
                status = group.changed(&seen, PART).await?;
            }
        }
    }

    async fn group(&self, id: &str, submission: &Submission) -> Result<PlacementGroup, ClusterError> {
        let Submission { resources, selector, .. } = submission.clone();
        let bundles = vec![Bundle { resources, selector }];
        let spec =
            PlacementGroupSpec { name: name(id), bundles, strategy: Strategy::default(), topology: None };
        self.cluster.placement_group(spec).await
    }

    async fn devices(&self, group: &PlacementGroupStatus) -> Result<Vec<Device>, ClusterError> {
        let Some(bundle) = group.bundles.first().filter(|bundle| !bundle.devices.is_empty()) else {
            return Ok(Vec::new());
        };
        let nodes = self.cluster.status().await?.nodes;
        let node = nodes.into_iter().find(|node| Some(&node.name) == bundle.node.as_ref());
        let devices = node.into_iter().flat_map(|node| node.devices).map(|device| device.device);
        Ok(devices.filter(|device| bundle.devices.contains(&device.index)).collect())
    }

    /// Until it is done, or the group is gone already.
    async fn release(&self, group: &str) {
        let mut backoff = reconnect();
        loop {
            match self.cluster.remove_placement_group(group).await {
                Ok(()) => return,
                Err(ClusterError::Refused(why)) => {
                    return tracing::debug!(group, why, "nothing to give back");
                }
                Err(error) => {
                    tracing::warn!(group, %error, "what a job had cannot be given back now");
                    backoff.pause().await;
                }
            }
        }
    }
}

/// The placement group of a job.
pub(super) fn name(id: &str) -> String {
    format!("{PREFIX}{id}")
}
