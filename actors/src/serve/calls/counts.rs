//! What became of a caller's calls to a deployment, and how that is told under Ray Serve's names.
//!
//! Pure. Each caller counts for itself: an ingress tells its own, the dashboard those of replicas that ask others.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use bincode::{Decode, Encode};

/// Ray Serve's default buckets, milliseconds.
pub(crate) const BUCKETS_MS: [f64; 15] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 300.0, 400.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0];

/// Calls of one caller, or of several put together.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct CallCounts {
    /// Calls that a replica had and that have ended.
    pub requests: u64,
    /// Of them, those to which the replica gave no answer.
    pub errors: u64,
    /// How many took no longer than each of the buckets, and none of those before it; the last has the others.
    pub latency: [u64; BUCKETS_MS.len() + 1],
    /// What all took together, milliseconds.
    pub latency_ms: f64,
    /// Calls that wait for a replica.
    pub queued: u64,
    /// Calls under way at each replica, by number, where there are any.
    pub ongoing: BTreeMap<u64, u64>,
}

impl CallCounts {
    /// A call has ended that a replica had.
    pub(super) fn ended(&mut self, after: Duration, failed: bool) {
        let ms = after.as_secs_f64() * 1e3;
        let bucket = BUCKETS_MS.iter().position(|most| ms <= *most).unwrap_or(BUCKETS_MS.len());
        self.requests += 1;
        self.errors += u64::from(failed);
        self.latency[bucket] += 1;
        self.latency_ms += ms;
    }

    /// Adds those of another caller.
    pub(in crate::serve) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.latency.iter_mut().zip(other.latency).for_each(|(sum, it)| *sum += it);
        self.latency_ms += other.latency_ms;
        self.queued += other.queued;
        for (replica, ongoing) in &other.ongoing {
            *self.ongoing.entry(*replica).or_default() += ongoing;
        }
    }

    /// The same of a caller that is gone: nothing of it is under way.
    pub(in crate::serve) fn past(self) -> Self {
        Self { queued: 0, ongoing: BTreeMap::new(), ..self }
    }
}

/// Of an application and one of its deployments.
pub(crate) type Of = (String, String);

/// The text of these counts, in Prometheus' OpenMetrics form.
pub(crate) fn render(all: &[(Of, CallCounts)]) -> String {
    let mut text = String::new();
    let mut family = |name: &str,
                      kind: &str,
                      help: &str,
                      lines: &dyn Fn(&str, &CallCounts) -> Vec<String>| {
        let _ = write!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}\n");
        for ((application, deployment), counts) in all {
            let labels =
                format!("application=\"{}\",deployment=\"{}\"", escaped(application), escaped(deployment));
            lines(&labels, counts).iter().for_each(|line| text.extend([name, line, "\n"]));
        }
    };
    family(
        "ray_serve_deployment_request_counter",
        "counter",
        "Calls that a replica of the deployment had",
        &|labels, it| vec![format!("_total{{{labels}}} {}", it.requests)],
    );
    family(
        "ray_serve_deployment_error_counter",
        "counter",
        "Of them, those without an answer",
        &|labels, it| vec![format!("_total{{{labels}}} {}", it.errors)],
    );
    family(
        "ray_serve_deployment_processing_latency_ms",
        "histogram",
        "From the replica's choice to the end of its answer",
        &latency,
    );
    family(
        "ray_serve_replica_processing_queries",
        "gauge",
        "Calls under way at each replica",
        &|labels, it| {
            let line = |(replica, n): (&u64, &u64)| format!("{{{labels},replica=\"{replica}\"}} {n}");
            it.ongoing.iter().map(line).collect()
        },
    );
    family("ray_serve_deployment_queued_queries", "gauge", "Calls that wait for a replica", &|labels, it| {
        vec![format!("{{{labels}}} {}", it.queued)]
    });
    text
}

fn latency(labels: &str, counts: &CallCounts) -> Vec<String> {
    let bounds = BUCKETS_MS.iter().map(|most| format!("{most:?}")).chain(["+Inf".to_owned()]);
    let mut sum = 0;
    let buckets = bounds.zip(counts.latency).map(|(bound, count)| {
        sum += count;
        format!("_bucket{{{labels},le=\"{bound}\"}} {sum}")
    });
    let mut lines: Vec<String> = buckets.collect();
    lines.push(format!("_sum{{{labels}}} {}", counts.latency_ms));
    lines.push(format!("_count{{{labels}}} {}", counts.requests));
    lines
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_under_rays_names_and_add_up() {
        let mut one = CallCounts { queued: 2, ongoing: BTreeMap::from([(7, 1)]), ..CallCounts::default() };
        one.ended(Duration::from_millis(3), false);
        one.ended(Duration::from_secs(60), true);
        let mut both = one.clone();
        both.add(&one.past());
        let text = render(&[(("a\"b".to_owned(), "it".to_owned()), both)]);
        let of = r#"application="a\"b",deployment="it""#;
        for line in [
            format!("ray_serve_deployment_request_counter_total{{{of}}} 4"),
            format!("ray_serve_deployment_error_counter_total{{{of}}} 2"),
            format!("ray_serve_deployment_processing_latency_ms_bucket{{{of},le=\"2.0\"}} 0"),
            format!("ray_serve_deployment_processing_latency_ms_bucket{{{of},le=\"5.0\"}} 2"),
            format!("ray_serve_deployment_processing_latency_ms_bucket{{{of},le=\"+Inf\"}} 4"),
            format!("ray_serve_deployment_processing_latency_ms_sum{{{of}}} 120006"),
            format!("ray_serve_replica_processing_queries{{{of},replica=\"7\"}} 1"),
            format!("ray_serve_deployment_queued_queries{{{of}}} 2"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
