//! What the controller knows of the handles that replicas have of other deployments: their calls under way.
//!
//! Pure. A replica that is drained has nothing left when every caller of its deployment has said so. A caller whose line is
//! gone counts for a while as it was last: it comes back, unless its process has ended.

use std::collections::BTreeMap;
use std::time::Duration;

use super::counts::{CallCounts, Of};
use crate::serve::core::Seen;
use crate::serve::messages::ReportCalls;

/// How long a caller may take to come back; also after the start of the controller.
pub(in crate::serve) const BACK_PATIENCE: Duration = Duration::from_secs(3);

/// All handles, by their numbers.
#[derive(Debug, Default)]
pub(in crate::serve) struct Callers {
    all: BTreeMap<u64, Caller>,
    /// What those had counted that are gone.
    past: BTreeMap<Of, CallCounts>,
}

#[derive(Debug)]
struct Caller {
    application: String,
    deployment: String,
    /// Lines of it that are open: while it comes back by a new one the old one may still be.
    lines: u32,
    lost_at: Duration,
    load: u64,
    draining: Vec<(u64, u64)>,
    counts: CallCounts,
}

impl Caller {
    fn of(&self) -> Of {
        (self.application.clone(), self.deployment.clone())
    }
}

impl Callers {
    /// A caller opens a line.
    pub(in crate::serve) fn came(&mut self, caller: u64, application: &str, deployment: &str) {
        let new = || Caller {
            application: application.to_owned(),
            deployment: deployment.to_owned(),
            lines: 0,
            lost_at: Duration::ZERO,
            load: 0,
            draining: Vec::new(),
            counts: CallCounts::default(),
        };
        self.all.entry(caller).or_insert_with(new).lines += 1;
    }

    /// A line is gone.
    pub(in crate::serve) fn went(&mut self, caller: u64, now: Duration) {
        if let Some(caller) = self.all.get_mut(&caller) {
            (caller.lines, caller.lost_at) = (caller.lines.saturating_sub(1), now);
        }
    }

    /// What a caller has under way. Whether something may follow from it at once.
    pub(in crate::serve) fn report(&mut self, report: ReportCalls) -> bool {
        let Some(caller) = self.all.get_mut(&report.caller) else { return false };
        let began = caller.load == 0 && report.load > 0;
        let emptied = report.draining.iter().any(|it| it.1 == 0 && !caller.draining.contains(it));
        (caller.load, caller.draining, caller.counts) = (report.load, report.draining, report.counts);
        began || emptied
    }

    /// What became of all calls, by application and deployment.
    pub(in crate::serve) fn counts(&self) -> Vec<(Of, CallCounts)> {
        let mut all = self.past.clone();
        for caller in self.all.values() {
            all.entry(caller.of()).or_default().add(&caller.counts);
        }
        all.into_iter().collect()
    }

    /// Forgets what was counted for deployments that are no more.
    pub(in crate::serve) fn keep(&mut self, is_there: impl Fn(&Of) -> bool) {
        self.past.retain(|of, _| is_there(of));
    }

    /// Adds their calls to what the ingresses have said. `since` is the time since the start of the controller, before
    /// which it may have had callers that are still to come back.
    pub(in crate::serve) fn add_to(
        &mut self,
        seen: &mut Seen,
        of: impl Fn(u64) -> Option<(String, String)>,
        now: Duration,
    ) {
        let is_there =
            |caller: &Caller| caller.lines > 0 || now.saturating_sub(caller.lost_at) < BACK_PATIENCE;
        for (_, caller) in self.all.extract_if(.., |_, caller| !is_there(caller)) {
            let of = caller.of();
            self.past.entry(of).or_default().add(&caller.counts.past());
        }
        for caller in self.all.values() {
            *seen.loads.entry(caller.of()).or_default() += caller.load;
        }
        seen.draining = std::mem::take(&mut seen.draining)
            .into_iter()
            .filter_map(|(number, left)| {
                // Of a model: handles have nothing there.
                let Some((application, deployment)) = of(number) else { return Some((number, left)) };
                if now < BACK_PATIENCE {
                    return None;
                }
                let callers = self.all.values();
                let mut callers =
                    callers.filter(|it| it.application == application && it.deployment == deployment);
                let said = |caller: &Caller| {
                    caller.draining.iter().find(|(it, _)| *it == number).map(|(_, left)| *left)
                };
                let there: u64 = callers.try_fold(0, |sum, caller| Some(sum + said(caller)?))?;
                Some((number, left + there))
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: &str = "app";

    fn report(caller: u64, load: u64, draining: &[(u64, u64)]) -> ReportCalls {
        let (application, deployment) = (APP.to_owned(), "it".to_owned());
        let counts = CallCounts { requests: load, queued: 1, ..CallCounts::default() };
        ReportCalls { application, deployment, caller, load, draining: draining.to_vec(), counts }
    }

    /// What is seen after the ingresses have said that they have nothing at replica 7.
    fn seen(callers: &mut Callers, now_s: u64) -> (u64, Option<u64>) {
        let mut seen = Seen { draining: BTreeMap::from([(7, 0)]), ..Seen::default() };
        let of = |_| Some((APP.to_owned(), "it".to_owned()));
        callers.add_to(&mut seen, of, Duration::from_secs(now_s));
        (seen.loads.values().sum(), seen.draining.get(&7).copied())
    }

    #[test]
    fn a_replica_is_empty_when_all_who_may_call_it_have_said_so() {
        let mut callers = Callers::default();
        assert_eq!(seen(&mut callers, 1), (0, None), "some may still come back");
        assert_eq!(seen(&mut callers, 10), (0, Some(0)));
        callers.came(1, APP, "it");
        callers.came(2, APP, "other");
        assert_eq!(seen(&mut callers, 10), (0, None), "it has not said it");
        assert!(callers.report(report(1, 3, &[])), "the first load is news");
        assert!(!callers.report(report(1, 4, &[(7, 2)])));
        assert_eq!(seen(&mut callers, 10), (4, Some(2)));
        assert!(callers.report(report(1, 2, &[(7, 0)])), "it has nothing there any more");
        assert_eq!(seen(&mut callers, 10), (2, Some(0)));
        assert!(!callers.report(report(9, 1, &[])), "nobody's");
    }

    #[test]
    fn a_caller_that_is_gone_counts_for_a_while_and_may_come_back() {
        let mut callers = Callers::default();
        callers.came(1, APP, "it");
        callers.report(report(1, 3, &[(7, 1)]));
        callers.went(1, Duration::from_secs(10));
        assert_eq!(seen(&mut callers, 12), (3, Some(1)));
        callers.came(1, APP, "it");
        assert_eq!(seen(&mut callers, 20), (3, Some(1)));
        let counts = |callers: &Callers| {
            callers.counts().iter().map(|(_, it)| (it.requests, it.queued)).collect::<Vec<_>>()
        };
        assert_eq!(counts(&callers), [(3, 1)]);
        callers.went(1, Duration::from_secs(20));
        assert_eq!(seen(&mut callers, 23), (0, Some(0)));
        assert_eq!(counts(&callers), [(3, 0)], "what it has counted stays");
        callers.keep(|_| false);
        assert_eq!(counts(&callers), []);
    }
}
