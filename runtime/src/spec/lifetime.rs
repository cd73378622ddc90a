//! How long an actor is there: names, namespaces and owners.
//!
//! Plain data. Whether an owner is still there is decided by `head::core`.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::handle::Incarnation;

/// The namespace of names that say none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// How long an actor or a supervisor is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifetime {
    /// As long as whoever asks for it: the driver, or the incarnation of the actor, whose [`Cluster`] was used. What
    /// is asked for by neither of them is detached.
    ///
    /// [`Cluster`]: crate::cluster::Cluster
    #[default]
    Caller,
    /// Until somebody removes it.
    Detached,
    /// Until the owner ends. Then it is ended, too, and forgotten.
    Owned(Owner),
}

/// Whose end is the end of what it owns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// A registered driver.
    Driver(DriverId),
    /// An actor.
    Actor {
        /// Its name.
        name: String,
        /// Only this life of it. `None`: as long as it is restarted; it is gone when it is dead for good or removed.
        incarnation: Option<Incarnation>,
    },
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Driver(id) => write!(f, "driver {id}"),
            Owner::Actor { name, incarnation: None } => write!(f, "actor {name}"),
            Owner::Actor { name, incarnation: Some(incarnation) } => {
                write!(f, "actor {name}, incarnation {incarnation}")
            }
        }
    }
}

/// A driver: drawn at random when it registers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct DriverId(pub u64);

impl std::fmt::Display for DriverId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The name by which the cluster knows `name` of that namespace: `name` itself in the default namespace, else
/// `namespace/name`. A name that says its namespace already keeps it.
pub fn full_name(namespace: &str, name: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    match namespace {
        DEFAULT_NAMESPACE => name.to_owned(),
        namespace => format!("{namespace}/{name}"),
    }
}

/// Namespace and short name of a full name.
pub fn split_name(full: &str) -> (&str, &str) {
    full.split_once('/').unwrap_or((DEFAULT_NAMESPACE, full))
}

/// Whether this can name a group, a node or a part of a full name: it also names files.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.len() <= 128
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Whether this can name an actor or a supervisor: one name, or two with a `/` between, the first not that of the
/// default namespace, which is left out.
pub(crate) fn is_full_name(full: &str) -> bool {
    match full.split_once('/') {
        None => is_name(full),
        Some((namespace, name)) => is_name(namespace) && namespace != DEFAULT_NAMESPACE && is_name(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_find_their_namespace() {
        assert_eq!(full_name("default", "a"), "a");
        assert_eq!(full_name("train", "a"), "train/a");
        assert_eq!(full_name("train", "default/a"), "a");
        assert_eq!(full_name("train", "eval/a"), "eval/a");
        assert_eq!(split_name("eval/a"), ("eval", "a"));
        assert_eq!(split_name("a"), ("default", "a"));
        let names = ["a", "eval/a", "default/a", "a/b/c", "/a", "a/", "../a", ""];
        assert_eq!(names.map(is_full_name), [true, true, false, false, false, false, false, false]);
    }
}
