//! Nodes, workers, connections and a store that behave like the real ones, in virtual time.

mod checks;
mod faults;
mod ghost;
mod workers;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::ghost::Ghost;
use crate::group::GroupView;
use crate::handle::{ActorAddr, ActorId, Incarnation, ProcessId};
use crate::head::core::{Command, Event, HeadState, Manner, Patience, Record, Write};
use crate::head::messages::{
    Apply, NodeReport, NodeStage, PrepareBundles, ProcessStatus, StartWorker, WorkerPhase, WorkerProcess,
};
use crate::head::tenure::Allegiance;
use crate::spec::{ActorSpec, Capacity, DeathCause, Device, SupervisorSpec, Verdict};

const NODES: [&str; 3] = ["a", "b", "c"];
const DEVICES: u32 = 3;
const AGENT_GRACE: Duration = Duration::from_secs(10);

/// Something that is to happen.
#[derive(Debug, Clone)]
enum What {
    /// Over a connection; lost if the connection, or the head, is another one by then.
    ToHead(Link, u64, Event),
    ToNode(Link, u64, Command),
    ToWorker(Link, u64, Command),
    /// The head has taken a report that told of these ends.
    Heard(Link, u64, Vec<Incarnation>),
    Connect(Link),
    Heartbeat(String, u64),
    /// A worker makes its next step.
    Step(Incarnation),
    Die(Incarnation, DeathCause),
    StartHead,
    /// The head has taken a worker's registration that told of these views.
    Registered(Incarnation, u64, Vec<(String, u64)>),
    /// An order of an older head, to the agent with that boot.
    Late(u64, u64, Command),
    /// An older head wakes.
    Haunt,
    StartAgent(String),
    Thaw(String, u64),
    Flush,
    Tick,
    /// A worker without agent gives up.
    Orphaned(Incarnation),
}

/// The connection of a node or of a worker with the head.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Link {
    Node(String),
    Worker(Incarnation),
}

#[derive(Default)]
struct Node {
    /// Agent process, 0 for none.
    boot: u64,
    frozen: bool,
    seq: u64,
    registered_seq: u64,
    ordered: Incarnation,
    /// Ends that the head has not heard of.
    ends: BTreeMap<Incarnation, (Worker, DeathCause)>,
    alone_since: Duration,
    allegiance: Allegiance,
    /// Newest term whose head it has heard; what `allegiance` must go by.
    joined: u64,
}

#[derive(Debug, Clone)]
struct Worker {
    allegiance: Allegiance,
    joined: u64,
    /// Epoch of the last view that an older head sent.
    late_epoch: u64,
    actor: String,
    node: String,
    device: Option<u32>,
    phase: WorkerPhase,
    seq: u64,
    views: BTreeMap<String, GroupView>,
}

pub(super) struct World {
    rng: StdRng,
    now: Duration,
    specs: Vec<ActorSpec>,
    devices: u32,
    supervisors: Vec<SupervisorSpec>,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    whats: BTreeMap<u64, What>,
    count: u64,
    head: Option<HeadState>,
    /// Which head process; messages of another are lost.
    head_run: u64,
    ghost: Option<Ghost>,
    /// When the lease of the ghost ends in the store.
    lease_until: Duration,
    late_last: Duration,
    /// Orders that an older head did not give any more, and late ones that were refused.
    pub(super) fenced: u64,
    pub(super) refused: u64,
    ticks: Option<Duration>,
    durable: BTreeMap<String, Record>,
    unwritten: Vec<Write>,
    /// What a head wants to hear when all is written.
    durables: Vec<(u64, Event)>,
    store_down: bool,
    nodes: BTreeMap<String, Node>,
    workers: BTreeMap<Incarnation, Worker>,
    /// Generation of each connection, and the time of the last delivery on it, so that it keeps order.
    links: BTreeMap<Link, (u64, Duration)>,
    highest: Incarnation,
    healed: bool,
    /// Highest life of each actor that was killed while the head counted on it.
    pub(super) killed: BTreeMap<String, Incarnation>,
}

impl World {
    pub(super) fn new(seed: u64, specs: Vec<ActorSpec>) -> Self {
        Self::with_tree(seed, specs, Vec::new(), DEVICES)
    }

    /// The same where each node has so many devices.
    pub(super) fn with_devices(seed: u64, specs: Vec<ActorSpec>, devices: u32) -> Self {
        Self::with_tree(seed, specs, Vec::new(), devices)
    }

    /// The same with supervisors.
    pub(super) fn with_tree(
        seed: u64,
        specs: Vec<ActorSpec>,
        supervisors: Vec<SupervisorSpec>,
        devices: u32,
    ) -> Self {
        let mut world = Self {
            devices,
            rng: StdRng::seed_from_u64(seed),
            now: Duration::from_secs(1),
            specs,
            supervisors,
            queue: BinaryHeap::new(),
            whats: BTreeMap::new(),
            count: 0,
            head: None,
            head_run: 0,
            ghost: None,
            lease_until: Duration::ZERO,
            late_last: Duration::ZERO,
            fenced: 0,
            refused: 0,
            ticks: None,
            durable: BTreeMap::new(),
            unwritten: Vec::new(),
            durables: Vec::new(),
            store_down: false,
            nodes: NODES.iter().map(|name| ((*name).to_owned(), Node::default())).collect(),
            workers: BTreeMap::new(),
            links: BTreeMap::new(),
            highest: Incarnation(0),
            healed: false,
            killed: BTreeMap::new(),
        };
        world.start_head();
        world.apply();
        // Applied means durable.
        world.flush();
        for name in NODES {
            world.start_agent(name);
        }
        world
    }

    pub(super) fn head(&self) -> &HeadState {
        self.head.as_ref().expect("there is a head")
    }

    pub(super) fn alive(&self, actor: &str) -> Vec<Incarnation> {
        self.workers.iter().filter(|(_, worker)| worker.actor == actor).map(|(i, _)| *i).collect()
    }

    pub(super) fn view_of(&self, actor: &str, group: &str) -> Option<&GroupView> {
        self.workers.values().find(|worker| worker.actor == actor)?.views.get(group)
    }

    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.rng.random_range(0..below.max(1))
    }

    fn after(&mut self, ms: u64, what: What) {
        // Microseconds, so that few things happen at the same moment.
        let delay = Duration::from_micros(self.roll(ms * 1000));
        self.at(self.now + delay, what);
    }

    fn at(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.queue.push(Reverse((at, self.count)));
        self.whats.insert(self.count, what);
    }

    /// Sends over a connection, in order.
    fn send(&mut self, link: &Link, what: impl FnOnce(u64) -> What) {
        let delay = Duration::from_micros(self.roll(5000));
        let (generation, last) = self.links.entry(link.clone()).or_default();
        let at = (self.now + delay).max(*last + Duration::from_nanos(1));
        *last = at;
        let what = what(*generation);
        self.at(at, what);
    }

    fn is_open(&self, link: &Link, generation: u64) -> bool {
        self.links.get(link).is_some_and(|(present, _)| *present == generation)
    }

    /// Breaks a connection: what is on its way is lost. The node or worker connects again.
    fn cut(&mut self, link: &Link) {
        self.links.entry(link.clone()).or_default().0 += 1;
        if let Link::Node(name) = link {
            let boot = self.nodes[name].boot;
            let event = Event::NodeDisconnected { node: name.clone(), boot };
            let run = self.head_run;
            // The head hears of it from its own end of the connection.
            self.after(20, What::ToHead(Link::Worker(Incarnation(0)), run, event));
        }
        self.after(100, What::Connect(link.clone()));
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(Reverse((at, id))) = self.queue.peek().copied().filter(|Reverse((at, _))| *at <= end) {
            self.queue.pop();
            self.now = at;
            let what = self.whats.remove(&id).expect("queued");
            self.happen(what);
        }
        self.now = end;
    }

    fn happen(&mut self, what: What) {
        match what {
            What::ToHead(link, tag, event) => {
                // An event that the head makes by itself is tagged with the head's run.
                let own = link == Link::Worker(Incarnation(0));
                if if own { tag == self.head_run } else { self.is_open(&link, tag) } {
                    self.tell_head(&link, event);
                }
            }
            What::ToNode(link, generation, command) if self.is_open(&link, generation) => {
                self.joins(&link);
                self.node_told(link, command)
            }
            What::ToNode(Link::Node(node), _, Command::StartWorker { order, .. }) => {
                self.order_again(&node, order)
            }
            What::ToWorker(link, generation, command) if self.is_open(&link, generation) => {
                self.joins(&link);
                self.worker_told(&link, command);
            }
            What::ToNode(Link::Node(node), _, Command::PrepareBundles { order, .. }) => {
                self.prepare_again(&node, order);
            }
            What::ToNode(..) | What::ToWorker(..) => {}
            What::Heard(Link::Node(name), generation, ends)
                if self.is_open(&Link::Node(name.clone()), generation) =>
            {
                self.joins(&Link::Node(name.clone()));
                let node = self.nodes.get_mut(&name).expect("known");
                node.ends.retain(|incarnation, _| !ends.contains(incarnation));
            }
            What::Heard(..) => {}
            What::Connect(Link::Node(name)) => self.report_node(&name, true),
            What::Connect(Link::Worker(incarnation)) => self.report_worker(incarnation, true),
            What::Heartbeat(name, boot) if self.nodes[&name].boot == boot => {
                self.report_node(&name, false);
                self.at(self.now + Duration::from_secs(1), What::Heartbeat(name, boot));
            }
            What::Heartbeat(..) => {}
            What::Step(incarnation) => self.step(incarnation),
            What::Die(incarnation, cause) => self.die(incarnation, cause),
            What::StartHead => self.start_head(),
            What::Registered(incarnation, generation, told) => {
                if self.is_open(&Link::Worker(incarnation), generation) {
                    self.registered(incarnation, &told);
                }
            }
            What::Haunt => self.haunt(),
            What::Late(term, boot, command) => self.arrive_late(term, boot, command),
            What::StartAgent(name) => self.start_agent(&name),
            What::Thaw(name, boot) => self.thaw(&name, boot),
            What::Flush => self.flush(),
            What::Tick if self.ticks.is_some_and(|at| at <= self.now) => {
                self.ticks = None;
                self.feed(Event::Tick);
            }
            What::Tick => {}
            What::Orphaned(incarnation) => {
                let orphan = self.workers.get(&incarnation).is_some_and(|worker| {
                    let node = &self.nodes[&worker.node];
                    node.boot == 0 && self.now.saturating_sub(node.alone_since) >= AGENT_GRACE
                });
                if orphan {
                    self.die(incarnation, DeathCause::Exited { code: 1 });
                }
            }
        }
    }

    // The head ------------------------------------------------------------------------------------------------

    fn start_head(&mut self) {
        if self.head.is_some() {
            return;
        }
        if self.now < self.lease_until {
            return self.at(self.lease_until, What::StartHead);
        }
        self.head_run += 1;
        let records = self.durable.values().cloned().collect();
        let (head, commands) = HeadState::recover(Patience::default(), self.now, records);
        self.head = Some(head.in_term(self.head_run));
        self.carry_out(commands);
        self.flush();
        for link in self.links.keys().cloned().collect::<Vec<_>>() {
            self.after(300, What::Connect(link));
        }
    }

    pub(super) fn crash_head(&mut self) {
        if self.head.take().is_none() {
            return;
        }
        // Writes that were not durable are lost, and so is what is on its way.
        self.unwritten.clear();
        self.durables.clear();
        self.ticks = None;
        self.links.values_mut().for_each(|(generation, _)| *generation += 1);
        self.after(2000, What::StartHead);
    }

    fn apply(&mut self) {
        let specs = self.specs.clone();
        if let Some(head) = self.head.as_mut() {
            let group = head.apply_placement_group(self.now, super::placement_group()).expect("valid");
            self.carry_out(group);
        }
        if let Some(head) = self.head.as_mut() {
            let apply = Apply { supervisors: self.supervisors.clone(), ..Apply::merge(specs) };
            let (_, commands) = head.apply(self.now, apply).expect("valid");
            self.carry_out(commands);
        }
    }

    fn feed(&mut self, event: Event) {
        if let Some(head) = self.head.as_mut() {
            let commands = head.handle(self.now, event);
            self.carry_out(commands);
        }
    }

    fn tell_head(&mut self, link: &Link, event: Event) {
        let Some(head) = self.head.as_mut() else {
            return self.after(100, What::Connect(link.clone()));
        };
        if let Event::NodeReport(report) = &event {
            if head.admits(report).is_err() {
                return self.after(500, What::Connect(link.clone()));
            }
            let ended = report.workers.iter().filter(|worker| worker.status != ProcessStatus::Running);
            let ends = ended.map(|worker| worker.incarnation).collect();
            self.feed(event);
            return self.send(&link.clone(), |generation| What::Heard(link.clone(), generation, ends));
        }
        if let (Event::WorkerReport(report), Link::Worker(incarnation)) = (&event, link)
            && report.registering
        {
            let (incarnation, told) = (*incarnation, report.views.clone());
            self.send(link, |generation| What::Registered(incarnation, generation, told));
        }
        self.feed(event);
    }

    fn carry_out(&mut self, commands: Vec<Command>) {
        for command in commands {
            match &command {
                Command::StartWorker { node, order } => {
                    self.check_start(node, order);
                    self.highest = order.incarnation;
                    let link = Link::Node(node.clone());
                    self.send(&link.clone(), |generation| What::ToNode(link, generation, command));
                }
                Command::StopWorker { node, .. }
                | Command::StopNode { node }
                | Command::PrepareBundles { node, .. } => {
                    let link = Link::Node(node.clone());
                    self.send(&link.clone(), |generation| What::ToNode(link, generation, command));
                }
                Command::DismissWorker { incarnation, .. } | Command::SendView { incarnation, .. } => {
                    let link = Link::Worker(*incarnation);
                    self.send(&link.clone(), |generation| What::ToWorker(link, generation, command));
                }
                Command::CreateActor(order) => {
                    let link = Link::Worker(order.incarnation);
                    self.send(&link.clone(), |generation| What::ToWorker(link, generation, command));
                }
                Command::AwaitDurable { group, epoch } => {
                    let event = Event::BundlesDurable { group: group.clone(), epoch: *epoch };
                    self.durables.push((self.head_run, event));
                    self.after(20, What::Flush);
                }
                Command::AskJudge { question, .. } => {
                    let event = Event::Judged {
                        child: question.child.clone(),
                        incarnation: question.incarnation,
                        verdict: (self.roll(3) > 0).then_some(Verdict::Restart),
                    };
                    let run = self.head_run;
                    self.after(50, What::ToHead(Link::Worker(Incarnation(0)), run, event));
                }
                Command::DropPackage { .. } => {}
                Command::Persist(write) => {
                    self.check_write(write);
                    self.unwritten.push(write.clone());
                    self.after(20, What::Flush);
                }
            }
        }
        if self.head.is_some() {
            self.check_promises();
        }
        let deadline = self.head.as_ref().and_then(HeadState::next_deadline);
        if let Some(at) = deadline.filter(|at| self.ticks.is_none_or(|tick| *at < tick)) {
            self.ticks = Some(at);
            self.at(at.max(self.now), What::Tick);
        }
    }

    /// The fate of an order is unknown: it is repeated while the head waits for it.
    fn order_again(&mut self, node: &str, order: StartWorker) {
        if self.head.as_ref().is_some_and(|head| head.awaits_start(order.incarnation)) {
            let link = Link::Node(node.to_owned());
            let command = Command::StartWorker { node: node.to_owned(), order };
            self.send(&link.clone(), |generation| What::ToNode(link, generation, command));
        }
    }

    fn prepare_again(&mut self, node: &str, order: PrepareBundles) {
        let head = self.head.as_ref();
        if head.is_some_and(|head| head.awaits_bundles(&order.group, order.epoch, node)) {
            let link = Link::Node(node.to_owned());
            let command = Command::PrepareBundles { node: node.to_owned(), order };
            self.send(&link.clone(), |generation| What::ToNode(link, generation, command));
        }
    }

    fn flush(&mut self) {
        if !self.store_down {
            for write in self.unwritten.drain(..) {
                let key = write.key().path();
                match write {
                    Write::Put(record) => drop(self.durable.insert(key, *record)),
                    Write::Delete(_) => drop(self.durable.remove(&key)),
                }
            }
            for (run, event) in std::mem::take(&mut self.durables) {
                let own = Link::Worker(Incarnation(0));
                self.after(1, What::ToHead(own, run, event));
            }
        }
    }

    // Nodes ---------------------------------------------------------------------------------------------------

    fn start_agent(&mut self, name: &str) {
        let boot = self.rng.random();
        let highest = self.workers.iter().filter(|(_, worker)| worker.node == name).map(|(i, _)| *i).max();
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot != 0 {
            return;
        }
        *node = Node {
            boot,
            ordered: highest.unwrap_or_default(),
            ends: std::mem::take(&mut node.ends),
            ..Node::default()
        };
        self.links.entry(Link::Node(name.to_owned())).or_default();
        self.report_node(name, true);
        self.at(self.now + Duration::from_secs(1), What::Heartbeat(name.to_owned(), boot));
    }

    fn report_node(&mut self, name: &str, registering: bool) {
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot == 0 || node.frozen {
            return;
        }
        node.seq += 1;
        if registering {
            node.registered_seq = node.seq;
        }
        let process = |incarnation: &Incarnation, worker: &Worker, status| WorkerProcess {
            actor: worker.actor.clone(),
            incarnation: *incarnation,
            device: worker.device,
            pid: incarnation.0 as u32,
            status,
        };
        let running = self.workers.iter().filter(|(_, worker)| worker.node == name);
        let running = running.map(|(i, worker)| process(i, worker, ProcessStatus::Running));
        let ended = node
            .ends
            .iter()
            .map(|(i, (worker, cause))| process(i, worker, ProcessStatus::exited(cause.clone())));
        let report = NodeReport {
            name: name.to_owned(),
            boot: node.boot,
            seq: node.seq,
            registering,
            addr: addr(ActorId::NODE, Incarnation(0), node.boot),
            pid: 1,
            devices: (0..self.devices).map(|index| Device::cpu(index, 1)).collect(),
            capacity: Capacity { cpus: 8, ..Capacity::default() },
            labels: Default::default(),
            packages: Vec::new(),
            stage: NodeStage::Serving,
            workers: running.chain(ended).collect(),
            term: 0,
        };
        let link = Link::Node(name.to_owned());
        self.send(&link.clone(), |generation| What::ToHead(link, generation, Event::NodeReport(report)));
    }

    fn node_told(&mut self, link: Link, command: Command) {
        let Link::Node(name) = &link else { return };
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot == 0 {
            return;
        }
        if node.frozen {
            // It waits in the socket until the agent thaws.
            let again = self.now + Duration::from_millis(100);
            let generation = self.links[&link].0;
            return self.at(again, What::ToNode(link, generation, command));
        }
        match command {
            Command::StartWorker { order, .. } => self.start_worker(name, order),
            Command::PrepareBundles { order, .. } => {
                let outdated = order.report_seq < node.registered_seq;
                let refused = outdated.then(|| "outdated".to_owned());
                let (node, PrepareBundles { group, epoch, .. }) = (name.clone(), order);
                let event = Event::BundlesPrepared { group, epoch, node, refused };
                self.send(&link.clone(), |generation| What::ToHead(link, generation, event));
            }
            Command::StopWorker { incarnation, manner, .. } => {
                let here = self.workers.get(&incarnation).is_some_and(|worker| worker.node == *name);
                let (ms, cause) = match manner {
                    Manner::Kill => (20, DeathCause::Killed { signal: 9 }),
                    Manner::Graceful | Manner::Finish(_) => (1000, DeathCause::Exited { code: 0 }),
                };
                if here {
                    self.after(ms, What::Die(incarnation, cause));
                }
            }
            _ => {}
        }
    }

    fn thaw(&mut self, name: &str, boot: u64) {
        let node = self.nodes.get_mut(name).expect("known");
        if node.boot == boot {
            node.frozen = false;
            self.report_node(name, false);
        }
    }
}

fn addr(actor: ActorId, incarnation: Incarnation, process: u64) -> ActorAddr {
    ActorAddr { actor, incarnation, process: ProcessId(process), endpoint: String::new() }
}
