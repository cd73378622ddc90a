//! Actors in bundles: which bundle takes one, what a bundle has left, and how placement groups look from outside.

use std::collections::BTreeMap;

use super::HeadState;
use super::bundles::PlacementGroup;
use crate::cluster::status::{BundleStatus, PlacementGroupStatus};
use crate::head::placement::{BundleRef, BundleSlot, Offer, Slot, refusal};
use crate::spec::{ActorSpec, LabelSelector, Placement, Resources};

impl HeadState {
    /// A place for the actor in what its group reserved.
    pub(super) fn find_seat(
        &mut self,
        spec: &ActorSpec,
        last: Option<&Slot>,
        name: &str,
        index: Option<u32>,
    ) -> Result<Slot, String> {
        self.actors.settle();
        let Some(group) = self.placement_groups.get(name) else {
            return Err(format!("there is no placement group {name}; it may have been removed"));
        };
        let all = group.spec.bundles.len() as u32;
        if let Some(index) = index.filter(|index| *index >= all) {
            return Err(format!(
                "placement group {name} has {all} bundles, there is none with index {index}"
            ));
        }
        let wanted = |bundle: &u32| index.is_none_or(|index| index == *bundle);
        let mut found: Vec<Slot> = Vec::new();
        let offers: Vec<(u32, Offer)> = (0..all)
            .filter(wanted)
            .filter_map(|index| Some((index, self.bundle_offer(group, index)?)))
            .collect();
        let mut misses = Vec::new();
        for (index, offer) in &offers {
            let missed = offer.misses(&spec.resources, &LabelSelector::default());
            if missed.is_empty() {
                let back = last.and_then(|last| last.device).filter(|device| offer.is_free(*device));
                let device = match spec.resources.devices {
                    0 => None,
                    _ => back.or_else(|| offer.free_devices(1).first().copied()),
                };
                let bundle = BundleRef { group: name.to_owned(), id: group.id, index: *index };
                found.push(Slot { node: offer.node.clone(), device, bundle: Some(bundle) });
            } else {
                misses.push((
                    format!("bundle {index} of placement group {name}, on node {},", offer.node),
                    missed,
                ));
            }
        }
        let back = found.iter().position(|slot| Some(slot) == last).unwrap_or_default();
        match found.into_iter().nth(back) {
            Some(slot) => Ok(slot),
            None if misses.is_empty() => {
                Err(format!("placement group {name} is pending: {}", group.waits_for()))
            }
            None => Err(refusal(misses)),
        }
    }

    /// What a bundle has free, as if it were a node.
    fn bundle_offer(&self, group: &PlacementGroup, index: u32) -> Option<Offer> {
        let slot = group.places.get(&index)?;
        let node = self.nodes.get(&slot.node)?;
        let bundle = BundleRef { group: group.name().to_owned(), id: group.id, index };
        let usage = self.actors.bundle_usage(&bundle, &slot.node);
        let owner = |device: u32| {
            let owner = usage.and_then(|usage| usage.devices.get(&device)).cloned();
            owner.or_else(|| node.stray_on(device))
        };
        let Resources { cpus, memory, custom, .. } = &group.spec.bundles.get(index as usize)?.resources;
        Some(Offer {
            node: slot.node.clone(),
            closed: node.closed(),
            devices: slot.devices.iter().map(|&device| (device, owner(device))).collect(),
            cpus: *cpus,
            memory: *memory,
            custom: custom.clone(),
            used: usage.map(|usage| usage.resources.clone()).unwrap_or_default(),
            ..Offer::default()
        })
    }

    /// The bundle that an actor which is found on a node must be in.
    pub(super) fn bundle_at(&self, spec: &ActorSpec, node: &str, device: Option<u32>) -> Option<BundleRef> {
        let Placement::Bundle { group, index } = &spec.placement else { return None };
        let group = self.placement_groups.get(group)?;
        let holds = |(at, slot): &(&u32, &BundleSlot)| {
            slot.node == node
                && index.is_none_or(|index| index == **at)
                && device.is_none_or(|device| slot.devices.contains(&device))
        };
        let (index, _) = group.places.iter().find(holds)?;
        Some(BundleRef { group: group.name().to_owned(), id: group.id, index: *index })
    }

    /// All placement groups.
    pub fn placement_group_status(&self) -> Vec<PlacementGroupStatus> {
        let mut actors: BTreeMap<(&str, u64, u32), Vec<String>> = BTreeMap::new();
        for ((bundle, _), usage) in self.actors.bundles() {
            let names = actors.entry((&bundle.group, bundle.id, bundle.index)).or_default();
            names.extend(usage.actors.iter().cloned());
        }
        let of = |group: &PlacementGroup| self.status_of_group(group, &actors);
        self.placement_groups.values().map(of).collect()
    }

    /// The placement group of that name.
    pub fn placement_group(&self, name: &str) -> Option<PlacementGroupStatus> {
        let group = self.placement_groups.get(name)?;
        Some(self.status_of_group(group, &BTreeMap::new()))
    }

    fn status_of_group(
        &self,
        group: &PlacementGroup,
        actors: &BTreeMap<(&str, u64, u32), Vec<String>>,
    ) -> PlacementGroupStatus {
        let places: BTreeMap<u32, &BundleSlot> = group.reserved().collect();
        let bundles = group.spec.bundles.iter().zip(0u32..).map(|(bundle, index)| BundleStatus {
            index,
            resources: bundle.resources.clone(),
            node: places.get(&index).map(|slot| slot.node.clone()),
            devices: places.get(&index).map(|slot| slot.devices.clone()).unwrap_or_default(),
            actors: actors.get(&(group.name(), group.id, index)).cloned().unwrap_or_default(),
        });
        PlacementGroupStatus {
            name: group.name().to_owned(),
            state: group.state(),
            strategy: group.spec.strategy,
            topology: group.spec.topology.clone(),
            bundles: bundles.collect(),
        }
    }
}
