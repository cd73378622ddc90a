//! Carries out what the core of a store decides, and serves the processes of the node.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::net::sockopt::socket_peercred;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::super::map::cleared_file;
use super::super::messages::{ObjectStatus, StoreStatus, ToProcess, ToStore};
use super::super::socket::{self, Inbox};
use super::super::{ObjectAddr, ObjectError, ObjectId};
use super::core::{Client, Command, ReadFrom, StoreCore};
use super::{Inner, Outlet, Store, pull};

/// Messages that wait for one process; one that does not read is cut off.
const OUTBOX_MAX: usize = 4096;

type Outgoing = (ToProcess, Option<Arc<OwnedFd>>);

impl Store {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the core decide something, and does it in the same order.
    pub(super) fn with<R>(self: &Arc<Self>, decide: impl FnOnce(&mut StoreCore) -> R) -> R {
        let mut inner = self.lock();
        let decided = decide(&mut inner.core);
        self.execute(&mut inner);
        decided
    }

    fn execute(self: &Arc<Self>, inner: &mut Inner) {
        for command in inner.core.take_commands() {
            match command {
                Command::Done(client, call, result) => {
                    inner.send(client, (ToProcess::Done { call, result }, None));
                }
                Command::Opened(client, call, object, result) => {
                    let memory = result.is_ok().then(|| inner.memory[&object].clone());
                    inner.send(client, (ToProcess::Opened { call, result }, memory));
                }
                Command::Recycled(client, object) => {
                    inner.send(client, (ToProcess::Recycled { object }, None))
                }
                Command::Trim(client) => inner.send(client, (ToProcess::Trim, None)),
                Command::Evict(client, object) => inner.send(client, (ToProcess::Evict { object }, None)),
                Command::Spill(object) => self.spill(object, inner.memory[&object].clone()),
                Command::Load(object, from) => self.load(object, from),
                Command::Close(object) => drop(inner.memory.remove(&object)),
                Command::Unlink(object) => self.disk.remove(object),
                Command::Make(size) => self.make_ready(size),
                Command::Ready(client, call, size) => {
                    if let Some(memory) = inner.take_ready(size) {
                        inner.send(client, (ToProcess::Ready { call }, Some(Arc::new(memory))));
                    }
                }
                Command::Unready(size) => drop(inner.take_ready(size)),
            }
        }
    }

    fn spill(self: &Arc<Self>, object: ObjectId, memory: Arc<OwnedFd>) {
        let store = self.clone();
        self.system.runtime().spawn_blocking(move || {
            let bytes = store.with(|core| core.bytes_of(object));
            let written = bytes.map_or(Ok(()), |bytes| store.disk.write(object, memory.as_fd(), bytes));
            if let Err(error) = &written {
                tracing::warn!(%object, error, "cannot spill");
            }
            store.with(|core| core.spilled(object, written));
        });
    }

    fn make_ready(self: &Arc<Self>, size: u64) {
        let store = self.clone();
        self.system.runtime().spawn_blocking(move || {
            let made = usize::try_from(size).map_err(io::Error::other).and_then(cleared_file);
            let mut inner = store.lock();
            let ok = made.is_ok();
            match made {
                Ok(memory) => inner.ready.push((size, memory)),
                Err(error) => tracing::warn!(%error, size, "no memory can be made ready for objects"),
            }
            inner.core.made(size, ok);
            store.execute(&mut inner);
        });
    }

    fn load(self: &Arc<Self>, object: ObjectId, from: Option<ObjectAddr>) {
        let store = self.clone();
        self.system.runtime().spawn(async move {
            let loaded = match from {
                Some(addr) => pull::pull(&store, addr).await,
                None => {
                    let reading = store.clone();
                    let bytes = store.with(|core| core.bytes_of(object)).unwrap_or_default();
                    let read =
                        tokio::task::spawn_blocking(move || reading.disk.read_whole(object, bytes)).await;
                    read.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(ObjectError::io)
                }
            };
            let mut inner = store.lock();
            let loaded = loaded.map(|memory| inner.memory.insert(object, Arc::new(memory)));
            inner.core.loaded(object, loaded.map(drop));
            store.execute(&mut inner);
        });
    }

    /// Serves a process until it ends.
    pub(super) async fn serve(self: &Arc<Self>, stream: UnixStream) {
        let served = async {
            let peer = socket_peercred(stream.as_fd())?;
            let (mut inbox, stream) = (Inbox::default(), Arc::new(stream));
            let carries = |message: &ToStore| matches!(message, ToStore::Publish { .. });
            let process = match inbox.next(&stream, carries).await? {
                Some((ToStore::Hello { process }, _)) => process,
                Some(_) | None => return Err(io::Error::other("it did not say who it is")),
            };
            let (out, outgoing) = mpsc::channel(OUTBOX_MAX);
            let welcome = ToProcess::Welcome { endpoint: self.system.endpoint().to_owned() };
            let _ = out.try_send((welcome, None));
            let client = {
                let mut inner = self.lock();
                let client = Client(inner.next_client);
                inner.next_client += 1;
                let pid = peer.pid.as_raw_pid().unsigned_abs();
                inner.clients.insert(client, Outlet { pid, out });
                inner.core.connected(client, process);
                client
            };
            let over = tokio::select! {
                over = write(&stream, outgoing) => over,
                over = self.read(client, &stream, &mut inbox) => over,
            };
            let mut inner = self.lock();
            inner.clients.remove(&client);
            inner.core.closed(client);
            self.execute(&mut inner);
            over
        };
        if let Err(error) = served.await {
            tracing::warn!(%error, "the object store has cut a process off");
        }
    }

    async fn read(
        self: &Arc<Self>,
        client: Client,
        stream: &UnixStream,
        inbox: &mut Inbox,
    ) -> io::Result<()> {
        let carries = |message: &ToStore| matches!(message, ToStore::Publish { .. });
        while let Some((message, fd)) = inbox.next(stream, carries).await? {
            let mut inner = self.lock();
            let core = &mut inner.core;
            match message {
                ToStore::Hello { .. } => return Err(io::Error::other("it said twice who it is")),
                ToStore::Reserve { call, bytes } => core.reserve(client, call, bytes),
                ToStore::Unreserve { bytes } => core.unreserve(client, bytes),
                ToStore::Publish { call, object, bytes, capacity } => {
                    let result = core.publish(client, object, bytes, capacity);
                    if result.is_ok() {
                        inner.memory.extend(fd.map(|fd| (object, Arc::new(fd))));
                    }
                    inner.send(client, (ToProcess::Done { call, result }, None));
                }
                ToStore::Spilled { object, bytes } => {
                    if self.disk.has(object, bytes) && core.bytes_of(object).is_none() {
                        core.found(client, object, bytes);
                    }
                }
                ToStore::Free { object } => core.free(client, object),
                ToStore::Open { call, object } => core.open(client, call, object, self.system.endpoint()),
                ToStore::Close { object } => core.close(client, object),
                ToStore::Forget { object } => core.forget(client, object),
                ToStore::Trimmed => core.trimmed(client),
                ToStore::Evicted { object, done } => core.evicted(client, object, done),
            }
            self.execute(&mut inner);
            if !inner.clients.contains_key(&client) {
                return Err(io::Error::other("it does not read what it is told"));
            }
        }
        Ok(())
    }

    /// A piece of an object, for another node.
    pub(super) fn piece(
        self: &Arc<Self>,
        object: ObjectId,
        offset: u64,
        max: usize,
    ) -> Result<Vec<u8>, ObjectError> {
        let (from, memory) = {
            let mut inner = self.lock();
            let from = inner.core.begin_read(object)?;
            (from, inner.memory.get(&object).cloned())
        };
        let bytes = self.with(|core| core.bytes_of(object)).unwrap_or_default();
        let max = usize::try_from(bytes.saturating_sub(offset)).unwrap_or(max).min(max);
        let read = match (from, memory) {
            (ReadFrom::Memory, Some(memory)) => read_at(memory.as_fd(), offset, max),
            (ReadFrom::Memory | ReadFrom::Disk, _) => self.disk.read(object, offset, max),
        };
        self.with(|core| core.end_read(object));
        read.map_err(ObjectError::io)
    }

    /// What there is.
    pub(super) fn status(&self) -> StoreStatus {
        let inner = self.lock();
        let pid = |client: &Client| inner.clients.get(client).map(|outlet| outlet.pid);
        let objects = inner.core.list().map(|(object, bytes, state, owner, readers)| ObjectStatus {
            object: object.to_string(),
            node: self.config.node.clone(),
            state,
            bytes,
            owner_pid: owner.as_ref().and_then(pid),
            readers: readers.iter().filter_map(pid).collect(),
        });
        let (used, spilled) = inner.core.used();
        StoreStatus { capacity: self.config.memory_bytes_max, used, spilled, objects: objects.collect() }
    }
}

impl Inner {
    fn take_ready(&mut self, size: u64) -> Option<OwnedFd> {
        let at = self.ready.iter().position(|(ready, _)| *ready == size)?;
        Some(self.ready.swap_remove(at).1)
    }

    /// A process that does not read is let go; its reader notices.
    fn send(&mut self, client: Client, message: Outgoing) {
        if let Some(outlet) = self.clients.get(&client)
            && outlet.out.try_send(message).is_err()
        {
            self.clients.remove(&client);
        }
    }
}

async fn write(stream: &UnixStream, mut outgoing: mpsc::Receiver<Outgoing>) -> io::Result<()> {
    while let Some((message, memory)) = outgoing.recv().await {
        let sent = socket::send(stream, &message, memory.as_ref().map(|memory| memory.as_fd())).await;
        match sent {
            // It has just ended; so says the other direction, too.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent?,
        }
    }
    Err(io::Error::other("it does not read what it is told"))
}

/// Bytes of a file from `offset` on.
pub(super) fn read_at(fd: std::os::fd::BorrowedFd<'_>, offset: u64, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; max];
    let mut read = 0;
    while read < max {
        match rustix::io::pread(fd, &mut bytes[read..], offset + read as u64)? {
            0 => break,
            n => read += n,
        }
    }
    bytes.truncate(read);
    Ok(bytes)
}
