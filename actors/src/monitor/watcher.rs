//! Looks at a cluster once a second and keeps what it saw.
//!
//! Ingresses and EPLB actors are found by their type, so several models are watched beside each other. What is not
//! looked at by anybody costs one small message a second to each of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{join_all, join3};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::ClusterStatus;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::history::Balance;
use super::report::ServingReport;
use super::timeline::ready;
use super::together::Served;
use crate::eplb::Eplb;
use crate::ingress_actor::IngressActor;
use crate::messages::{GetPulse, GetServing};
use crate::serve::ServeController;
use crate::serve::calls::counts::{CallCounts, Of};
use crate::serve::messages::GetCalls;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long one look may take.
const DEADLINE: Duration = Duration::from_millis(900);

/// What was seen. Cheap to clone.
#[derive(Clone, Default)]
pub struct Watcher(Arc<Mutex<Seen>>);

/// What is gone is forgotten.
#[derive(Default)]
pub struct Seen {
    /// By the names of models.
    pub models: BTreeMap<String, Served>,
    /// By the names of EPLB actors.
    pub balances: BTreeMap<String, Balance>,
    /// Calls between replicas of users' actors, by the deployment that is called.
    pub(super) calls: Vec<(Of, CallCounts)>,
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
        let controllers = ready::<ServeController>(&status);
        let calls = controllers.iter().map(async |name| {
            let controller = cluster.handle::<ServeController>(name).await.ok()?.with_deadline(DEADLINE);
            controller.ask(GetCalls).await.ok()
        });
        let (reports, pulses, calls) = join3(join_all(reports), join_all(pulses), join_all(calls)).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let mut seen = self.seen();
        let there = |name: &String| status.actors.iter().any(|actor| actor.name == *name);
        seen.balances.retain(|name, _| there(name));
        let reports: Vec<_> = reports.into_iter().flatten().collect();
        for (ingress, all) in &reports {
            // Several applications may serve models of one name.
            let mut models: BTreeMap<&String, ServingReport> = BTreeMap::new();
            for report in all {
                let known = models.entry(&report.model);
                known.and_modify(|known| known.join(report)).or_insert_with(|| report.clone());
            }
            for (model, report) in models {
                seen.models.entry(model.clone()).or_default().hear(ingress, report);
            }
        }
        // Who does not answer still serves what it did; who does, what it says.
        let serves = |ingress: &str, model: &str| match reports.iter().find(|(name, _)| name == ingress) {
            Some((_, all)) => all.iter().any(|report| report.model == model),
            None => status.actors.iter().any(|actor| actor.name == ingress),
        };
        seen.models.retain(|model, served| served.keep(|ingress| serves(ingress, model)));
        seen.models.values_mut().for_each(|served| served.note(now));
        for (name, pulse) in pulses.into_iter().flatten() {
            seen.balances.entry(name).or_default().push(now, pulse);
        }
        if let Some(calls) = calls.into_iter().flatten().next() {
            seen.calls = calls;
        }
        seen.status = Some(status);
    }
}
