//! The part of the controller's service that concerns replicas which ask others: tells them what is served, hears them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream;

use super::{Service, State};
use crate::serve::calls::counts::{CallCounts, Of};
use crate::serve::messages::{ReportCalls, Table, TableActors, WatchDeployment};

/// The line of a caller; it is gone when this is dropped.
struct Line {
    service: Service,
    caller: u64,
}

impl Drop for Line {
    fn drop(&mut self) {
        let now = self.service.0.started.elapsed();
        self.service.lock().callers.went(self.caller, now);
    }
}

impl Service {
    /// The replicas of a deployment, now and whenever they change.
    pub(in crate::serve) fn watch(
        &self,
        watch: WatchDeployment,
    ) -> impl Stream<Item = Option<TableActors>> + 'static {
        let WatchDeployment { application, deployment, caller } = watch;
        self.lock().callers.came(caller, &application, &deployment);
        let line = Line { service: self.clone(), caller };
        // What was published last may be older than what is so.
        self.publish();
        let mut published = self.0.published.subscribe();
        published.mark_changed();
        stream::unfold((line, published, None), move |(line, mut published, told)| {
            let (application, deployment) = (application.clone(), deployment.clone());
            async move {
                loop {
                    published.changed().await.ok()?;
                    let now = find(&published.borrow_and_update(), &application, &deployment);
                    if told.as_ref() != Some(&now) {
                        return Some((now.clone(), (line, published, Some(now))));
                    }
                }
            }
        })
    }

    /// What a caller has under way.
    pub(in crate::serve) fn hear_caller(&self, report: ReportCalls) {
        if self.lock().callers.report(report) {
            self.0.woken.notify_one();
        }
    }

    /// What became of the calls of all handles.
    pub(in crate::serve) fn calls(&self) -> Vec<(Of, CallCounts)> {
        self.lock().callers.counts()
    }

    /// Tells callers what is served, if that is new.
    pub(super) fn publish(&self) {
        let table = self.table();
        self.0.published.send_if_modified(|told| {
            let new = **told != table;
            if new {
                *told = Arc::new(table);
            }
            new
        });
    }
}

impl State {
    /// Adds what callers have under way to what the ingresses have said.
    pub(super) fn hear_callers(&mut self, now: Duration) {
        let of = |number| {
            let (app, name, replica) = self.core.replica(number)?;
            replica.workload.actor().map(|_| (app.to_owned(), name.to_owned()))
        };
        self.callers.add_to(&mut self.seen, of, now);
        let apps = self.core.apps();
        self.callers.keep(|(app, name)| apps.get(app).is_some_and(|app| app.deployments.contains_key(name)));
    }
}

fn find(table: &Table, application: &str, deployment: &str) -> Option<TableActors> {
    let app = table.apps.iter().find(|app| app.name == application)?;
    app.actors.iter().find(|it| it.name == deployment).cloned()
}
