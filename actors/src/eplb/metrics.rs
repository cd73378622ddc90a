//! What `/metrics` shows of load balancing. The ingress serves it, and asks the EPLB actor now and then.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::EplbStatus;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Over {
    layers: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct End {
    end: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

/// The figures.
#[derive(Clone, Default)]
pub(crate) struct EplbMetrics {
    balancedness: Family<Over, Gauge<f64, AtomicU64>>,
    remaps: Family<End, Counter>,
    experts: Family<Path, Counter>,
    bytes: Family<Path, Counter>,
}

impl EplbMetrics {
    /// Figures that `registry` shows.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let name = |name: &str| format!("heliostat:eplb_{name}");
        registry.register(
            name("balancedness"),
            "Mean load of the EP ranks over the largest",
            metrics.balancedness.clone(),
        );
        registry.register(name("remaps"), "Remaps that have ended", metrics.remaps.clone());
        registry.register(
            name("moved_experts"),
            "Experts that remaps brought to a rank, by their way",
            metrics.experts.clone(),
        );
        registry.register(
            name("moved_bytes"),
            "Bytes of experts that remaps brought to a rank, by their way",
            metrics.bytes.clone(),
        );
        metrics
    }

    /// Takes in what the EPLB actor says.
    pub(crate) fn report(&self, status: &EplbStatus) {
        let balancedness = &status.balancedness;
        for (layers, value) in
            [("min", balancedness.min), ("p50", balancedness.p50), ("avg", balancedness.avg)]
        {
            self.balancedness.get_or_create(&Over { layers }).set(value);
        }
        let totals = &status.totals;
        for (end, count) in [("committed", totals.committed), ("rolled_back", totals.rolled_back)] {
            set(&self.remaps.get_or_create(&End { end }), count);
        }
        for (path, carried) in totals.moved.paths() {
            set(&self.experts.get_or_create(&Path { path }), carried.experts);
            set(&self.bytes.get_or_create(&Path { path }), carried.bytes);
        }
    }
}

/// An actor that restarts counts from zero, which Prometheus takes for what it is.
fn set(counter: &Counter, count: u64) {
    counter.inner().store(count, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;
    use crate::eplb::{Balancedness, Totals};
    use crate::messages::{Carried, Moved};

    #[test]
    fn bytes_are_counted_by_their_way() {
        let mut registry = Registry::default();
        let metrics = EplbMetrics::new(&mut registry);
        let moved = Moved { nvlink: Carried { experts: 2, bytes: 88 }, ..Moved::default() };
        let totals = Totals { committed: 3, rolled_back: 1, moved };
        let balancedness = Balancedness::of([0.5, 0.75]);
        metrics.report(&EplbStatus { totals, balancedness, ..EplbStatus::default() });
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            r#"heliostat:eplb_balancedness{layers="min"} 0.5"#,
            r#"heliostat:eplb_remaps_total{end="committed"} 3"#,
            r#"heliostat:eplb_remaps_total{end="rolled_back"} 1"#,
            r#"heliostat:eplb_moved_experts_total{path="nvlink"} 2"#,
            r#"heliostat:eplb_moved_bytes_total{path="nvlink"} 88"#,
            r#"heliostat:eplb_moved_bytes_total{path="host"} 0"#,
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} is not in\n{text}");
        }
    }
}
