//! All actors by name, with what must be found fast among a hundred thousand: who waits for a place, who is due, and
//! what is set aside on each node.
//!
//! The indices follow from the actors alone. Whoever may have changed one is looked at again before an index is read,
//! so nobody has to remember to keep them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Deref;
use std::time::Duration;

use super::actors::{Actor, Life};
use crate::head::placement::{BundleRef, Slot};
use crate::spec::Resources;

/// All actors.
#[derive(Debug, Default)]
pub(super) struct Roster {
    actors: BTreeMap<String, Actor>,
    /// May differ from their entries.
    touched: Vec<String>,
    entries: HashMap<String, Entry>,
    waiting: BTreeSet<String>,
    deadlines: BTreeSet<(Duration, String)>,
    /// By node; what actors in bundles have is not counted here, but they are listed.
    nodes: BTreeMap<String, Usage>,
    /// By bundle and the node where the process is.
    bundles: BTreeMap<(BundleRef, String), Usage>,
    /// Somebody waits who did not, or something was given back.
    news: bool,
}

/// How an actor stands in the indices.
#[derive(Debug, Default, PartialEq)]
struct Entry {
    waits: bool,
    deadline: Option<Duration>,
    holds: Option<Holding>,
}

/// What an actor's process has.
#[derive(Debug, Clone, PartialEq)]
struct Holding {
    slot: Slot,
    resources: Resources,
}

/// What the actors of one node, or in one bundle, have together.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) resources: Resources,
    pub(super) actors: BTreeSet<String>,
    pub(super) devices: BTreeMap<u32, String>,
}

/// To read them as a map. To change one takes `get_mut`, which notes it.
impl Deref for Roster {
    type Target = BTreeMap<String, Actor>;

    fn deref(&self) -> &Self::Target {
        &self.actors
    }
}

impl Roster {
    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Actor> {
        let actor = self.actors.get_mut(name)?;
        self.touched.push(name.to_owned());
        Some(actor)
    }

    pub(super) fn insert(&mut self, name: String, actor: Actor) {
        self.touched.push(name.clone());
        self.actors.insert(name, actor);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.touched.push(name.to_owned());
        self.actors.remove(name);
    }

    /// Brings the indices up to date.
    pub(super) fn settle(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        for name in touched {
            let entry = self.actors.get(&name).map(Entry::of);
            self.file(name, entry);
        }
    }

    fn file(&mut self, name: String, entry: Option<Entry>) {
        let old = self.entries.remove(&name).unwrap_or_default();
        let new = entry.unwrap_or_default();
        if old.waits != new.waits {
            if new.waits {
                self.waiting.insert(name.clone())
            } else {
                self.waiting.remove(&name)
            };
            self.news |= new.waits;
        }
        if old.deadline != new.deadline {
            old.deadline.map(|at| self.deadlines.remove(&(at, name.clone())));
            new.deadline.map(|at| self.deadlines.insert((at, name.clone())));
        }
        if old.holds != new.holds {
            self.news |= old.holds.is_some();
            old.holds.as_ref().into_iter().for_each(|holding| self.give_back(&name, holding));
            new.holds.as_ref().into_iter().for_each(|holding| self.set_aside(&name, holding));
        }
        if self.actors.contains_key(&name) {
            self.entries.insert(name, new);
        }
    }

    fn set_aside(&mut self, name: &str, holding: &Holding) {
        let Slot { node, bundle, .. } = &holding.slot;
        let usage = self.nodes.entry(node.clone()).or_default();
        usage.actors.insert(name.to_owned());
        match bundle {
            None => usage.set_aside(name, holding),
            Some(bundle) => {
                let usage = self.bundles.entry((bundle.clone(), node.clone())).or_default();
                usage.actors.insert(name.to_owned());
                usage.set_aside(name, holding);
            }
        }
    }

    fn give_back(&mut self, name: &str, holding: &Holding) {
        let Slot { node, bundle, .. } = &holding.slot;
        if let Some(usage) = self.nodes.get_mut(node) {
            usage.actors.remove(name);
            if bundle.is_none() {
                usage.give_back(name, holding);
            }
            if usage.actors.is_empty() {
                self.nodes.remove(node);
            }
        }
        let Some(bundle) = bundle else { return };
        let key = (bundle.clone(), node.clone());
        if let Some(usage) = self.bundles.get_mut(&key) {
            usage.actors.remove(name);
            usage.give_back(name, holding);
            if usage.actors.is_empty() {
                self.bundles.remove(&key);
            }
        }
    }

    /// Whether placement may come to another result than the last time.
    pub(super) fn take_news(&mut self) -> bool {
        self.settle();
        std::mem::take(&mut self.news)
    }

    /// Names of the actors that wait for a place.
    pub(super) fn waiting(&mut self) -> Vec<String> {
        self.settle();
        self.waiting.iter().cloned().collect()
    }

    /// Names of the actors whose deadline has passed.
    pub(super) fn due(&mut self, now: Duration) -> Vec<String> {
        self.settle();
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, name)| name.clone()).collect()
    }

    /// Names of the actors with a process on the node.
    pub(super) fn on_node(&mut self, node: &str) -> Vec<String> {
        self.settle();
        self.nodes.get(node).map_or_else(Vec::new, |usage| usage.actors.iter().cloned().collect())
    }

    /// The next deadline. As of the last `settle`, like `usage`.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        debug_assert!(self.touched.is_empty(), "indices are settled after every event");
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// What the processes of a bundle have on a node.
    pub(super) fn bundle_usage(&self, bundle: &BundleRef, node: &str) -> Option<&Usage> {
        self.bundles.get(&(bundle.clone(), node.to_owned()))
    }

    /// All bundles with processes in them, those that are gone included, and the node where these are.
    pub(super) fn bundles(&self) -> impl Iterator<Item = (&(BundleRef, String), &Usage)> {
        self.bundles.iter()
    }

    /// What the actors of a node have.
    pub(super) fn usage(&self, node: &str) -> Option<&Usage> {
        self.nodes.get(node)
    }
}

impl Usage {
    fn set_aside(&mut self, name: &str, holding: &Holding) {
        self.resources.add(&holding.resources);
        holding.slot.device.map(|device| self.devices.insert(device, name.to_owned()));
    }

    fn give_back(&mut self, name: &str, holding: &Holding) {
        self.resources.remove(&holding.resources);
        if let Some(device) = holding.slot.device
            && self.devices.get(&device).is_some_and(|owner| owner == name)
        {
            self.devices.remove(&device);
        }
    }
}

impl Entry {
    fn of(actor: &Actor) -> Self {
        let holds = actor
            .process()
            .map(|live| Holding { slot: live.slot.clone(), resources: actor.spec.resources.clone() });
        Self { waits: matches!(actor.life, Life::Pending { .. }), deadline: actor.deadline(), holds }
    }
}
