//! What the head knows and decides: events and the time in, commands out.
//!
//! It never does I/O and never reads a clock, so a simulation can replay any history. Nodes and workers report their
//! whole (small) state again and again; every decision follows from what is so, not from which message said it.

mod actors;
mod apply;
mod bundles;
mod drain;
mod groups;
mod meshes;
mod nodes;
mod owners;
mod packages;
mod record;
mod report;
mod roster;
mod seats;
#[cfg(test)]
mod simulation;
mod supervisors;
#[cfg(test)]
mod tree_tests;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

pub use self::bundles::NoSuchGroup;
use self::bundles::{PlacementGroup, Release};
pub use self::drain::NoSuchNode;
use self::groups::Group;
use self::nodes::Node;
use self::owners::{Driver, Owned};
use self::packages::Packages;
#[cfg(test)]
pub(super) use self::record::{ActorRecord, GroupRecord, NodeRecord, PlacementGroupRecord, SupervisorRecord};
pub use self::record::{Key, LifeRecord, Record, Write};
use self::roster::Roster;
use self::supervisors::Supervisor;
use self::values::Values;
use super::messages::{CreateActor, NodeReport, PrepareBundles, StartWorker, WorkerReport};
use crate::group::GroupView;
use crate::handle::{ActorAddr, Incarnation, ProcessId};
use crate::package::Digest;
use crate::spec::{DriverId, Verdict};
use crate::supervisor::ChildDied;

/// How patient the head is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A node that is silent for this long counts as unreachable. Default 1.5 s.
    pub heartbeat_timeout: Duration,
    /// A node whose agent closed its connection, and that does not come back for this long, is lost with its actors, if
    /// another node is there: the agent has ended, as far as one can tell. Default 1.5 s.
    pub agent_grace: Duration,
    /// A node that is silent for this long is lost, with its actors. Default 3 s.
    pub node_grace: Duration,
    /// A node whose agent is gone keeps its actors for so long, if one of them owns a GPU and its worker still reports:
    /// what it holds is not given up for the want of an agent. Default 10 s, the time that workers wait for an agent.
    pub gpu_grace: Duration,
    /// A driver whose connection broke and that does not come back for so long is gone, with what it owns. Default 3 s.
    pub driver_grace: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            heartbeat_timeout: Duration::from_millis(1500),
            agent_grace: Duration::from_millis(1500),
            node_grace: Duration::from_secs(3),
            gpu_grace: Duration::from_secs(10),
            driver_grace: Duration::from_secs(3),
        }
    }
}

/// What the head learns.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node says what it is and which workers it has.
    NodeReport(NodeReport),
    /// The connection to a node's agent broke.
    NodeDisconnected {
        /// Name of the node.
        node: String,
        /// Which agent process it was.
        boot: u64,
    },
    /// A node certainly did not start a worker.
    StartFailed {
        /// The worker.
        incarnation: Incarnation,
        /// Why.
        message: String,
    },
    /// A worker says how its actor is.
    WorkerReport(WorkerReport),
    /// A node has answered to `Command::PrepareBundles`.
    BundlesPrepared {
        /// Name of the placement group.
        group: String,
        /// Which attempt.
        epoch: u64,
        /// Name of the node.
        node: String,
        /// Why it cannot, if so.
        refused: Option<String>,
    },
    /// What `Command::AwaitDurable` asked for.
    BundlesDurable {
        /// Name of the placement group.
        group: String,
        /// Which attempt.
        epoch: u64,
    },
    /// A driver registers, or says that it is still there.
    DriverHello {
        /// Which it is.
        id: DriverId,
        /// What it calls itself.
        name: String,
        /// Its process.
        process: ProcessId,
        /// Whether it registers for the first time.
        first: bool,
    },
    /// The last connection with a process, which may be a driver, broke.
    ProcessLost(ProcessId),
    /// A driver ends.
    DriverEnded {
        /// Which it was.
        id: DriverId,
        /// How it ended.
        why: String,
    },
    /// The actor that was asked about a death has answered, or cannot be asked.
    Judged {
        /// The child that died.
        child: String,
        /// The life that ended.
        incarnation: Incarnation,
        /// What is to be done; `None` if there was no answer: it is asked again while there is time.
        verdict: Option<Verdict>,
    },
    /// A deadline has passed.
    Tick,
    /// The cluster is to end: workers, nodes, head.
    Shutdown,
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Have the node start a worker.
    StartWorker {
        /// Name of the node.
        node: String,
        /// What to start.
        order: StartWorker,
    },
    /// Have the node end a worker.
    StopWorker {
        /// Name of the node.
        node: String,
        /// The worker.
        incarnation: Incarnation,
        /// How.
        manner: Manner,
    },
    /// Tell a worker itself to exit: it is fenced, and its node may not hear us.
    DismissWorker {
        /// The worker.
        incarnation: Incarnation,
        /// Why.
        why: String,
    },
    /// Have a worker create its actor.
    CreateActor(Box<CreateActor>),
    /// Deliver a view to a worker's actor.
    SendView {
        /// The worker.
        incarnation: Incarnation,
        /// The view.
        view: Arc<GroupView>,
    },
    /// Ask an actor what follows from a death.
    AskJudge {
        /// The actor.
        judge: ActorAddr,
        /// What it is asked.
        question: ChildDied,
    },
    /// Have a node end its workers and itself.
    StopNode {
        /// Name of the node.
        node: String,
    },
    /// Have a node confirm that it is there to hold bundles.
    PrepareBundles {
        /// Name of the node.
        node: String,
        /// What for.
        order: PrepareBundles,
    },
    /// Say `Event::BundlesDurable` when everything up to here is durable.
    AwaitDurable {
        /// Name of the placement group.
        group: String,
        /// Which attempt.
        epoch: u64,
    },
    /// A package is in use no more: drop it from the head's directory.
    DropPackage {
        /// Which.
        sha256: Digest,
    },
    /// Keep this in the state store.
    Persist(Write),
}

/// How a worker is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum Manner {
    /// SIGTERM, then SIGKILL after the node's grace.
    Graceful,
    /// The actor is told to take nothing new and to end when it has handled what it has; SIGKILL after so long.
    Finish(Duration),
    /// SIGKILL at once.
    Kill,
}

/// Numbers that were made durable ahead of use, so that issuing one never waits for the store.
#[derive(Debug, Clone, Copy, Default)]
struct Reserve {
    issued: u64,
    reserved: u64,
}

impl Reserve {
    /// After a restart of the head: everything that may have been issued counts as issued.
    fn recovered(reserved: u64) -> Self {
        Self { issued: reserved, reserved }
    }

    /// The next number, and the new reservation to write when half of the present one is used.
    fn issue(&mut self, block: u64) -> (u64, Option<u64>) {
        self.issued += 1;
        if self.issued + block / 2 > self.reserved {
            self.reserved = self.issued + block;
            return (self.issued, Some(self.reserved));
        }
        (self.issued, None)
    }
}

/// Incarnations that are reserved at a time.
const INCARNATION_BLOCK: u64 = 256;

/// Everything the head knows.
#[derive(Debug)]
pub struct HeadState {
    patience: Patience,
    /// HA-2: goes with every order.
    term: u64,
    nodes: BTreeMap<String, Node>,
    actors: Roster,
    groups: BTreeMap<String, Group>,
    /// Meshes of which a rank waits to be created.
    gathering: BTreeSet<String>,
    placement_groups: BTreeMap<String, PlacementGroup>,
    releasing: Vec<Release>,
    supervisors: BTreeMap<String, Supervisor>,
    drivers: BTreeMap<DriverId, Driver>,
    owned: Owned,
    /// Rounds of restarts so far.
    rounds: u64,
    packages: Packages,
    values: Values,
    /// HD-1: incarnations rise over the whole life of the cluster and are never issued twice.
    incarnations: Reserve,
    /// After a restart of the head: places nothing before all nodes it knew have reported, or this moment.
    hold: Option<Duration>,
    /// Whether what waits for a place may find one now.
    replan: bool,
    closing: bool,
    store_answers: bool,
    /// Raised by every visible change.
    version: u64,
    changed: bool,
    now: Duration,
    out: Vec<Command>,
}

impl HeadState {
    /// An empty cluster.
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            term: 0,
            nodes: BTreeMap::new(),
            actors: Roster::default(),
            groups: BTreeMap::new(),
            gathering: BTreeSet::new(),
            placement_groups: BTreeMap::new(),
            releasing: Vec::new(),
            supervisors: BTreeMap::new(),
            drivers: BTreeMap::new(),
            owned: Owned::default(),
            rounds: 0,
            packages: Packages::default(),
            values: Values::default(),
            incarnations: Reserve::default(),
            hold: None,
            replan: false,
            closing: false,
            store_answers: true,
            version: 1,
            changed: false,
            now: Duration::ZERO,
            out: Vec::new(),
        }
    }

    /// The same in that term of the election.
    pub fn in_term(self, term: u64) -> Self {
        Self { term, ..self }
    }

    /// The term of the election in which this head leads.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Takes one event at `now` (time since any fixed moment, never decreasing) and returns what to do, in order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Command> {
        self.now = now;
        match event {
            Event::NodeReport(report) => self.node_report(report),
            Event::NodeDisconnected { node, boot } => self.node_disconnected(&node, boot),
            Event::StartFailed { incarnation, message } => self.start_failed(incarnation, message),
            Event::WorkerReport(report) => self.worker_report(report),
            Event::BundlesPrepared { group, epoch, node, refused } => {
                self.bundles_prepared(&group, epoch, &node, refused);
            }
            Event::BundlesDurable { group, epoch } => self.bundles_durable(&group, epoch),
            Event::DriverHello { id, name, process, first } => self.driver_hello(id, name, process, first),
            Event::ProcessLost(process) => self.driver_disconnected(process),
            Event::DriverEnded { id, why } => self.end_driver(id, &why),
            Event::Judged { child, incarnation, verdict } => match verdict {
                Some(verdict) => self.judged(&child, incarnation, verdict),
                None => self.judge_silent(&child, incarnation),
            },
            Event::Tick => {}
            Event::Shutdown => self.shutdown(),
        }
        self.finish()
    }

    /// Notes whether the state store answers, so that watchers hear when that changes.
    pub fn store_health(&mut self, answers: bool) -> Vec<Command> {
        self.changed |= std::mem::replace(&mut self.store_answers, answers) != answers;
        self.finish()
    }

    /// The moment at which `Event::Tick` is due, unless something else happens first.
    pub fn next_deadline(&self) -> Option<Duration> {
        let nodes = self.nodes.values().filter_map(|node| node.deadline(&self.patience));
        let drains = self.nodes.values().filter_map(Node::drain_until).filter(|at| *at > self.now);
        let missed = self.missed().filter(|at| *at > self.now);
        let own = self.actors.next_deadline().into_iter().chain(self.drivers_due());
        nodes.chain(drains).chain(own).chain(self.hold).chain(missed).min()
    }

    /// Whether this head has lost every node that it had, for half of the grace: another head may reach them, and takes
    /// over before their actors are given up.
    pub fn is_cut_off(&self) -> bool {
        !self.closing && self.missed().is_some_and(|at| at <= self.now)
    }

    fn missed(&self) -> Option<Duration> {
        if self.nodes.values().any(Node::is_connected) {
            return None;
        }
        self.nodes.values().filter_map(|node| node.missed_at()).max()
    }

    /// Raised by every visible change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether the cluster has ended: it was shut down and no node is left.
    pub fn is_closed(&self) -> bool {
        self.closing && !self.nodes.values().any(Node::is_connected)
    }

    /// Does what time and free resources allow, then hands over the commands.
    fn finish(&mut self) -> Vec<Command> {
        self.check_nodes();
        if self.hold.is_some_and(|until| self.now >= until || !self.nodes.values().any(Node::is_awaited)) {
            self.hold = None;
            (self.changed, self.replan) = (true, true);
            self.recheck_owners();
        }
        self.end_orphans();
        self.ask_judges();
        let replan = self.actors.take_news() | std::mem::take(&mut self.replan);
        self.place_pending(replan);
        self.actors.settle();
        self.move_from_drained(replan);
        // After the actors: one that is only being restarted finds its place still free.
        if replan {
            self.actors.settle();
            self.plan_placement_groups();
        }
        self.create_ranks();
        self.actors.settle();
        if std::mem::take(&mut self.changed) {
            self.version += 1;
        }
        std::mem::take(&mut self.out)
    }

    fn persist(&mut self, record: Record) {
        self.out.push(Command::Persist(Write::Put(Box::new(record))));
    }

    fn forget(&mut self, key: Key) {
        self.out.push(Command::Persist(Write::Delete(key)));
    }

    fn shutdown(&mut self) {
        self.closing = true;
        self.changed = true;
        for name in self.actors.keys().cloned().collect::<Vec<_>>() {
            let cause = crate::spec::DeathCause::stopped("the cluster was shut down");
            self.retire(&name, cause, actors::Then::Forget);
        }
        for name in std::mem::take(&mut self.supervisors).into_keys() {
            self.forget(Key::Supervisor(name));
        }
        for id in std::mem::take(&mut self.drivers).into_keys() {
            self.forget(Key::Driver(id));
        }
        self.forget_placement_groups();
        self.forget_values();
        let connected = self.nodes.values().filter(|node| node.is_connected());
        let commands: Vec<Command> =
            connected.map(|node| Command::StopNode { node: node.name().to_owned() }).collect();
        self.out.extend(commands);
    }
}
