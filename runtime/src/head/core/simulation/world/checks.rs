//! What must hold at every step.

use super::World;
use crate::cluster::status::NodeState;
use crate::head::core::{Record, Write};
use crate::head::messages::StartWorker;
use crate::spec::{Placement, Quantity};

impl World {
    /// HD-1, HD-2, SV-2: an order has a new incarnation, and no other process of the actor lives where the head can
    /// reach it: the one before has died, or its node was declared lost.
    pub(super) fn check_start(&self, node: &str, order: &StartWorker) {
        let StartWorker { actor, incarnation, .. } = order;
        assert!(*incarnation > self.highest, "incarnation {incarnation} was issued before");
        let nodes = self.head().node_status();
        for (other, worker) in self.workers.iter().filter(|(_, worker)| worker.actor == *actor) {
            let node = nodes.iter().find(|node| node.name == worker.node);
            let lost = node.is_none_or(|node| matches!(node.state, NodeState::Lost { .. }));
            assert!(lost, "{actor}: {incarnation} is started while {other} lives on {node:?}");
        }
        let state = nodes.iter().find(|other| other.name == node).map(|node| &node.state);
        assert_eq!(state, Some(&NodeState::Ready), "{actor} is started on {node}");
        self.check_device(node, order);
        self.check_bundle(node, order);
    }

    /// PL-1: a device has one owner, also counting processes that are fenced or are being ended.
    fn check_device(&self, node: &str, order: &StartWorker) {
        let Some(device) = order.device.as_ref().map(|device| device.index) else { return };
        let owner =
            self.workers.iter().find(|(_, worker)| worker.node == node && worker.device == Some(device));
        assert!(owner.is_none(), "{} gets device {device} of {node}, where {owner:?} lives", order.actor);
    }

    /// PG-2: nothing starts in a bundle whose place is not durable.
    fn check_bundle(&self, node: &str, order: &StartWorker) {
        let spec = self.specs.iter().find(|spec| spec.name == order.actor).expect("known");
        let Placement::Bundle { group, index: Some(index) } = &spec.placement else { return };
        let Some(Record::PlacementGroup(record)) = self.durable.get(&format!("placement_group/{group}"))
        else {
            panic!("{}: the group is not durable", order.actor);
        };
        let place = record.places.get(index).unwrap_or_else(|| panic!("bundle {index} has no durable place"));
        assert_eq!(place.node, node, "{}", order.actor);
        let device = order.device.as_ref().map(|device| device.index);
        assert!(device.is_some_and(|device| place.devices.contains(&device)), "{} in {place:?}", order.actor);
    }

    /// PG-1: bundles get their places all together. And no two on one node, as the strategy wants it.
    pub(super) fn check_write(&self, write: &Write) {
        let Write::Put(record) = write else { return };
        let Record::PlacementGroup(record) = &**record else { return };
        let (places, all) = (record.places.len(), record.spec.bundles.len());
        assert!(record.created || places == 0, "{places} of {all} bundles before the group was created");
        let nodes: std::collections::BTreeSet<&str> =
            record.places.values().map(|place| place.node.as_str()).collect();
        assert_eq!(nodes.len(), places, "each bundle is on a node of its own: {:?}", record.places);
    }

    /// PL-1: no more is promised on a node than it has.
    pub(super) fn check_promises(&self) {
        for node in self.head().node_status() {
            assert!(node.used.cpus <= Quantity::whole(node.cpus), "{} promises {}", node.name, node.used);
        }
    }
}
