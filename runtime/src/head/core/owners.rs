//! Who owns what: drivers, actors that own others, and the end of what is owned when its owner ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::actors::{Actor, Life, Then};
use super::{HeadState, Key, Record};
use crate::cluster::status::DriverStatus;
use crate::handle::ProcessId;
use crate::spec::{DeathCause, DriverId, InvalidSpec, Lifetime, Owner};

/// A registered driver.
#[derive(Debug)]
pub(super) struct Driver {
    name: String,
    reach: Reach,
}

/// Whether a driver is heard of.
#[derive(Debug)]
enum Reach {
    Connected(ProcessId),
    /// Its connection broke, or this head, restarted, has not heard of it yet.
    Away {
        since: Duration,
    },
}

/// What each owner owns, so that nothing is searched for when one ends.
#[derive(Debug, Default)]
pub(super) struct Owned {
    by: BTreeMap<OwnerKey, BTreeSet<Thing>>,
    /// Actors of which a life ended, or that were forgotten: what they own is looked at.
    moved: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum OwnerKey {
    Driver(DriverId),
    Actor(String),
}

/// Something that can be owned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Thing {
    Actor(String),
    Supervisor(String),
}

fn key(lifetime: &Lifetime) -> Option<OwnerKey> {
    match lifetime {
        Lifetime::Owned(Owner::Driver(id)) => Some(OwnerKey::Driver(*id)),
        Lifetime::Owned(Owner::Actor { name, .. }) => Some(OwnerKey::Actor(name.clone())),
        Lifetime::Caller | Lifetime::Detached => None,
    }
}

impl Owned {
    /// Notes whose it is; `before` is what was noted earlier.
    pub(super) fn note(&mut self, thing: Thing, before: Option<&Lifetime>, now: Option<&Lifetime>) {
        if let Some(owner) = before.and_then(key)
            && let Some(owned) = self.by.get_mut(&owner)
        {
            owned.remove(&thing);
            if owned.is_empty() {
                self.by.remove(&owner);
            }
        }
        if let Some(owner) = now.and_then(key) {
            self.by.entry(owner).or_default().insert(thing);
        }
    }

    /// A life of the actor ended, or began.
    pub(super) fn moved(&mut self, actor: &str) {
        if self.by.contains_key(&OwnerKey::Actor(actor.to_owned())) {
            self.moved.insert(actor.to_owned());
        }
    }

    fn of(&self, owner: &OwnerKey) -> Vec<Thing> {
        self.by.get(owner).into_iter().flatten().cloned().collect()
    }

    /// The supervisors that an actor owns.
    pub(super) fn supervisors_of(&self, actor: &str) -> Vec<String> {
        let owned = self.by.get(&OwnerKey::Actor(actor.to_owned())).into_iter().flatten();
        let supervisors = owned.filter_map(|thing| match thing {
            Thing::Supervisor(name) => Some(name.clone()),
            Thing::Actor(_) => None,
        });
        supervisors.collect()
    }

    fn all_moved(&mut self) {
        let actors = self.by.keys().filter_map(|owner| match owner {
            OwnerKey::Actor(name) => Some(name.clone()),
            OwnerKey::Driver(_) => None,
        });
        self.moved = actors.collect();
    }
}

impl HeadState {
    /// A driver says that it is there. LT-1: one that was taken for gone does not come back.
    ///
    /// # Errors
    /// Its actors have been ended.
    pub fn admits_driver(&self, id: DriverId, first: bool) -> Result<(), String> {
        match first || self.drivers.contains_key(&id) {
            true => Ok(()),
            false => Err(format!(
                "driver {id} was taken for gone, and what it owned was ended; connect anew, and use the lifetime \
                 `Detached` for actors that must outlive their driver"
            )),
        }
    }

    pub(super) fn driver_hello(&mut self, id: DriverId, name: String, process: ProcessId, first: bool) {
        if self.admits_driver(id, first).is_err() || self.closing {
            return;
        }
        let known = self.drivers.get_mut(&id);
        let new = known.is_none();
        match known {
            Some(driver) => {
                self.changed |= matches!(driver.reach, Reach::Away { .. });
                driver.reach = Reach::Connected(process);
            }
            None => {
                let driver = Driver { name: name.clone(), reach: Reach::Connected(process) };
                self.drivers.insert(id, driver);
            }
        }
        if new {
            self.changed = true;
            self.persist(Record::Driver(id, name));
        }
    }

    /// After a restart of the head: a driver that an earlier one knew.
    pub(super) fn recover_driver(&mut self, id: DriverId, name: String) {
        self.drivers.insert(id, Driver { name, reach: Reach::Away { since: self.now } });
    }

    /// Processes of drivers that are there, as far as is known.
    pub fn driver_processes(&self) -> impl Iterator<Item = ProcessId> + '_ {
        self.drivers.values().filter_map(|driver| match driver.reach {
            Reach::Connected(process) => Some(process),
            Reach::Away { .. } => None,
        })
    }

    pub(super) fn driver_disconnected(&mut self, gone: ProcessId) {
        let now = self.now;
        for driver in self.drivers.values_mut() {
            if matches!(driver.reach, Reach::Connected(process) if process == gone) {
                driver.reach = Reach::Away { since: now };
                self.changed = true;
            }
        }
    }

    /// When a driver that is away counts as gone, if one is away.
    pub(super) fn drivers_due(&self) -> Option<Duration> {
        let away = self.drivers.values().filter_map(|driver| match driver.reach {
            Reach::Away { since } => Some(since + self.patience.driver_grace),
            Reach::Connected(_) => None,
        });
        away.min()
    }

    pub(super) fn end_driver(&mut self, id: DriverId, why: &str) {
        let Some(driver) = self.drivers.remove(&id) else { return };
        self.changed = true;
        self.forget(Key::Driver(id));
        let cause = DeathCause::OwnerGone { owner: format!("driver {}", driver.name), why: why.to_owned() };
        for thing in self.owned.of(&OwnerKey::Driver(id)) {
            self.end_thing(&thing, &cause);
        }
    }

    /// LT-2: ends what belongs to owners that are gone.
    pub(super) fn end_orphans(&mut self) {
        if self.hold.is_some() {
            return;
        }
        let now = self.now;
        let gone = |driver: &Driver| match driver.reach {
            Reach::Away { since } => since + self.patience.driver_grace <= now,
            Reach::Connected(_) => false,
        };
        let gone: Vec<DriverId> = self.drivers.iter().filter(|(_, d)| gone(d)).map(|(id, _)| *id).collect();
        let grace = self.patience.driver_grace.as_millis();
        for id in gone {
            self.end_driver(id, &format!("its connection broke, and it did not come back within {grace} ms"));
        }
        while let Some(owner) = self.owned.moved.pop_first() {
            for thing in self.owned.of(&OwnerKey::Actor(owner.clone())) {
                let lifetime = match &thing {
                    Thing::Actor(name) => self.actors.get(name).map(|actor| &actor.spec.lifetime),
                    Thing::Supervisor(name) => self.supervisors.get(name).map(|it| &it.spec.lifetime),
                };
                let Some(Lifetime::Owned(of)) = lifetime else { continue };
                if let Err(why) = self.owner_is_there(of) {
                    let cause = DeathCause::OwnerGone { owner: of.to_string(), why };
                    self.end_thing(&thing, &cause);
                }
            }
        }
    }

    /// After a restart of the head, once all nodes have reported: owners may have ended meanwhile.
    pub(super) fn recheck_owners(&mut self) {
        self.owned.all_moved();
    }

    fn end_thing(&mut self, thing: &Thing, cause: &DeathCause) {
        match thing {
            Thing::Actor(name) => self.retire(name, cause.clone(), Then::Forget),
            Thing::Supervisor(name) => self.remove_subtree(name, cause),
        }
    }

    /// An error says how the owner ended.
    fn owner_is_there(&self, owner: &Owner) -> Result<(), String> {
        match owner {
            Owner::Driver(id) => match self.drivers.contains_key(id) {
                true => Ok(()),
                false => Err("it is not registered, or was taken for gone".to_owned()),
            },
            Owner::Actor { name, incarnation } => {
                let actor = self.actors.get(name).ok_or_else(|| "there is no such actor".to_owned())?;
                let life = match incarnation {
                    None => actor.lives_on(),
                    Some(incarnation) => actor.lives_as(*incarnation),
                };
                life.map_err(|cause| cause.map_or("it ended".to_owned(), |cause| cause.to_string()))
            }
        }
    }

    /// Refuses an owner that is not there. `applied` are the names that come in the same request.
    pub(super) fn check_owner(
        &self,
        name: &str,
        lifetime: &Lifetime,
        applied: &[&str],
    ) -> Result<(), InvalidSpec> {
        let Lifetime::Owned(owner) = lifetime else { return Ok(()) };
        let invalid = |why: String| Err(InvalidSpec::actor(name, why));
        if let Owner::Actor { name: owner, incarnation } = owner {
            if owner == name {
                return invalid("it owns itself".into());
            }
            if incarnation.is_none() && applied.contains(&owner.as_str()) {
                return Ok(());
            }
        }
        match self.owner_is_there(owner) {
            Ok(()) => Ok(()),
            Err(why) => invalid(format!("its owner, {owner}, is gone: {why}")),
        }
    }

    /// All drivers.
    pub fn driver_status(&self) -> Vec<DriverStatus> {
        let status = |(id, driver): (&DriverId, &Driver)| DriverStatus {
            id: *id,
            name: driver.name.clone(),
            connected: matches!(driver.reach, Reach::Connected(_)),
            owned: u32::try_from(self.owned.of(&OwnerKey::Driver(*id)).len()).unwrap_or(u32::MAX),
        };
        self.drivers.iter().map(status).collect()
    }
}

impl Actor {
    /// Whether its name is taken: it lives, or will again.
    pub(super) fn is_there(&self) -> bool {
        self.lives_on().is_ok()
    }

    /// Whether it lives, or will again. If not, how it ended.
    fn lives_on(&self) -> Result<(), Option<&DeathCause>> {
        match &self.life {
            Life::Dead { cause } => Err(Some(cause)),
            Life::Stopping { cause, then: Then::Forget | Then::StayDead, .. } => Err(Some(cause)),
            Life::Stopping { .. }
            | Life::Pending { .. }
            | Life::Backoff { .. }
            | Life::Judged { .. }
            | Life::Live(_) => Ok(()),
        }
    }

    /// Whether that life of it goes on. If not, how it ended.
    fn lives_as(&self, incarnation: crate::handle::Incarnation) -> Result<(), Option<&DeathCause>> {
        match &self.life {
            Life::Live(live) if live.incarnation == incarnation => Ok(()),
            Life::Stopping { live, cause, .. } if live.incarnation == incarnation => Err(Some(cause)),
            Life::Dead { cause } if self.incarnation == incarnation => Err(Some(cause)),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. }
                if self.incarnation == incarnation =>
            {
                Err(self.last_death.as_ref())
            }
            Life::Live(_)
            | Life::Stopping { .. }
            | Life::Dead { .. }
            | Life::Pending { .. }
            | Life::Backoff { .. }
            | Life::Judged { .. } => Err(None),
        }
    }
}
