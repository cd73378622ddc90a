//! Keeps the pool of a handle in line with what the serve controller says of the deployment, and tells it what is under way.
//!
//! The controller pushes every change. What is under way is told when it changes, so often at most; an idle caller says
//! nothing. While there is no controller the replicas that were known last are called.

use std::time::Duration;

use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::backoff::Backoff;
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::handle::Handle;
use heliostat_runtime::spec::DEFAULT_NAMESPACE;
use tokio::time::Instant;

use super::pool::{Calls, Pool};
use crate::deployment::SERVE;
use crate::serve::ServeController;
use crate::serve::messages::{ReportCalls, WatchDeployment};

/// Between two reports.
const REPORT_PAUSE: Duration = Duration::from_millis(100);
/// Between two tries to reach the controller.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Whose calls, and to what.
#[derive(Clone, Debug)]
pub(super) struct Whose {
    pub(super) application: String,
    /// Which deployment is called.
    pub(super) deployment: String,
    /// Of all callers of the cluster.
    pub(super) caller: u64,
}

/// Runs for as long as somebody has the handle.
pub(super) async fn attend<A: RemoteActor>(pool: Pool<A>, cluster: Cluster, whose: Whose) {
    // The replica's own namespace is another one.
    let cluster = cluster.in_namespace(DEFAULT_NAMESPACE);
    let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
    loop {
        match cluster.handle::<ServeController>(SERVE).await {
            Ok(controller) => {
                if follow(&pool, &controller, &whose).await {
                    backoff = Backoff::new(AGAIN.0, AGAIN.1);
                }
                cluster.forget(SERVE);
            }
            Err(why) => tracing::debug!("the serve controller is not found: {why}"),
        }
        backoff.pause().await;
    }
}

/// Follows one controller to its end. Whether it has said anything.
async fn follow<A: RemoteActor>(pool: &Pool<A>, controller: &Handle<ServeController>, whose: &Whose) -> bool {
    let Whose { application, deployment, caller } = whose.clone();
    let mut told = controller.stream(WatchDeployment { application, deployment, caller });
    let mut heard = false;
    let mut reported: Option<Calls> = None;
    let mut report_at: Option<Instant> = None;
    let mut last = Instant::now();
    loop {
        let due = report_at.unwrap_or(last);
        tokio::select! {
            next = told.next() => match next {
                Some(Ok(Some(deployment))) => {
                    heard = true;
                    pool.set(&deployment);
                }
                Some(Ok(None)) => {
                    heard = true;
                    let Whose { application, deployment, .. } = whose;
                    pool.set_absent(format!("application {application} has no deployment called {deployment}"));
                }
                Some(Err(why)) => {
                    tracing::debug!("the serve controller says no more of {}: {why}", whose.deployment);
                    return heard;
                }
                None => return heard,
            },
            () = pool.changed() => report_at = report_at.or(Some(last + REPORT_PAUSE)),
            () = tokio::time::sleep_until(due), if heard && report_at.is_some() => {
                report_at = None;
                let calls = pool.calls();
                if reported.as_ref() != Some(&calls) {
                    last = Instant::now();
                    let sent = controller.tell(report(whose, calls.clone()));
                    reported = sent.is_ok().then_some(calls);
                    // What could not be sent is sent once there is room.
                    report_at = reported.is_none().then_some(last + REPORT_PAUSE);
                }
            }
        }
    }
}

fn report(whose: &Whose, Calls { load, draining, counts }: Calls) -> ReportCalls {
    let Whose { application, deployment, caller } = whose.clone();
    ReportCalls { application, deployment, caller, load, draining, counts }
}
