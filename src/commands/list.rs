//! `helio list|get|summary`: the cluster as tables, one thing of it, and counts.
//!
//! Facts come from the head, jobs from the jobs actor, objects from the nodes' stores; filters are the state API's.

use super::{print, print_json};
use crate::args::{Get, Kind, List, Summary, Target};
use crate::cluster::{self, Access};
use crate::failure::{FAILED, Failure, USAGE};
use crate::show;
use anyhow::{Context, Result};
use heliostat_actors::deployment::JOBS;
use heliostat_actors::jobs::{JobsActor, ListJobs};
use heliostat_actors::state::query::{self, Filter, Row};
use heliostat_runtime::cluster::status::{
    ActorState, ActorStatus, ClusterStatus, GroupStatus, NodeStatus, PlacementGroupStatus, WorkerStatus,
};
use heliostat_runtime::objects::ObjectStatus;
use serde::Serialize;
use serde_json::Value as Json;

/// Lists one kind of thing.
pub(crate) async fn list(args: &List) -> Result<()> {
    let mut found = Found::fetch(args.what, &args.target).await?;
    found.keep(&args.filters)?;
    if args.json { found.print_json() } else { print(&found.table()) }
}

/// Shows one thing.
pub(crate) async fn get(args: &Get) -> Result<()> {
    let found = Found::fetch(args.what, &args.target).await?;
    let id = id_of(args.what);
    let kind = kind_name(args.what);
    let named = |row: &&Row| row.get(id).and_then(Json::as_str) == Some(&args.name);
    let Some(row) = found.rows.iter().find(named) else {
        let why = format!("there is no {id} {:?} among the {kind}; see helio list {kind}", args.name);
        return Err(Failure::error(FAILED, why));
    };
    if args.json {
        return print_json(row);
    }
    print(&show::record(row))?;
    match &found.things {
        Things::Actors(actors, _) => print(&died(actors, &args.name)),
        _ => Ok(()),
    }
}

/// How the actor, or the incarnation before this one, ended, in a sentence; nothing if none did.
fn died(actors: &[ActorStatus], name: &str) -> String {
    let actor = actors.iter().find(|actor| actor.name == name);
    let cause = actor.and_then(|actor| match &actor.state {
        ActorState::Dead { cause } => Some(cause),
        _ => actor.last_death.as_ref(),
    });
    cause.map_or(String::new(), |cause| format!("\nit died: {cause}\n"))
}

/// Counts things by their states.
pub(crate) async fn summary(args: &Summary) -> Result<()> {
    let mut found = Found::fetch(args.what, &args.target).await?;
    found.keep(&args.filters)?;
    let (by, state) = counted_by(args.what);
    let counts = query::count(&found.rows, by, state);
    if args.json {
        return print_json(&serde_json::json!({"total": found.rows.len(), "by": by, "counts": counts}));
    }
    print(&show::counts(by, &counts))
}

/// Name of a kind on the command line.
fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Nodes => "nodes",
        Kind::Workers => "workers",
        Kind::Actors => "actors",
        Kind::Groups => "groups",
        Kind::PlacementGroups => "placement-groups",
        Kind::Jobs => "jobs",
        Kind::Objects => "objects",
    }
}

/// What tells one from another.
fn id_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Nodes | Kind::Actors | Kind::Groups | Kind::PlacementGroups => "name",
        Kind::Workers => "actor",
        Kind::Jobs => "submission_id",
        Kind::Objects => "object",
    }
}

/// By what they are counted, and their state.
fn counted_by(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::Nodes => ("cpus", "state"),
        Kind::Workers => ("node", "state"),
        Kind::Actors => ("type_name", "state"),
        Kind::Groups => ("name", "complete"),
        Kind::PlacementGroups => ("strategy", "state"),
        Kind::Jobs => ("type", "status"),
        Kind::Objects => ("node", "state"),
    }
}

/// Things of one kind, typed for tables.
enum Things {
    Nodes(Vec<NodeStatus>),
    Workers(Vec<WorkerStatus>),
    /// With the nodes that say what their devices are.
    Actors(Vec<ActorStatus>, Vec<NodeStatus>),
    Groups(Vec<GroupStatus>),
    PlacementGroups(Vec<PlacementGroupStatus>),
    Jobs(Vec<Json>),
    Objects(Vec<ObjectStatus>),
}

/// Things, and each as a row.
struct Found {
    things: Things,
    rows: Vec<Row>,
}

impl Found {
    async fn fetch(kind: Kind, target: &Target) -> Result<Self> {
        let access = Access::find(target)?;
        let status = async || -> Result<ClusterStatus> { cluster::status(&access).await };
        Ok(match kind {
            Kind::Nodes => of(status().await?.nodes, Things::Nodes),
            Kind::Workers => of(status().await?.workers, Things::Workers),
            Kind::Groups => of(status().await?.groups, Things::Groups),
            Kind::PlacementGroups => of(status().await?.placement_groups, Things::PlacementGroups),
            Kind::Actors => {
                let status = status().await?;
                of(status.actors, |actors| Things::Actors(actors, status.nodes))
            }
            Kind::Jobs => of(jobs(&access).await?, Things::Jobs),
            Kind::Objects => of(objects(&access).await?, Things::Objects),
        })
    }

    fn keep(&mut self, filters: &[Filter]) -> Result<()> {
        let chosen = query::choose(&self.rows, filters)
            .map_err(|why| Failure::error(USAGE, format!("--filter: {why}")))?;
        fn only<T>(things: &mut Vec<T>, chosen: &[bool]) {
            let mut chosen = chosen.iter().copied();
            things.retain(|_| chosen.next().unwrap_or(false));
        }
        only(&mut self.rows, &chosen);
        match &mut self.things {
            Things::Nodes(nodes) => only(nodes, &chosen),
            Things::Workers(workers) => only(workers, &chosen),
            Things::Actors(actors, _) => only(actors, &chosen),
            Things::Groups(groups) => only(groups, &chosen),
            Things::PlacementGroups(groups) => only(groups, &chosen),
            Things::Jobs(jobs) => only(jobs, &chosen),
            Things::Objects(objects) => only(objects, &chosen),
        }
        Ok(())
    }

    fn print_json(&self) -> Result<()> {
        match &self.things {
            Things::Nodes(nodes) => print_json(nodes),
            Things::Workers(workers) => print_json(workers),
            Things::Actors(actors, _) => print_json(actors),
            Things::Groups(groups) => print_json(groups),
            Things::PlacementGroups(groups) => print_json(groups),
            Things::Jobs(jobs) => print_json(jobs),
            Things::Objects(objects) => print_json(objects),
        }
    }

    fn table(&self) -> String {
        match &self.things {
            Things::Nodes(nodes) => show::cluster::nodes(nodes),
            Things::Workers(workers) => show::cluster::workers(workers),
            Things::Actors(actors, nodes) => show::cluster::actors(actors, nodes),
            Things::Groups(groups) => show::cluster::groups(groups),
            Things::PlacementGroups(groups) => show::cluster::placement_groups(groups),
            Things::Jobs(jobs) => show::job::list(&Json::Array(jobs.clone())),
            Things::Objects(objects) => show::cluster::objects(objects),
        }
    }
}

fn of<T: Serialize>(things: Vec<T>, wrap: impl FnOnce(Vec<T>) -> Things) -> Found {
    let row = |thing: &T| match serde_json::to_value(thing) {
        Ok(Json::Object(row)) => row,
        Ok(_) | Err(_) => Row::new(),
    };
    Found { rows: things.iter().map(row).collect(), things: wrap(things) }
}

/// What is in the object stores of the nodes.
async fn objects(access: &Access) -> Result<Vec<ObjectStatus>> {
    let stores = access.connect().await?.object_stores().await?;
    Ok(stores.into_iter().flat_map(|store| store.objects).collect())
}

/// All jobs, from the jobs actor itself.
async fn jobs(access: &Access) -> Result<Vec<Json>> {
    let cluster = access.connect().await?;
    let actor = cluster.handle::<JobsActor>(JOBS).await;
    let actor = actor.context("the jobs actor cannot be asked (helio list actors shows its state)")?;
    let jobs = actor.ask(ListJobs).await.context("the jobs actor does not answer")?;
    serde_json::from_str(&jobs).context("the jobs actor's answer")
}
