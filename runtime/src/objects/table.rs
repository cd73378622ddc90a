//! The objects of one process: what it owns, what it borrows, what it has mapped.
//!
//! It is there from the start of a system, and costs nothing before the first object: only then its keeper runs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::args::Kept;
use super::client::Mapped;
use super::counts::{Counts, Ticket};
use super::link::StoreLink;
use super::messages::ToStore;
use super::pool::Pool;
use super::{ObjectAddr, ObjectId, keeper};
use crate::handle::ProcessId;
use crate::system::{System, WeakSystem};

/// Between two looks for a store on this machine.
const LOOK_PAUSE: Duration = Duration::from_secs(5);

/// The objects of one process.
pub(crate) struct Table {
    pub(super) process: ProcessId,
    endpoint: String,
    system: OnceLock<WeakSystem>,
    begun: Instant,
    counts: Mutex<Counts>,
    /// The counts want something done.
    pub(super) news: Notify,
    pool: Mutex<Pool>,
    /// Objects of this process that live in its own memory.
    small: Mutex<HashMap<u64, Bytes>>,
    mapped: Mutex<HashMap<ObjectId, Weak<Mapped>>>,
    /// What is kept for actors that have refs in their arguments.
    kept: Mutex<Kept>,
    next: AtomicU64,
    running: AtomicBool,
    /// When a store was last looked for in vain.
    looked: Mutex<Option<Instant>>,
    /// The socket of the node's store, once it is known.
    pub(super) store: watch::Sender<Option<PathBuf>>,
    pub(super) link: watch::Sender<Option<Arc<StoreLink>>>,
    pub(super) stop: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    pub(crate) fn new(process: ProcessId, endpoint: String) -> Arc<Self> {
        Arc::new(Self {
            process,
            endpoint,
            system: OnceLock::new(),
            begun: Instant::now(),
            counts: Mutex::new(Counts::new(process)),
            news: Notify::new(),
            pool: Mutex::default(),
            small: Mutex::default(),
            mapped: Mutex::default(),
            kept: Mutex::default(),
            next: AtomicU64::new(1),
            running: AtomicBool::new(false),
            looked: Mutex::new(None),
            store: watch::Sender::new(None),
            link: watch::Sender::new(None),
            stop: CancellationToken::new(),
        })
    }

    /// Belongs to that system from now on.
    pub(crate) fn attach(&self, system: WeakSystem) {
        let _ = self.system.set(system);
    }

    /// The store of the node has its socket there.
    pub(crate) fn at_store(&self, socket: PathBuf) {
        self.store.send_replace(Some(socket));
    }

    /// The process takes part no more.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    pub(super) fn system(&self) -> Option<System> {
        self.system.get()?.upgrade()
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
    }

    pub(super) fn pool(&self) -> MutexGuard<'_, Pool> {
        lock(&self.pool)
    }

    pub(super) fn small(&self) -> MutexGuard<'_, HashMap<u64, Bytes>> {
        lock(&self.small)
    }

    pub(super) fn mapped(&self) -> MutexGuard<'_, HashMap<ObjectId, Weak<Mapped>>> {
        lock(&self.mapped)
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.kept)
    }

    /// Sees to it that the keeper runs.
    pub(super) fn run(self: &Arc<Self>) {
        if !self.running.swap(true, Ordering::Relaxed)
            && let Some(system) = self.system()
        {
            keeper::start(self, &system);
        }
    }

    /// Whether a store may be looked for now, which is not done for every object.
    pub(super) fn may_look(&self) -> bool {
        let mut looked = lock(&self.looked);
        let due = looked.is_none_or(|at| at.elapsed() >= LOOK_PAUSE);
        if due {
            *looked = Some(Instant::now());
        }
        due
    }

    pub(super) fn next_id(&self) -> ObjectId {
        ObjectId { owner: self.process, number: self.next.fetch_add(1, Ordering::Relaxed) }
    }

    /// A ref came in by a message, or was read within an object. False if it is not counted.
    pub(super) fn arrived(
        self: &Arc<Self>,
        addr: &ObjectAddr,
        ticket: Option<Ticket>,
        within: Option<ObjectId>,
    ) -> bool {
        self.run();
        let counted = self.counts().arrived(addr, ticket, within);
        self.news.notify_one();
        counted
    }

    /// A ref is gone.
    pub(super) fn dropped(&self, id: ObjectId) {
        self.counts().dropped(id);
        self.news.notify_one();
    }

    /// A ref is being sent.
    pub(super) fn sent(&self, id: ObjectId) -> Option<Ticket> {
        let number = self.counts().sent(id, self.now())?;
        self.news.notify_one();
        Some(Ticket { sender: self.endpoint.clone(), number })
    }

    /// Something is mapped no more.
    pub(super) fn unmapped(&self, id: ObjectId, link: &Weak<StoreLink>) {
        let mut mapped = self.mapped();
        if mapped.get(&id).is_some_and(|mapped| mapped.strong_count() == 0) {
            mapped.remove(&id);
        }
        drop(mapped);
        // A store that came later never heard of this mapping.
        if let Some(link) = link.upgrade()
            && !link.try_tell(ToStore::Close { object: id })
            && let Some(system) = self.system()
        {
            system.runtime().spawn(async move { link.tell(ToStore::Close { object: id }).await });
        }
    }
}
