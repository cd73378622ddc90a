//! The part of the controller's service that concerns ingresses: has them run, tells them what is served, hears them.

use std::time::Duration;

use futures_util::future::join_all;
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::ClusterStatus;

use super::{Service, State};
use crate::deployment::ingress_spec;
use crate::ingress_actor::{IngressActor, IngressArgs};
use crate::serve::core::{Site, SiteStage, Stage};
use crate::serve::messages::{SetTable, Table, TableReport};

/// How long an ingress may take to take a table, and how long the others wait for it.
const DEADLINE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_millis(250);

/// What is to be done for one ingress.
pub(super) enum IngressOrder {
    /// Have it, on that node.
    Ensure { name: String, node: String, args: Box<IngressArgs> },
    /// End and forget it.
    Remove(String),
}

impl IngressOrder {
    /// `args` are those of the one that has the configured port.
    pub(super) fn ensure(site: &Site, args: &IngressArgs) -> Self {
        let mut args = Box::new(args.clone());
        if !site.configured {
            args.bind.set_port(0);
        }
        Self::Ensure { name: site.name.clone(), node: site.node.clone(), args }
    }
}

impl Service {
    /// Tells all ingresses what is served, which is returned, and takes in what is in flight. One that is slow is waited for
    /// shortly: the others are not kept.
    pub(super) async fn tell_ingresses(&self, status: &ClusterStatus) -> Table {
        let (table, turns, asked) = {
            let mut state = self.lock();
            state.look_at_ingresses(status);
            let asked = state.ingresses.ask();
            let stays = |site: &Site| site.stage == SiteStage::Serving;
            let leaving = |name: &str| !state.core.sites().get(name).is_some_and(stays);
            let asked: Vec<_> = asked.into_iter().map(|(name, it)| (leaving(&name), name, it)).collect();
            (state.table(), state.ingresses.turns(), asked)
        };
        let tasks = asked.into_iter().map(|(leaving, name, incarnation)| {
            let (service, table, turns) = (self.clone(), table.clone(), turns.clone());
            tokio::spawn(async move {
                let told = SetTable { table, leaving, turns };
                let report = tell(&service.0.cluster, (&name, incarnation), told).await;
                service.lock().ingresses.told((&name, incarnation), report);
            })
        });
        // Answers that come later are taken in then.
        let _ = tokio::time::timeout(PATIENCE, join_all(tasks)).await;
        table
    }

    /// What does not succeed is ordered again.
    pub(super) async fn carry_out_at(&self, order: IngressOrder) {
        let cluster = &self.0.cluster;
        match order {
            IngressOrder::Ensure { name, node, args } => {
                let spec = match ingress_spec(&name, &node, &args, self.0.args.base.restart) {
                    Ok(spec) => spec,
                    Err(why) => return tracing::error!(name, "an ingress cannot be described: {why}"),
                };
                if let Err(why) = cluster.apply(vec![spec]).await {
                    tracing::warn!(name, node, "an ingress cannot be applied yet: {why}");
                }
            }
            IngressOrder::Remove(name) => {
                if let Err(why) = cluster.remove_actor(&name).await {
                    tracing::warn!(name, "an ingress cannot be removed yet: {why}");
                }
            }
        }
    }
}

impl State {
    /// Takes in which ingresses and nodes there are.
    pub(super) fn look_at_ingresses(&mut self, status: &ClusterStatus) {
        self.seen.sites = self.ingresses.look(self.core.sites(), status);
    }

    /// Takes in what ingresses have said.
    pub(super) fn hear_ingresses(&mut self) {
        let drained = self.core.replicas().filter(|(_, _, replica)| replica.stage == Stage::Draining);
        self.seen.draining = self.ingresses.at(drained.map(|(_, _, replica)| replica.number));
        self.seen.loads = self.ingresses.loads();
        self.seen.problems = self.ingresses.problems();
    }
}

/// Tells an ingress in that incarnation what is served.
async fn tell(cluster: &Cluster, (name, incarnation): (&str, u64), told: SetTable) -> Option<TableReport> {
    let known = cluster.handle::<IngressActor>(name).await;
    let handle = match known {
        Ok(handle) if handle.addr().incarnation.0 == incarnation => handle,
        _ => {
            cluster.forget(name);
            cluster.handle::<IngressActor>(name).await.ok()?
        }
    };
    if handle.addr().incarnation.0 != incarnation {
        return None;
    }
    let told = handle.with_deadline(DEADLINE).ask(told).await;
    told.map_err(|why| tracing::debug!(name, "an ingress does not answer: {why}")).ok()
}
