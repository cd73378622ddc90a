//! Nodes as the head sees them: who is connected, who is silent, and which worker processes they report.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::record::{DrainRecord, NodeRecord, Record};
use super::{Command, HeadState, Key, Manner, Patience};
use crate::handle::Incarnation;
use crate::head::messages::{NodeReport, NodeStage, ProcessStatus, WorkerProcess};
use crate::head::placement::Offer;
use crate::package::Digest;
use crate::spec::{DeathCause, Device, DeviceKind};

/// How often a node without an agent is looked at again, at least.
const SPARE_LOOK: Duration = Duration::from_millis(1500);

/// One node.
#[derive(Debug)]
pub(super) struct Node {
    record: NodeRecord,
    /// Where its agent listens; empty until it reports.
    pub(super) endpoint: String,
    pub(super) pid: u32,
    pub(super) reach: Reach,
    leaving: bool,
    /// When actors that fit nowhere else must go, too.
    drain_until: Option<Duration>,
    /// Last report, so that one that was overtaken is ignored.
    seq: u64,
    /// Worker processes that run there, as it reports, and that no actor of this head goes by. They are being ended.
    pub(super) strays: BTreeMap<Incarnation, WorkerProcess>,
    /// Packages that it has.
    pub(super) packages: Vec<Digest>,
}

/// Whether a node is heard of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reach {
    /// It reports.
    Connected { heard: Duration },
    /// It is silent or its connection broke; its actors are kept for a while.
    Unreachable { since: Duration, until: Duration, why: String, awaited: bool },
    /// It was silent for too long; its actors are fenced.
    Lost { why: String },
}

impl Node {
    pub(super) fn recovered(record: NodeRecord, now: Duration, grace: Duration) -> Self {
        let why = "has not reported since the head restarted".into();
        let drain_until = record.drain.map(|drain| now + drain.grace);
        Self {
            drain_until,
            record,
            endpoint: String::new(),
            pid: 0,
            reach: Reach::Unreachable { since: now, until: now + grace, why, awaited: true },
            leaving: false,
            seq: 0,
            strays: BTreeMap::new(),
            packages: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.record.name
    }

    pub(super) fn devices(&self) -> &[Device] {
        &self.record.devices
    }

    pub(super) fn record(&self) -> &NodeRecord {
        &self.record
    }

    pub(super) fn device(&self, index: u32) -> Option<&Device> {
        self.record.devices.iter().find(|device| device.index == index)
    }

    /// Who owns a device though no actor of this head does.
    pub(super) fn stray_on(&self, device: u32) -> Option<String> {
        let stray = self.strays.values().find(|process| process.device == Some(device))?;
        Some(format!("an old incarnation of {}", stray.actor))
    }

    /// Begins or ends a drain.
    pub(super) fn drain(&mut self, drain: Option<DrainRecord>, now: Duration) -> NodeRecord {
        self.record.drain = drain;
        self.drain_until = drain.map(|drain| now + drain.grace);
        self.record.clone()
    }

    /// When the drain's grace ends, if the node is drained.
    pub(super) fn drain_until(&self) -> Option<Duration> {
        self.drain_until
    }

    /// Whether it is to leave once no actor is on it, and no other process holds it.
    pub(super) fn may_leave(&self) -> bool {
        self.record.drain.is_some_and(|drain| drain.leave) && self.strays.is_empty() && !self.leaving
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(self.reach, Reach::Connected { .. })
    }

    /// Whether the head, restarted, still waits for its first report.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(self.reach, Reach::Unreachable { awaited: true, .. })
    }

    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(super) fn deadline(&self, patience: &Patience) -> Option<Duration> {
        match self.reach {
            Reach::Connected { heard } => Some(heard + patience.heartbeat_timeout),
            Reach::Unreachable { until, .. } => Some(until),
            Reach::Lost { .. } => None,
        }
    }

    /// When a head that lost this node should let another one try; `None` unless it was here and is now silent.
    pub(super) fn missed_at(&self) -> Option<Duration> {
        match self.reach {
            Reach::Unreachable { since, until, awaited: false, .. } => Some(since + (until - since) / 2),
            Reach::Unreachable { awaited: true, .. } | Reach::Connected { .. } | Reach::Lost { .. } => None,
        }
    }

    /// Why nothing may be placed here, if so.
    pub(super) fn closed(&self) -> Option<String> {
        match &self.reach {
            Reach::Connected { .. } if self.leaving => Some("is leaving".into()),
            Reach::Connected { .. } if self.drain_until.is_some() => Some("is being drained".into()),
            Reach::Connected { .. } => None,
            Reach::Unreachable { why, .. } => Some(format!("is unreachable: it {why}")),
            Reach::Lost { why } => Some(format!("is lost: it {why}")),
        }
    }
}

impl HeadState {
    /// Whether this report is taken. A second agent of the same name is refused while the first is heard. HD-4: a node
    /// that was lost registers anew, by which it also refuses orders that reached it late.
    pub fn admits(&self, report: &NodeReport) -> Result<(), String> {
        match self.nodes.get(&report.name) {
            Some(node) if node.is_connected() && node.record.boot != report.boot => Err(format!(
                "a node named {:?} has already joined (agent pid {} at {}); give this one another name",
                report.name, node.pid, node.endpoint
            )),
            Some(Node { reach: Reach::Lost { why }, .. }) if !report.registering => {
                Err(format!("the node was given up, because it {why}, and must register anew"))
            }
            // Its registration refuses what an earlier head had ordered and is still on its way.
            None | Some(Node { reach: Reach::Unreachable { awaited: true, .. }, .. })
                if !report.registering =>
            {
                Err("the node must register at this head first".to_owned())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn node_report(&mut self, report: NodeReport) {
        if self.admits(&report).is_err() || self.overtaken(&report) {
            return;
        }
        let name = report.name.clone();
        self.update_node(&report);
        for process in &report.workers {
            match &process.status {
                ProcessStatus::Running => self.worker_runs(&name, process),
                ProcessStatus::Exited { cause, last_words } => {
                    self.note_last_words(&process.actor, process.incarnation, last_words.as_deref());
                    self.exited(&process.actor, process.incarnation, cause.clone());
                }
            }
        }
        let listed: HashSet<Incarnation> = report.workers.iter().map(|process| process.incarnation).collect();
        for (actor, incarnation, confirmed) in self.actors_on(&name) {
            let listed = listed.contains(&incarnation);
            // HD-3: an order that a registering node does not know was lost: the node refuses it if it still arrives.
            if !listed && (confirmed || report.registering) {
                let why = format!("the agent of node {name} no longer knows it");
                self.exited(&actor, incarnation, DeathCause::Vanished { why });
            }
        }
        if report.stage == NodeStage::Left {
            self.node_left(&name);
        }
    }

    fn overtaken(&self, report: &NodeReport) -> bool {
        self.nodes
            .get(&report.name)
            .is_some_and(|node| node.record.boot == report.boot && report.seq <= node.seq)
    }

    fn update_node(&mut self, report: &NodeReport) {
        let record = NodeRecord {
            name: report.name.clone(),
            boot: report.boot,
            devices: report.devices.clone(),
            capacity: report.capacity.clone(),
            labels: report.labels.clone(),
            drain: self.nodes.get(&report.name).and_then(|node| node.record.drain),
        };
        let grace = self.patience.node_grace;
        let known = self.nodes.get(&report.name).map(|node| node.record == record);
        let node = self
            .nodes
            .entry(report.name.clone())
            .or_insert_with(|| Node::recovered(record.clone(), self.now, grace));
        let leaving = report.stage != NodeStage::Serving;
        let opened = !node.is_connected() || node.leaving != leaving;
        self.changed |= opened;
        self.replan |= opened || report.registering;
        node.reach = Reach::Connected { heard: self.now };
        node.leaving = leaving;
        node.endpoint.clone_from(&report.addr.endpoint);
        node.pid = report.pid;
        node.seq = report.seq;
        // What still runs is noted again below.
        self.replan |= !node.strays.is_empty();
        node.strays.clear();
        node.packages.clone_from(&report.packages);
        if known != Some(true) {
            node.record = record.clone();
            (self.changed, self.replan) = (true, true);
            let devices: Vec<u32> = record.devices.iter().map(|device| device.index).collect();
            self.drop_bundles(&report.name, |slot| slot.devices.iter().any(|index| !devices.contains(index)));
            self.persist(Record::Node(record));
        }
        if self.closing && !leaving {
            self.out.push(Command::StopNode { node: report.name.clone() });
        }
    }

    /// A process that the node reports as running: the present one is confirmed, one that nobody remembers after a
    /// restart of the head is adopted, any other is fenced.
    fn worker_runs(&mut self, node: &str, process: &WorkerProcess) {
        let incarnation = process.incarnation;
        let as_known = self.actors.get(&process.actor).is_some_and(|actor| actor.serves_as(process));
        if as_known {
            return;
        }
        self.adopt(&process.actor, incarnation, node, process.device);
        let current = self.actors.get_mut(&process.actor).and_then(|actor| actor.process_mut(incarnation));
        let manner = match current {
            Some((live, stopping)) => {
                self.changed |= live.pid != Some(process.pid);
                live.confirmed = true;
                live.pid = Some(process.pid);
                if !stopping {
                    return;
                }
                live.manner
            }
            None => {
                let node = self.nodes.get_mut(node);
                node.map(|node| node.strays.insert(incarnation, process.clone()));
                Manner::Kill
            }
        };
        self.out.push(Command::StopWorker { node: node.to_owned(), incarnation, manner });
    }

    pub(super) fn node_disconnected(&mut self, name: &str, boot: u64) {
        let Patience { agent_grace, node_grace, .. } = self.patience;
        // What lives on without its agent is given up early only where it may go on elsewhere.
        let elsewhere = self.nodes.values().any(|node| node.is_connected() && node.name() != name);
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.record.boot == boot) else { return };
        if node.is_connected() {
            let why = "closed its connection".to_owned();
            let grace = if elsewhere { agent_grace.min(node_grace) } else { node_grace };
            let (since, until) = (self.now, self.now + grace);
            node.reach = Reach::Unreachable { since, until, why, awaited: false };
            (self.changed, self.replan) = (true, true);
            self.node_silent(name);
        }
    }

    /// The agent said goodbye: nothing of it is left.
    pub(super) fn node_left(&mut self, name: &str) {
        for (actor, incarnation, _) in self.actors_on(name) {
            let why = "the node left the cluster".to_owned();
            self.exited(&actor, incarnation, DeathCause::NodeLost { node: name.to_owned(), why });
        }
        self.drop_bundles(name, |_| true);
        self.nodes.remove(name);
        self.forget(Key::Node(name.to_owned()));
        (self.changed, self.replan) = (true, true);
    }

    /// Declares nodes unreachable and lost as time passes.
    pub(super) fn check_nodes(&mut self) {
        let now = self.now;
        let due = |node: &&mut Node| node.deadline(&self.patience).is_some_and(|deadline| deadline <= now);
        let (mut lost, mut silent) = (Vec::new(), Vec::new());
        for node in self.nodes.values_mut().filter(due) {
            (self.changed, self.replan) = (true, true);
            match node.reach {
                Reach::Connected { heard } => {
                    let why = format!("was silent for {} ms", (now - heard).as_millis());
                    silent.push(node.record.name.clone());
                    // Its grace counts from the last sign of life.
                    let until = heard + self.patience.node_grace;
                    node.reach = Reach::Unreachable { since: heard, until, why, awaited: false };
                    if until <= now {
                        lost.push(node.record.name.clone());
                    }
                }
                Reach::Unreachable { .. } => lost.push(node.record.name.clone()),
                Reach::Lost { .. } => {}
            }
        }
        lost.retain(|name| !self.spares_gpus(name));
        silent.iter().for_each(|name| self.node_silent(name));
        lost.iter().for_each(|name| self.lose_node(name));
    }

    /// Whether the node is given more time, because a worker on it that owns a GPU still reports: its agent is gone, and
    /// the machine is not.
    fn spares_gpus(&mut self, name: &str) -> bool {
        let look = self.patience.agent_grace.max(SPARE_LOOK);
        let recent = self.now.saturating_sub(look);
        let on_node = self.actors.on_node(name);
        let is_gpu = |index: u32| {
            let device = self.nodes.get(name).and_then(|node| node.device(index));
            device.is_some_and(|device| matches!(device.kind, DeviceKind::Cuda { .. }))
        };
        let speaks = |actor: &String| {
            let live = self.actors.get(actor).and_then(|actor| actor.process());
            live.is_some_and(|live| {
                live.slot.device.is_some_and(is_gpu) && live.heard.is_some_and(|at| at > recent)
            })
        };
        let spared = on_node.iter().any(speaks);
        let end = self.now + look;
        match self.nodes.get_mut(name).map(|node| &mut node.reach) {
            Some(Reach::Unreachable { since, until, .. }) if spared => {
                let last = *since + self.patience.gpu_grace;
                *until = end.min(last);
                last > self.now
            }
            _ => false,
        }
    }

    fn lose_node(&mut self, name: &str) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let Reach::Unreachable { why, .. } = &node.reach else { return };
        let why = why.clone();
        node.reach = Reach::Lost { why: why.clone() };
        node.strays.clear();
        for (actor, incarnation, _) in self.actors_on(name) {
            let fenced = format!("node {name} was lost: it {why}");
            self.out.push(Command::DismissWorker { incarnation, why: fenced });
            let cause = DeathCause::NodeLost { node: name.to_owned(), why: format!("it {why}") };
            self.exited(&actor, incarnation, cause);
        }
        self.drop_bundles(name, |_| true);
    }

    /// Actors with a process on the node: name, incarnation, and whether the node has confirmed it.
    fn actors_on(&mut self, node: &str) -> Vec<(String, Incarnation, bool)> {
        let names = self.actors.on_node(node);
        let process = |name: String| {
            let live = self.actors.get(&name)?.process()?;
            Some((name, live.incarnation, live.confirmed))
        };
        names.into_iter().filter_map(process).collect()
    }

    /// Nodes on which a fenced process of an actor has not ended yet, by actor.
    pub(super) fn strays(&self) -> HashMap<String, String> {
        let of = |node: &Node| {
            let name = node.name().to_owned();
            node.strays.values().map(move |process| (process.actor.clone(), name.clone())).collect::<Vec<_>>()
        };
        self.nodes.values().flat_map(of).collect()
    }

    /// What each node has free.
    pub(super) fn offers(&self) -> Vec<Offer> {
        let mut offers: Vec<Offer> = self.nodes.values().map(|node| self.offer(node)).collect();
        self.offer_less_bundles(&mut offers);
        offers
    }

    fn offer(&self, node: &Node) -> Offer {
        let NodeRecord { name, capacity, labels, devices, .. } = node.record();
        let usage = self.actors.usage(name);
        let owner = |index: u32| {
            let owner = usage.and_then(|usage| usage.devices.get(&index)).cloned();
            owner.or_else(|| node.stray_on(index))
        };
        Offer {
            node: name.clone(),
            closed: node.closed(),
            labels: labels.clone(),
            devices: devices.iter().map(|device| (device.index, owner(device.index))).collect(),
            cpus: capacity.cpus.into(),
            memory: capacity.memory,
            custom: capacity.custom.clone(),
            used: usage.map(|usage| usage.resources.clone()).unwrap_or_default(),
            actors: usage.map_or(0, |usage| usage.actors.len()),
        }
    }
}
