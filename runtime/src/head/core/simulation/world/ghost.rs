//! A leader that was replaced and does not know it yet: it was frozen or cut off, its clock runs at a pace of its own,
//! and what it had sent, or still sends, arrives late.

use std::time::Duration;

use super::{Link, What, World};
use crate::handle::Incarnation;
use crate::head::core::{Command, Event, HeadState};
use crate::head::tenure::Tenure;

/// How long a leader that is silent in the store leads.
const TTL: Duration = Duration::from_secs(2);

pub(super) struct Ghost {
    head: HeadState,
    tenure: Tenure,
    /// How fast its clock runs: 0.95 to 1.05.
    pace: f64,
    /// Whether somebody asks it for something.
    asked: bool,
}

impl World {
    /// The leader is frozen, or cut off from the store: another is elected when its lease has run out. It goes on
    /// believing that it leads, and wakes now and then; with `asked` somebody has it restart actors.
    pub(in super::super) fn depose(&mut self, asked: bool) {
        let Some(head) = self.head.take() else { return };
        let pace = 0.95 + self.roll(1001) as f64 / 10_000.0;
        let renewed = self.now.saturating_sub(Duration::from_millis(self.roll(500)));
        let tenure = Tenure::leased(self.head_run, TTL, true, renewed.mul_f64(pace));
        self.ghost = Some(Ghost { head, tenure, pace, asked });
        // The guard of its writes does not hold any more; what it had sent is still on its way.
        self.unwritten.clear();
        self.durables.clear();
        self.ticks = None;
        self.hold_up();
        self.links.values_mut().for_each(|(generation, _)| *generation += 1);
        // At the very moment, at times: then only the margin keeps them apart.
        let late = self.roll(500) * self.roll(2);
        let elected = renewed + TTL + Duration::from_millis(late);
        self.lease_until = elected;
        self.at(elected, What::StartHead);
        for _ in 0..4 {
            self.after(8000, What::Haunt);
        }
        let soon = Duration::from_millis(1 + self.roll(40));
        self.at(elected + soon, What::Haunt);
    }

    /// Messages of the old leader are not lost with its lease.
    fn hold_up(&mut self) {
        let term = self.head_run;
        let flying: Vec<u64> = self.whats.keys().copied().collect();
        for id in flying {
            let command =
                match self.whats.get(&id) {
                    Some(
                        What::ToNode(link, generation, command) | What::ToWorker(link, generation, command),
                    ) if self.is_open(link, *generation) => command.clone(),
                    _ => continue,
                };
            self.send_late(term, command);
        }
    }

    fn send_late(&mut self, term: u64, command: Command) {
        let boot = match &command {
            Command::StartWorker { node, .. }
            | Command::StopWorker { node, .. }
            | Command::PrepareBundles { node, .. }
            | Command::StopNode { node } => self.nodes[node].boot,
            _ => 0,
        };
        // In order, as one connection has it.
        let delay = Duration::from_micros(self.roll(1_500_000));
        self.late_last = (self.now + delay).max(self.late_last + Duration::from_nanos(1));
        self.at(self.late_last, What::Late(term, boot, command));
    }

    /// The old leader wakes for a moment and acts on what it believes.
    pub(super) fn haunt(&mut self) {
        let Some(mut ghost) = self.ghost.take() else { return };
        let mut commands = ghost.head.handle(self.now, Event::Tick);
        if ghost.asked {
            let which = self.roll(self.specs.len() as u64) as usize;
            let name = self.specs[which].name.clone();
            commands.extend(ghost.head.restart_actor(self.now, &name, "").expect("known"));
        }
        for command in commands {
            if matches!(command, Command::Persist(_) | Command::AwaitDurable { .. }) {
                // Its transaction does not happen.
                continue;
            }
            if !ghost.tenure.may_act(self.now.mul_f64(ghost.pace)) {
                self.fenced += 1;
                continue;
            }
            assert!(self.head.is_none(), "HA-1: two heads give orders at {:?}", self.now);
            if let Command::StartWorker { order, .. } = &command {
                self.highest = self.highest.max(order.incarnation);
            }
            self.send_late(ghost.head.term(), command);
        }
        self.ghost = Some(ghost);
    }

    /// An order of an old leader arrives.
    pub(super) fn arrive_late(&mut self, term: u64, boot: u64, command: Command) {
        let (link, joined, obeyed) = match &command {
            Command::StartWorker { node: name, .. }
            | Command::StopWorker { node: name, .. }
            | Command::PrepareBundles { node: name, .. }
            | Command::StopNode { node: name } => {
                let node = self.nodes.get_mut(name).expect("known");
                if node.boot == 0 || node.boot != boot {
                    return;
                }
                if node.frozen {
                    let again = self.now + Duration::from_millis(100);
                    return self.at(again, What::Late(term, boot, command));
                }
                (Link::Node(name.clone()), node.joined, node.allegiance.obey(term).is_ok())
            }
            Command::DismissWorker { incarnation, .. } | Command::SendView { incarnation, .. } => {
                let Some(worker) = self.workers.get_mut(incarnation) else { return };
                (Link::Worker(*incarnation), worker.joined, worker.allegiance.obey(term).is_ok())
            }
            Command::CreateActor(order) => {
                let Some(worker) = self.workers.get_mut(&order.incarnation) else { return };
                (Link::Worker(order.incarnation), worker.joined, worker.allegiance.obey(term).is_ok())
            }
            Command::AskJudge { .. }
            | Command::Persist(_)
            | Command::AwaitDurable { .. }
            | Command::DropPackage { .. } => return,
        };
        if !obeyed {
            self.refused += 1;
            return;
        }
        assert!(term >= joined, "HA-2: {link:?} of term {joined} obeys {command:?} of term {term}");
        match link {
            Link::Node(_) => self.node_told(link, command),
            Link::Worker(incarnation) => {
                let epoch = match &command {
                    Command::SendView { view, .. } => view.epoch,
                    _ => 0,
                };
                self.worker_told(&link, command);
                if let Some(worker) = self.workers.get_mut(&incarnation) {
                    worker.late_epoch = worker.late_epoch.max(epoch);
                }
            }
        }
    }

    /// A worker is registered. What an older head sent meanwhile is told, too.
    pub(super) fn registered(&mut self, incarnation: Incarnation, told: &[(String, u64)]) {
        self.joins(&Link::Worker(incarnation));
        let Some(worker) = self.workers.get(&incarnation) else { return };
        let has = worker.views.iter().map(|(group, view)| (group.clone(), view.epoch));
        if !has.eq(told.iter().cloned()) {
            self.report_worker(incarnation, true);
        }
    }

    /// The head that leads, in the newest term, is heard of at the end of that link.
    pub(super) fn joins(&mut self, link: &Link) {
        let term = self.head_run;
        let (joined, allegiance) = match link {
            Link::Node(name) => {
                let node = self.nodes.get_mut(name).expect("known");
                (&mut node.joined, &mut node.allegiance)
            }
            Link::Worker(incarnation) => {
                let Some(worker) = self.workers.get_mut(incarnation) else { return };
                (&mut worker.joined, &mut worker.allegiance)
            }
        };
        allegiance.obey(term).expect("the newest head is obeyed");
        *joined = term;
    }
}
