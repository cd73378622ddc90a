//! What clients ask of the head: apply specs, stop, restart, remove.

use std::collections::BTreeMap;

use super::actors::{Actor, Life, Then};
use super::{Command, HeadState, Record};
use crate::head::messages::{Applied, ApplyMode};
use crate::head::supervise::History;
use crate::spec::{ActorSpec, DeathCause, InvalidSpec};

/// No actor has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no actor is named {0:?}")]
pub struct NoSuchActor(pub String);

impl HeadState {
    /// Applies specs, all or none: a new name is started, the same spec changes nothing (but revives a dead actor),
    /// another spec of a known name restarts it. `ApplyMode::Exactly` also removes every actor that is not listed.
    pub fn apply(
        &mut self,
        now: std::time::Duration,
        specs: Vec<ActorSpec>,
        mode: ApplyMode,
    ) -> Result<(Applied, Vec<Command>), InvalidSpec> {
        self.now = now;
        self.check(&specs, mode)?;
        let mut applied = Applied::default();
        if mode == ApplyMode::Exactly {
            let kept = |name: &String| specs.iter().any(|spec| spec.name == *name);
            let removed: Vec<String> = self.actors.keys().filter(|name| !kept(name)).cloned().collect();
            for name in removed {
                self.retire(&name, "it is not in the applied set", Then::Forget);
                applied.removed += 1;
            }
        }
        for spec in specs {
            self.apply_one(spec, &mut applied);
        }
        self.regroup();
        Ok((applied, self.finish()))
    }

    fn apply_one(&mut self, spec: ActorSpec, applied: &mut Applied) {
        let name = spec.name.clone();
        let Some(actor) = self.actors.get_mut(&name) else {
            self.persist(Record::Spec(spec.clone()));
            self.actors.insert(name, Actor::new(spec));
            self.changed = true;
            applied.started += 1;
            return;
        };
        let forgotten = matches!(actor.life, Life::Stopping { then: Then::Forget, .. });
        let dead = matches!(actor.life, Life::Dead { .. } | Life::Stopping { then: Then::StayDead, .. });
        if actor.spec == spec && !forgotten && !dead {
            applied.unchanged += 1;
            return;
        }
        if actor.spec != spec || forgotten {
            actor.spec = spec.clone();
            self.persist(Record::Spec(spec));
        }
        applied.restarted += 1;
        self.revive(&name, if dead { "it was revived" } else { "its spec changed" });
    }

    /// Refuses what could not work, before anything is changed.
    fn check(&self, specs: &[ActorSpec], mode: ApplyMode) -> Result<(), InvalidSpec> {
        let invalid = |spec: &ActorSpec, why: String| Err(InvalidSpec::actor(&spec.name, why));
        if let (true, Some(spec)) = (self.closing, specs.first()) {
            return invalid(spec, "the cluster is shutting down".into());
        }
        let mut merged: BTreeMap<&str, &ActorSpec> = BTreeMap::new();
        if mode == ApplyMode::Merge {
            let wanted = self.actors.iter().filter(|(_, actor)| actor.is_wanted());
            merged.extend(wanted.map(|(name, actor)| (name.as_str(), &actor.spec)));
        }
        for (i, spec) in specs.iter().enumerate() {
            spec.validate()?;
            if specs[..i].iter().any(|other| other.name == spec.name) {
                return invalid(spec, "it is listed twice".into());
            }
            merged.insert(&spec.name, spec);
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

    /// Ends an actor; it stays dead until it is applied again or restarted.
    pub fn stop_actor(&mut self, now: std::time::Duration, name: &str) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        self.retire(name, "by request", Then::StayDead);
        Ok(self.finish())
    }

    /// Ends an actor and forgets its spec.
    pub fn remove_actor(
        &mut self,
        now: std::time::Duration,
        name: &str,
    ) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        self.retire(name, "by request", Then::Forget);
        Ok(self.finish())
    }

    /// Ends an actor, if it lives, and starts a new incarnation with a clean history.
    pub fn restart_actor(
        &mut self,
        now: std::time::Duration,
        name: &str,
    ) -> Result<Vec<Command>, NoSuchActor> {
        self.now = now;
        self.known(name)?;
        self.revive(name, "a restart was requested");
        Ok(self.finish())
    }

    fn known(&self, name: &str) -> Result<(), NoSuchActor> {
        self.actors.contains_key(name).then_some(()).ok_or_else(|| NoSuchActor(name.to_owned()))
    }

    fn revive(&mut self, name: &str, why: &str) {
        if let Some(actor) = self.actors.get_mut(name) {
            actor.history = History::default();
        }
        self.retire(name, why, Then::Restart);
    }
}

impl Actor {
    /// Whether its seat in a group is taken: not once it was stopped on purpose.
    fn is_wanted(&self) -> bool {
        let stopped = |cause: &DeathCause| matches!(cause, DeathCause::Stopped { .. } | DeathCause::Finished);
        match &self.life {
            Life::Dead { cause } => !stopped(cause),
            Life::Stopping { then, .. } => !matches!(then, Then::Forget | Then::StayDead),
            Life::Pending { .. } | Life::Backoff { .. } | Life::Live(_) => true,
        }
    }
}
