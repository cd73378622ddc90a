//! Follows a starting cluster: the head's status -> rows of progress, and whether it serves or has failed.
//!
//! `see` is pure; `Watch` asks the head again and again.

use super::report::{Row, RowState};
use crate::cluster::Access;
use crate::commands::serve;
use crate::deploy::APPLICATION;
use heliostat_actors::deployment::SERVE;
use heliostat_actors::ingress_actor::IngressActor;
use heliostat_actors::messages::AwaitServing;
use heliostat_runtime::actor::RemoteActor;
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::spec::DeathCause;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Pause between two looks.
const PERIOD: Duration = Duration::from_millis(50);
/// A look is taken at least this often, even where nothing changes.
const LONGEST_LOOK: Duration = Duration::from_millis(300);

/// What a look at the cluster shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// One per actor, by name.
    pub(crate) rows: Vec<Row>,
    /// All expected actors and all groups are ready.
    pub(crate) ready: bool,
    /// Why it never will be.
    pub(crate) failed: Option<String>,
}

/// What must be there before the cluster serves.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Names of actors that must be ready.
    pub(crate) names: Vec<String>,
    /// A model is served from the start, and must take requests.
    pub(crate) serves: bool,
    /// So many ingresses must be ready.
    pub(crate) ingresses: usize,
    /// The state may hold actors of an earlier life of the cluster.
    pub(crate) may_be_left: bool,
}

/// A task that looks at the cluster until it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: mpsc::Receiver<Seen>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Starts to look.
    pub(crate) fn start(access: Access, wanted: Wanted) -> Self {
        let (sender, seen) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let cluster = loop {
                match access.connect().await {
                    Ok(cluster) => break cluster,
                    Err(_) => {
                        send(
                            &sender,
                            Seen { rows: vec![waiting("actors", "the head starts")], ..Seen::default() },
                        )
                        .await
                    }
                }
                tokio::time::sleep(PERIOD).await;
            };
            let mut version = 0;
            let mut before = None;
            loop {
                match cluster.watch(version, LONGEST_LOOK).await {
                    Ok(status) => {
                        version = status.version;
                        let first = before.is_none();
                        let before = before.get_or_insert_with(|| match wanted.may_be_left {
                            true => failed_before(&status, &wanted),
                            false => Vec::new(),
                        });
                        if first {
                            revive(&cluster, before).await;
                        }
                        let mut seen = see(&status, &wanted, before);
                        let asleep = seen.ready && wanted.serves && !takes_requests(&cluster, &status).await;
                        seen.ready &= !asleep;
                        if seen.failed.is_none() && (asleep || awaits_controller(&status, &wanted.names)) {
                            seen.failed = serve::given_up(&cluster, APPLICATION).await;
                        }
                        send(&sender, seen).await;
                    }
                    Err(e) => tracing::debug!("no status: {e}"),
                }
                tokio::time::sleep(PERIOD).await;
            }
        });
        Self { seen, task }
    }

    /// The next look; never ends by itself.
    pub(crate) async fn next(&mut self) -> Seen {
        match self.seen.recv().await {
            Some(seen) => seen,
            None => std::future::pending().await,
        }
    }
}

/// Waits for a while until all ingresses take requests: they hear from the head that the ranks have met when this process does,
/// and whoever reads that the cluster serves may be quicker.
async fn takes_requests(cluster: &Cluster, status: &ClusterStatus) -> bool {
    for ingress in ingresses(status) {
        cluster.forget(&ingress.name);
        let Ok(handle) = cluster.handle::<IngressActor>(&ingress.name).await else { return false };
        if handle.with_deadline(LONGEST_LOOK).ask(AwaitServing).await.is_err() {
            return false;
        }
    }
    true
}

fn ingresses(status: &ClusterStatus) -> impl Iterator<Item = &ActorStatus> {
    status.actors.iter().filter(|actor| actor.type_name == IngressActor::TYPE)
}

/// Hands over what was seen. A receiver that is gone has ended this task, too.
async fn send(sender: &mpsc::Sender<Seen>, seen: Seen) {
    let _ = sender.send(seen).await;
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether the serve controller has yet to add an actor, or has removed one that failed.
fn awaits_controller(status: &ClusterStatus, expected: &[String]) -> bool {
    let asked = status.actor(SERVE).is_some_and(|controller| controller.state == ActorState::Ready);
    asked && expected.iter().any(|name| status.actor(name).is_none())
}

/// What the status means for somebody who waits for the cluster to serve.
///
/// `before` are actors as an earlier cluster left them in this state: only what happens to them from then on counts.
pub(crate) fn see(status: &ClusterStatus, wanted: &Wanted, before: &[ActorStatus]) -> Seen {
    let expected = &wanted.names;
    let rows: Vec<Row> = expected
        .iter()
        .map(|name| status.actor(name).map_or_else(|| waiting(name, "to be deployed"), row))
        .collect();
    let all_ready = rows.iter().all(|row| row.state == RowState::Ready);
    Seen {
        ready: all_ready
            && ingresses(status).filter(|it| it.state == ActorState::Ready).count() >= wanted.ingresses
            && status.groups.iter().all(|group| group.complete),
        failed: expected
            .iter()
            .filter_map(|name| status.actor(name).filter(|actor| is_news(actor, before)))
            .find_map(failure),
        rows,
    }
}

fn waiting(name: &str, reason: &str) -> Row {
    Row { name: name.into(), place: String::new(), state: RowState::Waiting { reason: reason.into() } }
}

fn row(actor: &ActorStatus) -> Row {
    let state = match &actor.state {
        ActorState::Pending { reason } => RowState::Waiting { reason: reason.clone() },
        ActorState::Starting { progress } => RowState::Starting {
            phase: if progress.phase.is_empty() { "starting".into() } else { progress.phase.clone() },
            done: progress.done,
            total: progress.total,
        },
        ActorState::Ready => RowState::Ready,
        ActorState::Restarting { .. } | ActorState::Dead { .. } => RowState::Down { cause: cause(actor) },
        ActorState::Stopping => RowState::Waiting { reason: "stopping".into() },
    };
    let node = actor.node.iter().cloned();
    let device = actor.device.iter().map(|d| format!("device {d}"));
    let pid = actor.pid.iter().map(|p| format!("pid {p}"));
    let place = node.chain(device).chain(pid).collect::<Vec<_>>().join(" ");
    Row { name: actor.name.clone(), place, state }
}

/// Actors that had failed when the cluster was first looked at: in an earlier life of it, which did not end in good order.
fn failed_before(status: &ClusterStatus, wanted: &Wanted) -> Vec<ActorStatus> {
    let known = wanted.names.iter().filter_map(|name| status.actor(name));
    known.filter(|actor| failure(actor).is_some()).cloned().collect()
}

/// Has those that stayed dead start again: whoever starts a cluster wants them to live.
async fn revive(cluster: &Cluster, before: &[ActorStatus]) {
    for actor in before.iter().filter(|actor| matches!(actor.state, ActorState::Dead { .. })) {
        if let Err(error) = cluster.restart_actor(&actor.name).await {
            tracing::warn!(actor = actor.name, %error, "cannot be started again");
        }
    }
}

/// Whether what became of an actor is of this life of the cluster.
fn is_news(actor: &ActorStatus, before: &[ActorStatus]) -> bool {
    let is_dead = matches!(actor.state, ActorState::Dead { .. });
    before
        .iter()
        .filter(|old| old.name == actor.name)
        .all(|old| old.incarnation != actor.incarnation && (is_dead || old.last_death != actor.last_death))
}

/// Why a start cannot succeed: an actor that could not be created fails the same way again.
fn failure(actor: &ActorStatus) -> Option<String> {
    let hopeless = matches!(actor.state, ActorState::Dead { .. })
        || matches!(actor.last_death, Some(DeathCause::CreateFailed { .. } | DeathCause::StartFailed { .. }));
    hopeless.then(|| match &actor.last_death {
        Some(DeathCause::CreateFailed { message }) => {
            format!("{} could not be created:\n{message}", actor.name)
        }
        _ => format!("{}: {}", actor.name, cause(actor)),
    })
}

fn cause(actor: &ActorStatus) -> String {
    match (&actor.state, &actor.last_death) {
        (ActorState::Dead { cause }, _) | (_, Some(cause)) => cause.to_string(),
        (_, None) => "died".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heliostat_runtime::cluster::status::{GroupStatus, HeadStatus, StoreHealth};
    use heliostat_runtime::handle::Incarnation;
    use heliostat_runtime::spec::Progress;

    fn actor(name: &str, state: ActorState, last_death: Option<DeathCause>) -> ActorStatus {
        ActorStatus {
            last_death,
            incarnation: Incarnation(1),
            node: Some("node-0".into()),
            pid: Some(7),
            ..ActorStatus::new(name, "rank", state)
        }
    }

    fn cluster(actors: Vec<ActorStatus>, complete: bool) -> ClusterStatus {
        let head = HeadStatus {
            endpoint: "e".into(),
            pid: 1,
            uptime_s: 0,
            closing: false,
            recovering: false,
            term: 1,
            heads: vec![],
        };
        let group = GroupStatus { name: "ep".into(), epoch: 1, complete, members: vec![] };
        ClusterStatus {
            version: 1,
            head,
            nodes: vec![],
            workers: vec![],
            actors,
            groups: vec![group],
            placement_groups: vec![],
            supervisors: vec![],
            drivers: vec![],
            state_store: StoreHealth::default(),
        }
    }

    fn names(names: &[&str]) -> Wanted {
        let names = names.iter().map(|n| n.to_string()).collect();
        Wanted { names, serves: false, ingresses: 0, may_be_left: false }
    }

    #[test]
    fn ready_means_every_expected_actor_and_a_complete_group() {
        let ready = || actor("rank-0", ActorState::Ready, None);
        assert!(see(&cluster(vec![ready()], true), &names(&["rank-0"]), &[]).ready);
        assert!(!see(&cluster(vec![ready()], false), &names(&["rank-0"]), &[]).ready);
        let seen = see(&cluster(vec![ready()], true), &names(&["rank-0", "eplb"]), &[]);
        assert!(!seen.ready && seen.failed.is_none());
        assert_eq!(seen.rows[1].state, RowState::Waiting { reason: "to be deployed".into() });
    }

    #[test]
    fn a_constructor_that_fails_ends_the_start_and_is_told_once() {
        let torn = || Some(DeathCause::CreateFailed { message: "model.safetensors is torn".into() });
        let again = ActorState::Restarting { attempt: 1, in_ms: 0 };
        let actors = vec![actor("rank-0", again.clone(), torn()), actor("rank-1", again, torn())];
        let failed = see(&cluster(actors, false), &names(&["rank-0", "rank-1"]), &[]).failed;
        assert_eq!(failed.as_deref(), Some("rank-0 could not be created:\nmodel.safetensors is torn"));
    }

    #[test]
    fn what_an_earlier_life_left_is_no_failure_of_this_one() {
        let no_room = || Some(DeathCause::StartFailed { message: "no space left".into() });
        let starting = || ActorState::Starting { progress: Progress::default() };
        let with = |incarnation, state, death| {
            let actor = actor("jobs", state, death);
            cluster(vec![ActorStatus { incarnation: Incarnation(incarnation), ..actor }], true)
        };
        let dead = || ActorState::Dead { cause: no_room().unwrap() };
        let wanted = names(&["jobs"]);
        let before = failed_before(&with(1, dead(), no_room()), &wanted);
        let failed = |status: &ClusterStatus| see(status, &wanted, &before).failed;
        assert_eq!(failed(&with(1, dead(), no_room())), None);
        assert_eq!(failed(&with(2, starting(), no_room())), None);
        assert!(failed(&with(2, dead(), no_room())).is_some(), "it happened again");
        let torn = Some(DeathCause::CreateFailed { message: "torn".into() });
        assert!(failed(&with(2, starting(), torn)).is_some(), "something else happened");
    }

    #[test]
    fn a_worker_that_was_killed_while_starting_is_no_reason_to_stop() {
        let progress = Progress { phase: "loading weights".into(), done: 1, total: 4 };
        let killed = Some(DeathCause::Killed { signal: 9 });
        let seen = see(
            &cluster(vec![actor("rank-0", ActorState::Starting { progress }, killed)], false),
            &names(&["rank-0"]),
            &[],
        );
        assert_eq!(seen.failed, None);
        assert_eq!(seen.rows[0].place, "node-0 pid 7");
        assert!(matches!(seen.rows[0].state, RowState::Starting { done: 1, total: 4, .. }));
    }
}
