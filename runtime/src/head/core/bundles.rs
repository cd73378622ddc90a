//! Placement groups: planned all at once, confirmed by their nodes, made durable, and only then used.
//!
//! PG-1: the bundles of a group get places all together or not at all; those that are lost with a node, too. PG-2: an
//! actor starts in a bundle only when the bundle's node has confirmed it and its place is durable, so a head that starts
//! anew never finds it elsewhere. PG-3: what a bundle reserves is given to nobody else, until the bundle is gone and the
//! processes in it have ended. PG-4: a group is planned when something that it waits for may have come, never by a timer.

use std::collections::BTreeSet;
use std::time::Duration;

use super::actors::{Actor, Then};
use super::record::PlacementGroupRecord;
use super::{Command, HeadState, INCARNATION_BLOCK, Key, Record};
use crate::cluster::status::PlacementGroupState;
use crate::head::messages::PrepareBundles;
use crate::head::placement::{BundleRef, BundleSlot, Offer, Places, plan};
use crate::spec::{InvalidSpec, Placement, PlacementGroupSpec, Resources};

/// No placement group has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no placement group {0:?}")]
pub struct NoSuchGroup(pub String);

/// One placement group.
#[derive(Debug)]
pub(super) struct PlacementGroup {
    pub(super) spec: PlacementGroupSpec,
    /// Tells it from earlier ones of the same name.
    pub(super) id: u64,
    /// Places that are durable.
    pub(super) places: Places,
    attempt: Attempt,
    /// Whether all bundles have had places.
    created: bool,
}

/// A place that was given up. It is free for others only when that is durable: a head that starts anew must not find
/// bundle and successor in one place.
#[derive(Debug)]
pub(super) struct Release {
    epoch: u64,
    bundle: BundleRef,
    slot: BundleSlot,
    resources: Resources,
}

/// What is being done for the bundles without a place.
#[derive(Debug)]
enum Attempt {
    /// Nothing, because of this.
    Waits { reason: String },
    /// The nodes are asked.
    Prepares { epoch: u64, places: Places, unconfirmed: BTreeSet<String> },
    /// The places are being written down.
    Writes { epoch: u64, places: Places },
}

impl PlacementGroup {
    pub(super) fn recovered(record: PlacementGroupRecord) -> Self {
        let PlacementGroupRecord { spec, id, places, created } = record;
        Self { spec, id, places, attempt: Attempt::Waits { reason: String::new() }, created }
    }

    fn record(&self) -> PlacementGroupRecord {
        let mut places = self.places.clone();
        if let Attempt::Writes { places: new, .. } = &self.attempt {
            places.extend(new.clone());
        }
        let created = self.created || !places.is_empty();
        PlacementGroupRecord { spec: self.spec.clone(), id: self.id, places, created }
    }

    pub(super) fn name(&self) -> &str {
        &self.spec.name
    }

    pub(super) fn is_complete(&self) -> bool {
        self.places.len() == self.spec.bundles.len()
    }

    pub(super) fn spec(&self) -> &PlacementGroupSpec {
        &self.spec
    }

    /// The places that it would keep without that node.
    pub(super) fn places_but(&self, node: &str) -> Places {
        let kept = self.reserved().filter(|(_, slot)| slot.node != node);
        kept.map(|(index, slot)| (index, slot.clone())).collect()
    }

    /// All places, also those that are not used yet.
    pub(super) fn reserved(&self) -> impl Iterator<Item = (u32, &BundleSlot)> {
        let new = match &self.attempt {
            Attempt::Waits { .. } => None,
            Attempt::Prepares { places, .. } | Attempt::Writes { places, .. } => Some(places),
        };
        self.places.iter().chain(new.into_iter().flatten()).map(|(index, slot)| (*index, slot))
    }

    pub(super) fn waits_for(&self) -> String {
        match &self.attempt {
            Attempt::Waits { reason } => reason.clone(),
            Attempt::Prepares { unconfirmed, .. } => {
                let nodes: Vec<&str> = unconfirmed.iter().map(String::as_str).collect();
                format!("waits for confirmation by {}", nodes.join(", "))
            }
            Attempt::Writes { .. } => "waits for the state store".to_owned(),
        }
    }

    pub(super) fn state(&self) -> PlacementGroupState {
        match (&self.attempt, self.created) {
            _ if self.is_complete() => PlacementGroupState::Created,
            (_, true) => PlacementGroupState::Rescheduling { reason: self.waits_for() },
            (Attempt::Waits { reason }, false) => PlacementGroupState::Pending { reason: reason.clone() },
            (_, false) => PlacementGroupState::Prepared { reason: self.waits_for() },
        }
    }
}

impl HeadState {
    /// Makes a placement group; the same again changes nothing.
    pub fn apply_placement_group(
        &mut self,
        now: Duration,
        spec: PlacementGroupSpec,
    ) -> Result<Vec<Command>, InvalidSpec> {
        self.now = now;
        spec.validate()?;
        let invalid = |why: &str| Err(InvalidSpec::placement_group(&spec.name, why));
        match self.placement_groups.get(&spec.name) {
            _ if self.closing => return invalid("the cluster is shutting down"),
            Some(group) if group.spec == spec => return Ok(self.finish()),
            Some(_) => return invalid("it exists with other bundles; remove it first, or take another name"),
            None => {}
        }
        let id = self.issue();
        let attempt = Attempt::Waits { reason: String::new() };
        let group = PlacementGroup { id, places: Places::new(), attempt, created: false, spec };
        self.persist(Record::PlacementGroup(group.record()));
        self.placement_groups.insert(group.spec.name.clone(), group);
        (self.changed, self.replan) = (true, true);
        Ok(self.finish())
    }

    /// Removes a placement group. Actors in its bundles are ended for good; what they have is free when they have ended.
    pub fn remove_placement_group(&mut self, now: Duration, name: &str) -> Result<Vec<Command>, NoSuchGroup> {
        self.now = now;
        let mut group = self.placement_groups.remove(name).ok_or_else(|| NoSuchGroup(name.to_owned()))?;
        self.forget(Key::PlacementGroup(name.to_owned()));
        let given_up = group.drop(|_| true, "");
        self.release(given_up);
        let inside =
            |actor: &Actor| matches!(&actor.spec.placement, Placement::Bundle { group, .. } if group == name);
        let inside: Vec<String> =
            self.actors.iter().filter(|(_, actor)| inside(actor)).map(|(name, _)| name.clone()).collect();
        for actor in inside {
            let cause = crate::spec::DeathCause::stopped(format!("placement group {name} was removed"));
            self.retire(&actor, cause, Then::StayDead);
        }
        (self.changed, self.replan) = (true, true);
        Ok(self.finish())
    }

    /// At the end of the cluster.
    pub(super) fn forget_placement_groups(&mut self) {
        for name in std::mem::take(&mut self.placement_groups).into_keys() {
            self.forget(Key::PlacementGroup(name));
        }
    }

    /// A number that was never used before.
    pub(super) fn issue(&mut self) -> u64 {
        let (issued, reserve) = self.incarnations.issue(INCARNATION_BLOCK);
        if let Some(reserved) = reserve {
            self.persist(Record::Incarnations(reserved));
        }
        issued
    }

    /// PG-4: plans every group that misses places. Called when something may have changed.
    pub(super) fn plan_placement_groups(&mut self) {
        let waits =
            |group: &PlacementGroup| !group.is_complete() && matches!(group.attempt, Attempt::Waits { .. });
        let mut waiting: Vec<(u64, String)> = self
            .placement_groups
            .values()
            .filter(|group| waits(group))
            .map(|group| (group.id, group.spec.name.clone()))
            .collect();
        if waiting.is_empty() {
            return;
        }
        // First come, first served.
        waiting.sort_unstable();
        let mut offers = self.offers();
        for (_, name) in waiting {
            let Some(group) = self.placement_groups.get(&name) else { continue };
            let planned = match self.hold {
                Some(_) => Err("waits for all nodes to report to the restarted head".to_owned()),
                None => plan(&group.spec, &group.places, &offers).map_err(|why| why.to_string()),
            };
            match planned {
                Ok(places) => {
                    group.take_from(&mut offers, &places);
                    self.prepare(&name, places);
                }
                Err(why) => self.group_waits(&name, why),
            }
        }
    }

    fn group_waits(&mut self, name: &str, why: String) {
        let Some(group) = self.placement_groups.get_mut(name) else { return };
        self.changed |= !matches!(&group.attempt, Attempt::Waits { reason } if *reason == why);
        group.attempt = Attempt::Waits { reason: why };
    }

    /// First phase: every node that is to hold a bundle is asked.
    fn prepare(&mut self, name: &str, places: Places) {
        let epoch = self.issue();
        let nodes: BTreeSet<String> = places.values().map(|slot| slot.node.clone()).collect();
        for node in &nodes {
            let report_seq = self.nodes.get(node).map_or(0, super::nodes::Node::seq);
            let order = PrepareBundles { group: name.to_owned(), epoch, report_seq, term: self.term };
            self.out.push(Command::PrepareBundles { node: node.clone(), order });
        }
        let Some(group) = self.placement_groups.get_mut(name) else { return };
        group.attempt = Attempt::Prepares { epoch, places, unconfirmed: nodes };
        self.changed = true;
    }

    /// Whether the node is still to confirm: then the order may be repeated.
    pub fn awaits_bundles(&self, group: &str, epoch: u64, node: &str) -> bool {
        match self.placement_groups.get(group).map(|group| &group.attempt) {
            Some(Attempt::Prepares { epoch: present, unconfirmed, .. }) => {
                *present == epoch && unconfirmed.contains(node)
            }
            Some(Attempt::Waits { .. } | Attempt::Writes { .. }) | None => false,
        }
    }

    /// A node confirms, or says why it cannot. When all have, the places are written down.
    pub(super) fn bundles_prepared(&mut self, name: &str, epoch: u64, node: &str, refused: Option<String>) {
        let Some(group) = self.placement_groups.get_mut(name) else { return };
        let Attempt::Prepares { epoch: present, unconfirmed, places } = &mut group.attempt else { return };
        if *present != epoch {
            return;
        }
        self.changed = true;
        if let Some(why) = refused {
            // The node has told the head why by its report, or is about to.
            self.replan = true;
            return self.group_waits(name, format!("node {node} refused: {why}"));
        }
        unconfirmed.remove(node);
        if !unconfirmed.is_empty() {
            return;
        }
        group.attempt = Attempt::Writes { epoch, places: std::mem::take(places) };
        let record = group.record();
        self.persist(Record::PlacementGroup(record));
        self.out.push(Command::AwaitDurable { group: name.to_owned(), epoch });
    }

    /// Second phase: the places are durable, and used from now on. Or it is durable that places were given up.
    pub(super) fn bundles_durable(&mut self, name: &str, epoch: u64) {
        let before = self.releasing.len();
        self.releasing.retain(|release| release.epoch != epoch);
        self.replan |= self.releasing.len() != before;
        let Some(group) = self.placement_groups.get_mut(name) else { return };
        let Attempt::Writes { epoch: present, places } = &mut group.attempt else { return };
        if *present != epoch {
            return;
        }
        group.places.append(places);
        group.attempt = Attempt::Waits { reason: String::new() };
        group.created |= !group.places.is_empty();
        (self.changed, self.replan) = (true, true);
    }

    /// The node is silent: what it was asked is planned anew. Bundles that have their place keep it for the node's grace.
    pub(super) fn node_silent(&mut self, node: &str) {
        for group in self.placement_groups.values_mut() {
            if let Attempt::Prepares { unconfirmed, .. } = &group.attempt
                && unconfirmed.contains(node)
            {
                let reason = format!("node {node} did not confirm");
                group.attempt = Attempt::Waits { reason };
                (self.changed, self.replan) = (true, true);
            }
        }
    }

    /// After a restart of the head: a node may have been forgotten in a write that survived, and its bundles not.
    pub(super) fn drop_forgotten_places(&mut self) {
        let places = self.placement_groups.values().flat_map(PlacementGroup::reserved);
        let gone: BTreeSet<String> = places
            .filter(|(_, slot)| !self.nodes.contains_key(&slot.node))
            .map(|(_, slot)| slot.node.clone())
            .collect();
        gone.iter().for_each(|node| self.drop_bundles(node, |_| true));
    }

    /// Names of the groups with durable places on the node.
    pub(super) fn groups_on(&self, node: &str) -> Vec<String> {
        let on = |group: &&PlacementGroup| group.places.values().any(|slot| slot.node == node);
        self.placement_groups.values().filter(on).map(|group| group.spec.name.clone()).collect()
    }

    /// Names of the actors that run on the node in bundles of the group.
    pub(super) fn actors_in(&mut self, group: &str, node: &str) -> BTreeSet<String> {
        self.actors.settle();
        let here = self.actors.bundles().filter(|((bundle, at), _)| bundle.group == group && at == node);
        here.flat_map(|(_, usage)| usage.actors.iter().cloned()).collect()
    }

    /// The bundles of one group on that node are to be placed anew.
    pub(super) fn drop_group_bundles(&mut self, name: &str, node: &str) {
        self.drop_from_group(name, node, |slot| slot.node == node);
    }

    /// The node, or what a bundle has of it, is gone: its bundles are to be placed anew.
    pub(super) fn drop_bundles(&mut self, node: &str, gone: impl Fn(&BundleSlot) -> bool) {
        let gone = |slot: &BundleSlot| slot.node == node && gone(slot);
        let names: Vec<String> = self.placement_groups.keys().cloned().collect();
        names.iter().for_each(|name| self.drop_from_group(name, node, gone));
    }

    fn drop_from_group(&mut self, name: &str, node: &str, gone: impl Fn(&BundleSlot) -> bool) {
        let Some(group) = self.placement_groups.get_mut(name) else { return };
        let given_up = group.drop(gone, node);
        if given_up.is_empty() {
            return;
        }
        let record = group.record();
        self.persist(Record::PlacementGroup(record));
        self.release(given_up);
    }

    /// Has these places free as soon as it is durable that they were given up.
    fn release(&mut self, mut given_up: Vec<Release>) {
        (self.changed, self.replan) = (true, true);
        let Some(group) = given_up.first().map(|release| release.bundle.group.clone()) else { return };
        let epoch = self.issue();
        given_up.iter_mut().for_each(|release| release.epoch = epoch);
        self.releasing.append(&mut given_up);
        self.out.push(Command::AwaitDurable { group, epoch });
    }

    /// Takes from the offers what bundles reserve, and what processes in bundles that are gone still have.
    pub(super) fn offer_less_bundles(&self, offers: &mut [Offer]) {
        for group in self.placement_groups.values() {
            for (index, slot) in group.reserved() {
                if let Some(offer) = offer_of(offers, &slot.node) {
                    let owner = format!("bundle {index} of placement group {}", group.name());
                    offer.take(&group.spec.bundles[index as usize].resources, &slot.devices, &owner);
                }
            }
        }
        for Release { bundle, slot, resources, .. } in &self.releasing {
            if let Some(offer) = offer_of(offers, &slot.node) {
                let owner = format!("placement group {}, until its release is durable", bundle.group);
                offer.take(resources, &slot.devices, &owner);
            }
        }
        for ((bundle, node), usage) in self.actors.bundles() {
            let Some(offer) = offer_of(offers, node) else { continue };
            if !self.is_placed(bundle, node) {
                offer.used.add(&Resources { devices: 0, ..usage.resources.clone() });
            }
            for (device, owner) in &usage.devices {
                offer.take(&Resources::default(), &[*device], owner);
            }
        }
    }

    fn is_placed(&self, bundle: &BundleRef, node: &str) -> bool {
        let released = |release: &Release| release.bundle == *bundle && release.slot.node == node;
        self.releasing.iter().any(released)
            || self.placement_groups.get(&bundle.group).is_some_and(|group| {
                group.id == bundle.id && group.places.get(&bundle.index).is_some_and(|slot| slot.node == node)
            })
    }
}

impl PlacementGroup {
    /// Gives up places; returns those that are, or may be, durable.
    fn drop(&mut self, gone: impl Fn(&BundleSlot) -> bool, node: &str) -> Vec<Release> {
        let mut places = self.places.clone();
        self.places.retain(|_, slot| !gone(slot));
        match &mut self.attempt {
            Attempt::Waits { .. } => {}
            // PG-1: all together or not at all.
            Attempt::Prepares { places, .. } if places.values().any(&gone) => {
                self.attempt = Attempt::Waits { reason: format!("node {node} is gone") };
            }
            Attempt::Prepares { .. } => {}
            Attempt::Writes { places: new, .. } => {
                places.extend(new.clone());
                new.retain(|_, slot| !gone(slot));
            }
        }
        places.retain(|_, slot| gone(slot));
        let release = |(index, slot): (u32, BundleSlot)| Release {
            epoch: 0,
            bundle: BundleRef { group: self.spec.name.clone(), id: self.id, index },
            slot,
            resources: self.spec.bundles[index as usize].resources.clone(),
        };
        places.into_iter().map(release).collect()
    }

    pub(super) fn take_from(&self, offers: &mut [Offer], places: &Places) {
        for (index, slot) in places {
            if let Some(offer) = offer_of(offers, &slot.node) {
                let resources = &self.spec.bundles[*index as usize].resources;
                offer.take(
                    resources,
                    &slot.devices,
                    &format!("bundle {index} of placement group {}", self.name()),
                );
            }
        }
    }
}

/// Offers are in the order of their nodes' names.
pub(super) fn offer_of<'a>(offers: &'a mut [Offer], node: &str) -> Option<&'a mut Offer> {
    let at = offers.binary_search_by(|offer| offer.node.as_str().cmp(node)).ok()?;
    offers.get_mut(at)
}
