//! The embedded store: one redb file in a directory that one process owns.
//!
//! Every transaction is on disk before it is acknowledged. Its events go into a log of bounded length, from which
//! watches read, so a slow watch costs nothing and misses nothing.

mod watch;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use rustix::fs::{FlockOperation, flock};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::{Entry, Event, Expect, FORMAT_VERSION, LeaseId, Op, Revision, Snapshot, StateError};
use crate::panics;
use crate::wire::to_bytes;
pub(super) use watch::EmbeddedWatch;

/// Key -> (revision, lease or 0, value).
const ENTRIES: TableDefinition<'_, &str, (u64, i64, &[u8])> = TableDefinition::new("entries");
/// Revision -> events of that transaction.
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Lease -> time to live, milliseconds.
const LEASES: TableDefinition<'_, i64, u64> = TableDefinition::new("leases");
/// `REVISION`, `LEASE` (the last ones given out) and `FORMAT`.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

const REVISION: &str = "revision";
const LEASE: &str = "lease";
const FORMAT: &str = "format";

/// Transactions whose events are kept.
const LOG_LENGTH: u64 = if cfg!(test) { 16 } else { 4096 };
/// The state is small; redb's default would be a gigabyte.
const CACHE_BYTES: usize = 16 << 20;

/// A store in a local file.
#[derive(Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
    /// Stops with the last clone.
    _expiry: Arc<AbortOnDropHandle<()>>,
}

struct Inner {
    database: Database,
    file: PathBuf,
    /// When each lease ends.
    leases: Mutex<HashMap<LeaseId, Lease>>,
    leases_changed: Arc<Notify>,
    /// The last revision on disk.
    committed: tokio::sync::watch::Sender<u64>,
    /// Held while the store is open; the kernel releases it when the process ends, however it ends.
    _lock: File,
}

#[derive(Clone, Copy)]
struct Lease {
    ttl: Duration,
    ends_at: Instant,
}

impl Embedded {
    pub(super) async fn open(dir: &Path) -> Result<Self, StateError> {
        let dir = dir.to_owned();
        let inner = tokio::task::spawn_blocking(move || Inner::open(&dir)).await.map_err(joined)??;
        let inner = Arc::new(inner);
        let expiry = tokio::spawn(expire(Arc::downgrade(&inner)));
        Ok(Self { inner, _expiry: Arc::new(AbortOnDropHandle::new(expiry)) })
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Entry>, StateError> {
        let read = self.inner.database.begin_read().map_err(|e| self.inner.failed(e))?;
        let entries = read.open_table(ENTRIES).map_err(|e| self.inner.failed(e))?;
        let found = entries.get(key).map_err(|e| self.inner.failed(e))?;
        Ok(found.map(|found| {
            let (revision, _, value) = found.value();
            Entry { key: key.to_owned(), value: value.to_vec(), revision: Revision(revision) }
        }))
    }

    pub(super) fn range(&self, prefix: &str) -> Result<Snapshot, StateError> {
        let read = self.inner.database.begin_read().map_err(|e| self.inner.failed(e))?;
        let counters = read.open_table(COUNTERS).map_err(|e| self.inner.failed(e))?;
        let revision = counter(&counters, REVISION).map_err(|e| self.inner.failed(e))?;
        let table = read.open_table(ENTRIES).map_err(|e| self.inner.failed(e))?;
        let mut entries = Vec::new();
        for item in table.range(prefix..).map_err(|e| self.inner.failed(e))? {
            let (key, found) = item.map_err(|e| self.inner.failed(e))?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (revision, _, value) = found.value();
            let key = key.value().to_owned();
            entries.push(Entry { key, value: value.to_vec(), revision: Revision(revision) });
        }
        Ok(Snapshot { entries, revision: Revision(revision) })
    }

    pub(super) async fn txn(&self, ops: Vec<Op>) -> Result<Revision, StateError> {
        self.blocking(move |inner| inner.txn(&ops)).await
    }

    pub(super) fn watch(&self, prefix: &str, from: Revision) -> EmbeddedWatch {
        EmbeddedWatch::new(self.inner.clone(), prefix, from)
    }

    pub(super) async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        self.blocking(move |inner| inner.grant(ttl)).await
    }

    pub(super) fn keep_alive(&self, lease: LeaseId) -> Result<(), StateError> {
        let mut leases = self.inner.leases();
        let lease = leases.get_mut(&lease).ok_or(StateError::LeaseExpired)?;
        lease.ends_at = Instant::now() + lease.ttl;
        Ok(())
    }

    pub(super) async fn revoke(&self, lease: LeaseId) -> Result<(), StateError> {
        self.blocking(move |inner| inner.end_leases(&[lease])).await
    }

    /// Writes wait for the disk, so they are kept off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || work(&inner)).await.map_err(joined)?
    }
}

fn joined(error: tokio::task::JoinError) -> StateError {
    StateError::Unavailable(error.to_string())
}

impl Inner {
    fn open(dir: &Path) -> Result<Self, StateError> {
        let unavailable =
            |what: &str, e: std::io::Error| StateError::Unavailable(format!("{what} {}: {e}", dir.display()));
        fs::create_dir_all(dir).map_err(|e| unavailable("cannot create", e))?;
        let lock = lock(dir)?;
        let file = dir.join("state.redb");
        let damaged = |why: String| StateError::Damaged { file: file.display().to_string(), why };
        // A file of foreign bytes can make redb panic rather than fail.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(&file)
        }));
        let database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(error)) => return Err(damaged(error.to_string())),
            Err(panic) => return Err(damaged(panics::message(&*panic))),
        };
        let Found { format, revision, leases } =
            prepare(&database).map_err(|error| damaged(error.to_string()))?;
        if format != FORMAT_VERSION {
            let (place, found) = (file.display().to_string(), format.to_string());
            return Err(StateError::Format { place, found, other: "dir" });
        }
        let ends_at = |ttl| Instant::now() + ttl;
        Ok(Self {
            database,
            leases: Mutex::new(
                leases.into_iter().map(|(id, ttl)| (id, Lease { ttl, ends_at: ends_at(ttl) })).collect(),
            ),
            leases_changed: Arc::default(),
            committed: tokio::sync::watch::Sender::new(revision),
            file,
            _lock: lock,
        })
    }

    fn txn(&self, ops: &[Op]) -> Result<Revision, StateError> {
        let write = self.database.begin_write().map_err(|e| self.failed(e))?;
        let revision = self.apply(&write, ops)?;
        match revision {
            Some(revision) => self.commit(write, revision),
            // Only checks, or deletes of what is not there: the revision stays.
            None => Ok(Revision(*self.committed.borrow())),
        }
    }

    fn commit(&self, write: WriteTransaction, revision: u64) -> Result<Revision, StateError> {
        write.commit().map_err(|e| self.failed(e))?;
        // Two commits may come here in either order.
        self.committed.send_if_modified(|last| {
            let newer = *last < revision;
            *last = revision.max(*last);
            newer
        });
        Ok(Revision(revision))
    }

    /// Checks all expectations, then applies all changes. Returns the new revision if there is one.
    fn apply(&self, write: &WriteTransaction, ops: &[Op]) -> Result<Option<u64>, StateError> {
        let mut entries = write.open_table(ENTRIES).map_err(|e| self.failed(e))?;
        for op in ops {
            let (key, expect) = op.parts();
            let present =
                entries.get(key).map_err(|e| self.failed(e))?.map(|found| Revision(found.value().0));
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => present.is_none(),
                Expect::Revision(revision) => present == Some(revision),
            };
            if !holds {
                return Err(StateError::Conflict { key: key.to_owned(), present });
            }
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases().contains_key(lease)
            {
                return Err(StateError::LeaseExpired);
            }
        }
        let mut counters = write.open_table(COUNTERS).map_err(|e| self.failed(e))?;
        let revision = counter(&counters, REVISION).map_err(|e| self.failed(e))? + 1;
        let mut events = Vec::new();
        for op in ops {
            match op {
                Op::Put { key, value, lease, .. } => {
                    let lease = lease.map_or(0, |lease| lease.0);
                    entries
                        .insert(key.as_str(), (revision, lease, value.as_slice()))
                        .map_err(|e| self.failed(e))?;
                    let (key, value) = (key.clone(), Some(value.clone()));
                    events.push(Event { key, value, revision: Revision(revision) });
                }
                Op::Delete { key, .. } => {
                    if entries.remove(key.as_str()).map_err(|e| self.failed(e))?.is_some() {
                        events.push(Event { key: key.clone(), value: None, revision: Revision(revision) });
                    }
                }
                Op::Check { .. } => {}
            }
        }
        if events.is_empty() {
            return Ok(None);
        }
        counters.insert(REVISION, revision).map_err(|e| self.failed(e))?;
        let mut log = write.open_table(LOG).map_err(|e| self.failed(e))?;
        let bytes = to_bytes(&events).map_err(|e| StateError::Invalid(e.to_string()))?;
        log.insert(revision, bytes.as_slice()).map_err(|e| self.failed(e))?;
        if let Some(old) = revision.checked_sub(LOG_LENGTH) {
            log.remove(old).map_err(|e| self.failed(e))?;
        }
        Ok(Some(revision))
    }

    fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        let write = self.database.begin_write().map_err(|e| self.failed(e))?;
        let id = {
            let mut counters = write.open_table(COUNTERS).map_err(|e| self.failed(e))?;
            let id = counter(&counters, LEASE).map_err(|e| self.failed(e))? + 1;
            counters.insert(LEASE, id).map_err(|e| self.failed(e))?;
            let mut leases = write.open_table(LEASES).map_err(|e| self.failed(e))?;
            let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            let id = i64::try_from(id).map_err(|e| StateError::Invalid(e.to_string()))?;
            leases.insert(id, ttl_ms).map_err(|e| self.failed(e))?;
            LeaseId(id)
        };
        write.commit().map_err(|e| self.failed(e))?;
        self.leases().insert(id, Lease { ttl, ends_at: Instant::now() + ttl });
        self.leases_changed.notify_one();
        Ok(id)
    }

    /// Ends leases and removes the keys attached to them, in one transaction.
    fn end_leases(&self, ended: &[LeaseId]) -> Result<(), StateError> {
        // First, so that no new key can be attached meanwhile.
        self.leases().retain(|id, _| !ended.contains(id));
        let write = self.database.begin_write().map_err(|e| self.failed(e))?;
        let deletes: Vec<Op> = {
            let entries = write.open_table(ENTRIES).map_err(|e| self.failed(e))?;
            let mut deletes = Vec::new();
            for item in entries.iter().map_err(|e| self.failed(e))? {
                let (key, found) = item.map_err(|e| self.failed(e))?;
                if ended.contains(&LeaseId(found.value().1)) {
                    deletes.push(Op::delete(key.value()));
                }
            }
            let mut leases = write.open_table(LEASES).map_err(|e| self.failed(e))?;
            for lease in ended {
                leases.remove(lease.0).map_err(|e| self.failed(e))?;
            }
            deletes
        };
        let revision = self.apply(&write, &deletes)?;
        let revision = revision.unwrap_or_else(|| *self.committed.borrow());
        self.commit(write, revision).map(drop)
    }

    fn leases(&self) -> MutexGuard<'_, HashMap<LeaseId, Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: impl Into<redb::Error>) -> StateError {
        match error.into() {
            redb::Error::Corrupted(why) => StateError::Damaged { file: self.file.display().to_string(), why },
            other => StateError::Unavailable(format!("{}: {other}", self.file.display())),
        }
    }
}

/// What a file has when it is opened.
struct Found {
    format: u64,
    revision: u64,
    /// With their times to live.
    leases: Vec<(LeaseId, Duration)>,
}

/// A new file gets what it lacks; one of another format stays as it is.
fn prepare(database: &Database) -> Result<Found, redb::Error> {
    let write = database.begin_write()?;
    let (format, revision) = {
        let mut counters = write.open_table(COUNTERS)?;
        if counters.get(FORMAT)?.is_none() {
            counters.insert(FORMAT, FORMAT_VERSION)?;
        }
        (counter(&counters, FORMAT)?, counter(&counters, REVISION)?)
    };
    if format != FORMAT_VERSION {
        write.abort()?;
        return Ok(Found { format, revision, leases: Vec::new() });
    }
    write.open_table(ENTRIES)?;
    write.open_table(LOG)?;
    let mut leases = Vec::new();
    for item in write.open_table(LEASES)?.iter()? {
        let (id, ttl) = item?;
        leases.push((LeaseId(id.value()), Duration::from_millis(ttl.value())));
    }
    write.commit()?;
    Ok(Found { format, revision, leases })
}

fn counter(
    table: &impl ReadableTable<&'static str, u64>,
    name: &'static str,
) -> Result<u64, redb::StorageError> {
    Ok(table.get(name)?.map_or(0, |found| found.value()))
}

/// Takes the directory for this process; the lock file says who has it.
fn lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join("lock");
    let failed = |e: std::io::Error| StateError::Unavailable(format!("{}: {e}", path.display()));
    let mut file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).map_err(failed)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let pid = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = command.replace('\0', " ").trim().to_owned();
        let owner = match (pid.is_empty(), command.is_empty()) {
            (true, _) => "another process".to_owned(),
            (false, true) => format!("process {pid}"),
            (false, false) => format!("process {pid} ({command})"),
        };
        return Err(StateError::InUse { dir: dir.display().to_string(), owner });
    }
    file.set_len(0).map_err(failed)?;
    writeln!(file, "{}", std::process::id()).map_err(failed)?;
    Ok(file)
}

/// Ends leases when their time is up, as long as the store is open.
async fn expire(store: std::sync::Weak<Inner>) {
    loop {
        let Some(inner) = store.upgrade() else { return };
        let now = Instant::now();
        let (due, next) = {
            let leases = inner.leases();
            let due: Vec<_> = leases.iter().filter(|(_, l)| l.ends_at <= now).map(|(id, _)| *id).collect();
            (due, leases.values().map(|l| l.ends_at).min())
        };
        if due.is_empty() {
            // Only weak while it waits, so that dropping the store closes it. A new lease may end sooner than the one
            // waited for; a kept one only later.
            let changed = inner.leases_changed.clone();
            let wait = next.map_or(Duration::from_secs(3600), |at| at - now);
            drop(inner);
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
            continue;
        }
        let ended = tokio::task::spawn_blocking(move || inner.end_leases(&due)).await;
        if let Ok(Err(error)) = ended {
            tracing::warn!(%error, "could not remove the keys of an expired lease");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn old_changes_are_dropped_and_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(dir.path()).await.unwrap();
        for i in 0..20 {
            store.txn(vec![Op::put("busy", [i])]).await.unwrap();
        }
        let mut watch = store.watch("busy", Revision(1));
        let StateError::Compacted { oldest } = watch.next().await.unwrap_err() else {
            panic!("not compacted")
        };
        assert_eq!(oldest, Revision(5));
        let mut watch = store.watch("busy", oldest);
        for i in 4..20 {
            assert_eq!(watch.next().await.unwrap().value, Some(vec![i]));
        }
    }
}
