//! A client's side of placement groups and of drained nodes.

use std::time::{Duration, Instant};

use super::status::{PlacementGroupState, PlacementGroupStatus};
use super::{Cluster, ClusterError, not_applied};
use crate::head::messages::{
    DrainNode, MakePlacementGroup, RemovePlacementGroup, UndrainNode, WatchPlacementGroup,
};
use crate::spec::{Placement, PlacementGroupSpec};

/// Longest wait of one question to the head.
const WATCH_PART: Duration = Duration::from_secs(2);

/// A placement group that was made. Dropping this changes nothing: it lives until it is removed.
#[derive(Clone)]
pub struct PlacementGroup {
    pub(super) cluster: Cluster,
    pub(super) name: String,
}

impl PlacementGroup {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For an actor that goes into its bundle `index`, or with `None` into the first that has room.
    pub fn bundle(&self, index: impl Into<Option<u32>>) -> Placement {
        Placement::Bundle { group: self.name.clone(), index: index.into() }
    }

    /// How it is at this moment. Fails if it was removed.
    pub async fn status(&self) -> Result<PlacementGroupStatus, ClusterError> {
        self.watch(None, Duration::ZERO).await
    }

    /// How it is as soon as its state is not the one that was `seen`, or after `limit`. Fails if it was removed.
    pub async fn changed(
        &self,
        seen: &PlacementGroupState,
        limit: Duration,
    ) -> Result<PlacementGroupStatus, ClusterError> {
        let started = Instant::now();
        loop {
            let left = limit.saturating_sub(started.elapsed());
            let status = self.watch(Some(seen.clone()), left.min(WATCH_PART)).await?;
            if status.state != *seen || left.is_zero() {
                return Ok(status);
            }
        }
    }

    /// Waits until all bundles are reserved. Fails after `limit` with what they wait for, or when the group is removed.
    pub async fn ready(&self, limit: Duration) -> Result<PlacementGroupStatus, ClusterError> {
        let started = Instant::now();
        let mut status = self.status().await?;
        loop {
            let left = limit.saturating_sub(started.elapsed());
            let why = match &status.state {
                PlacementGroupState::Created => return Ok(status),
                PlacementGroupState::Pending { reason }
                | PlacementGroupState::Prepared { reason }
                | PlacementGroupState::Rescheduling { reason } => reason,
            };
            if left.is_zero() {
                let name = &self.name;
                return Err(ClusterError::Refused(format!("placement group {name} is not ready: {why}")));
            }
            status = self.changed(&status.state, left).await?;
        }
    }

    async fn watch(
        &self,
        seen: Option<PlacementGroupState>,
        wait: Duration,
    ) -> Result<PlacementGroupStatus, ClusterError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let watch = WatchPlacementGroup { name: self.name.clone(), seen, wait_ms };
        let status = self.cluster.ask_within(watch, wait, true).await?;
        status.ok_or_else(|| ClusterError::NoSuchPlacementGroup(self.name.clone()))
    }

    /// Ends the actors in it, for good, and gives its bundles back.
    pub async fn remove(&self) -> Result<(), ClusterError> {
        self.cluster.remove_placement_group(&self.name).await
    }
}

impl Cluster {
    /// Reserves bundles, all or none, as soon as there is room. Returns when the group is registered, which survives
    /// the head; `ready` waits for the bundles. The same spec again gives the same group.
    pub async fn placement_group(&self, spec: PlacementGroupSpec) -> Result<PlacementGroup, ClusterError> {
        let name = spec.name.clone();
        // Harmless twice: the same group again changes nothing.
        self.ask(MakePlacementGroup { spec }).await?.map_err(not_applied)?;
        Ok(PlacementGroup { cluster: self.clone(), name })
    }

    /// The placement group of that name, whoever made it.
    pub async fn get_placement_group(&self, name: &str) -> Result<PlacementGroup, ClusterError> {
        let group = PlacementGroup { cluster: self.clone(), name: name.to_owned() };
        group.status().await.map(|_| group)
    }

    /// Ends the actors in a placement group, for good, and gives its bundles back. What an actor has is free when its
    /// process has ended.
    pub async fn remove_placement_group(&self, name: &str) -> Result<(), ClusterError> {
        let remove = RemovePlacementGroup { name: name.to_owned() };
        self.ask_within(remove, Duration::ZERO, false).await?.map_err(ClusterError::Refused)
    }

    /// Empties a node: nothing new goes there, actors that fit elsewhere move at once, the others go on for `grace` and
    /// then wait for a place. With `leave` its agent ends when nothing is left on it; a lost node is forgotten. Returns
    /// when the drain has begun; the node's state says when it is over.
    pub async fn drain_node(&self, node: &str, grace: Duration, leave: bool) -> Result<(), ClusterError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let drain = DrainNode { node: node.to_owned(), grace_ms, leave };
        self.ask(drain).await?.map_err(ClusterError::Refused)
    }

    /// Has a drained node take actors again.
    pub async fn undrain_node(&self, node: &str) -> Result<(), ClusterError> {
        self.ask(UndrainNode { node: node.to_owned() }).await?.map_err(ClusterError::Refused)
    }
}
