//! Where cluster state is kept: an embedded file store, or etcd for more than one head.
//!
//! One interface with etcd's semantics: every transaction that changes something raises the store's revision by one,
//! a key remembers the revision that last changed it, and compare-and-swap compares that. One conformance suite runs
//! against both.

mod election;
mod embedded;
mod etcd;

use std::path::PathBuf;
use std::time::Duration;

use bincode::{Decode, Encode};

pub use election::Leadership;
use embedded::{Embedded, EmbeddedWatch};
use etcd::{Etcd, EtcdWatch};

/// Operations of one transaction at most: etcd's default limit.
pub const TXN_OPS_MAX: usize = 128;
/// Bytes of keys and values of one transaction at most: within etcd's default limit of a request.
pub const TXN_BYTES_MAX: usize = 1_400_000;

/// The format of what is kept: of the store, and of the head's records and what else is written to it. Whoever changes the encoding of
/// any of these raises it; a store of another format is refused. Tests compare examples of each type with those that were
/// written for this number (`head/format/`, and `src/format/` of the actors).
pub const FORMAT_VERSION: u64 = 2;

/// A state of the store; grows with every change and never goes back, also over restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Revision(pub u64);

/// A time-limited grant; keys attached to it go when it is not kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct LeaseId(pub i64);

/// Which store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateConfig {
    /// A file in this directory, for one head.
    Embedded {
        /// Created if it is missing.
        dir: PathBuf,
    },
    /// An etcd cluster.
    Etcd {
        /// `host:port` or URLs.
        endpoints: Vec<String>,
        /// Put before every key, so that clusters can share one etcd.
        prefix: String,
        /// Certificates, for endpoints that are `https://` URLs.
        tls: Option<EtcdTls>,
    },
}

/// Certificates towards etcd, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// The CA that made those of the servers.
    pub ca: PathBuf,
    /// Certificate and key that the servers ask of clients, if they ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A value with the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision of its last change.
    pub revision: Revision,
}

/// All keys of a prefix at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Sorted by key.
    pub entries: Vec<Entry>,
    /// The revision of the store; watch from the next one to miss nothing.
    pub revision: Revision,
}

/// What must be true of a key for a transaction to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Anything.
    Any,
    /// The key is not there.
    Absent,
    /// The key was last changed in that revision.
    Revision(Revision),
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// What must be true of it before.
        expect: Expect,
        /// The lease that it goes with.
        lease: Option<LeaseId>,
    },
    /// Removes a key; one that is not there is no error.
    Delete {
        /// The key.
        key: String,
        /// What must be true of it before.
        expect: Expect,
    },
    /// Changes nothing, but the transaction happens only if this is true.
    Check {
        /// The key.
        key: String,
        /// What must be true of it.
        expect: Expect,
    },
}

impl Op {
    /// Sets a key whatever it was.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), expect: Expect::Any, lease: None }
    }

    /// Removes a key whatever it was.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into(), expect: Expect::Any }
    }

    /// The same with a condition.
    pub fn expect(mut self, new: Expect) -> Self {
        match &mut self {
            Self::Put { expect, .. } | Self::Delete { expect, .. } | Self::Check { expect, .. } => {
                *expect = new
            }
        }
        self
    }

    fn size(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key, .. } | Self::Check { key, .. } => key.len(),
        }
    }

    fn parts(&self) -> (&str, Expect) {
        match self {
            Self::Put { key, expect, .. } | Self::Delete { key, expect } | Self::Check { key, expect } => {
                (key, *expect)
            }
        }
    }
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Event {
    /// The key.
    pub key: String,
    /// Its new value; `None` if it was removed.
    pub value: Option<Vec<u8>>,
    /// The revision of the change. Changes of one transaction share it.
    pub revision: Revision,
}

/// Why the store did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// An expectation did not hold; nothing was changed.
    #[error("{key} changed meanwhile")]
    Conflict {
        /// The first key that was not as expected.
        key: String,
        /// The revision of its last change, if it is there.
        present: Option<Revision>,
    },
    /// The lease expired or never was.
    #[error("the lease expired")]
    LeaseExpired,
    /// Changes that old are no longer kept: read the present state and watch from there.
    #[error("changes before revision {} are no longer kept", oldest.0)]
    Compacted {
        /// The oldest revision that can be watched from.
        oldest: Revision,
    },
    /// The store does not answer now; the change may or may not have happened.
    #[error("state store unavailable: {0}")]
    Unavailable(String),
    /// Another process has the directory.
    #[error("state directory {dir} is in use by {owner}; stop it, or give this head a directory of its own")]
    InUse {
        /// The directory.
        dir: String,
        /// The process that holds it.
        owner: String,
    },
    /// The file is not a sound store.
    #[error(
        "state file {file} is damaged ({why}); put back a copy, or move it away and start with an empty state: \
         running nodes and workers will report themselves again"
    )]
    Damaged {
        /// The file.
        file: String,
        /// What was found.
        why: String,
    },
    /// Another version of Heliostat wrote it.
    #[error(
        "the state in {place} has format {found}, and this version of Heliostat reads format {FORMAT_VERSION}: run the version \
         that wrote it, or have this cluster begin anew with another {other} in [state]"
    )]
    Format {
        /// The file, or the prefix in etcd.
        place: String,
        /// Its format, as it stands there.
        found: String,
        /// The key of cluster.toml that says where the state is.
        other: &'static str,
    },
    /// The request makes no sense.
    #[error("invalid request to the state store: {0}")]
    Invalid(String),
}

impl StateError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// The store. Cheap to clone.
#[derive(Clone)]
pub enum StateStore {
    /// In a local file.
    Embedded(Embedded),
    /// In etcd.
    Etcd(Etcd),
}

impl StateStore {
    /// Opens the store and checks that it answers. Must be called in a tokio runtime.
    pub async fn open(config: &StateConfig) -> Result<Self, StateError> {
        match config {
            StateConfig::Embedded { dir } => Embedded::open(dir).await.map(Self::Embedded),
            StateConfig::Etcd { endpoints, prefix, tls } => {
                Etcd::connect(endpoints, prefix, tls.as_ref()).await.map(Self::Etcd)
            }
        }
    }

    /// Reads one key.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, StateError> {
        match self {
            Self::Embedded(store) => store.get(key),
            Self::Etcd(store) => store.get(key).await,
        }
    }

    /// Reads all keys that start with `prefix`, at one revision.
    pub async fn range(&self, prefix: &str) -> Result<Snapshot, StateError> {
        match self {
            Self::Embedded(store) => store.range(prefix),
            Self::Etcd(store) => store.range(prefix).await,
        }
    }

    /// Does all of it or, when an expectation does not hold, nothing. Returns the revision. A key may occur once;
    /// `TXN_OPS_MAX` and `TXN_BYTES_MAX` bound it.
    pub async fn txn(&self, ops: Vec<Op>) -> Result<Revision, StateError> {
        let mut keys: Vec<_> = ops.iter().map(|op| op.parts().0).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(StateError::Invalid(format!("key {} occurs twice in a transaction", pair[0])));
        }
        let bytes: usize = ops.iter().map(Op::size).sum();
        if ops.len() > TXN_OPS_MAX || bytes > TXN_BYTES_MAX {
            let ops = ops.len();
            return Err(StateError::Invalid(format!(
                "a transaction of {ops} operations and {bytes} bytes; {TXN_OPS_MAX} and {TXN_BYTES_MAX} are possible"
            )));
        }
        match self {
            Self::Embedded(store) => store.txn(ops).await,
            Self::Etcd(store) => store.txn(ops).await,
        }
    }

    /// Sets a key, if it is as expected.
    pub async fn put(
        &self,
        key: &str,
        value: impl Into<Vec<u8>>,
        expect: Expect,
    ) -> Result<Revision, StateError> {
        self.txn(vec![Op::put(key, value).expect(expect)]).await
    }

    /// Removes a key, if it is as expected.
    pub async fn delete(&self, key: &str, expect: Expect) -> Result<Revision, StateError> {
        self.txn(vec![Op::delete(key).expect(expect)]).await
    }

    /// Follows the changes of all keys that start with `prefix`, from that revision on.
    pub async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StateError> {
        match self {
            Self::Embedded(store) => Ok(Watch(Source::Embedded(store.watch(prefix, from)))),
            Self::Etcd(store) => Ok(Watch(Source::Etcd(Box::new(store.watch(prefix, from))))),
        }
    }

    /// Grants a lease. etcd counts in whole seconds, so it may last a little longer.
    pub async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        match self {
            Self::Embedded(store) => store.grant(ttl).await,
            Self::Etcd(store) => store.grant(ttl).await,
        }
    }

    /// Makes a lease last another time-to-live from now.
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<(), StateError> {
        match self {
            Self::Embedded(store) => store.keep_alive(lease),
            Self::Etcd(store) => store.keep_alive(lease).await,
        }
    }

    /// Ends a lease; the keys attached to it are removed. One that is not there is no error.
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), StateError> {
        match self {
            Self::Embedded(store) => store.revoke(lease).await,
            Self::Etcd(store) => store.revoke(lease).await,
        }
    }
}

/// Follows changes. Nothing is missed: after a lost connection it goes on where it was.
pub struct Watch(Source);

enum Source {
    Embedded(EmbeddedWatch),
    Etcd(Box<EtcdWatch>),
}

impl Watch {
    /// The next change, in order of revision. Ends only with `Compacted`, or for the embedded store when it closes.
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Event, StateError> {
        match &mut self.0 {
            Source::Embedded(watch) => watch.next().await,
            Source::Etcd(watch) => watch.next().await,
        }
    }
}
