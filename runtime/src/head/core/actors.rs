//! Actors as the head sees them: from spec to process to death and back.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::nodes::Node;
use super::owners::Thing;
use super::supervisors::JUDGE_PATIENCE;
use super::{Command, HeadState, Key, Manner};
use crate::handle::{ActorAddr, Incarnation, ProcessId};
use crate::head::messages::{CreateActor, StartWorker, WorkerPhase, WorkerProcess, WorkerReport};
use crate::head::placement::{Offer, Request, Slot, place};
use crate::head::supervise::{Action, History};
use crate::spec::{ActorSpec, DeathCause, LabelSelector, Placement, Progress, Resources};

/// What decides whether an actor finds a place.
type Wish = (Resources, Placement, LabelSelector);

/// One actor.
#[derive(Debug)]
pub(super) struct Actor {
    pub(super) spec: ActorSpec,
    pub(super) life: Life,
    /// The last incarnation that was started.
    pub(super) incarnation: Incarnation,
    /// Where that ran: it goes back there if it can.
    pub(super) slot: Option<Slot>,
    pub(super) restarts: u64,
    pub(super) last_death: Option<DeathCause>,
    /// What the process wrote last whose end was that death.
    pub(super) last_words: Option<String>,
    /// The same of a process of which it was just heard that it ended.
    words: Option<String>,
    pub(super) history: History,
    /// The round of restarts that it waits to take part in.
    pub(super) round: Option<u64>,
}

/// HD-2: an actor has at most one process, the one in `Live` or `Stopping`.
#[derive(Debug)]
pub(super) enum Life {
    /// To be placed as soon as something fits.
    Pending { reason: String },
    /// To be placed at that moment.
    Backoff { attempt: u32, at: Duration },
    /// A process was ordered, and was not seen to end.
    Live(Live),
    /// Its process is to end; what follows waits for that.
    Stopping { live: Live, cause: DeathCause, then: Then },
    /// It died, and an actor is to decide what follows.
    Judged { cause: DeathCause, since: Duration, asked: bool },
    /// It stays dead until it is revived.
    Dead { cause: DeathCause },
}

/// What follows when a stopping process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// The supervisor decides.
    Supervise,
    /// A new incarnation, at once.
    Restart,
    /// A new incarnation at that moment, when all of its round have ended.
    Again { at: Duration, attempt: u32, round: u64 },
    /// It stays dead unless its supervisor, which failed, is restarted.
    Down,
    /// It stays dead.
    StayDead,
    /// The actor is forgotten.
    Forget,
}

/// One incarnation's process.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) incarnation: Incarnation,
    pub(super) slot: Slot,
    /// Its node has reported it: from then on, missing in a report means dead.
    pub(super) confirmed: bool,
    pub(super) pid: Option<u32>,
    pub(super) phase: Phase,
    pub(super) announced: Option<Vec<u8>>,
    /// The worker's process and where it listens, once it has reported.
    pub(super) worker: Option<(ProcessId, String)>,
    /// It waits to hear what to create.
    pub(super) waiting: bool,
    /// How it is ended, once it is.
    pub(super) manner: Manner,
    /// When the worker itself last reported.
    pub(super) heard: Option<Duration>,
    seq: u64,
    /// Highest epoch sent, by group.
    pub(super) sent: BTreeMap<String, u64>,
}

/// How far an incarnation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    Starting(Progress),
    Ready(ActorAddr),
}

impl Live {
    pub(super) fn new(incarnation: Incarnation, slot: Slot) -> Self {
        Self {
            incarnation,
            slot,
            confirmed: false,
            pid: None,
            phase: Phase::Starting(Progress { phase: "starting process".into(), ..Progress::default() }),
            announced: None,
            worker: None,
            waiting: false,
            manner: Manner::Graceful,
            heard: None,
            seq: 0,
            sent: BTreeMap::new(),
        }
    }
}

impl Actor {
    pub(super) fn new(spec: ActorSpec) -> Self {
        Self {
            spec,
            life: Life::Pending { reason: String::new() },
            incarnation: Incarnation(0),
            slot: None,
            restarts: 0,
            last_death: None,
            last_words: None,
            words: None,
            history: History::default(),
            round: None,
        }
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        match self.life {
            Life::Backoff { at, .. } => Some(at),
            Life::Judged { since, .. } => Some(since + JUDGE_PATIENCE),
            Life::Pending { .. } | Life::Live(_) | Life::Stopping { .. } | Life::Dead { .. } => None,
        }
    }

    /// Its process, whether it serves or is being stopped.
    pub(super) fn process(&self) -> Option<&Live> {
        match &self.life {
            Life::Live(live) | Life::Stopping { live, .. } => Some(live),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } | Life::Dead { .. } => None,
        }
    }

    /// Its process if it is this incarnation, and whether it is being stopped.
    pub(super) fn process_mut(&mut self, incarnation: Incarnation) -> Option<(&mut Live, bool)> {
        let (live, stopping) = match &mut self.life {
            Life::Live(live) => (live, false),
            Life::Stopping { live, .. } => (live, true),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } | Life::Dead { .. } => {
                return None;
            }
        };
        (live.incarnation == incarnation).then_some((live, stopping))
    }

    /// Whether this is its process, and nothing is new about it.
    pub(super) fn serves_as(&self, process: &WorkerProcess) -> bool {
        matches!(&self.life, Life::Live(live) if live.incarnation == process.incarnation
            && live.confirmed && live.pid == Some(process.pid))
    }

    /// Name of the mesh that it is a rank of.
    pub(super) fn mesh(&self) -> Option<&str> {
        self.spec.mesh.as_ref()?;
        self.spec.group.as_ref().map(|member| member.group.as_str())
    }

    /// Address of the incarnation that serves.
    pub(super) fn ready(&self) -> Option<&ActorAddr> {
        match &self.life {
            Life::Live(Live { phase: Phase::Ready(addr), .. }) => Some(addr),
            _ => None,
        }
    }
}

impl HeadState {
    /// After a restart of the head: takes over an incarnation that was started after the last write that survived.
    pub(super) fn adopt(&mut self, name: &str, incarnation: Incarnation, node: &str, device: Option<u32>) {
        let Some(actor) = self.actors.get_mut(name).filter(|_| self.hold.is_some()) else { return };
        if incarnation <= actor.incarnation || matches!(actor.life, Life::Dead { .. }) {
            return;
        }
        // It was started, so the one that we remember had ended.
        let spec = actor.spec.clone();
        let bundle = self.bundle_at(&spec, node, device);
        let Some(actor) = self.actors.get_mut(name) else { return };
        let slot = Slot { node: node.to_owned(), device, bundle };
        actor.incarnation = incarnation;
        actor.slot = Some(slot.clone());
        actor.life = Life::Live(Live::new(incarnation, slot));
        self.changed = true;
        self.recheck_groups();
        self.persist_actor(name);
    }

    pub(super) fn worker_report(&mut self, report: WorkerReport) {
        let (name, incarnation) = (report.actor.clone(), report.incarnation);
        self.adopt(&name, incarnation, &report.node, report.device);
        let Some(actor) = self.actors.get_mut(&name) else { return self.dismiss(incarnation) };
        let mesh = actor.mesh().map(str::to_owned);
        let Some((live, stopping)) = actor.process_mut(incarnation) else { return self.dismiss(incarnation) };
        if stopping || report.seq <= live.seq {
            return;
        }
        live.seq = report.seq;
        live.heard = Some(self.now);
        if report.registering {
            live.sent.clear();
        }
        for (group, epoch) in &report.views {
            let sent = live.sent.entry(group.clone()).or_default();
            *sent = (*sent).max(*epoch);
        }
        self.changed |= live.pid != Some(report.pid);
        live.pid = Some(report.pid);
        live.worker = Some((report.addr.process, report.addr.endpoint));
        live.waiting = report.phase == WorkerPhase::Waiting;
        let phase = match report.phase {
            WorkerPhase::Waiting => {
                match mesh {
                    // MS-4: ranks are created together.
                    Some(mesh) => drop(self.gathering.insert(mesh)),
                    None => self.create(&name, Vec::new()),
                }
                return;
            }
            WorkerPhase::Creating(progress) => Phase::Starting(progress),
            WorkerPhase::Ready(addr) => Phase::Ready(addr),
            WorkerPhase::Ended(cause) => return self.ended(&name, cause),
        };
        let moved = std::mem::discriminant(&live.phase) != std::mem::discriminant(&phase);
        let announced = live.announced != report.announced;
        self.changed |= live.phase != phase || announced;
        live.phase = phase;
        live.announced = report.announced;
        if moved || announced {
            self.persist_actor(&name);
        }
        self.learn_views(report.held);
        self.joined_group(&name);
        self.send_views(&name);
    }

    /// Has the worker create its actor. A rank of a mesh is told where its peers are.
    pub(super) fn create(&mut self, name: &str, peers: Vec<Option<ActorAddr>>) {
        let Some(Actor { life: Life::Live(live), spec, .. }) = self.actors.get(name) else { return };
        let (incarnation, spec, term) = (live.incarnation, spec.clone(), self.term);
        let device =
            live.slot.device.and_then(|index| self.nodes.get(&live.slot.node)?.device(index).cloned());
        let order = CreateActor { incarnation, spec, device, peers, term };
        self.out.push(Command::CreateActor(Box::new(order)));
    }

    fn dismiss(&mut self, incarnation: Incarnation) {
        let why = "the head does not know this incarnation, or has replaced it".to_owned();
        self.out.push(Command::DismissWorker { incarnation, why });
    }

    /// The actor ended though its process still runs: that is going too, and then the supervisor decides.
    fn ended(&mut self, name: &str, cause: DeathCause) {
        self.stop(name, cause, Then::Supervise, Manner::Graceful);
    }

    /// Ends the actor's process, if it has one, and does what follows.
    pub(super) fn stop(&mut self, name: &str, cause: DeathCause, then: Then, manner: Manner) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        self.changed = true;
        self.owned.moved(name);
        let life = std::mem::replace(&mut actor.life, Life::Pending { reason: String::new() });
        match life {
            Life::Live(mut live) => {
                let (node, incarnation) = (live.slot.node.clone(), live.incarnation);
                live.manner = manner;
                actor.life = Life::Stopping { live, cause, then };
                self.out.push(Command::StopWorker { node, incarnation, manner });
                self.recheck_groups();
                if then != Then::Forget {
                    self.persist_actor(name);
                }
            }
            Life::Stopping { mut live, cause, .. } => {
                if manner == Manner::Kill {
                    live.manner = manner;
                }
                let (node, incarnation) = (live.slot.node.clone(), live.incarnation);
                actor.life = Life::Stopping { live, cause, then };
                // One that is taking its time may be killed.
                if manner == Manner::Kill {
                    self.out.push(Command::StopWorker { node, incarnation, manner });
                }
            }
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } | Life::Dead { .. } => {
                self.follow(name, cause, then);
            }
        }
    }

    /// Ends an actor on purpose.
    pub(super) fn retire(&mut self, name: &str, cause: DeathCause, then: Then) {
        if then == Then::Forget {
            self.forget(Key::Spec(name.to_owned()));
            self.forget(Key::Actor(name.to_owned()));
        }
        self.stop(name, cause, then, Manner::Graceful);
    }

    /// What the incarnation's process wrote last, before its end is followed up.
    pub(super) fn note_last_words(&mut self, name: &str, incarnation: Incarnation, words: Option<&str>) {
        if let Some(actor) = self.actors.get_mut(name)
            && actor.process_mut(incarnation).is_some()
        {
            actor.words = words.map(str::to_owned);
        }
    }

    /// A process ended.
    pub(super) fn exited(&mut self, name: &str, incarnation: Incarnation, cause: DeathCause) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        if actor.process_mut(incarnation).is_none() {
            return;
        }
        self.changed = true;
        self.owned.moved(name);
        let node = actor.slot.as_ref().and_then(|slot| self.nodes.get_mut(&slot.node));
        if let Some(node) = node {
            node.strays.remove(&incarnation);
        }
        match std::mem::replace(&mut actor.life, Life::Pending { reason: String::new() }) {
            Life::Live(_) => {
                self.recheck_groups();
                self.follow(name, cause, Then::Supervise);
            }
            Life::Stopping { cause, then, .. } => self.follow(name, cause, then),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } | Life::Dead { .. } => {}
        }
    }

    /// The actor has no process now; what is next?
    fn follow(&mut self, name: &str, cause: DeathCause, then: Then) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        if then == Then::Forget {
            return self.forgotten(name);
        }
        if actor.incarnation.0 > 0 {
            actor.last_death = Some(cause.clone());
            actor.last_words = actor.words.take();
        }
        let action = match then {
            Then::Supervise => match actor.spec.seat.clone() {
                Some(seat) if !cause.is_intended() => return self.child_died(name, &seat, cause),
                Some(_) | None => actor.history.died(&actor.spec.restart, &cause, self.now),
            },
            Then::Restart => Action::Restart { delay: Duration::ZERO, attempt: 0 },
            Then::Again { at, attempt, round } => {
                actor.round = Some(round);
                Action::Restart { delay: at.saturating_sub(self.now), attempt }
            }
            Then::StayDead | Then::Down | Then::Forget => Action::GiveUp,
        };
        match action {
            Action::Restart { delay, attempt } => {
                actor.restarts += u64::from(then != Then::Restart);
                actor.life = if delay.is_zero() {
                    Life::Pending { reason: String::new() }
                } else {
                    Life::Backoff { attempt, at: self.now + delay }
                };
            }
            Action::GiveUp => actor.life = Life::Dead { cause },
        }
        self.persist_actor(name);
    }

    fn forgotten(&mut self, name: &str) {
        let Some(spec) = self.actors.get(name).map(|actor| &actor.spec) else { return };
        let grouped = spec.group.is_some() || !spec.subscribe.is_empty();
        self.owned.note(Thing::Actor(name.to_owned()), Some(&spec.lifetime), None);
        self.actors.remove(name);
        if grouped {
            self.regroup();
        }
    }

    /// Whether the worker was ordered and its node has not reported it yet: then the order may be repeated.
    pub fn awaits_start(&self, incarnation: Incarnation) -> bool {
        self.actors
            .values()
            .filter_map(Actor::process)
            .any(|live| live.incarnation == incarnation && !live.confirmed)
    }

    pub(super) fn start_failed(&mut self, incarnation: Incarnation, message: String) {
        let current = |actor: &Actor| {
            actor.process().is_some_and(|live| live.incarnation == incarnation && !live.confirmed)
        };
        let name = self.actors.iter().find(|(_, actor)| current(actor)).map(|(name, _)| name.clone());
        if let Some(name) = name {
            self.exited(&name, incarnation, DeathCause::StartFailed { message });
        }
    }

    /// Starts what waits and fits, lower ranks first. Looks again only when something may have changed.
    pub(super) fn place_pending(&mut self, replan: bool) {
        let mut waiting = self.actors.due(self.now);
        if replan {
            waiting.extend(self.actors.waiting());
        }
        let waits = |name: &String| match self.actors.get(name).map(|actor| &actor.life) {
            Some(Life::Pending { .. }) => true,
            Some(Life::Backoff { at, .. }) => *at <= self.now,
            Some(Life::Live(_) | Life::Stopping { .. } | Life::Judged { .. } | Life::Dead { .. }) | None => {
                false
            }
        };
        waiting.retain(waits);
        if waiting.is_empty() {
            return;
        }
        let rank = |name: &String| Some(self.actors.get(name)?.spec.group.as_ref()?.rank);
        waiting.sort_by_cached_key(|name| (rank(name), name.clone()));
        let (mut offers, strays) = (self.offers(), self.strays());
        let mut refused: HashMap<Wish, String> = HashMap::new();
        for name in waiting {
            let placed = match (self.hold, strays.get(&name), self.awaited_by(&name)) {
                (Some(_), ..) => Err("waits for all nodes to report to the restarted head".to_owned()),
                (None, Some(node), _) => Err(format!("an old incarnation still runs on node {node}")),
                (None, None, Some(other)) => {
                    Err(format!("{other}, which is restarted with it, has not ended yet"))
                }
                (None, None, None) => self.find_slot(&name, &mut offers, &mut refused),
            };
            match placed {
                Ok(slot) => self.start(&name, slot),
                Err(reason) => self.wait(&name, reason),
            }
        }
    }

    /// A place for the actor, which is then taken; wishes that were refused once are refused to all.
    fn find_slot(
        &mut self,
        name: &str,
        offers: &mut [Offer],
        refused: &mut HashMap<Wish, String>,
    ) -> Result<Slot, String> {
        let Some(actor) = self.actors.get(name) else { return Err(String::new()) };
        let ActorSpec { resources, placement, selector, .. } = &actor.spec;
        let wish = (resources.clone(), placement.clone(), selector.clone());
        if let Some(why) = refused.get(&wish) {
            return Err(why.clone());
        }
        if let Placement::Bundle { group, index } = placement {
            let (spec, last, index) = (actor.spec.clone(), actor.slot.clone(), *index);
            return self.find_seat(&spec, last.as_ref(), &group.clone(), index);
        }
        let request = Request { resources, placement, selector, last: actor.slot.as_ref() };
        match place(&request, offers) {
            Ok(slot) => {
                let offer = offers.iter_mut().find(|offer| offer.node == slot.node);
                if let Some(offer) = offer {
                    offer.take(resources, slot.device.as_slice(), name);
                    offer.actors += 1;
                }
                Ok(slot)
            }
            Err(why) => Err(refused.entry(wish).or_insert(why.to_string()).clone()),
        }
    }

    fn wait(&mut self, name: &str, why: String) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        if !matches!(&actor.life, Life::Pending { reason } if *reason == why) {
            actor.life = Life::Pending { reason: why };
            self.changed = true;
        }
    }

    fn start(&mut self, name: &str, slot: Slot) {
        let incarnation = Incarnation(self.issue());
        let Some(actor) = self.actors.get_mut(name) else { return };
        actor.incarnation = incarnation;
        actor.slot = Some(slot.clone());
        actor.life = Life::Live(Live::new(incarnation, slot.clone()));
        actor.round = None;
        self.changed = true;
        self.owned.moved(name);
        self.owner_begins(name);
        let device = slot.device.and_then(|index| self.nodes.get(&slot.node)?.device(index).cloned());
        let report_seq = self.nodes.get(&slot.node).map_or(0, Node::seq);
        let package = self.actors.get(name).and_then(|actor| self.package_order(&actor.spec, incarnation.0));
        let hang_timeout = self.actors.get(name).and_then(|actor| actor.spec.hang_timeout);
        let (actor, term) = (name.to_owned(), self.term);
        let order = StartWorker { actor, incarnation, device, package, hang_timeout, report_seq, term };
        self.out.push(Command::StartWorker { node: slot.node, order });
        self.persist_actor(name);
    }
}
