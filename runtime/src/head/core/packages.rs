//! The registry of packages: which binary has which name and version, who uses it, and which may go.
//!
//! Pure like the rest of the core: the head's shell keeps the files and tells what is there.

use std::collections::{BTreeMap, BTreeSet};

use super::{Command, HeadState, Key, Record};
use crate::package::{
    Digest, PackageId, PackageInfo, PackageOrder, PackageStatus, RegisterMode, RegistryError,
};
use crate::spec::ActorSpec;

/// Nodes named to one that fetches a package.
const SOURCES_MAX: usize = 4;
/// Actors named in an error.
const NAMED_MAX: usize = 5;

/// All packages.
#[derive(Debug, Default)]
pub(super) struct Packages {
    /// By content: one that was replaced stays as long as actors run it.
    known: BTreeMap<Digest, PackageInfo>,
    /// PK-1: one content at a time has a name and version.
    current: BTreeMap<(String, String), Digest>,
    number: u64,
}

impl Packages {
    /// Takes what an earlier head kept: the latest registration of a name and version counts.
    pub(super) fn restore(&mut self, info: PackageInfo) {
        self.number = self.number.max(info.number);
        let key = (info.id.name.clone(), info.id.version.clone());
        let present = self.current.get(&key).and_then(|digest| self.known.get(digest));
        if present.is_none_or(|present| present.number < info.number) {
            self.current.insert(key, info.id.sha256);
        }
        self.known.insert(info.id.sha256, info);
    }

    fn current(&self, name: &str, version: &str) -> Option<&PackageInfo> {
        self.known.get(self.current.get(&(name.to_owned(), version.to_owned()))?)
    }

    fn is_current(&self, info: &PackageInfo) -> bool {
        self.current(&info.id.name, &info.id.version).is_some_and(|current| current.id == info.id)
    }

    fn remove(&mut self, sha256: Digest) {
        if let Some(info) = self.known.remove(&sha256) {
            let key = (info.id.name, info.id.version);
            if self.current.get(&key) == Some(&sha256) {
                self.current.remove(&key);
            }
        }
    }
}

impl HeadState {
    /// PK-2: a spec names a package as it is registered, so that whoever applies it was built from what its actors will
    /// run. A spec that is there already stays good, whatever was registered since.
    pub(super) fn check_package(&self, spec: &ActorSpec) -> Result<(), String> {
        let Some(id) = &spec.package else { return Ok(()) };
        let own = self.actors.get(&spec.name).and_then(|actor| actor.spec.package.as_ref());
        if own == Some(id) && self.packages.known.contains_key(&id.sha256) {
            return Ok(());
        }
        match self.packages.current(&id.name, &id.version) {
            Some(there) if there.id.sha256 == id.sha256 => Ok(()),
            Some(there) => Err(format!(
                "package {} {} is {} in this cluster, and the driver is {}: run the driver that was registered last, or \
                 give this one another version",
                id.name,
                id.version,
                there.id.sha256.short(),
                id.sha256.short()
            )),
            None => Err(format!("package {id} is not registered; start the driver with helio submit")),
        }
    }

    /// Whether this name and version may stand for this content.
    pub fn may_register(&self, id: &PackageId, mode: RegisterMode) -> Result<(), RegistryError> {
        if !is_word(&id.name) || !is_word(&id.version) {
            return Err(RegistryError::Name(format!("{} {}", id.name, id.version)));
        }
        if let Some(present) = self.packages.current(&id.name, &id.version)
            && present.id.sha256 != id.sha256
            && mode == RegisterMode::Keep
        {
            return Err(RegistryError::Differs { present: present.id.sha256, asked: id.clone() });
        }
        let other = self.packages.known.get(&id.sha256).filter(|other| other.id != *id);
        if let Some(other) = other {
            let there = format!("{} {} is {}, which is registered", id.name, id.version, other.id);
            return Err(RegistryError::Name(there));
        }
        Ok(())
    }

    /// Enters a package of which `bytes` are in the head's directory, which may hold `bytes_max`. What is used longest
    /// ago and by no actor makes room.
    pub fn register_package(
        &mut self,
        id: PackageId,
        bytes: u64,
        bytes_max: u64,
        mode: RegisterMode,
    ) -> Result<Vec<Command>, RegistryError> {
        self.may_register(&id, mode)?;
        let used = self.used_packages();
        let others = || self.packages.known.values().filter(|info| info.id.sha256 != id.sha256);
        let in_use: u64 = others().filter(|info| used.contains(&info.id.sha256)).map(|info| info.bytes).sum();
        if in_use + bytes > bytes_max {
            return Err(RegistryError::Full { max: bytes_max, used: in_use, asked: bytes });
        }
        self.packages.number += 1;
        let info = PackageInfo { id, bytes, number: self.packages.number };
        let mut left: u64 = others_bytes(&self.packages, info.id.sha256) + bytes;
        let mut idle: Vec<(u64, Digest, u64)> = self
            .packages
            .known
            .values()
            .filter(|other| !used.contains(&other.id.sha256) && other.id.sha256 != info.id.sha256)
            // One that was replaced and that nobody runs has no use any more.
            .map(|other| if self.packages.is_current(other) { (other.number, other) } else { (0, other) })
            .map(|(number, other)| (number, other.id.sha256, other.bytes))
            .collect();
        idle.sort();
        let replaces = self.packages.current(&info.id.name, &info.id.version).map(|info| info.id.sha256);
        for (number, sha256, bytes) in idle {
            if number == 0 || left > bytes_max || replaces == Some(sha256) {
                left -= bytes;
                self.forget_package(sha256);
            }
        }
        self.packages.restore(info.clone());
        self.persist(Record::Package(info));
        self.changed = true;
        Ok(self.finish())
    }

    /// Takes a package out, unless actors run it.
    pub fn remove_package(&mut self, name: &str, version: &str) -> Result<Vec<Command>, RegistryError> {
        let unknown = || RegistryError::Unknown(name.to_owned(), version.to_owned());
        let id = self.packages.current(name, version).map(|info| info.id.clone()).ok_or_else(unknown)?;
        let actors = self.actors_of(id.sha256);
        if !actors.is_empty() {
            let named = actors.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
            let more = actors.len().saturating_sub(NAMED_MAX);
            let actors = if more > 0 { format!("{named} and {more} more") } else { named };
            return Err(RegistryError::InUse { id, actors });
        }
        self.forget_package(id.sha256);
        self.changed = true;
        Ok(self.finish())
    }

    fn forget_package(&mut self, sha256: Digest) {
        self.packages.remove(sha256);
        self.forget(Key::Package(sha256));
        self.out.push(Command::DropPackage { sha256 });
    }

    /// All packages, by name and version.
    pub fn package_status(&self) -> Vec<PackageStatus> {
        let status = |info: &PackageInfo| PackageStatus {
            id: info.id.clone(),
            bytes: info.bytes,
            actors: self.actors_of(info.id.sha256),
            nodes: self.holders(info.id.sha256).map(|(name, _)| name.to_owned()).collect(),
            replaced: !self.packages.is_current(info),
        };
        let mut all: Vec<PackageStatus> = self.packages.known.values().map(status).collect();
        all.sort_by(|a, b| (&a.id, a.replaced).cmp(&(&b.id, b.replaced)));
        all
    }

    /// Packages that the head's directory must keep.
    pub fn known_packages(&self) -> BTreeSet<Digest> {
        self.packages.known.keys().copied().collect()
    }

    /// Where a node finds the package of an actor that it is to start; different nodes for different incarnations.
    pub(super) fn package_order(&self, spec: &ActorSpec, turn: u64) -> Option<PackageOrder> {
        let id = spec.package.clone()?;
        let holders: Vec<&str> = self.holders(id.sha256).map(|(_, endpoint)| endpoint).collect();
        let first = usize::try_from(turn).unwrap_or_default().checked_rem(holders.len()).unwrap_or_default();
        let sources = holders.iter().cycle().skip(first).take(holders.len().min(SOURCES_MAX));
        Some(PackageOrder { id, sources: sources.map(|endpoint| (*endpoint).to_owned()).collect() })
    }

    fn holders(&self, sha256: Digest) -> impl Iterator<Item = (&str, &str)> {
        let has = move |node: &&super::nodes::Node| node.is_connected() && node.packages.contains(&sha256);
        self.nodes.values().filter(has).map(|node| (node.name(), node.endpoint.as_str()))
    }

    fn used_packages(&self) -> BTreeSet<Digest> {
        self.actors.values().filter_map(|actor| Some(actor.spec.package.as_ref()?.sha256)).collect()
    }

    fn actors_of(&self, sha256: Digest) -> Vec<String> {
        let uses = |spec: &ActorSpec| spec.package.as_ref().is_some_and(|id| id.sha256 == sha256);
        self.actors.values().filter(|actor| uses(&actor.spec)).map(|actor| actor.spec.name.clone()).collect()
    }
}

fn others_bytes(packages: &Packages, but: Digest) -> u64 {
    packages.known.values().filter(|info| info.id.sha256 != but).map(|info| info.bytes).sum()
}

/// Whether this can be a name or a version.
fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'+' | b'.'))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Patience;
    use super::*;
    use crate::head::messages::Apply;

    const MAX: u64 = 100;

    fn id(name: &str, version: &str, content: u8) -> PackageId {
        PackageId { name: name.into(), version: version.into(), sha256: Digest([content; 32]) }
    }

    fn register(state: &mut HeadState, id: PackageId, bytes: u64) -> Result<Vec<Command>, RegistryError> {
        state.register_package(id, bytes, MAX, RegisterMode::Keep)
    }

    fn apply(state: &mut HeadState, actor: &str, package: PackageId) -> Result<(), String> {
        let spec = ActorSpec { package: Some(package), ..ActorSpec::new(actor, "t", vec![]) };
        let applied = state.apply(Duration::ZERO, Apply::merge(vec![spec]));
        applied.map(drop).map_err(|error| error.to_string())
    }

    fn dropped(commands: &[Command]) -> Vec<u8> {
        let content = |command: &Command| match command {
            Command::DropPackage { sha256 } => Some(sha256.0[0]),
            _ => None,
        };
        commands.iter().filter_map(content).collect()
    }

    #[test]
    fn a_driver_and_its_workers_are_the_same_binary() {
        let mut state = HeadState::new(Patience::default());
        assert!(apply(&mut state, "a", id("p", "1", 1)).unwrap_err().contains("not registered"));
        register(&mut state, id("p", "1", 1), 10).unwrap();
        register(&mut state, id("p", "1", 1), 10).unwrap();
        apply(&mut state, "a", id("p", "1", 1)).unwrap();
        // Another binary under the same name and version is refused, and its driver, too.
        let refused = register(&mut state, id("p", "1", 2), 10).unwrap_err().to_string();
        assert!(refused.contains("010101010101") && refused.contains("--replace"), "{refused}");
        assert!(apply(&mut state, "b", id("p", "1", 2)).unwrap_err().contains("the driver is 020202020202"));
        // Once it was replaced, the old driver is refused; what it had started goes on.
        state.register_package(id("p", "1", 2), 10, MAX, RegisterMode::Replace).unwrap();
        apply(&mut state, "b", id("p", "1", 2)).unwrap();
        assert!(apply(&mut state, "c", id("p", "1", 1)).is_err());
        apply(&mut state, "a", id("p", "1", 1)).unwrap();
        let replaced: Vec<bool> = state.package_status().iter().map(|package| package.replaced).collect();
        assert_eq!(replaced, [true, false]);
    }

    #[test]
    fn what_no_actor_runs_makes_room_and_what_one_runs_stays() {
        let mut state = HeadState::new(Patience::default());
        for n in 1..=4 {
            assert!(dropped(&register(&mut state, id("p", &n.to_string(), n), 25).unwrap()).is_empty());
        }
        apply(&mut state, "a", id("p", "1", 1)).unwrap();
        assert_eq!(dropped(&register(&mut state, id("p", "5", 5), 50).unwrap()), [2, 3]);
        assert!(matches!(state.remove_package("p", "1"), Err(RegistryError::InUse { .. })));
        let full = state.register_package(id("q", "1", 9), 80, MAX, RegisterMode::Keep);
        assert_eq!(full, Err(RegistryError::Full { max: MAX, used: 25, asked: 80 }));
        state.remove_actor(Duration::ZERO, "a", "").unwrap();
        assert_eq!(dropped(&state.remove_package("p", "1").unwrap()), [1]);
        assert!(matches!(state.remove_package("p", "1"), Err(RegistryError::Unknown(..))));
    }

    #[test]
    fn a_restarted_head_knows_which_registration_was_the_last() {
        let mut state = HeadState::new(Patience::default());
        let mut records = BTreeMap::new();
        let mut keep = |commands: Vec<Command>| {
            for command in commands {
                let Command::Persist(write) = command else { continue };
                match write {
                    super::super::Write::Put(record) => records.insert(record.key().path(), *record),
                    super::super::Write::Delete(key) => records.remove(&key.path()),
                };
            }
        };
        keep(register(&mut state, id("p", "1", 2), 10).unwrap());
        apply(&mut state, "a", id("p", "1", 2)).unwrap();
        keep(state.register_package(id("p", "1", 1), 10, MAX, RegisterMode::Replace).unwrap());
        let records: Vec<Record> = records.into_values().collect();
        assert_eq!(records.len(), 2);
        let (again, _) = HeadState::recover(Patience::default(), Duration::ZERO, records);
        let current = again.packages.current("p", "1").unwrap();
        assert_eq!(current.id, id("p", "1", 1));
    }
}
