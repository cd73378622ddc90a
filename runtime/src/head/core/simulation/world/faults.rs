//! What can break in the simulated world, and how it heals.

use std::time::Duration;

use super::{AGENT_GRACE, Link, NODES, What, World};
use crate::cluster::status::{ActorState, ActorStatus};
use crate::handle::Incarnation;
use crate::head::core::Manner;
use crate::spec::DeathCause;

impl World {
    /// No actor fails by itself from now on.
    pub(in super::super) fn spare(&mut self) {
        self.healed = true;
    }

    /// The actor's worker is killed.
    pub(in super::super) fn kill(&mut self, actor: &str) {
        for incarnation in self.alive(actor) {
            self.die(incarnation, DeathCause::Killed { signal: 9 });
        }
    }

    /// All agents fall silent for 10 s.
    pub(in super::super) fn freeze_all(&mut self) {
        for name in NODES {
            let node = self.nodes.get_mut(name).expect("known");
            node.frozen = true;
            let boot = node.boot;
            self.at(self.now + Duration::from_secs(10), What::Thaw(name.to_owned(), boot));
        }
    }

    /// Something breaks.
    pub(in super::super) fn fault(&mut self) {
        let name = NODES[self.roll(3) as usize].to_owned();
        let victim = self.roll(self.workers.len() as u64) as usize;
        let victim = self.workers.keys().nth(victim).copied();
        match (self.roll(14), victim) {
            (0..=2, Some(victim)) => {
                self.note_killed(victim);
                self.die(victim, DeathCause::Killed { signal: 9 });
            }
            (3, _) => self.kill_agent(&name, 3000),
            (4, _) => self.kill_agent(&name, 20_000),
            (5, _) => self.kill_host(&name),
            (6, _) => self.freeze(&name),
            (7, _) if !self.store_down => self.crash_head(),
            (12 | 13, _) if !self.store_down => self.depose(true),
            (8, _) => self.cut(&Link::Node(name)),
            (9, Some(victim)) => self.cut(&Link::Worker(victim)),
            (10, _) => self.store_down = !self.store_down,
            _ => self.request(),
        }
        self.flush();
    }

    fn kill_agent(&mut self, name: &str, back_ms: u64) {
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot == 0 {
            return;
        }
        self.cut(&Link::Node(name.to_owned()));
        let now = self.now;
        let node = self.nodes.get_mut(name).expect("known");
        (node.boot, node.frozen, node.alone_since) = (0, false, now);
        let orphans: Vec<_> =
            self.workers.iter().filter(|(_, worker)| worker.node == name).map(|(i, _)| *i).collect();
        for orphan in orphans {
            self.at(now + AGENT_GRACE, What::Orphaned(orphan));
        }
        self.after(back_ms, What::StartAgent(name.to_owned()));
    }

    fn kill_host(&mut self, name: &str) {
        self.kill_agent(name, 20_000);
        self.workers.retain(|_, worker| worker.node != name);
        self.nodes.get_mut(name).expect("known").ends.clear();
    }

    fn freeze(&mut self, name: &str) {
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot != 0 && !node.frozen {
            node.frozen = true;
            let boot = node.boot;
            self.after(10_000, What::Thaw(name.to_owned(), boot));
        }
    }

    /// For what must follow: whether the head counted on that life.
    fn note_killed(&mut self, victim: Incarnation) {
        let Some(head) = &self.head else { return };
        let counts = |actor: &ActorStatus| {
            let lives = matches!(actor.state, ActorState::Ready | ActorState::Starting { .. });
            actor.incarnation == victim && lives
        };
        if let Some(actor) = head.actor_status().into_iter().find(counts) {
            self.killed.insert(actor.name, victim);
        }
    }

    /// Somebody asks for something. What has a supervisor is left to it.
    fn request(&mut self) {
        let free: Vec<String> =
            self.specs.iter().filter(|spec| spec.seat.is_none()).map(|spec| spec.name.clone()).collect();
        let which = self.roll(free.len() as u64) as usize;
        let Some(name) = free.get(which).cloned() else { return };
        let action = self.roll(6);
        let now = self.now;
        let Some(head) = self.head.as_mut() else { return };
        let commands = match action {
            0 => head.stop_actor(now, &name, "somebody", Manner::Graceful),
            1 => head.restart_actor(now, &name, "somebody"),
            3 | 4 => return self.drain_or_undo(action == 3),
            2 => {
                // Its actors stay dead until they are applied again.
                let commands = head.remove_placement_group(now, super::super::RESERVED).unwrap_or_default();
                self.carry_out(commands);
                return if self.roll(2) == 0 {
                    self.apply()
                };
            }
            _ => return self.apply(),
        };
        self.carry_out(commands.expect("known"));
    }

    fn drain_or_undo(&mut self, drain: bool) {
        let (node, grace) = (NODES[self.roll(3) as usize], Duration::from_millis(self.roll(5000)));
        let now = self.now;
        let Some(head) = self.head.as_mut() else { return };
        // A head that starts anew may not know the node yet.
        let commands = match drain {
            true => head.drain_node(now, node, grace, false),
            false => head.undrain_node(now, node),
        };
        self.carry_out(commands.unwrap_or_default());
    }

    /// The node is to be empty, and to stay.
    pub(in super::super) fn drain(&mut self, node: &str, grace: Duration) {
        let commands = self.head.as_mut().expect("there is a head").drain_node(self.now, node, grace, false);
        self.carry_out(commands.expect("known"));
    }

    pub(in super::super) fn undrain(&mut self, node: &str) {
        let commands = self.head.as_mut().expect("there is a head").undrain_node(self.now, node);
        self.carry_out(commands.unwrap_or_default());
    }

    /// Nothing breaks any more, and what is broken is repaired.
    pub(in super::super) fn heal(&mut self) {
        self.healed = true;
        self.store_down = false;
        let lease = self.lease_until.saturating_sub(self.now);
        self.run_for(lease);
        self.flush();
        self.start_head();
        for name in NODES {
            let boot = self.nodes[name].boot;
            self.thaw(name, boot);
            self.start_agent(name);
        }
        self.apply();
        self.flush();
        // The head has heard of all nodes by then.
        self.run_for(Duration::from_secs(8));
        NODES.iter().for_each(|name| self.undrain(name));
        self.apply();
    }
}
