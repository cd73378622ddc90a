//! `helio status` and `helio list` as text.

use super::{Terminal, or_dash, render, seconds, table};
use heliostat_runtime::cluster::status::{
    ActorState, ActorStatus, ClusterStatus, GroupStatus, NodeState, NodeStatus, PlacementGroupState,
    PlacementGroupStatus, WorkerStatus,
};
use heliostat_runtime::objects::ObjectStatus;
use heliostat_runtime::spec::{Device, DeviceKind, HOST_LABEL, Labels, NODE_LABEL, Resources};
use std::collections::BTreeSet;
use std::fmt::Write;

/// The whole cluster on one screen.
pub(crate) fn status(status: &ClusterStatus, terminal: Terminal) -> String {
    let head = &status.head;
    let ready = status.actors.iter().filter(|a| a.state == ActorState::Ready).count();
    let mut text = String::new();
    let state = match (head.closing, head.recovering, ready == status.actors.len()) {
        (true, ..) => terminal.style("33", "stopping"),
        (_, true, _) => terminal.style("33", "recovering"),
        (.., true) => terminal.style("32", "ready"),
        (.., false) => terminal.style("33", "not ready"),
    };
    let _ = writeln!(
        text,
        "{state}: {ready} of {} actors; head {} (pid {}, up {}, term {})",
        status.actors.len(),
        head.endpoint,
        head.pid,
        seconds(head.uptime_s),
        head.term
    );
    if head.heads.len() > 1 {
        let others: Vec<&str> =
            head.heads.iter().filter(|at| **at != head.endpoint).map(String::as_str).collect();
        let _ = writeln!(text, "other heads: {}", others.join(", "));
    }
    let store = &status.state_store;
    match &store.error {
        None => drop(writeln!(text, "state store: {}", store.kind)),
        Some(error) => {
            let _ = writeln!(
                text,
                "state store: {} {}: {error}; the head goes on from memory, {} writes wait",
                store.kind,
                terminal.style("31", "fails"),
                store.queued
            );
        }
    }
    for group in &status.groups {
        let whole = if group.complete { "complete" } else { "incomplete" };
        let _ = writeln!(
            text,
            "group {}: {whole}, {} ranks, epoch {}",
            group.name,
            group.members.len(),
            group.epoch
        );
    }
    for group in &status.placement_groups {
        let _ = writeln!(
            text,
            "placement group {}: {}, {} bundles",
            group.name,
            placement_group_state(&group.state),
            group.bundles.len()
        );
    }
    let _ = write!(text, "\n{}\n{}", nodes(&status.nodes), actors(&status.actors, &status.nodes));
    text
}

/// A state in a few words.
pub(crate) fn placement_group_state(state: &PlacementGroupState) -> String {
    match state {
        PlacementGroupState::Pending { reason } => format!("pending: {reason}"),
        PlacementGroupState::Prepared { reason } => format!("prepared: {reason}"),
        PlacementGroupState::Created => "created".into(),
        PlacementGroupState::Rescheduling { reason } => format!("rescheduling: {reason}"),
    }
}

/// One line per node.
pub(crate) fn nodes(nodes: &[NodeStatus]) -> String {
    let mut table =
        table(["node", "state", "devices", "in use", "cpus", "reserved", "labels", "pid", "endpoint"]);
    for node in nodes {
        let used = node.devices.iter().filter(|d| d.owner.is_some()).count();
        table.add_row([
            node.name.clone(),
            node_state(&node.state),
            devices(node.devices.iter().map(|d| &d.device)),
            used.to_string(),
            node.cpus.to_string(),
            if node.used == Resources::default() { "-".into() } else { node.used.to_string() },
            labels(&node.labels),
            node.pid.to_string(),
            node.endpoint.clone(),
        ]);
    }
    render(&table)
}

/// Those that somebody set.
fn labels(labels: &Labels) -> String {
    let own = |key: &str| key == NODE_LABEL || key == HOST_LABEL;
    let set = labels.iter().filter(|(key, _)| !own(key)).map(|(key, value)| format!("{key}={value}"));
    let set: Vec<String> = set.collect();
    if set.is_empty() { "-".into() } else { set.join(", ") }
}

/// One line per worker process.
pub(crate) fn workers(workers: &[WorkerStatus]) -> String {
    let mut table = table(["worker of", "state", "node", "pid", "incarnation"]);
    for worker in workers {
        table.add_row([
            worker.actor.clone(),
            word(&worker.state),
            worker.node.clone(),
            or_dash(worker.pid),
            worker.incarnation.to_string(),
        ]);
    }
    render(&table)
}

/// One line per object of a store.
pub(crate) fn objects(objects: &[ObjectStatus]) -> String {
    let mut table = table(["object", "state", "node", "bytes", "owner", "readers"]);
    for object in objects {
        let readers: Vec<String> = object.readers.iter().map(ToString::to_string).collect();
        table.add_row([
            object.object.clone(),
            word(&object.state),
            object.node.clone(),
            object.bytes.to_string(),
            or_dash(object.owner_pid),
            readers.join(", "),
        ]);
    }
    render(&table)
}

/// One line per actor; `nodes` say what their devices are.
pub(crate) fn actors(actors: &[ActorStatus], nodes: &[NodeStatus]) -> String {
    let mut table = table(["actor", "type", "state", "node", "device", "pid", "restarts", "last death"]);
    for actor in actors {
        table.add_row([
            actor.name.clone(),
            actor.type_name.clone(),
            actor_state(&actor.state),
            or_dash(actor.node.as_ref()),
            or_dash(device(actor, nodes)),
            or_dash(actor.pid),
            actor.restarts.to_string(),
            or_dash(actor.last_death.as_ref()),
        ]);
    }
    render(&table)
}

/// One line per placement group.
pub(crate) fn placement_groups(groups: &[PlacementGroupStatus]) -> String {
    let mut table = table(["placement group", "strategy", "bundles", "nodes", "state"]);
    for group in groups {
        let nodes: BTreeSet<&str> =
            group.bundles.iter().filter_map(|bundle| bundle.node.as_deref()).collect();
        table.add_row([
            group.name.clone(),
            word(&group.strategy),
            group.bundles.len().to_string(),
            nodes.into_iter().collect::<Vec<_>>().join(","),
            placement_group_state(&group.state),
        ]);
    }
    render(&table)
}

/// One line per group of ranks.
pub(crate) fn groups(groups: &[GroupStatus]) -> String {
    let mut table = table(["group", "state", "ranks", "epoch"]);
    for group in groups {
        let whole = if group.complete { "complete" } else { "incomplete" };
        table.add_row([
            group.name.clone(),
            whole.to_owned(),
            group.members.len().to_string(),
            group.epoch.to_string(),
        ]);
    }
    render(&table)
}

/// A state in a few words.
pub(crate) fn actor_state(state: &ActorState) -> String {
    match state {
        ActorState::Pending { reason } => format!("pending: {reason}"),
        ActorState::Starting { progress } if progress.phase.is_empty() => "starting".into(),
        ActorState::Starting { progress } if progress.total == 0 => format!("starting: {}", progress.phase),
        ActorState::Starting { progress } => {
            let percent = progress.done.saturating_mul(100) / progress.total;
            format!("starting: {} {percent}%", progress.phase)
        }
        ActorState::Ready => "ready".into(),
        ActorState::Restarting { attempt, in_ms } => format!("restarting in {in_ms} ms (attempt {attempt})"),
        ActorState::Stopping => "stopping".into(),
        ActorState::Dead { .. } => "dead".into(),
    }
}

fn node_state(state: &NodeState) -> String {
    match state {
        NodeState::Ready => "ready".into(),
        NodeState::Draining { actors: 1 } => "draining: 1 actor left".into(),
        NodeState::Draining { actors } => format!("draining: {actors} actors left"),
        NodeState::Drained => "drained".into(),
        NodeState::Leaving => "leaving".into(),
        NodeState::Unreachable { why } => format!("unreachable: {why}"),
        NodeState::Lost { why } => format!("lost: {why}"),
    }
}

/// The device of an actor as "0" or "cuda:1": its index on the node, or the GPU's ordinal.
fn device(actor: &ActorStatus, nodes: &[NodeStatus]) -> Option<String> {
    let index = actor.device?;
    let node = nodes.iter().find(|node| Some(&node.name) == actor.node.as_ref());
    let device = node.and_then(|node| node.devices.iter().find(|d| d.device.index == index));
    Some(match device.map(|d| &d.device.kind) {
        Some(DeviceKind::Cuda { ordinal }) => format!("cuda:{ordinal}"),
        Some(DeviceKind::Cpu { .. }) | None => index.to_string(),
    })
}

/// "4 cpu (2 threads each)" or "2 cuda (GPUs 0, 1)".
fn devices<'d>(devices: impl Iterator<Item = &'d Device>) -> String {
    let (mut cpu, mut cuda, mut threads) = (0, 0, 0);
    let mut ordinals = BTreeSet::new();
    for device in devices {
        match device.kind {
            DeviceKind::Cpu { threads: n } => (cpu, threads) = (cpu + 1, n),
            DeviceKind::Cuda { ordinal } => {
                cuda += 1;
                ordinals.insert(ordinal);
            }
        }
    }
    let cpu = (cpu > 0)
        .then(|| format!("{cpu} cpu ({threads} thread{} each)", if threads == 1 { "" } else { "s" }));
    let gpus = ordinals.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let cuda =
        (cuda > 0).then(|| format!("{cuda} cuda (GPU{} {gpus})", if ordinals.len() == 1 { "" } else { "s" }));
    let all: Vec<String> = cpu.into_iter().chain(cuda).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

/// A unit variant as serde spells it.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use heliostat_runtime::cluster::status::{HeadStatus, StoreHealth};
    use heliostat_runtime::handle::Incarnation;
    use heliostat_runtime::spec::DeathCause;

    #[test]
    fn devices_are_counted_by_kind() {
        let cpu = [Device::cpu(0, 2), Device::cpu(1, 2)];
        assert_eq!(devices(cpu.iter()), "2 cpu (2 threads each)");
        let cuda = [Device::cuda(0, 4), Device::cuda(1, 5), Device::cuda(2, 4)];
        assert_eq!(devices(cuda.iter()), "3 cuda (GPUs 4, 5)");
        assert_eq!(devices(cuda[..1].iter()), "1 cuda (GPU 4)");
        assert_eq!(devices([].iter()), "none");
    }

    #[test]
    fn a_cluster_in_trouble_says_which() {
        let actor = ActorStatus {
            restarts: 2,
            last_death: Some(DeathCause::Killed { signal: 9 }),
            incarnation: Incarnation(7),
            group: Some("ep".into()),
            rank: Some(0),
            node: Some("node-0".into()),
            device: Some(0),
            ..ActorStatus::new("rank-0", "rank", ActorState::Restarting { attempt: 2, in_ms: 100 })
        };
        let head = HeadStatus {
            endpoint: "127.0.0.1:6379".into(),
            pid: 1,
            uptime_s: 61,
            closing: false,
            recovering: false,
            term: 1,
            heads: vec![],
        };
        let store = StoreHealth { kind: "etcd".into(), queued: 3, error: Some("connection refused".into()) };
        let cluster = ClusterStatus {
            version: 1,
            head,
            nodes: vec![],
            workers: vec![],
            actors: vec![actor],
            groups: vec![],
            placement_groups: vec![],
            supervisors: vec![],
            drivers: vec![],
            state_store: store,
        };
        let text = status(&cluster, Terminal { colour: false, width: 100 });
        assert!(
            text.starts_with("not ready: 0 of 1 actors; head 127.0.0.1:6379 (pid 1, up 1 min 1 s, term 1)\n"),
            "{text}"
        );
        assert!(text.contains(
            "state store: etcd fails: connection refused; the head goes on from memory, 3 writes wait"
        ));
        assert!(text.contains("rank-0") && text.contains("restarting in 100 ms (attempt 2)"), "{text}");
        assert!(text.contains("signal 9 (SIGKILL"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }
}
