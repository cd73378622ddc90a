//! A model as all its ingresses tell of it: their reports, put together.
//!
//! Pure. What is counted never goes back, whichever ingress starts anew, ends, or does not answer for a while. Ranks tell
//! every ingress the same, so they are not added up.

use std::collections::BTreeMap;

use super::history::{Line, grown};
use super::report::ServingReport;

/// One model.
#[derive(Debug, Default)]
pub struct Served {
    /// What was seen of it.
    pub line: Line,
    /// The last report of each ingress.
    parts: BTreeMap<String, ServingReport>,
    /// What all of them have counted.
    counted: ServingReport,
}

impl Served {
    /// Takes the report of an ingress.
    pub(super) fn hear(&mut self, ingress: &str, report: ServingReport) {
        let before = self.parts.get(ingress).cloned().unwrap_or_default();
        let counted = &mut self.counted;
        counted.model.clone_from(&report.model);
        counted.ended += grown(before.ended, report.ended);
        counted.moves += grown(before.moves, report.moves);
        add(&mut counted.first_token, &before.first_token, &report.first_token);
        add(&mut counted.inter_token, &before.inter_token, &report.inter_token);
        self.parts.insert(ingress.to_owned(), report);
    }

    /// Forgets ingresses that do not serve it; whether there is one left.
    pub(super) fn keep(&mut self, serves: impl Fn(&str) -> bool) -> bool {
        self.parts.retain(|ingress, _| serves(ingress));
        !self.parts.is_empty()
    }

    /// Notes how it is at this moment.
    pub(super) fn note(&mut self, at_ms: u64) {
        let mut now = self.counted.clone();
        for report in self.parts.values() {
            now.in_flight += report.in_flight;
            for (id, rank) in &report.ranks {
                let newest = now.ranks.entry(*id).or_insert_with(|| rank.clone());
                if rank.steps > newest.steps {
                    newest.clone_from(rank);
                }
            }
        }
        self.line.push(at_ms, now);
    }

    /// Names of the ingresses.
    pub fn ingresses(&self) -> String {
        self.parts.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

fn add(counted: &mut Vec<u64>, before: &[u64], now: &[u64]) {
    counted.resize(counted.len().max(now.len()), 0);
    for (at, (sum, now)) in counted.iter_mut().zip(now).enumerate() {
        *sum += grown(before.get(at).copied().unwrap_or(0), *now);
    }
}

#[cfg(test)]
mod tests {
    use heliostat_engine::request::RankStats;

    use super::*;

    fn report(in_flight: u64, ended: u64, steps: u64) -> ServingReport {
        let rank = RankStats { steps, output_tokens: 10 * steps, ..RankStats::default() };
        let first_token = vec![0, ended];
        let ranks = [(0, rank)].into();
        ServingReport { in_flight, ended, first_token, ranks, ..ServingReport::default() }
    }

    #[test]
    fn requests_are_added_up_and_ranks_are_not() {
        let mut served = Served::default();
        served.hear("a", report(1, 10, 5));
        served.hear("b", report(2, 20, 4));
        served.note(1_000);
        let now = served.line.report().unwrap();
        assert_eq!((now.in_flight, now.ended, now.first_token.as_slice()), (3, 30, &[0, 30][..]));
        assert_eq!((now.ranks.len(), now.ranks[&0].output_tokens), (1, 50), "the newest word of the rank");

        // One does not answer, then counts from zero: nothing is counted twice, and nothing goes back.
        served.hear("a", report(1, 11, 6));
        served.note(2_000);
        served.hear("b", report(0, 4, 6));
        served.note(3_000);
        assert_eq!(served.line.report().unwrap().ended, 35);
        let rates: Vec<f64> = served.line.since(0).map(|sample| sample.requests_per_s).collect();
        assert_eq!(rates, [1.0, 4.0]);
        assert_eq!(served.ingresses(), "a, b");
        assert!(served.keep(|name| name == "a"));
        served.note(4_000);
        assert_eq!((served.line.report().unwrap().ended, served.line.report().unwrap().in_flight), (35, 1));
        assert!(!served.keep(|_| false));
    }
}
