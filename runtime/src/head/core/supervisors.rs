//! The supervision tree: what follows from the death of a child.

use std::time::Duration;

use super::actors::{Life, Then};
use super::owners::Thing;
use super::record::SupervisorRecord;
use super::{Command, HeadState, Key, Record};
use crate::handle::Incarnation;
use crate::head::supervise::{Action, History};
use crate::spec::{DeathCause, Lifetime, Owner, Seat, SupervisorSpec, SupervisorStrategy, Verdict};
use crate::supervisor::ChildDied;

/// How long an actor that is to decide is waited for: to be ready, and then to answer.
pub(super) const JUDGE_PATIENCE: Duration = Duration::from_secs(10);

/// An inner node of the tree.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) spec: SupervisorSpec,
    /// Restarts of its children together.
    history: History,
    /// Its own restarts below its supervisor, if that counts each child.
    own: History,
}

impl Supervisor {
    pub(super) fn new(spec: SupervisorSpec) -> Self {
        Self { spec, history: History::default(), own: History::default() }
    }

    pub(super) fn recovered(record: SupervisorRecord, now: Duration) -> Self {
        let SupervisorRecord { spec, history, own } = record;
        Self { spec, history: history.recovered(now), own: own.recovered(now) }
    }

    fn record(&self) -> SupervisorRecord {
        SupervisorRecord { spec: self.spec.clone(), history: self.history.clone(), own: self.own.clone() }
    }
}

/// A child that died: an actor, or a supervisor that failed.
#[derive(Debug, Clone)]
struct Child {
    thing: Thing,
    order: u32,
}

impl Child {
    fn name(&self) -> &str {
        match &self.thing {
            Thing::Actor(name) | Thing::Supervisor(name) => name,
        }
    }
}

/// What a round of restarts has in common.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// SV-4: nobody of a round starts before all of it that are to end have ended.
    number: u64,
    at: Duration,
    attempt: u32,
}

impl HeadState {
    /// An actor below a supervisor died, and has no process any more.
    pub(super) fn child_died(&mut self, name: &str, seat: &Seat, cause: DeathCause) {
        let child = Child { thing: Thing::Actor(name.to_owned()), order: seat.order };
        self.judge(&seat.supervisor, &child, cause);
    }

    fn judge(&mut self, supervisor: &str, child: &Child, cause: DeathCause) {
        let Some(it) = self.supervisors.get(supervisor) else { return };
        let verdict = match (&it.spec.strategy, &child.thing) {
            // A subtree that failed is down, and has no life to wait in: what is meant for silence is done.
            (SupervisorStrategy::Ask { otherwise, .. }, Thing::Supervisor(_)) => Some(*otherwise),
            (strategy, _) => strategy.verdict(),
        };
        match (verdict, &child.thing) {
            (Some(verdict), _) => self.carry_verdict(supervisor, child, cause, verdict),
            (None, Thing::Actor(name)) => {
                let Some(actor) = self.actors.get_mut(name) else { return };
                // Asked in `ask_judges`, when the actor that decides is there.
                actor.life = Life::Judged { cause, since: self.now, asked: false };
                self.changed = true;
                self.persist_actor(name);
            }
            (None, Thing::Supervisor(_)) => {}
        }
    }

    fn carry_verdict(&mut self, supervisor: &str, child: &Child, cause: DeathCause, verdict: Verdict) {
        self.changed = true;
        let only = match verdict {
            Verdict::Restart => Some(true),
            Verdict::RestartAll | Verdict::RestartRest => Some(false),
            Verdict::Stop | Verdict::Escalate => None,
        };
        let Some(only) = only else {
            return match verdict {
                Verdict::Stop => self.lay_down(child, &cause),
                _ => self.escalate(supervisor, child, cause),
            };
        };
        match self.count(supervisor, child, &cause, only) {
            Action::GiveUp => self.escalate(supervisor, child, cause),
            Action::Restart { delay, attempt } => {
                self.rounds += 1;
                let round = Round { number: self.rounds, at: self.now + delay, attempt };
                self.restart(child, round);
                let others = self.children(supervisor).into_iter().filter(|other| match verdict {
                    Verdict::RestartAll => other.thing != child.thing,
                    Verdict::RestartRest => other.order > child.order,
                    Verdict::Restart | Verdict::Stop | Verdict::Escalate => false,
                });
                let why = DeathCause::SiblingDied {
                    supervisor: supervisor.to_owned(),
                    child: child.name().to_owned(),
                    death: Box::new(cause.brief()),
                };
                for other in others.collect::<Vec<_>>() {
                    self.end_for_round(&other, &why, round);
                }
            }
        }
    }

    /// Counts a restart: each child's own, or those of all together.
    fn count(&mut self, supervisor: &str, child: &Child, cause: &DeathCause, only: bool) -> Action {
        let now = self.now;
        let Some(it) = self.supervisors.get_mut(supervisor) else { return Action::GiveUp };
        let policy = it.spec.restart;
        let history = match (only, &child.thing) {
            (false, _) => Some(&mut it.history),
            (true, Thing::Actor(name)) => self.actors.get_mut(name).map(|actor| &mut actor.history),
            (true, Thing::Supervisor(name)) => self.supervisors.get_mut(name).map(|it| &mut it.own),
        };
        let action = history.map_or(Action::GiveUp, |history| history.died(&policy, cause, now));
        // SV-5: what was counted is kept. An actor's own count is written down with what becomes of it.
        match (only, &child.thing) {
            (false, _) => self.persist_supervisor(supervisor),
            (true, Thing::Supervisor(name)) => self.persist_supervisor(name),
            (true, Thing::Actor(_)) => {}
        }
        action
    }

    /// Writes down a supervisor with its counts.
    pub(super) fn persist_supervisor(&mut self, name: &str) {
        if let Some(it) = self.supervisors.get(name) {
            let record = it.record();
            self.persist(Record::Supervisor(record));
        }
    }

    /// The child that died is started again.
    fn restart(&mut self, child: &Child, round: Round) {
        match &child.thing {
            Thing::Actor(name) => {
                let Some(actor) = self.actors.get_mut(name) else { return };
                actor.restarts += 1;
                self.await_round(name, round);
            }
            Thing::Supervisor(name) => {
                for actor in self.actors_beneath(name) {
                    self.lift(&actor, round);
                }
            }
        }
    }

    /// An actor without a process takes part in a round.
    fn await_round(&mut self, name: &str, round: Round) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        actor.life = match round.at > self.now {
            true => Life::Backoff { attempt: round.attempt, at: round.at },
            false => Life::Pending { reason: String::new() },
        };
        actor.round = Some(round.number);
        self.changed = true;
        self.persist_actor(name);
    }

    /// An actor that went down with its supervisor is started again with it.
    fn lift(&mut self, name: &str, round: Round) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        match &mut actor.life {
            Life::Dead { cause: DeathCause::Escalated { .. } } => {
                actor.restarts += 1;
                self.await_round(name, round);
            }
            Life::Stopping { then: then @ (Then::Down | Then::Again { .. }), .. } => {
                *then = Then::Again { at: round.at, attempt: round.attempt, round: round.number };
            }
            Life::Dead { .. }
            | Life::Stopping { .. }
            | Life::Pending { .. }
            | Life::Backoff { .. }
            | Life::Judged { .. }
            | Life::Live(_) => {}
        }
    }

    /// A child that lives is ended and started again with the one that died.
    fn end_for_round(&mut self, child: &Child, why: &DeathCause, round: Round) {
        let beneath = match &child.thing {
            Thing::Actor(name) => vec![name.clone()],
            Thing::Supervisor(name) => self.actors_beneath(name),
        };
        let then = Then::Again { at: round.at, attempt: round.attempt, round: round.number };
        for name in beneath {
            let Some(actor) = self.actors.get(&name) else { continue };
            match &actor.life {
                Life::Live(_) | Life::Stopping { then: Then::Supervise | Then::Again { .. }, .. } => {
                    self.stop(&name, why.clone(), then, super::Manner::Graceful);
                }
                Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } => {
                    self.await_round(&name, round);
                }
                Life::Stopping { .. } | Life::Dead { .. } => {}
            }
        }
    }

    /// The child stays dead.
    fn lay_down(&mut self, child: &Child, cause: &DeathCause) {
        let Thing::Actor(name) = &child.thing else { return };
        let Some(actor) = self.actors.get_mut(name) else { return };
        actor.life = Life::Dead { cause: cause.clone() };
        self.owned.moved(name);
        self.persist_actor(name);
    }

    /// A supervisor fails: all beneath it go down, and whoever is above it decides.
    fn escalate(&mut self, supervisor: &str, child: &Child, cause: DeathCause) {
        let cause = DeathCause::Escalated {
            supervisor: supervisor.to_owned(),
            child: child.name().to_owned(),
            death: Box::new(cause.brief()),
        };
        for name in self.actors_beneath(supervisor) {
            self.take_down(&name, &cause);
        }
        for name in self.supervisors_beneath(supervisor) {
            let Some(it) = self.supervisors.get_mut(&name) else { continue };
            (it.history, it.own) = (History::default(), History::default());
            self.persist_supervisor(&name);
        }
        let Some(it) = self.supervisors.get_mut(supervisor) else { return };
        it.history = History::default();
        self.persist_supervisor(supervisor);
        let Some(it) = self.supervisors.get(supervisor) else { return };
        match (it.spec.seat.clone(), it.spec.lifetime.clone()) {
            (Some(seat), _) => {
                let child = Child { thing: Thing::Supervisor(supervisor.to_owned()), order: seat.order };
                self.judge(&seat.supervisor, &child, cause);
            }
            (None, Lifetime::Owned(Owner::Actor { name, .. })) => self.fail_owner(&name, cause),
            (None, Lifetime::Owned(Owner::Driver(_)) | Lifetime::Detached | Lifetime::Caller) => {}
        }
    }

    /// The owner of a supervisor at the top fails by it.
    fn fail_owner(&mut self, name: &str, cause: DeathCause) {
        if self.actors.get(name).is_some_and(|actor| matches!(actor.life, Life::Live(_))) {
            self.stop(name, cause, Then::Supervise, super::Manner::Graceful);
        }
    }

    fn take_down(&mut self, name: &str, cause: &DeathCause) {
        let Some(actor) = self.actors.get_mut(name) else { return };
        actor.history = History::default();
        match &actor.life {
            Life::Live(_)
            | Life::Stopping { then: Then::Supervise | Then::Again { .. } | Then::Down, .. } => {
                self.stop(name, cause.clone(), Then::Down, super::Manner::Graceful);
            }
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } => {
                actor.life = Life::Dead { cause: cause.clone() };
                self.owned.moved(name);
                self.persist_actor(name);
            }
            Life::Stopping { .. } | Life::Dead { .. } => {}
        }
    }

    /// A new life of an owner begins: supervisors of it that had failed begin anew with it.
    pub(super) fn owner_begins(&mut self, owner: &str) {
        for supervisor in self.owned.supervisors_of(owner) {
            self.rounds += 1;
            let round = Round { number: self.rounds, at: self.now, attempt: 0 };
            for actor in self.actors_beneath(&supervisor) {
                self.lift(&actor, round);
            }
        }
    }

    /// Somebody of the actor's round who has not ended yet.
    pub(super) fn awaited_by(&self, name: &str) -> Option<&str> {
        let wanted = self.actors.get(name)?.round?;
        let ends = |life: &Life| matches!(life, Life::Stopping { then: Then::Again { round, .. }, .. } if *round == wanted);
        self.actors.iter().find(|(_, actor)| ends(&actor.life)).map(|(name, _)| name.as_str())
    }

    fn children(&self, supervisor: &str) -> Vec<Child> {
        let below =
            |seat: &Option<Seat>| seat.as_ref().filter(|seat| seat.supervisor == supervisor).map(|s| s.order);
        let actors = self.actors.iter().filter_map(|(name, actor)| {
            Some(Child { order: below(&actor.spec.seat)?, thing: Thing::Actor(name.clone()) })
        });
        let supervisors = self.supervisors.iter().filter_map(|(name, it)| {
            Some(Child { order: below(&it.spec.seat)?, thing: Thing::Supervisor(name.clone()) })
        });
        actors.chain(supervisors).collect()
    }

    /// All actors beneath a supervisor, at any depth. The tree has no cycle: `check_tree` sees to that.
    fn actors_beneath(&self, supervisor: &str) -> Vec<String> {
        let mut found = Vec::new();
        for child in self.children(supervisor) {
            match child.thing {
                Thing::Actor(name) => found.push(name),
                Thing::Supervisor(name) => found.extend(self.actors_beneath(&name)),
            }
        }
        found
    }

    fn supervisors_beneath(&self, supervisor: &str) -> Vec<String> {
        let mut found = Vec::new();
        for child in self.children(supervisor) {
            if let Thing::Supervisor(name) = child.thing {
                found.extend(self.supervisors_beneath(&name));
                found.push(name);
            }
        }
        found
    }

    /// Forgets a supervisor and all beneath it.
    pub(super) fn remove_subtree(&mut self, supervisor: &str, cause: &DeathCause) {
        for name in self.actors_beneath(supervisor) {
            self.retire(&name, cause.clone(), Then::Forget);
        }
        for name in self.supervisors_beneath(supervisor).into_iter().chain([supervisor.to_owned()]) {
            if let Some(it) = self.supervisors.remove(&name) {
                self.owned.note(Thing::Supervisor(name.clone()), Some(&it.spec.lifetime), None);
                self.forget(Key::Supervisor(name));
                self.changed = true;
            }
        }
    }

    // Actors that decide ----------------------------------------------------------------------------------

    /// Asks actors that decide and are ready about the deaths that wait for it; after a while what is meant for their
    /// silence is done.
    pub(super) fn ask_judges(&mut self) {
        // Most clusters have no such actor.
        if !self.supervisors.values().any(|it| matches!(it.spec.strategy, SupervisorStrategy::Ask { .. })) {
            return;
        }
        let waiting: Vec<String> = self
            .actors
            .iter()
            .filter(|(_, actor)| matches!(actor.life, Life::Judged { .. }))
            .map(|(name, _)| name.clone())
            .collect();
        for name in waiting {
            self.ask_judge(&name);
        }
    }

    fn ask_judge(&mut self, name: &str) {
        let Some(actor) = self.actors.get(name) else { return };
        let Life::Judged { cause, since, asked } = &actor.life else { return };
        let (cause, overdue, asked) = (cause.clone(), *since + JUDGE_PATIENCE <= self.now, *asked);
        let seat = actor.spec.seat.clone();
        let supervisor = seat.as_ref().and_then(|seat| self.supervisors.get(&seat.supervisor));
        let Some((seat, supervisor)) = seat.as_ref().zip(supervisor) else { return };
        let SupervisorStrategy::Ask { actor: judge, otherwise } = &supervisor.spec.strategy else {
            // Its supervisor has another strategy by now.
            return self.judge(
                &seat.supervisor,
                &Child { thing: Thing::Actor(name.to_owned()), order: seat.order },
                cause,
            );
        };
        let otherwise = *otherwise;
        let judge = self.actors.get(judge).and_then(|judge| judge.ready()).cloned();
        match (asked, overdue, judge) {
            (_, true, _) => self.judged(name, actor.incarnation, otherwise),
            (false, false, Some(judge)) => {
                let question = ChildDied {
                    supervisor: seat.supervisor.clone(),
                    child: name.to_owned(),
                    incarnation: actor.incarnation,
                    cause,
                    restarts: actor.restarts,
                };
                self.out.push(Command::AskJudge { judge, question });
                if let Some(Life::Judged { asked, .. }) =
                    self.actors.get_mut(name).map(|actor| &mut actor.life)
                {
                    *asked = true;
                }
            }
            (true, false, _) | (false, false, None) => {}
        }
    }

    /// The actor that decides could not be asked: it is asked again, while there is time.
    pub(super) fn judge_silent(&mut self, name: &str, incarnation: Incarnation) {
        let actor = self.actors.get_mut(name).filter(|actor| actor.incarnation == incarnation);
        if let Some(Life::Judged { asked, .. }) = actor.map(|actor| &mut actor.life) {
            *asked = false;
        }
    }

    /// It was decided what follows from the death of that incarnation.
    pub(super) fn judged(&mut self, name: &str, incarnation: Incarnation, verdict: Verdict) {
        let Some(actor) = self.actors.get(name).filter(|actor| actor.incarnation == incarnation) else {
            return;
        };
        let (Life::Judged { cause, .. }, Some(seat)) = (&actor.life, &actor.spec.seat) else { return };
        let (cause, seat) = (cause.clone(), seat.clone());
        let child = Child { thing: Thing::Actor(name.to_owned()), order: seat.order };
        self.carry_verdict(&seat.supervisor, &child, cause, verdict);
    }
}
