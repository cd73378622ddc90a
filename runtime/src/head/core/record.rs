//! What the head keeps in the state store, and how it starts again from it.

use std::sync::Arc;
use std::time::Duration;

use bincode::{Decode, Encode};

use super::actors::{Actor, Life, Live, Phase, Then};
use super::bundles::PlacementGroup;
use super::groups::Group;
use super::nodes::Node;
use super::owners::Thing;
use super::supervisors::Supervisor;
use super::{Command, HeadState, INCARNATION_BLOCK, Patience, Reserve};
use crate::group::GroupView;
use crate::handle::{ActorAddr, Incarnation};
use crate::head::messages::Kept;
use crate::head::placement::{Places, Slot};
use crate::head::supervise::History;
use crate::package::{Digest, PackageInfo};
use crate::spec::{
    ActorSpec, Capacity, DeathCause, Device, DriverId, Labels, PlacementGroupSpec, Progress, SupervisorSpec,
};

/// One entry of the state store.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[allow(clippy::large_enum_variant, reason = "records are on their way to or from the store, never kept")]
pub enum Record {
    /// An applied spec.
    Spec(ActorSpec),
    /// What became of it.
    Actor(ActorRecord),
    /// A group's last view.
    Group(GroupRecord),
    /// A node that joined.
    Node(NodeRecord),
    /// A placement group.
    PlacementGroup(PlacementGroupRecord),
    /// No incarnation above this was ever issued.
    Incarnations(u64),
    /// A supervisor.
    Supervisor(SupervisorRecord),
    /// A driver that is there, and its name.
    Driver(DriverId, String),
    /// A registered package.
    Package(PackageInfo),
    /// What an actor keeps under a key.
    Value(String, Kept),
}

/// What became of an actor.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ActorRecord {
    /// Name of the actor.
    pub name: String,
    /// Its last incarnation.
    pub incarnation: Incarnation,
    /// Where that ran.
    pub slot: Option<Slot>,
    /// How it was.
    pub life: LifeRecord,
    /// Restarts so far.
    pub restarts: u64,
    /// The recent ones, which count against its limit.
    pub history: History,
    /// Why the incarnation before the last ended.
    pub last_death: Option<DeathCause>,
    /// What that one wrote last.
    pub last_words: Option<String>,
}

/// A supervisor and its restarts.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct SupervisorRecord {
    /// As it was applied.
    pub spec: SupervisorSpec,
    /// Recent restarts of its children together.
    pub history: History,
    /// Its own below its supervisor.
    pub own: History,
}

/// How an actor was when it was written down.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum LifeRecord {
    /// No process; to be started.
    Down,
    /// A process was started.
    Live {
        /// Its address, once it was created.
        ready: Option<ActorAddr>,
        /// What it announced to its group.
        announced: Option<Vec<u8>>,
    },
    /// Not to be started again.
    Dead(DeathCause),
    /// It died, and an actor is to decide what follows.
    Judged(DeathCause),
}

/// A group's last view.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct GroupRecord {
    /// The view that was sent last.
    pub view: GroupView,
    /// No epoch above this was ever issued.
    pub reserved: u64,
}

/// A placement group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PlacementGroupRecord {
    /// As it was asked for.
    pub spec: PlacementGroupSpec,
    /// Tells it from earlier ones of the same name.
    pub id: u64,
    /// Where its bundles are.
    pub places: Places,
    /// Whether all have had places.
    pub created: bool,
}

/// A node that joined.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NodeRecord {
    /// Its name.
    pub name: String,
    /// Which agent process it was.
    pub boot: u64,
    /// Its devices.
    pub devices: Vec<Device>,
    /// What else it has.
    pub capacity: Capacity,
    /// Its labels.
    pub labels: Labels,
    /// That it is drained, if so.
    pub drain: Option<DrainRecord>,
}

/// How a node is drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct DrainRecord {
    /// How long actors stay that fit nowhere else; after a restart of the head anew.
    pub grace: Duration,
    /// Whether the node leaves when it is empty.
    pub leave: bool,
}

/// Where a record is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// Of an actor's spec.
    Spec(String),
    /// Of an actor's record.
    Actor(String),
    /// Of a group.
    Group(String),
    /// Of a node.
    Node(String),
    /// Of a placement group.
    PlacementGroup(String),
    /// Of the incarnation reserve.
    Incarnations,
    /// Of a supervisor.
    Supervisor(String),
    /// Of a driver.
    Driver(DriverId),
    /// Of a package.
    Package(Digest),
    /// Of a value.
    Value(String),
}

impl Key {
    /// The key as the store sees it.
    pub fn path(&self) -> String {
        match self {
            Key::Spec(name) => format!("spec/{name}"),
            Key::Actor(name) => format!("actor/{name}"),
            Key::Group(name) => format!("group/{name}"),
            Key::Node(name) => format!("node/{name}"),
            Key::PlacementGroup(name) => format!("placement_group/{name}"),
            Key::Incarnations => "incarnations".into(),
            Key::Supervisor(name) => format!("supervisor/{name}"),
            Key::Driver(id) => format!("driver/{id}"),
            Key::Package(sha256) => format!("package/{sha256}"),
            Key::Value(key) => format!("value/{key}"),
        }
    }
}

impl Record {
    /// Where it is kept.
    pub fn key(&self) -> Key {
        match self {
            Record::Spec(spec) => Key::Spec(spec.name.clone()),
            Record::Actor(record) => Key::Actor(record.name.clone()),
            Record::Group(record) => Key::Group(record.view.group.clone()),
            Record::Node(record) => Key::Node(record.name.clone()),
            Record::PlacementGroup(record) => Key::PlacementGroup(record.spec.name.clone()),
            Record::Incarnations(_) => Key::Incarnations,
            Record::Supervisor(record) => Key::Supervisor(record.spec.name.clone()),
            Record::Driver(id, _) => Key::Driver(*id),
            Record::Package(info) => Key::Package(info.id.sha256),
            Record::Value(key, _) => Key::Value(key.clone()),
        }
    }
}

/// One change of the state store.
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// Keep this under its key.
    Put(Box<Record>),
    /// Drop what is under the key.
    Delete(Key),
}

impl Write {
    /// The key that it changes.
    pub fn key(&self) -> Key {
        match self {
            Write::Put(record) => record.key(),
            Write::Delete(key) => key.clone(),
        }
    }
}

impl HeadState {
    /// Starts again at `now` from what an earlier head kept.
    ///
    /// Every node counts as unreachable until it reports, and nothing is placed until all have, or `node_grace` has
    /// passed: an actor that is alive must be found before another incarnation of it could be started.
    ///
    /// The commands that come with it must be durable before the first event.
    pub fn recover(patience: Patience, now: Duration, records: Vec<Record>) -> (Self, Vec<Command>) {
        let mut state = Self::new(patience);
        state.now = now;
        let mut last = Vec::new();
        for record in records {
            match record {
                Record::Spec(spec) => {
                    let thing = Thing::Actor(spec.name.clone());
                    state.owned.note(thing, None, Some(&spec.lifetime));
                    state.actors.insert(spec.name.clone(), Actor::new(spec));
                }
                Record::Actor(record) => last.push(record),
                Record::Group(record) => {
                    let group = Group::recovered(Arc::new(record.view), record.reserved);
                    state.groups.insert(group.view().group.clone(), group);
                }
                Record::Node(record) => {
                    state
                        .nodes
                        .insert(record.name.clone(), Node::recovered(record, now, patience.node_grace));
                }
                Record::PlacementGroup(record) => {
                    let group = PlacementGroup::recovered(record);
                    state.placement_groups.insert(group.name().to_owned(), group);
                }
                Record::Supervisor(record) => {
                    let (name, it) = (record.spec.name.clone(), Supervisor::recovered(record, now));
                    let thing = Thing::Supervisor(name.clone());
                    state.owned.note(thing, None, Some(&it.spec.lifetime));
                    state.supervisors.insert(name, it);
                }
                Record::Driver(id, name) => state.recover_driver(id, name),
                Record::Package(info) => state.packages.restore(info),
                Record::Value(key, kept) => state.values.restore(key, kept),
                Record::Incarnations(reserved) => state.incarnations = Reserve::recovered(reserved),
            }
        }
        for record in last {
            if let Some(actor) = state.actors.get_mut(&record.name) {
                actor.restore(record, now);
            }
        }
        state.regroup();
        state.recheck_owners();
        state.hold = (!state.nodes.is_empty()).then_some(now + patience.node_grace);
        // New blocks, so that even a head that dies at once has not issued what the next one issues.
        state.incarnations.reserved += INCARNATION_BLOCK;
        state.persist(Record::Incarnations(state.incarnations.reserved));
        let groups: Vec<GroupRecord> = state.groups.values_mut().map(Group::reserve).collect();
        groups.into_iter().for_each(|record| state.persist(Record::Group(record)));
        state.drop_forgotten_places();
        state.actors.settle();
        state.replan = true;
        let commands = std::mem::take(&mut state.out);
        (state, commands)
    }

    /// Writes down how the actor is now.
    pub(super) fn persist_actor(&mut self, name: &str) {
        if let Some(actor) = self.actors.get(name) {
            let record = actor.record();
            self.persist(Record::Actor(record));
        }
    }
}

impl Actor {
    fn record(&self) -> ActorRecord {
        let life = match &self.life {
            Life::Pending { .. } | Life::Backoff { .. } => LifeRecord::Down,
            // Its process is fenced when it is found again: only what follows its end is kept.
            Life::Stopping { cause, then: Then::StayDead | Then::Down, .. } => {
                LifeRecord::Dead(cause.clone())
            }
            Life::Stopping { .. } => LifeRecord::Down,
            Life::Live(live) => LifeRecord::Live {
                ready: match &live.phase {
                    Phase::Starting(_) => None,
                    Phase::Ready(addr) => Some(addr.clone()),
                },
                announced: live.announced.clone(),
            },
            Life::Judged { cause, .. } => LifeRecord::Judged(cause.clone()),
            Life::Dead { cause } => LifeRecord::Dead(cause.clone()),
        };
        ActorRecord {
            name: self.spec.name.clone(),
            incarnation: self.incarnation,
            slot: self.slot.clone(),
            life,
            restarts: self.restarts,
            history: self.history.clone(),
            last_death: self.last_death.clone(),
            last_words: self.last_words.clone(),
        }
    }

    fn restore(&mut self, record: ActorRecord, now: Duration) {
        self.incarnation = record.incarnation;
        self.restarts = record.restarts;
        self.history = record.history.recovered(now);
        self.last_death = record.last_death;
        self.last_words = record.last_words;
        self.life = match (record.life, &record.slot) {
            (LifeRecord::Live { ready, announced }, Some(slot)) => {
                let mut live = Live::new(record.incarnation, slot.clone());
                live.confirmed = true;
                live.announced = announced;
                live.phase = ready.map_or(Phase::Starting(Progress::default()), Phase::Ready);
                Life::Live(live)
            }
            (LifeRecord::Dead(cause), _) => Life::Dead { cause },
            (LifeRecord::Judged(cause), _) => Life::Judged { cause, since: now, asked: false },
            (LifeRecord::Down | LifeRecord::Live { .. }, _) => Life::Pending { reason: String::new() },
        };
        self.slot = record.slot;
    }
}
