//! What clients ask of the head: apply specs, stop, restart, remove.

use std::collections::BTreeMap;

use super::actors::{Actor, Life, Then};
use super::owners::Thing;
use super::supervisors::Supervisor;
use super::{Command, HeadState, Manner, Record};
use crate::head::messages::{Applied, Apply, ApplyMode};
use crate::head::supervise::History;
use crate::spec::{ActorSpec, DeathCause, InvalidSpec, SupervisorSpec, SupervisorStrategy, split_name};

/// Supervisors above one another at most.
const DEPTH_MAX: u32 = 64;

/// No actor has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no actor is named {0:?}")]
pub struct NoSuchActor(pub String);

impl HeadState {
    /// Applies specs, all or none; see [`ApplyMode`] for what becomes of names that are taken, and of others.
    pub fn apply(
        &mut self,
        now: std::time::Duration,
        apply: Apply,
    ) -> Result<(Applied, Vec<Command>), InvalidSpec> {
        self.now = now;
        let Apply { specs, supervisors, mode, by } = apply;
        self.check(&specs, &mode)?;
        self.check_tree(&specs, &supervisors)?;
        let mut applied = Applied::default();
        if let ApplyMode::Exactly { namespace } = &mode {
            self.prune(namespace, &specs, &by, &mut applied);
        }
        for supervisor in supervisors {
            self.apply_supervisor(supervisor);
        }
        for mut spec in specs {
            spec.in_set |= self.actors.get(&spec.name).is_some_and(|present| present.spec.in_set);
            match self.actors.get(&spec.name) {
                Some(present) if mode == ApplyMode::KeepPresent && present.is_there() => {
                    applied.unchanged += 1
                }
                Some(_) | None => self.apply_one(spec, &by, &mut applied),
            }
        }
        self.regroup();
        Ok((applied, self.finish()))
    }

    /// Removes what an earlier exact set of that namespace listed and this one does not.
    fn prune(&mut self, namespace: &str, specs: &[ActorSpec], by: &str, applied: &mut Applied) {
        let kept = |name: &str| specs.iter().any(|spec| spec.name == *name);
        let removed: Vec<String> = self
            .actors
            .iter()
            .filter(|(name, actor)| actor.spec.in_set && split_name(name).0 == namespace && !kept(name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in removed {
            self.retire(&name, stopped("it is not in the applied set", by), Then::Forget);
            applied.removed += 1;
        }
    }

    fn apply_supervisor(&mut self, spec: SupervisorSpec) {
        let before = self.supervisors.get(&spec.name).map(|it| it.spec.clone());
        if before.as_ref() == Some(&spec) {
            return;
        }
        let thing = Thing::Supervisor(spec.name.clone());
        self.owned.note(thing, before.as_ref().map(|it| &it.lifetime), Some(&spec.lifetime));
        self.changed = true;
        let name = spec.name.clone();
        self.supervisors.insert(name.clone(), Supervisor::new(spec));
        self.persist_supervisor(&name);
    }

    fn apply_one(&mut self, spec: ActorSpec, by: &str, applied: &mut Applied) {
        let name = spec.name.clone();
        let before = self.actors.get(&name).map(|actor| &actor.spec.lifetime);
        self.owned.note(Thing::Actor(name.clone()), before, Some(&spec.lifetime));
        let Some(actor) = self.actors.get_mut(&name) else {
            self.persist(Record::Spec(spec.clone()));
            self.actors.insert(name, Actor::new(spec));
            self.changed = true;
            applied.started += 1;
            return;
        };
        let forgotten = matches!(actor.life, Life::Stopping { then: Then::Forget, .. });
        let dead = matches!(
            actor.life,
            Life::Dead { .. } | Life::Stopping { then: Then::StayDead | Then::Down, .. }
        );
        if actor.spec == spec && !forgotten && !dead {
            applied.unchanged += 1;
            return;
        }
        if actor.spec != spec || forgotten {
            actor.spec = spec.clone();
            self.persist(Record::Spec(spec));
        }
        applied.restarted += 1;
        self.revive(&name, if dead { "it was revived" } else { "its spec changed" }, by);
    }

    /// Refuses what could not work, before anything is changed.
    fn check(&self, specs: &[ActorSpec], mode: &ApplyMode) -> Result<(), InvalidSpec> {
        let invalid = |spec: &ActorSpec, why: String| Err(InvalidSpec::actor(&spec.name, why));
        if let (true, Some(spec)) = (self.closing, specs.first()) {
            return invalid(spec, "the cluster is shutting down".into());
        }
        let mut merged: BTreeMap<&str, &ActorSpec> = BTreeMap::new();
        if !matches!(mode, ApplyMode::Exactly { .. }) {
            let wanted = self.actors.iter().filter(|(_, actor)| actor.is_wanted());
            merged.extend(wanted.map(|(name, actor)| (name.as_str(), &actor.spec)));
        }
        for (i, spec) in specs.iter().enumerate() {
            spec.validate()?;
            self.check_package(spec).or_else(|why| invalid(spec, why))?;
            if specs[..i].iter().any(|other| other.name == spec.name) {
                return invalid(spec, "it is listed twice".into());
            }
            let present = self.actors.get(&spec.name).filter(|present| present.is_there());
            if *mode == ApplyMode::New && present.is_some() {
                return invalid(
                    spec,
                    "the name is taken in its namespace; use `get_or_spawn` for the one that is there".into(),
                );
            }
            if *mode != ApplyMode::KeepPresent || present.is_none() {
                merged.insert(&spec.name, spec);
            }
        }
        let mut seats: BTreeMap<(&str, u32), &str> = BTreeMap::new();
        let mut sizes: BTreeMap<&str, u32> = BTreeMap::new();
        for (name, spec) in merged {
            let Some(member) = &spec.group else { continue };
            let size = *sizes.entry(&member.group).or_insert(member.size);
            if size != member.size {
                let (group, own) = (&member.group, member.size);
                return invalid(
                    spec,
                    format!("group {group} has size {size} by another spec, {own} by this one"),
                );
            }
            if let Some(other) = seats.insert((&member.group, member.rank), name) {
                return invalid(spec, format!("rank {} of group {} is {other}", member.rank, member.group));
            }
        }
        Ok(())
    }

    /// Refuses owners and supervisors that are not there, and a tree that is none.
    fn check_tree(&self, specs: &[ActorSpec], supervisors: &[SupervisorSpec]) -> Result<(), InvalidSpec> {
        let invalid = |name: &str, why: String| Err(InvalidSpec::actor(name, why));
        let mut tree: BTreeMap<&str, &SupervisorSpec> =
            self.supervisors.iter().map(|(name, it)| (name.as_str(), &it.spec)).collect();
        tree.extend(supervisors.iter().map(|spec| (spec.name.as_str(), spec)));
        let applied: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        for spec in supervisors {
            spec.validate()?;
            self.check_owner(&spec.name, &spec.lifetime, &applied)?;
        }
        let above = supervisors.iter().map(|spec| (&spec.name, &spec.seat));
        for (name, seat) in above.chain(specs.iter().map(|spec| (&spec.name, &spec.seat))) {
            let (mut next, mut depth) = (seat.as_ref(), 0);
            while let Some(seat) = next {
                let Some(supervisor) = tree.get(seat.supervisor.as_str()) else {
                    let why =
                        format!("there is no supervisor {:?}; apply it together with this", seat.supervisor);
                    return invalid(name, why);
                };
                depth += 1;
                if depth > DEPTH_MAX {
                    let why =
                        format!("more than {DEPTH_MAX} supervisors are above it, or they are in a circle");
                    return invalid(name, why);
                }
                if matches!(&supervisor.strategy, SupervisorStrategy::Ask { actor, .. } if actor == name) {
                    return invalid(name, format!("it cannot be below {}, which asks it", supervisor.name));
                }
                next = supervisor.seat.as_ref();
            }
        }
        specs.iter().try_for_each(|spec| self.check_owner(&spec.name, &spec.lifetime, &applied))
    }

    /// Ends an actor; it stays dead until it is applied again or restarted.
    pub fn stop_actor(
        &mut self,
        now: std::time::Duration,
        name: &str,
        by: &str,
        manner: Manner,
    ) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        let why = match manner {
            Manner::Graceful | Manner::Finish(_) => "by request",
            Manner::Kill => "killed by request",
        };
        self.stop(name, stopped(why, by), Then::StayDead, manner);
        Ok(self.finish())
    }

    /// Ends an actor and forgets its spec.
    pub fn remove_actor(
        &mut self,
        now: std::time::Duration,
        name: &str,
        by: &str,
    ) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        self.retire(name, stopped("removed by request", by), Then::Forget);
        Ok(self.finish())
    }

    /// Ends a supervisor and all beneath it, and forgets them.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove_supervisor(
        &mut self,
        now: std::time::Duration,
        name: &str,
        by: &str,
    ) -> Result<Vec<Command>, String> {
        self.now = now;
        if !self.supervisors.contains_key(name) {
            return Err(format!("no supervisor is named {name:?}"));
        }
        self.remove_subtree(name, &stopped("its supervisor was removed by request", by));
        self.regroup();
        Ok(self.finish())
    }

    /// Ends an actor, if it lives, and starts a new incarnation with a clean history.
    pub fn restart_actor(
        &mut self,
        now: std::time::Duration,
        name: &str,
        by: &str,
    ) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        self.revive(name, "a restart was requested", by);
        Ok(self.finish())
    }

    fn known(&self, name: &str) -> Result<(), NoSuchActor> {
        self.actors.contains_key(name).then_some(()).ok_or_else(|| NoSuchActor(name.to_owned()))
    }

    fn revive(&mut self, name: &str, why: &str, by: &str) {
        if let Some(actor) = self.actors.get_mut(name) {
            actor.history = History::default();
        }
        self.retire(name, stopped(why, by), Then::Restart);
    }
}

/// An empty `by` is nobody in particular.
pub(super) fn stopped(why: &str, by: &str) -> DeathCause {
    DeathCause::Stopped { why: why.to_owned(), by: (!by.is_empty()).then(|| by.to_owned()) }
}

impl Actor {
    /// Whether its seat in a group is taken: not once it was stopped on purpose.
    fn is_wanted(&self) -> bool {
        match &self.life {
            Life::Dead { cause } => !cause.is_intended(),
            Life::Stopping { then, .. } => !matches!(then, Then::Forget | Then::StayDead),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Judged { .. } | Life::Live(_) => true,
        }
    }
}
