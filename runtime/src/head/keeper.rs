//! Keeps the head's records in the state store, behind its back: the head never waits for the store.
//!
//! While the store does not answer, writes wait here, the latest of each key, and are tried again. HA-3: every write
//! happens only if this process still leads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::authority::Authority;
use super::core::{Record, Write};
use crate::backoff::Backoff;
use crate::cluster::status::StoreHealth;
use crate::state::{Leadership, Op, StateConfig, StateError, StateStore};
use crate::wire::{CodecError, from_bytes, to_bytes};

/// Everything of the head is kept under this.
const PREFIX: &str = "head/";
/// Operations of one transaction; etcd takes 128.
const OPS_MAX: usize = 100;
/// Bytes of one transaction, but for a single record that is larger; etcd takes about 1.5 MB.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Keys with what is to be written, or none for a key that is to go.
type Records = Vec<(String, Option<Vec<u8>>)>;

/// What one transaction takes of what waits.
fn next_batch(pending: &BTreeMap<String, Option<Vec<u8>>>) -> Records {
    let mut bytes = 0;
    let fits = |(key, value): &(&String, &Option<Vec<u8>>)| {
        let first = bytes == 0;
        bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        first || bytes <= BATCH_BYTES_MAX
    };
    pending.iter().take(OPS_MAX).take_while(fits).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Why the head's state could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store says no.
    #[error(transparent)]
    Store(#[from] StateError),
    /// A record is of another version, or of somebody else.
    #[error("state under {key:?} cannot be read: {error}; it was written by another version")]
    Record {
        /// Its key.
        key: String,
        /// What the codec says.
        error: CodecError,
    },
}

/// The writer. Cheap to clone.
#[derive(Clone)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
}

struct Shared {
    store: StateStore,
    leadership: Leadership,
    authority: Arc<Authority>,
    /// Latest value of each key that is to be written; `None` removes it.
    pending: Mutex<BTreeMap<String, Option<Vec<u8>>>>,
    news: Notify,
    health: watch::Sender<StoreHealth>,
}

impl Keeper {
    /// Reads what an earlier head kept, and keeps what this one writes for as long as it leads.
    pub(super) async fn open(
        config: &StateConfig,
        store: StateStore,
        leadership: Leadership,
        authority: Arc<Authority>,
    ) -> Result<(Self, Vec<Record>), LoadError> {
        let mut records = Vec::new();
        for entry in store.range(PREFIX).await?.entries {
            records
                .push(from_bytes(&entry.value).map_err(|error| LoadError::Record { key: entry.key, error })?);
        }
        let kind = match config {
            StateConfig::Embedded { dir } => format!("embedded ({})", dir.display()),
            StateConfig::Etcd { endpoints, .. } => format!("etcd ({})", endpoints.join(", ")),
        };
        let shared = Arc::new(Shared {
            store,
            leadership,
            authority,
            pending: Mutex::default(),
            news: Notify::new(),
            health: watch::Sender::new(StoreHealth { kind, queued: 0, error: None }),
        });
        tokio::spawn(shared.clone().write_behind());
        Ok((Self { shared }, records))
    }

    /// Queues a change.
    pub(super) fn write(&self, write: &Write) {
        let key = format!("{PREFIX}{}", write.key().path());
        let value = match write {
            Write::Put(record) => match to_bytes(&**record) {
                Ok(bytes) => Some(bytes),
                Err(error) => return tracing::error!(key, %error, "a record cannot be kept"),
            },
            Write::Delete(_) => None,
        };
        let mut pending = self.shared.lock();
        pending.insert(key, value);
        self.shared.health.send_if_modified(|health| {
            health.queued = pending.len() as u64;
            // Only worth waking somebody for when writes fail, or to wait for their end.
            true
        });
        self.shared.news.notify_one();
    }

    /// How the store is.
    pub(super) fn health(&self) -> StoreHealth {
        self.shared.health.borrow().clone()
    }

    /// Follows the health.
    pub(super) fn watch(&self) -> watch::Receiver<StoreHealth> {
        self.shared.health.subscribe()
    }

    /// Waits until everything queued is written, however long that takes; false if it never will be.
    pub(super) fn drained(&self) -> impl Future<Output = bool> + Send + 'static {
        let mut health = self.shared.health.subscribe();
        async move { health.wait_for(|health| health.queued == 0).await.is_ok() }
    }

    /// Waits until everything queued is written; false if that takes longer than `limit`, or fails.
    pub(super) fn flushed(&self, limit: Duration) -> impl Future<Output = bool> + Send + 'static {
        let mut health = self.shared.health.subscribe();
        async move {
            let settled = health.wait_for(|health| health.queued == 0 || health.error.is_some());
            let settled = tokio::time::timeout(limit, settled).await;
            matches!(settled, Ok(Ok(health)) if health.queued == 0)
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<Vec<u8>>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write_behind(self: Arc<Self>) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        loop {
            let batch = next_batch(&self.lock());
            if batch.is_empty() {
                self.news.notified().await;
                continue;
            }
            let ops = batch.iter().map(|(key, value)| match value {
                Some(value) => Op::put(key.clone(), value.clone()),
                None => Op::delete(key.clone()),
            });
            let ops = std::iter::once(self.leadership.guard()).chain(ops);
            match self.store.txn(ops.collect()).await {
                Ok(_) => {
                    backoff.reset();
                    self.written(&batch);
                }
                Err(error @ StateError::Conflict { .. }) => {
                    self.health.send_modify(|health| health.error = Some(error.to_string()));
                    return self.authority.end("another head was elected");
                }
                Err(error) => {
                    if self.health.borrow().error.is_none() {
                        tracing::warn!(%error, "cannot write to the state store, going on from memory");
                    }
                    self.health.send_modify(|health| health.error = Some(error.to_string()));
                    backoff.pause().await;
                }
            }
        }
    }

    /// Drops what was written, unless it has changed again meanwhile.
    fn written(&self, batch: &[(String, Option<Vec<u8>>)]) {
        let mut pending = self.lock();
        for (key, value) in batch {
            if pending.get(key) == Some(value) {
                pending.remove(key);
            }
        }
        self.health.send_modify(|health| {
            if health.error.take().is_some() {
                tracing::info!("the state store answers again");
            }
            health.queued = pending.len() as u64;
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tenure::Tenure;
    use super::*;
    use crate::spec::ActorSpec;

    #[tokio::test]
    async fn what_was_written_is_read_again_and_what_was_deleted_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = StateConfig::Embedded { dir: dir.path().to_owned() };
        let spec = |name: &str| Record::Spec(ActorSpec::new(name, "t", vec![1]));
        let store = StateStore::open(&config).await.unwrap();
        let leadership = store.seize("head", "me").await.unwrap();
        let authority = Authority::new(Tenure::sole(1), Instant::now());
        let (keeper, records) =
            Keeper::open(&config, store.clone(), leadership, authority.clone()).await.unwrap();
        assert_eq!(records, []);
        keeper.write(&Write::Put(Box::new(spec("a"))));
        keeper.write(&Write::Put(Box::new(spec("b"))));
        keeper.write(&Write::Put(Box::new(Record::Incarnations(7))));
        keeper.write(&Write::Delete(spec("b").key()));
        assert!(keeper.flushed(Duration::from_secs(10)).await);
        let read = keeper.shared.store.range(PREFIX).await.unwrap().entries;
        let read: Vec<Record> = read.iter().map(|entry| from_bytes(&entry.value).unwrap()).collect();
        assert_eq!(read, [Record::Incarnations(7), spec("a")]);

        // HA-3: once another leads, nothing is written any more.
        store.seize("head", "another").await.unwrap();
        keeper.write(&Write::Put(Box::new(spec("late"))));
        assert!(!keeper.flushed(Duration::from_secs(10)).await);
        authority.over().await;
        assert_eq!(store.get("head/spec/late").await.unwrap(), None);
    }

    #[test]
    fn a_batch_stays_below_what_a_store_takes() {
        let pending = |sizes: &[usize]| {
            let record = |(n, &size): (usize, &usize)| (format!("{n:04}"), Some(vec![0; size]));
            sizes.iter().enumerate().map(record).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(next_batch(&pending(&[10; 150])).len(), OPS_MAX);
        assert_eq!(next_batch(&pending(&[400_000; 5])).len(), 2);
        assert_eq!(next_batch(&pending(&[3_000_000, 10])).len(), 1, "a large record goes alone");
        assert_eq!(next_batch(&BTreeMap::new()).len(), 0);
    }
}
