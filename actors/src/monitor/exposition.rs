//! The cluster in Prometheus' OpenMetrics text, for `/metrics` of the dashboard: Ray's names where it has one.
//!
//! Pure: what was seen in, text out. Requests and engines are counted by each ingress, at its own `/metrics`; only calls
//! between replicas are told here.

use std::collections::BTreeMap;
use std::fmt::Write;

use heliostat_runtime::cluster::status::{ActorState, ClusterStatus, NodeState, PlacementGroupState};

use super::watcher::Seen;
use crate::deployment::group_of_eplb;
use crate::eplb::EplbPulse;
use crate::serve::calls::counts;

/// The text. Empty families stand there as well, so that a dashboard can tell nothing from unknown.
pub(super) fn render(seen: &Seen) -> String {
    let mut text = Text(String::new());
    if let Some(status) = &seen.status {
        cluster(&mut text, status);
    }
    balances(&mut text, seen);
    text.0.push_str(&counts::render(&seen.calls));
    text.0.push_str("# EOF\n");
    text.0
}

/// The EPLB actor of every replica of every deployment, each figure with the actor and its group of ranks.
fn balances(text: &mut Text, seen: &Seen) {
    let pulses: Vec<(&str, String, &EplbPulse)> = seen
        .balances
        .iter()
        .filter_map(|(name, balance)| Some((name.as_str(), group_of_eplb(name), balance.pulse()?)))
        .collect();
    let mut family = |(name, kind, help), values: &dyn Fn(&EplbPulse) -> Vec<Sample>| {
        text.family(name, kind, help);
        let sample = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        for (eplb, group, pulse) in &pulses {
            for (label, value) in values(pulse) {
                let labels = [("eplb", *eplb), ("group", group)].into_iter().chain(label);
                text.line(&sample, &labels.collect::<Vec<_>>(), value);
            }
        }
    };
    let map_epoch = "Epoch of the last remap of which a layer was committed";
    family(("heliostat:map_epoch", "gauge", map_epoch), &|p| vec![(None, p.map_epoch as f64)]);
    let membership = "Membership epoch of the group";
    family(("heliostat:membership_epoch", "gauge", membership), &|p| vec![(None, p.membership_epoch as f64)]);
    let ready = "Ranks of the group that are connected";
    family(("heliostat:ranks_ready", "gauge", ready), &|p| vec![(None, f64::from(p.ready))]);
    let balancedness = "Mean load of a rank by that of the fullest, over layers";
    family(("heliostat:balancedness", "gauge", balancedness), &|p| {
        let b = p.balancedness;
        let stats = [("min", b.min), ("p50", b.p50), ("avg", b.avg), ("max", b.max)];
        stats.map(|(stat, value)| (Some(("stat", stat)), value)).to_vec()
    });
    family(("heliostat:remaps", "counter", "Remaps that ended"), &|p| {
        let ends = [("committed", p.committed), ("rolled_back", p.rolled_back)];
        ends.map(|(end, count)| (Some(("end", end)), count as f64)).to_vec()
    });
    let experts = "Experts that remaps brought to a rank, by their way";
    family(("heliostat:moved_experts", "counter", experts), &|p| {
        p.moved.paths().map(|(path, carried)| (Some(("path", path)), carried.experts as f64)).to_vec()
    });
    let bytes = "Bytes of experts that remaps brought to a rank, by their way";
    family(("heliostat:moved_bytes", "counter", bytes), &|p| {
        p.moved.paths().map(|(path, carried)| (Some(("path", path)), carried.bytes as f64)).to_vec()
    });
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

/// A value, with the name and value of a further label.
type Sample = (Option<(&'static str, &'static str)>, f64);

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
    use crate::messages::{Carried, Moved};

    #[test]
    fn every_family_is_declared_before_its_lines() {
        let mut seen = Seen::default();
        let pulse = EplbPulse { map_epoch: 3, committed: 2, ..EplbPulse::default() };
        seen.balances.entry("a\"b".to_owned()).or_default().push(1, pulse);
        let text = render(&seen);
        for line in [
            r#"heliostat:map_epoch{eplb="a\"b",group="ep"} 3"#,
            r#"heliostat:remaps_total{eplb="a\"b",group="ep",end="committed"} 2"#,
            "# TYPE heliostat:remaps counter",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_replica_has_figures_of_its_own_and_each_family_stands_once() {
        let mut seen = Seen::default();
        let moved = Moved { nvlink: Carried { experts: 2, bytes: 88 }, ..Moved::default() };
        for (name, map_epoch) in [("serve/chat-1.eplb", 1), ("serve/chat-2.eplb", 2)] {
            let pulse = EplbPulse { map_epoch, moved, ..EplbPulse::default() };
            seen.balances.entry(name.to_owned()).or_default().push(1, pulse);
        }
        let text = render(&seen);
        for line in [
            r#"heliostat:map_epoch{eplb="serve/chat-1.eplb",group="serve.chat-1"} 1"#,
            r#"heliostat:map_epoch{eplb="serve/chat-2.eplb",group="serve.chat-2"} 2"#,
            r#"heliostat:moved_experts_total{eplb="serve/chat-2.eplb",group="serve.chat-2",path="nvlink"} 2"#,
            r#"heliostat:moved_bytes_total{eplb="serve/chat-1.eplb",group="serve.chat-1",path="nvlink"} 88"#,
            r#"heliostat:moved_bytes_total{eplb="serve/chat-1.eplb",group="serve.chat-1",path="host"} 0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let declared: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let once: std::collections::BTreeSet<&&str> = declared.iter().collect();
        assert_eq!(once.len(), declared.len(), "{text}");
        assert!(!text.contains("eplb_"), "one set of names:\n{text}");
    }
}
