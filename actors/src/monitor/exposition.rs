//! The cluster in Prometheus' OpenMetrics text, for `/metrics` of the dashboard: Ray's names where it has one.
//!
//! Pure: what was seen in, text out. Requests and engines are counted by each ingress, at its own `/metrics`.

use std::collections::BTreeMap;
use std::fmt::Write;

use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState, PlacementGroupState};

use super::watcher::Seen;

/// The text. Empty families stand there as well, so that a dashboard can tell nothing from unknown.
pub(super) fn render(seen: &Seen) -> String {
    let mut text = Text(String::new());
    if let Some(status) = &seen.status {
        cluster(&mut text, status);
    }
    text.family("heliostat:map_epoch", "gauge", "Epoch of the last remap of which a layer was committed");
    for (name, pulse) in pulses(seen) {
        text.line("heliostat:map_epoch", &[("eplb", name)], pulse.map_epoch as f64);
    }
    text.family("heliostat:membership_epoch", "gauge", "Membership epoch of the group");
    for (name, pulse) in pulses(seen) {
        text.line("heliostat:membership_epoch", &[("eplb", name)], pulse.membership_epoch as f64);
    }
    text.family("heliostat:ranks_ready", "gauge", "Ranks of the group that are connected");
    for (name, pulse) in pulses(seen) {
        text.line("heliostat:ranks_ready", &[("eplb", name)], f64::from(pulse.ready));
    }
    text.family("heliostat:balancedness", "gauge", "Mean load of a rank by that of the fullest, over layers");
    for (name, pulse) in pulses(seen) {
        let b = pulse.balancedness;
        for (stat, value) in [("min", b.min), ("p50", b.p50), ("avg", b.avg), ("max", b.max)] {
            text.line("heliostat:balancedness", &[("eplb", name), ("stat", stat)], value);
        }
    }
    text.family("heliostat:remaps", "counter", "Remaps that ended");
    for (name, pulse) in pulses(seen) {
        for (end, count) in [("committed", pulse.committed), ("rolled_back", pulse.rolled_back)] {
            text.line("heliostat:remaps_total", &[("eplb", name), ("end", end)], count as f64);
        }
    }
    text.0.push_str("# EOF\n");
    text.0
}

fn pulses(seen: &Seen) -> impl Iterator<Item = (&str, &crate::eplb::EplbPulse)> {
    seen.balances.iter().filter_map(|(name, balance)| Some((name.as_str(), balance.pulse()?)))
}

fn cluster(text: &mut Text, status: &ClusterStatus) {
    text.family("ray_cluster_active_nodes", "gauge", "Nodes that report");
    let is_lost = |state: &NodeState| matches!(state, NodeState::Unreachable { .. } | NodeState::Lost { .. });
    let lost = status.nodes.iter().filter(|node| is_lost(&node.state)).count();
    text.line("ray_cluster_active_nodes", &[("node_type", "node")], (status.nodes.len() - lost) as f64);
    text.family("ray_cluster_failed_nodes", "gauge", "Nodes that are silent or lost");
    text.line("ray_cluster_failed_nodes", &[("node_type", "node")], lost as f64);

    text.family("ray_actors", "gauge", "Actors by type and state");
    let mut actors: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for actor in &status.actors {
        *actors.entry((&actor.type_name, actor_state(&actor.state))).or_default() += 1;
    }
    for ((name, state), count) in actors {
        text.line("ray_actors", &[("Name", name), ("State", state)], count as f64);
    }
    text.family("ray_placement_groups", "gauge", "Placement groups by state");
    let mut groups: BTreeMap<&str, u64> = BTreeMap::new();
    for group in &status.placement_groups {
        *groups.entry(group_state(&group.state)).or_default() += 1;
    }
    for (state, count) in groups {
        text.line("ray_placement_groups", &[("State", state)], count as f64);
    }
    text.family("heliostat:actor_restarts", "counter", "Restarts of each actor");
    for actor in &status.actors {
        text.line("heliostat:actor_restarts_total", &[("actor", &actor.name)], actor.restarts as f64);
    }
    text.family("heliostat:devices", "gauge", "Devices by node and whether an actor owns them");
    for node in &status.nodes {
        let used = node.devices.iter().filter(|device| device.owner.is_some()).count();
        for (state, count) in [("used", used), ("free", node.devices.len() - used)] {
            text.line("heliostat:devices", &[("node", &node.name), ("state", state)], count as f64);
        }
    }
}

/// Ray's word.
fn actor_state(state: &ActorState) -> &'static str {
    match state {
        ActorState::Pending { .. } => "PENDING_CREATION",
        ActorState::Starting { .. } => "PENDING_CREATION",
        ActorState::Ready | ActorState::Stopping => "ALIVE",
        ActorState::Restarting { .. } => "RESTARTING",
        ActorState::Dead { .. } => "DEAD",
    }
}

fn group_state(state: &PlacementGroupState) -> &'static str {
    match state {
        PlacementGroupState::Pending { .. } => "PENDING",
        PlacementGroupState::Prepared { .. } => "PREPARED",
        PlacementGroupState::Created => "CREATED",
        PlacementGroupState::Rescheduling { .. } => "RESCHEDULING",
    }
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}.\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.0, "{name}{{{}}} {value}", labels.join(","));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eplb::EplbPulse;

    #[test]
    fn every_family_is_declared_before_its_lines() {
        let mut seen = Seen::default();
        let pulse = EplbPulse { map_epoch: 3, committed: 2, ..EplbPulse::default() };
        seen.balances.entry("a\"b".to_owned()).or_default().push(1, pulse);
        let text = render(&seen);
        for line in [
            r#"heliostat:map_epoch{eplb="a\"b"} 3"#,
            r#"heliostat:remaps_total{eplb="a\"b",end="committed"} 2"#,
            "# TYPE heliostat:remaps counter",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
