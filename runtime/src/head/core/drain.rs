//! Draining a node: nothing new goes there, and what is there goes elsewhere.
//!
//! DR-1: an actor that fits elsewhere moves at once; one that fits nowhere else goes on until the deadline, and then waits
//! for a place. DR-2: a drain is durable, and ends only by `undrain` or when the node leaves. A move is a stop and a new
//! incarnation elsewhere; it is no failure, so it does not count against `max_restarts`.

use std::collections::BTreeSet;
use std::time::Duration;

use super::actors::{Life, Then};
use super::nodes::{Node, Reach};
use super::record::{DrainRecord, Record};
use super::{Command, HeadState};
use crate::head::placement::{Offer, Places, Request, place, plan};
use crate::spec::{ActorSpec, Placement};

/// No node has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no node {name:?}; nodes are {known}")]
pub struct NoSuchNode {
    name: String,
    known: String,
}

impl HeadState {
    fn known_node(&mut self, name: &str) -> Result<&mut Node, NoSuchNode> {
        let known = self.nodes.keys().cloned().collect::<Vec<_>>().join(", ");
        self.nodes.get_mut(name).ok_or(NoSuchNode { name: name.to_owned(), known })
    }

    /// Empties a node. What fits nowhere else goes on for `grace`. With `leave` the node's agent ends when nothing is left
    /// on it; a node that is lost already is forgotten.
    pub fn drain_node(
        &mut self,
        now: Duration,
        name: &str,
        grace: Duration,
        leave: bool,
    ) -> Result<Vec<Command>, NoSuchNode> {
        self.now = now;
        let node = self.known_node(name)?;
        if leave && matches!(node.reach, Reach::Lost { .. }) {
            self.node_left(name);
            return Ok(self.finish());
        }
        let record = node.drain(Some(DrainRecord { grace, leave }), now);
        self.persist(Record::Node(record));
        (self.changed, self.replan) = (true, true);
        Ok(self.finish())
    }

    /// The node takes actors again.
    pub fn undrain_node(&mut self, now: Duration, name: &str) -> Result<Vec<Command>, NoSuchNode> {
        self.now = now;
        let record = self.known_node(name)?.drain(None, now);
        self.persist(Record::Node(record));
        (self.changed, self.replan) = (true, true);
        Ok(self.finish())
    }

    /// Moves what can be moved from nodes that are drained, and what must; lets those go that are empty.
    pub(super) fn move_from_drained(&mut self, replan: bool) {
        let draining = |node: &&Node| node.is_connected() && node.drain_until().is_some();
        let due = |node: &Node| node.drain_until().is_some_and(|until| until <= self.now);
        let drained: Vec<(String, bool)> = self
            .nodes
            .values()
            .filter(draining)
            .filter(|node| replan || (due(node) && self.actors.usage(node.name()).is_some()))
            .map(|node| (node.name().to_owned(), due(node)))
            .collect();
        if drained.is_empty() || self.hold.is_some() {
            return;
        }
        let mut offers = self.offers();
        for (node, due) in drained {
            self.move_bundles(&node, due, &mut offers);
            for name in self.actors.on_node(&node) {
                let Some(actor) = self.actors.get(&name) else { continue };
                if matches!(actor.life, Life::Live(_))
                    && (self.fits_elsewhere(&actor.spec, &mut offers) || due)
                {
                    let cause = crate::spec::DeathCause::stopped(format!("node {node} is being drained"));
                    self.retire(&name, cause, Then::Restart);
                }
            }
            self.let_go(&node);
        }
    }

    /// Whether there is room, which is then taken in these offers; the node itself offers nothing any more.
    fn fits_elsewhere(&self, spec: &ActorSpec, offers: &mut [Offer]) -> bool {
        let ActorSpec { resources, placement, selector, .. } = spec;
        if matches!(placement, Placement::Bundle { .. }) {
            // It moves with its bundle.
            return false;
        }
        let Ok(slot) = place(&Request { resources, placement, selector, last: None }, offers) else {
            return false;
        };
        if let Some(offer) = super::bundles::offer_of(offers, &slot.node) {
            offer.take(resources, slot.device.as_slice(), &spec.name);
        }
        true
    }

    /// Bundles on the node are given up where there is room for them elsewhere, or when it is time; their actors end,
    /// and start where the bundles are placed anew.
    fn move_bundles(&mut self, node: &str, due: bool, offers: &mut [Offer]) {
        for name in self.groups_on(node) {
            let Some(group) = self.placement_groups.get(&name) else { continue };
            let kept: Places = group.places_but(node);
            let planned = plan(group.spec(), &kept, offers);
            if let Ok(places) = &planned {
                group.take_from(offers, places);
            } else if !due {
                continue;
            }
            let inside: BTreeSet<String> = self.actors_in(&name, node);
            self.drop_group_bundles(&name, node);
            for actor in inside {
                let cause = crate::spec::DeathCause::stopped(format!("node {node} is being drained"));
                self.retire(&actor, cause, Then::Restart);
            }
        }
    }

    /// Has the node leave, if that was asked for and nothing is left on it.
    fn let_go(&mut self, name: &str) {
        let empty = self.actors.on_node(name).is_empty();
        if let Some(node) = self.nodes.get(name).filter(|node| empty && node.may_leave()) {
            self.out.push(Command::StopNode { node: node.name().to_owned() });
        }
    }
}
