//! The object store of a node, in the process of its agent: shared memory that the processes of the node put objects into
//! and map, with a disk behind it.
//!
//! `core` (pure) decides, `hosting` executes; `disk` and `pull` bring bytes in and out, `service` answers other nodes. The
//! store never maps memory itself. Its connection with a process breaks when that process ends, and not before: that is
//! how it knows who lives.

mod core;
#[cfg(test)]
mod core_tests;
mod disk;
mod hosting;
mod pull;
mod service;
mod stored;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use self::core::{Client, Limits, StoreCore};
use self::disk::Disk;
pub(crate) use self::service::StoreActor;
use super::ObjectId;
use super::messages::ToProcess;
use super::pool::Pool;
use super::socket;
use crate::actor::CreateError;
use crate::system::System;

/// Pulls from other nodes at once.
const PULLS_MAX: usize = 4;
/// A process that is asked for memory may take so long.
const TICK: Duration = Duration::from_secs(1);
/// How long the processes of a node may take to find a new store.
const SETTLING: Duration = Duration::from_secs(3);
/// Descriptors that are left for everything else.
const FDS_KEPT: u64 = 256;

/// What a store is.
#[derive(Debug, Clone)]
pub(crate) struct StoreConfig {
    /// Name of the node.
    pub(crate) node: String,
    /// Where its socket is.
    pub(crate) socket: PathBuf,
    /// Shared memory that it may hand out.
    pub(crate) memory_bytes_max: u64,
    /// Where objects go that have no room in memory.
    pub(crate) spill_dir: PathBuf,
    /// Bytes that may lie there; 0 for none.
    pub(crate) spill_bytes_max: u64,
    /// Sizes of objects for which memory is kept ready.
    pub(crate) ready: Vec<usize>,
}

/// The store of a node.
pub(crate) struct Store {
    config: StoreConfig,
    system: System,
    disk: Disk,
    pulls: Semaphore,
    inner: Mutex<Inner>,
}

struct Inner {
    core: StoreCore,
    memory: HashMap<ObjectId, Arc<OwnedFd>>,
    /// Memory that is ready, with its size.
    ready: Vec<(u64, OwnedFd)>,
    clients: HashMap<Client, Outlet>,
    next_client: u64,
}

struct Outlet {
    pid: u32,
    out: mpsc::Sender<(ToProcess, Option<Arc<OwnedFd>>)>,
}

/// A store that runs until this is dropped.
pub(crate) struct StoreHandle {
    store: Arc<Store>,
    _serving: AbortOnDropHandle<()>,
}

impl StoreHandle {
    /// Removes what is on disk; the node leaves.
    pub(crate) fn leave(&self) {
        self.store.disk.clear();
        let _ = std::fs::remove_file(&self.store.config.socket);
    }
}

/// Starts the store of a node. What an earlier one left on disk is removed.
pub(crate) async fn run(config: StoreConfig, system: &System) -> Result<StoreHandle, CreateError> {
    let failed = |error: io::Error| CreateError::Failed(format!("{}: {error}", config.socket.display()));
    let disk = Disk::new(&config.spill_dir);
    let listener = listen(&config.socket).map_err(failed)?;
    let limits = Limits {
        memory_bytes_max: config.memory_bytes_max,
        disk_bytes_max: config.spill_bytes_max,
        objects_max: descriptors(),
        ready: config.ready.iter().map(|bytes| Pool::capacity(*bytes) as u64).collect(),
    };
    let inner = Inner {
        core: StoreCore::new(limits),
        memory: HashMap::new(),
        ready: Vec::new(),
        clients: HashMap::new(),
        next_client: 1,
    };
    let store = Arc::new(Store {
        config,
        system: system.clone(),
        disk,
        pulls: Semaphore::new(PULLS_MAX),
        inner: Mutex::new(inner),
    });
    service::start(&store).await?;
    let serving = store.clone();
    let serving = tokio::spawn(async move {
        tokio::join!(accept(&serving, listener), tick(&serving), settle(&serving));
    });
    Ok(StoreHandle { store, _serving: AbortOnDropHandle::new(serving) })
}

fn listen(path: &std::path::Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = socket::short(path, |short| UnixListener::bind(short))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Raises the bound of descriptors to what is allowed; how many objects that makes room for.
fn descriptors() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "cannot raise the bound of descriptors");
            limit = getrlimit(Resource::Nofile);
        }
    }
    let all = limit.current.unwrap_or(1 << 20);
    usize::try_from(all.saturating_sub(FDS_KEPT)).unwrap_or(usize::MAX)
}

async fn accept(store: &Arc<Store>, listener: UnixListener) {
    let mut clients = tokio::task::JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let store = store.clone();
                clients.spawn(async move { store.serve(stream).await });
            }
            Err(error) => {
                tracing::warn!(%error, "the object store cannot accept a process");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        while clients.try_join_next().is_some() {}
    }
}

async fn tick(store: &Arc<Store>) {
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        store.with(StoreCore::tick);
    }
}

async fn settle(store: &Arc<Store>) {
    tokio::time::sleep(SETTLING).await;
    let claimed = store.with(|core| {
        core.settled();
        core.list().map(|(object, ..)| object.to_string()).collect::<HashSet<_>>()
    });
    // What comes later is of this store: it had no files before it settled but those that were claimed.
    store.disk.sweep(|name| claimed.contains(name));
}
