//! A recording of a running cluster: every rank notes its steps for a while, then all is gathered.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::cluster::status::{ActorState, ClusterStatus};
use heliostat_runtime::cluster::{Cluster, ClusterError};

use super::trace::{Recording, STEPS_MAX};
use crate::eplb::Eplb;
use crate::ingress_actor::IngressActor;
use crate::messages::{GetRequests, GetStatus, StartTrace, TakeTrace};
use crate::rank::Rank;

/// How long an actor may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest recording.
pub const LONGEST: Duration = Duration::from_secs(60);

/// Names of the actors of a type that are ready.
pub(super) fn ready<A: RemoteActor>(status: &ClusterStatus) -> Vec<String> {
    let ready = |actor: &&_| {
        let actor: &heliostat_runtime::cluster::status::ActorStatus = actor;
        actor.type_name == A::TYPE && matches!(actor.state, ActorState::Ready)
    };
    status.actors.iter().filter(ready).map(|actor| actor.name.clone()).collect()
}

/// Records for `duration`, at most [`LONGEST`]. Actors that do not answer are left out.
///
/// # Errors
/// The head does not answer.
pub async fn record(cluster: &Cluster, duration: Duration) -> Result<Recording, ClusterError> {
    let status = cluster.status().await?;
    let from_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    let mut ranks = ready::<Rank>(&status);
    ranks.sort_by_key(|name| (name.len(), name.clone()));
    let start = ranks.iter().map(async |name| {
        let rank = cluster.handle::<Rank>(name).await?.with_deadline(DEADLINE);
        let started = rank.ask(StartTrace { steps_max: STEPS_MAX as u32 }).await;
        started.map(|()| rank).map_err(|why| ClusterError::Refused(why.to_string()))
    });
    let started: Vec<_> = join_all(start).await;
    tokio::time::sleep(duration.min(LONGEST)).await;
    let take = ranks.into_iter().zip(started).map(async |(name, rank)| {
        let taken = rank.ok()?.ask(TakeTrace).await;
        taken
            .inspect_err(|why| tracing::warn!("no recording of {name}: {why}"))
            .ok()
            .map(|trace| (name, trace))
    });
    let ranks = join_all(take).await.into_iter().flatten().collect();
    let requests = ready::<IngressActor>(&status).into_iter().map(async |name| {
        let ingress = cluster.handle::<IngressActor>(&name).await.ok()?.with_deadline(DEADLINE);
        Some((name, ingress.ask(GetRequests).await.ok()?))
    });
    let requests = join_all(requests).await.into_iter().flatten().collect();
    let maps = ready::<Eplb>(&status).into_iter().map(async |name| {
        let eplb = cluster.handle::<Eplb>(&name).await.ok()?.with_deadline(DEADLINE);
        let status = eplb.ask(GetStatus).await.ok()?;
        Some((name, serde_json::from_str(&status).ok()?))
    });
    let maps = join_all(maps).await.into_iter().flatten().collect();
    Ok(Recording { from_us, ranks, requests, maps })
}
