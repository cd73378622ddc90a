//! Workers of the simulated world: they report, are told, and end.

use std::collections::BTreeMap;

use super::{Link, What, Worker, World, addr};
use crate::group::GroupView;
use crate::handle::{ActorId, Incarnation};
use crate::head::core::{Command, Event};
use crate::head::messages::{CreateActor, StartWorker, WorkerPhase, WorkerReport};
use crate::head::tenure::Allegiance;
use crate::spec::DeathCause;

/// MS-4: a rank of a mesh is told its own address, and addresses that are whole.
fn check_peers(order: &CreateActor) {
    let Some(member) = order.spec.group.as_ref().filter(|_| order.spec.mesh.is_some()) else { return };
    let own = order.peers[member.rank as usize].as_ref().map(|addr| addr.incarnation);
    assert_eq!(own, Some(order.incarnation), "rank {} is told of itself", member.rank);
    for addr in order.peers.iter().flatten() {
        assert_eq!(addr.process.0, addr.incarnation.0, "{addr} mixes two lives");
    }
}

impl World {
    pub(super) fn start_worker(&mut self, name: &str, order: StartWorker) {
        let node = self.nodes.get_mut(name).expect("known");
        let incarnation = order.incarnation;
        if self.workers.contains_key(&incarnation) || node.ends.contains_key(&incarnation) {
            return;
        }
        if order.report_seq < node.registered_seq || incarnation <= node.ordered {
            let event = Event::StartFailed { incarnation, message: "outdated".into() };
            let link = Link::Node(name.to_owned());
            return self.send(&link.clone(), |generation| What::ToHead(link, generation, event));
        }
        node.ordered = incarnation;
        let worker = Worker {
            allegiance: Allegiance::default(),
            joined: 0,
            late_epoch: 0,
            actor: order.actor,
            node: name.to_owned(),
            device: order.device.map(|device| device.index),
            phase: WorkerPhase::Waiting,
            seq: 0,
            views: BTreeMap::new(),
        };
        self.workers.insert(incarnation, worker);
        let link = Link::Worker(incarnation);
        self.links.entry(link.clone()).or_default();
        self.after(50, What::Connect(link));
        self.report_node(name, false);
    }

    pub(super) fn report_worker(&mut self, incarnation: Incarnation, registering: bool) {
        let Some(worker) = self.workers.get_mut(&incarnation) else { return };
        worker.seq += 1;
        let announced =
            matches!(worker.phase, WorkerPhase::Ready(_)).then(|| worker.actor.clone().into_bytes());
        let report = WorkerReport {
            actor: worker.actor.clone(),
            incarnation,
            seq: worker.seq,
            registering,
            addr: addr(ActorId::WORKER, Incarnation(0), incarnation.0),
            pid: incarnation.0 as u32,
            node: worker.node.clone(),
            device: worker.device,
            phase: worker.phase.clone(),
            announced,
            views: worker.views.iter().map(|(group, view)| (group.clone(), view.epoch)).collect(),
            held: if registering { worker.views.values().cloned().collect() } else { Vec::new() },
            term: 0,
        };
        let link = Link::Worker(incarnation);
        self.send(&link.clone(), |generation| What::ToHead(link, generation, Event::WorkerReport(report)));
    }

    pub(super) fn worker_told(&mut self, link: &Link, command: Command) {
        let Link::Worker(incarnation) = *link else { return };
        let Some(worker) = self.workers.get_mut(&incarnation) else { return };
        match command {
            Command::CreateActor(order) if worker.phase == WorkerPhase::Waiting => {
                check_peers(&order);
                worker.phase = WorkerPhase::Creating(Default::default());
                self.after(200, What::Step(incarnation));
            }
            Command::SendView { view, .. } => self.view_arrives(incarnation, &view),
            Command::DismissWorker { .. } => {
                self.after(5, What::Die(incarnation, DeathCause::Exited { code: 1 }))
            }
            _ => {}
        }
    }

    /// GR-1, GR-2: never an older view after a newer one, and all that live agree on what an epoch says.
    fn view_arrives(&mut self, incarnation: Incarnation, view: &GroupView) {
        for worker in self.workers.values() {
            let held = worker.views.get(&view.group).filter(|held| held.epoch == view.epoch);
            assert!(held.is_none_or(|held| held == view), "epoch {} has two meanings", view.epoch);
        }
        let worker = self.workers.get_mut(&incarnation).expect("alive");
        let held = worker.views.get(&view.group).map_or(0, |held| held.epoch);
        if view.epoch < worker.late_epoch {
            // It crossed a late view of an older head. The worker passes the newer one on, and registers again.
            return;
        }
        assert!(view.epoch >= held, "{}: epoch {} after {held}", worker.actor, view.epoch);
        worker.views.insert(view.group.clone(), view.clone());
    }

    pub(super) fn step(&mut self, incarnation: Incarnation) {
        let fails = !self.healed && self.roll(10) == 0;
        let Some(worker) = self.workers.get_mut(&incarnation) else { return };
        worker.phase = match fails {
            true => WorkerPhase::Ended(DeathCause::CreateFailed { message: "bad luck".into() }),
            false => WorkerPhase::Ready(addr(ActorId::named(&worker.actor), incarnation, incarnation.0)),
        };
        self.report_worker(incarnation, false);
        if fails {
            self.after(500, What::Die(incarnation, DeathCause::Exited { code: 1 }));
        }
    }

    pub(super) fn die(&mut self, incarnation: Incarnation, cause: DeathCause) {
        let Some(worker) = self.workers.remove(&incarnation) else { return };
        let name = worker.node.clone();
        let node = self.nodes.get_mut(&name).expect("known");
        node.ends.insert(incarnation, (worker, cause));
        self.report_node(&name, false);
    }
}
