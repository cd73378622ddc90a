//! Looks at a cluster once a second and keeps what it saw.
//!
//! Ingresses and EPLB actors are found by their type, so several models are watched beside each other. What is not
//! looked at by anybody costs one small message a second to each of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{join, join_all};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::ClusterStatus;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::history::{Balance, Line};
use super::timeline::ready;
use crate::eplb::Eplb;
use crate::ingress_actor::IngressActor;
use crate::messages::{GetPulse, GetServing};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long one look may take.
const DEADLINE: Duration = Duration::from_millis(900);

/// What was seen. Cheap to clone.
#[derive(Clone, Default)]
pub struct Watcher(Arc<Mutex<Seen>>);

/// By the names of actors; those that are gone are forgotten.
#[derive(Default)]
pub struct Seen {
    /// By ingress and model.
    pub lines: BTreeMap<(String, String), Line>,
    /// Of EPLB actors.
    pub balances: BTreeMap<String, Balance>,
    /// Of the whole cluster.
    pub status: Option<ClusterStatus>,
}

impl Watcher {
    /// Looks until the task is aborted.
    pub fn start(&self, cluster: Cluster) -> JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                this.look(&cluster).await;
            }
        })
    }

    /// What was seen; locked while it is held.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks once. Who does not answer in time is left out.
    pub async fn look(&self, cluster: &Cluster) {
        let Ok(Ok(status)) = tokio::time::timeout(DEADLINE, cluster.status()).await else { return };
        let (ingresses, eplbs) = (ready::<IngressActor>(&status), ready::<Eplb>(&status));
        let reports = ingresses.iter().map(async |name| {
            let ingress = cluster.handle::<IngressActor>(name).await.ok()?.with_deadline(DEADLINE);
            ingress.ask(GetServing).await.ok().map(|report| (name.clone(), report))
        });
        let pulses = eplbs.iter().map(async |name| {
            let eplb = cluster.handle::<Eplb>(name).await.ok()?.with_deadline(DEADLINE);
            eplb.ask(GetPulse).await.ok().map(|pulse| (name.clone(), pulse))
        });
        let (reports, pulses) = join(join_all(reports), join_all(pulses)).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let mut seen = self.seen();
        let there = |name: &String| status.actors.iter().any(|actor| actor.name == *name);
        seen.lines.retain(|(ingress, _), _| there(ingress));
        seen.balances.retain(|name, _| there(name));
        for (ingress, reports) in reports.into_iter().flatten() {
            // A model that it serves no more is forgotten.
            seen.lines.retain(|(of, model), _| {
                *of != ingress || reports.iter().any(|report| report.model == *model)
            });
            for report in reports {
                seen.lines.entry((ingress.clone(), report.model.clone())).or_default().push(now, report);
            }
        }
        for (name, pulse) in pulses.into_iter().flatten() {
            seen.balances.entry(name).or_default().push(now, pulse);
        }
        seen.status = Some(status);
    }
}
