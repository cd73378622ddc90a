//! What Ray's state API calls our things: columns as Ray 2.60 lays them down, and the words of its states.
//!
//! Pure: a status of the cluster in, rows out. What Heliostat does not know is null, never made up.

use heliostat_runtime::cluster::status::{
    ActorState, ActorStatus, BundleStatus, ClusterStatus, NodeState, NodeStatus, PlacementGroupState,
    PlacementGroupStatus, WorkerStatus,
};
use heliostat_runtime::objects::{ObjectPlace, ObjectStatus};
use heliostat_runtime::spec::{DeathCause, DeviceKind, Lifetime, Owner, Resources, split_name};
use serde_json::{Map, Value as Json, json};

use super::query::{Column, Row, Schema};

const fn column(name: &'static str) -> Column {
    Column { name, filterable: true, detail: false }
}

const fn shown(name: &'static str) -> Column {
    Column { name, filterable: false, detail: false }
}

const fn detail(name: &'static str) -> Column {
    Column { name, filterable: false, detail: true }
}

/// Ray's `ActorState`.
pub(super) const ACTORS: Schema = Schema {
    id: "actor_id",
    columns: &[
        column("actor_id"),
        column("class_name"),
        column("state"),
        column("job_id"),
        column("name"),
        column("node_id"),
        column("pid"),
        column("ray_namespace"),
        detail("serialized_runtime_env"),
        detail("required_resources"),
        detail("death_cause"),
        detail("is_detached"),
        Column { name: "placement_group_id", filterable: true, detail: true },
        Column { name: "repr_name", filterable: true, detail: true },
        detail("num_restarts"),
        detail("num_restarts_due_to_lineage_reconstruction"),
        detail("num_restarts_due_to_node_preemption"),
        detail("call_site"),
        detail("label_selector"),
        detail("fallback_strategy"),
    ],
};

/// Ray's `NodeState`.
pub(super) const NODES: Schema = Schema {
    id: "node_id",
    columns: &[
        column("node_id"),
        column("node_ip"),
        column("is_head_node"),
        column("state"),
        shown("state_message"),
        column("node_name"),
        shown("resources_total"),
        shown("labels"),
        detail("start_time_ms"),
        detail("end_time_ms"),
    ],
};

/// Ray's `WorkerState`.
pub(super) const WORKERS: Schema = Schema {
    id: "worker_id",
    columns: &[
        column("worker_id"),
        column("is_alive"),
        column("worker_type"),
        column("exit_type"),
        column("node_id"),
        column("ip"),
        column("pid"),
        detail("exit_detail"),
        detail("worker_launch_time_ms"),
        detail("worker_launched_time_ms"),
        detail("start_time_ms"),
        detail("end_time_ms"),
        Column { name: "debugger_port", filterable: true, detail: true },
        Column { name: "num_paused_threads", filterable: true, detail: true },
    ],
};

/// Ray's `JobState`.
pub(super) const JOBS: Schema = Schema {
    id: "submission_id",
    columns: &[
        column("job_id"),
        column("submission_id"),
        shown("entrypoint"),
        column("type"),
        column("status"),
        shown("message"),
        shown("error_type"),
        shown("driver_info"),
        detail("start_time"),
        detail("end_time"),
        detail("metadata"),
        detail("runtime_env"),
        detail("driver_agent_http_address"),
        detail("driver_node_id"),
        detail("driver_exit_code"),
    ],
};

/// Ray's `PlacementGroupState`.
pub(super) const PLACEMENT_GROUPS: Schema = Schema {
    id: "placement_group_id",
    columns: &[
        column("placement_group_id"),
        column("name"),
        column("creator_job_id"),
        column("state"),
        detail("bundles"),
        Column { name: "is_detached", filterable: true, detail: true },
        detail("stats"),
        detail("topology_strategy"),
        detail("topology_assignments"),
    ],
};

/// Ray's `ObjectState`.
pub(super) const OBJECTS: Schema = Schema {
    id: "object_id",
    columns: &[
        column("object_id"),
        column("object_size"),
        column("task_status"),
        column("reference_type"),
        column("call_site"),
        column("type"),
        column("pid"),
        column("ip"),
        column("attempt_number"),
    ],
};

/// All objects of the nodes' stores; where each comes from is not recorded.
pub(super) fn objects(objects: &[ObjectStatus]) -> Vec<Row> {
    let kind = |object: &ObjectStatus| match object.state {
        ObjectPlace::Memory | ObjectPlace::Disk => "LOCAL_REFERENCE",
        ObjectPlace::Copy | ObjectPlace::Freed => "PINNED_IN_MEMORY",
    };
    let object = |object: &ObjectStatus| {
        row(json!({
            "object_id": object.object,
            "object_size": object.bytes,
            "reference_type": kind(object),
            "pid": object.owner_pid,
            "ip": object.node,
        }))
    };
    objects.iter().map(object).collect()
}

/// All actors.
pub(super) fn actors(status: &ClusterStatus) -> Vec<Row> {
    status.actors.iter().map(actor).collect()
}

fn actor(actor: &ActorStatus) -> Row {
    // Ray shows a dead actor's cause only, we also know why the one before a living one died.
    let death = match &actor.state {
        ActorState::Dead { cause } => Some(cause),
        ActorState::Pending { .. }
        | ActorState::Starting { .. }
        | ActorState::Ready
        | ActorState::Restarting { .. }
        | ActorState::Stopping => actor.last_death.as_ref(),
    };
    let (namespace, name) = split_name(&actor.name);
    let (detached, job) = match &actor.lifetime {
        Lifetime::Detached | Lifetime::Caller => (true, String::new()),
        Lifetime::Owned(Owner::Driver(driver)) => (false, driver.to_string()),
        Lifetime::Owned(Owner::Actor { .. }) => (false, String::new()),
    };
    let mut row = row(json!({
        "actor_id": actor.name,
        "class_name": actor.type_name,
        "state": actor_state(actor),
        // The driver that owns it; a detached actor has none.
        "job_id": job,
        "name": name,
        "node_id": actor.node,
        "pid": actor.pid.unwrap_or(0),
        "ray_namespace": namespace,
        "repr_name": "",
        "is_detached": detached,
        "num_restarts": actor.restarts,
        "num_restarts_due_to_lineage_reconstruction": 0,
        "num_restarts_due_to_node_preemption": 0,
    }));
    row.insert("death_cause".into(), death.map_or(Json::Null, |cause| death_cause(actor, cause)));
    row
}

fn actor_state(actor: &ActorStatus) -> &'static str {
    match &actor.state {
        ActorState::Pending { .. } | ActorState::Starting { .. } if actor.restarts == 0 => "PENDING_CREATION",
        ActorState::Pending { .. } | ActorState::Starting { .. } | ActorState::Restarting { .. } => {
            "RESTARTING"
        }
        ActorState::Ready | ActorState::Stopping => "ALIVE",
        ActorState::Dead { .. } => "DEAD",
    }
}

/// Ray's `ActorDiedErrorContext`, and beside it the cause as we know it.
fn death_cause(actor: &ActorStatus, cause: &DeathCause) -> Json {
    let reason = match cause.root() {
        DeathCause::NodeLost { .. } => "NODE_DIED",
        DeathCause::Stopped { .. } => "RAY_KILL",
        DeathCause::Finished => "OUT_OF_SCOPE",
        DeathCause::OwnerGone { .. } => "OWNER_DIED",
        DeathCause::Exited { .. }
        | DeathCause::Killed { .. }
        | DeathCause::Vanished { .. }
        | DeathCause::OutOfMemory { .. }
        | DeathCause::Panicked { .. }
        | DeathCause::Hung { .. }
        | DeathCause::GpuFault { .. }
        | DeathCause::SiblingDied { .. }
        | DeathCause::Escalated { .. }
        | DeathCause::CreateFailed { .. }
        | DeathCause::StartFailed { .. }
        | DeathCause::Failed { .. } => "WORKER_DIED",
    };
    let message = match &actor.last_words {
        Some(words) => format!("{cause}\nThe last lines that its process wrote:\n{words}"),
        None => cause.to_string(),
    };
    json!({
        "actor_died_error_context": {
            "reason": reason,
            "error_message": message,
            "actor_id": actor.name,
            "name": actor.name,
            "class_name": actor.type_name,
            "pid": actor.pid.unwrap_or(0),
        },
        "heliostat": cause,
    })
}

/// All nodes.
pub(super) fn nodes(status: &ClusterStatus) -> Vec<Row> {
    let at_head = |node: &&NodeStatus| host(&node.endpoint) == host(&status.head.endpoint);
    // Ray has one head node, where several of ours may be on the head's machine.
    let head = status.nodes.iter().find(at_head).map(|node| node.name.as_str());
    status.nodes.iter().map(|one| node(one, head == Some(one.name.as_str()))).collect()
}

fn node(node: &NodeStatus, is_head: bool) -> Row {
    let (state, message) = match &node.state {
        NodeState::Ready => ("ALIVE", None),
        NodeState::Draining { actors } => {
            ("ALIVE", Some(format!("draining: {actors} actors are still there")))
        }
        NodeState::Drained => ("ALIVE", Some("drained: it takes no actors".to_owned())),
        NodeState::Leaving => ("ALIVE", Some("it ends its workers and leaves".to_owned())),
        NodeState::Unreachable { why } => ("ALIVE", Some(format!("unreachable: {why}"))),
        NodeState::Lost { why } => ("DEAD", Some(why.clone())),
    };
    let gpus = node.devices.iter().filter(|d| matches!(d.device.kind, DeviceKind::Cuda { .. })).count();
    let mut resources = Map::from_iter([("CPU".to_owned(), json!(f64::from(node.cpus)))]);
    if gpus > 0 {
        resources.insert("GPU".to_owned(), json!(gpus as f64));
    }
    if node.memory > 0 {
        resources.insert("memory".to_owned(), json!(node.memory as f64));
    }
    resources.extend(node.resources.iter().map(|(name, amount)| (name.clone(), json!(amount.as_f64()))));
    row(json!({
        "node_id": node.name,
        "node_ip": host(&node.endpoint),
        "is_head_node": is_head,
        "state": state,
        "state_message": message,
        "node_name": node.name,
        "resources_total": resources,
        "labels": node.labels,
    }))
}

/// All worker processes.
pub(super) fn workers(status: &ClusterStatus) -> Vec<Row> {
    let ip = |worker: &WorkerStatus| {
        let node = status.nodes.iter().find(|node| node.name == worker.node);
        node.map_or_else(String::new, |node| host(&node.endpoint).to_owned())
    };
    let of = |worker: &WorkerStatus| {
        row(json!({
            "worker_id": format!("{}-{}", worker.actor, worker.incarnation),
            "is_alive": true,
            "worker_type": "WORKER",
            "node_id": worker.node,
            "ip": ip(worker),
            "pid": worker.pid.unwrap_or(0),
        }))
    };
    status.workers.iter().map(of).collect()
}

/// All placement groups.
pub(super) fn placement_groups(status: &ClusterStatus) -> Vec<Row> {
    status.placement_groups.iter().map(placement_group).collect()
}

fn placement_group(group: &PlacementGroupStatus) -> Row {
    let (state, scheduling, why) = match &group.state {
        PlacementGroupState::Pending { reason } => ("PENDING", "NO_RESOURCES", Some(reason)),
        PlacementGroupState::Prepared { reason } => ("PREPARED", "SCHEDULING_STARTED", Some(reason)),
        PlacementGroupState::Created => ("CREATED", "FINISHED", None),
        PlacementGroupState::Rescheduling { reason } => ("RESCHEDULING", "NO_RESOURCES", Some(reason)),
    };
    let bundle = |bundle: &BundleStatus| {
        json!({
            "bundle_id": {"placement_group_id": group.name, "bundle_index": bundle.index},
            "unit_resources": resources(&bundle.resources),
            "node_id": bundle.node,
        })
    };
    row(json!({
        "placement_group_id": group.name,
        "name": group.name,
        "creator_job_id": "",
        "state": state,
        "bundles": group.bundles.iter().map(bundle).collect::<Vec<_>>(),
        "is_detached": true,
        // Ray says how the last attempt went; we say why as well.
        "stats": {"scheduling_state": scheduling, "reason": why},
        "topology_strategy": group.topology.iter().map(|key| (key.clone(), json!("STRICT_PACK"))).collect::<Row>(),
        "topology_assignments": {},
    }))
}

/// Amounts under Ray's names; what is not asked for is left out.
fn resources(of: &Resources) -> Row {
    let mut named = Row::new();
    let amounts = [("CPU", of.cpus.as_f64()), ("GPU", f64::from(of.devices)), ("memory", of.memory as f64)];
    let custom = of.custom.iter().map(|(name, amount)| (name.as_str(), amount.as_f64()));
    for (name, amount) in amounts.into_iter().chain(custom).filter(|(_, amount)| *amount > 0.0) {
        named.insert(name.to_owned(), json!(amount));
    }
    named
}

/// Actors by class and state, as Ray's `ActorSummaries`.
pub(super) fn actor_summary(rows: &[Row]) -> Json {
    let mut classes: Map<String, Json> = Map::new();
    for row in rows {
        let word = |key: &str| row.get(key).and_then(Json::as_str).unwrap_or_default();
        let (class, state) = (word("class_name"), word("state"));
        let entry = classes.entry(class).or_insert_with(|| json!({"class_name": class, "state_counts": {}}));
        let count = entry["state_counts"][state].as_u64().unwrap_or(0);
        entry["state_counts"][state] = json!(count + 1);
    }
    json!({"cluster": {"summary": classes, "total_actors": rows.len(), "summary_by": "class"}})
}

/// The object of a `json!` literal.
pub(super) fn row(value: Json) -> Row {
    match value {
        Json::Object(row) => row,
        other => Row::from_iter([("value".to_owned(), other)]),
    }
}

/// The host of HOST:PORT.
fn host(endpoint: &str) -> &str {
    let host = endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}
