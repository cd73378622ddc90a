//! Putting and getting objects.

use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::counts::Whereabouts;
use super::keeper::{self, OwnerActor};
use super::link::StoreLink;
use super::map::{Segment, View};
use super::messages::{Fate, FindStore, ListObjects, ReadObject, ToStore};
use super::object_ref::ObjectRef;
use super::pool::Pool;
use super::scope;
use super::store::StoreActor;
use super::table::Table;
use super::{CHUNK_BYTES, ObjectAddr, ObjectError, ObjectId, SMALL_BYTES_MAX, StoreStatus};
use crate::backoff::Backoff;
use crate::cluster::status::{NodeState, NodeStatus};
use crate::cluster::{Cluster, ClusterError};
use crate::handle::{ActorId, Handle};
use crate::spec::HOST_LABEL;
use crate::wire::{from_bytes, to_bytes};

/// How long the store of the node may be away, and an owner out of reach, before a call gives up.
const AWAY_MAX: Duration = Duration::from_secs(10);
/// How long a small object waits for the first word of the store.
const GREETING_MAX: Duration = Duration::from_secs(1);
/// Limit of one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Puts and gets objects on behalf of this process. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    table: Arc<Table>,
    cluster: Cluster,
}

/// The bytes of an object. In shared memory they are those of the store itself, not a copy.
#[derive(Clone)]
pub struct ObjectBytes(Held);

#[derive(Clone)]
enum Held {
    Small(Bytes),
    /// An object of this process, in its own segment.
    Own(Arc<Segment>, usize),
    Mapped(Arc<Mapped>),
}

/// An object that is mapped for reading; the store counts this process as a reader until it is dropped.
pub(super) struct Mapped {
    view: View,
    id: ObjectId,
    table: Arc<Table>,
    link: Weak<StoreLink>,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.table.unmapped(self.id, &self.link);
    }
}

impl Deref for ObjectBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Held::Small(bytes) => bytes,
            Held::Own(segment, len) => &segment.bytes()[..*len],
            Held::Mapped(mapped) => mapped.view.bytes(),
        }
    }
}

impl AsRef<[u8]> for ObjectBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for ObjectBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectBytes({})", self.len())
    }
}

impl Cluster {
    /// Objects: large values that are put once and read by many.
    pub fn objects(&self) -> Objects {
        Objects { table: self.system().objects().clone(), cluster: self.clone() }
    }

    /// The object stores of all nodes that answer, with their objects.
    ///
    /// # Errors
    /// The head does not answer.
    pub async fn object_stores(&self) -> Result<Vec<StoreStatus>, ClusterError> {
        let status = self.status().await?;
        let asked = status.nodes.iter().filter(|node| answers(node)).map(|node| {
            let store: Handle<StoreActor> = self.system().handle_at(&node.endpoint, ActorId::OBJECTS);
            async move { store.with_deadline(ANSWER_TIMEOUT).ask(ListObjects).await.ok() }
        });
        Ok(futures_util::future::join_all(asked).await.into_iter().flatten().collect())
    }
}

fn answers(node: &NodeStatus) -> bool {
    match &node.state {
        NodeState::Ready | NodeState::Draining { .. } | NodeState::Drained | NodeState::Leaving => true,
        NodeState::Unreachable { .. } | NodeState::Lost { .. } => false,
    }
}

impl Objects {
    /// Puts an object: copies the bytes, at the speed of memory where this process has put one of that size before, and
    /// returns the first ref to it. This process owns it: it is there until the last ref is gone, or this process.
    ///
    /// It copies on the calling thread.
    ///
    /// # Errors
    /// There is no room in the store of the node, nor on its disk, or the store is away.
    pub async fn put(&self, bytes: &[u8]) -> Result<ObjectRef, ObjectError> {
        self.put_with(bytes, Vec::new()).await
    }

    async fn put_with(&self, bytes: &[u8], within: Vec<ObjectId>) -> Result<ObjectRef, ObjectError> {
        let mut writer = self.create(bytes.len()).await?;
        writer.copy_from_slice(bytes);
        writer.within = within;
        writer.finish().await
    }

    /// Puts a value, as messages encode it. Refs in it are kept for as long as the object is there.
    ///
    /// # Errors
    /// As `put`, or it cannot be encoded.
    pub async fn put_value<T: Encode>(&self, value: &T) -> Result<ObjectRef, ObjectError> {
        let (bytes, within) = scope::put(|| to_bytes(value));
        self.put_with(&bytes?, within.iter().map(ObjectRef::id).collect()).await
    }

    /// Memory for an object of that size, to be filled in place: zero or what was there before.
    ///
    /// # Errors
    /// As `put`.
    pub async fn create(&self, bytes: usize) -> Result<ObjectWriter, ObjectError> {
        self.table.run();
        if self.has_store().await && bytes <= SMALL_BYTES_MAX {
            // The ref says whom to ask whether this process lives.
            let _ = tokio::time::timeout(GREETING_MAX, self.link()).await;
        }
        let memory = match bytes > SMALL_BYTES_MAX && self.has_store().await {
            false => Memory::Own(vec![0; bytes]),
            true => Memory::Segment(self.segment(bytes).await?),
        };
        Ok(ObjectWriter { objects: self.clone(), memory: Some(memory), bytes, within: Vec::new() })
    }

    /// Gets the memory for an object of that size ready, so that its put is as fast as one that is not the first.
    ///
    /// # Errors
    /// As `put`.
    pub async fn prefault(&self, bytes: usize) -> Result<(), ObjectError> {
        self.create(bytes).await.map(drop)
    }

    /// The bytes of an object. On a node they are shared, from another node they are copied here once for all processes.
    /// Where the store has no room they are copied to this process alone. Waits for as long as that takes.
    ///
    /// # Errors
    /// The object is gone, with its owner, its node or its last ref.
    pub async fn get(&self, object: &ObjectRef) -> Result<ObjectBytes, ObjectError> {
        self.table.run();
        let (addr, table) = (object.addr(), &self.table);
        let id = addr.id;
        let own = id.owner == table.process;
        if own
            && addr.in_store
            && let Some(segment) = table.pool().published(id.number)
        {
            return Ok(ObjectBytes(Held::Own(segment, self.size(addr)?)));
        }
        if own && let Some(bytes) = table.small().get(&id.number) {
            return Ok(ObjectBytes(Held::Small(bytes.clone())));
        }
        if own && !addr.in_store {
            return Err(ObjectError::Freed { object: id });
        }
        if let Some(mapped) = table.mapped().get(&id).and_then(Weak::upgrade) {
            return Ok(ObjectBytes(Held::Mapped(mapped)));
        }
        if addr.in_store && self.has_store().await {
            match self.map(addr).await {
                // Where the store has no room for it this process has: what is on disk can always be read.
                Err(ObjectError::StoreFull { .. } | ObjectError::TooLarge { .. }) => {}
                mapped => return mapped,
            }
        }
        self.fetch(addr).await.map(|bytes| ObjectBytes(Held::Small(bytes)))
    }

    /// The value of an object that `put_value` put.
    ///
    /// # Errors
    /// As `get`, or it is no such value.
    pub async fn get_value<T: Decode<()>>(&self, object: &ObjectRef) -> Result<T, ObjectError> {
        let bytes = self.get(object).await?;
        Ok(scope::read_from(&self.table, object.id(), || from_bytes(&bytes))?)
    }

    /// Waits until `count` of the objects can be read here at once, or are known to be lost, and at most for `limit`.
    /// Returns those and the others, in the order given.
    pub async fn wait(
        &self,
        objects: &[ObjectRef],
        count: usize,
        limit: Duration,
    ) -> (Vec<ObjectRef>, Vec<ObjectRef>) {
        let mut ready = HashMap::new();
        let mut getting: FuturesUnordered<_> = objects
            .iter()
            .enumerate()
            .map(|(i, object)| async move { (i, self.get(object).await) })
            .collect();
        let enough = async {
            while ready.len() < count
                && let Some((i, got)) = getting.next().await
            {
                ready.insert(i, got);
            }
        };
        let _ = tokio::time::timeout(limit, enough).await;
        let (mut here, mut others) = (Vec::new(), Vec::new());
        for (i, object) in objects.iter().enumerate() {
            if ready.contains_key(&i) { here.push(object.clone()) } else { others.push(object.clone()) }
        }
        (here, others)
    }

    /// Refs that `decode` makes count as this process's.
    pub(crate) fn received<R>(&self, decode: impl FnOnce() -> R) -> R {
        scope::received(&self.table, decode)
    }

    fn size(&self, addr: &ObjectAddr) -> Result<usize, ObjectError> {
        usize::try_from(addr.bytes).map_err(ObjectError::io)
    }

    /// A segment for an object of that size, from those that are idle or new.
    async fn segment(&self, bytes: usize) -> Result<Segment, ObjectError> {
        if let Some(segment) = self.table.pool().take(bytes) {
            return Ok(segment);
        }
        let capacity = Pool::capacity(bytes);
        let ready = Tries::of(|| async move { self.link().await?.reserve(capacity as u64).await }).await?;
        let made = tokio::task::spawn_blocking(move || match ready {
            Some(ready) => Segment::over(ready, capacity),
            None => Segment::create(capacity),
        });
        let made = made.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        if made.is_err()
            && let Ok(link) = self.link().await
        {
            link.tell(ToStore::Unreserve { bytes: capacity as u64 }).await;
        }
        made.map_err(ObjectError::io)
    }

    /// Maps an object of the node's store, which brings it there if need be.
    async fn map(&self, addr: &ObjectAddr) -> Result<ObjectBytes, ObjectError> {
        let len = self.size(addr)?;
        let (table, id) = (&self.table, addr.id);
        let (link, memory) = Tries::of(|| async move {
            let link = self.link().await?;
            let memory = link.open(addr.clone()).await?;
            Ok((link, memory))
        })
        .await?;
        let view = match View::map(memory.as_fd(), len) {
            Ok(view) => view,
            Err(error) => {
                link.tell(ToStore::Close { object: id }).await;
                return Err(ObjectError::io(error));
            }
        };
        let opened = Mapped { view, id, table: table.clone(), link: Arc::downgrade(&link) };
        let mapped = Arc::new(opened);
        table.mapped().insert(id, Arc::downgrade(&mapped));
        Ok(ObjectBytes(Held::Mapped(mapped)))
    }

    /// Reads an object in pieces, from its owner, or from its store where this process has none of its own.
    async fn fetch(&self, addr: &ObjectAddr) -> Result<Bytes, ObjectError> {
        let (object, started, mut backoff) = (addr.id, Instant::now(), Backoff::reconnect());
        let mut bytes = Vec::with_capacity(self.size(addr)?);
        while (bytes.len() as u64) < addr.bytes || addr.bytes == 0 {
            let piece = ReadObject { object, offset: bytes.len() as u64, max: CHUNK_BYTES };
            let (at, asked) = match (&addr.store, addr.in_store) {
                (Some(store), true) => {
                    let store_actor: Handle<StoreActor> =
                        self.cluster.system().handle_at(store, ActorId::OBJECTS);
                    let asked = store_actor.with_deadline(ANSWER_TIMEOUT).ask(piece).await;
                    (store, asked.map_err(|error| error.to_string()))
                }
                (Some(_) | None, _) => {
                    let owner: Handle<OwnerActor> =
                        self.cluster.system().handle_at(&addr.owner, ActorId::OBJECTS);
                    let asked = owner.with_deadline(ANSWER_TIMEOUT).ask(piece).await;
                    (&addr.owner, asked.map_err(|error| error.to_string()))
                }
            };
            match asked {
                Ok(Ok(piece)) if addr.bytes == 0 => return Ok(piece.into()),
                Ok(Ok(piece)) if piece.is_empty() => {
                    return Err(ObjectError::Io(format!(
                        "object {object} has not the size that its ref says"
                    )));
                }
                Ok(Ok(piece)) => bytes.extend_from_slice(&piece),
                Ok(Err(ObjectError::StoreAway(_))) if started.elapsed() < AWAY_MAX => backoff.pause().await,
                Ok(Err(error)) => return Err(error),
                Err(why) => {
                    let whereabouts =
                        Whereabouts { store: addr.store.clone(), endpoint: Some(addr.owner.clone()) };
                    match keeper::fate(self.cluster.system(), object.owner, &whereabouts).await {
                        Fate::Ended(why) => return Err(ObjectError::OwnerDied { object, why }),
                        Fate::Lives if started.elapsed() < AWAY_MAX => backoff.pause().await,
                        Fate::Lives | Fate::Unknown => {
                            return Err(ObjectError::Unreachable { object, at: at.clone(), why });
                        }
                    }
                }
            }
        }
        Ok(bytes.into())
    }

    async fn link(&self) -> Result<Arc<StoreLink>, ObjectError> {
        let mut link = self.table.link.subscribe();
        let there = tokio::time::timeout(AWAY_MAX, link.wait_for(Option::is_some)).await;
        let there = there.ok().and_then(|link| link.ok().and_then(|link| link.clone()));
        there.ok_or_else(|| ObjectError::StoreAway(format!("no answer for {} s", AWAY_MAX.as_secs())))
    }

    /// Whether this process runs on a node. A worker knows; a driver looks for an agent of its own host.
    async fn has_store(&self) -> bool {
        if self.table.store.borrow().is_some() {
            return true;
        }
        if !self.table.may_look() {
            return false;
        }
        let Ok(status) = self.cluster.status().await else { return false };
        let host = crate::node::host_name();
        let here = |node: &&NodeStatus| answers(node) && node.labels.get(HOST_LABEL) == Some(&host);
        for node in status.nodes.iter().filter(here) {
            let store: Handle<StoreActor> = self.cluster.system().handle_at(&node.endpoint, ActorId::OBJECTS);
            if let Ok(path) = store.with_deadline(ANSWER_TIMEOUT).ask(FindStore).await
                && std::fs::metadata(&path).is_ok()
            {
                self.table.at_store(path.into());
                return true;
            }
        }
        false
    }
}

/// Attempts at something for which a store is needed that may be away for a while.
struct Tries {
    started: Instant,
    backoff: Backoff,
}

impl Tries {
    fn new() -> Self {
        Self { started: Instant::now(), backoff: Backoff::reconnect() }
    }

    /// Attempts it until it succeeds, or fails for good.
    async fn of<T, F>(attempt: impl Fn() -> F) -> Result<T, ObjectError>
    where
        F: Future<Output = Result<T, ObjectError>>,
    {
        let mut tries = Self::new();
        loop {
            match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => tries.again(error).await?,
            }
        }
    }

    /// Waits before the next attempt, if there is to be one.
    async fn again(&mut self, error: ObjectError) -> Result<(), ObjectError> {
        match error {
            ObjectError::StoreAway(_) if self.started.elapsed() < AWAY_MAX => {
                self.backoff.pause().await;
                Ok(())
            }
            error => Err(error),
        }
    }
}

/// Memory for an object that is being filled. Dropped before `finish`, it was never an object.
pub struct ObjectWriter {
    objects: Objects,
    memory: Option<Memory>,
    bytes: usize,
    /// Objects to which it has refs in its bytes.
    within: Vec<ObjectId>,
}

enum Memory {
    Own(Vec<u8>),
    Segment(Segment),
}

impl Deref for ObjectWriter {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.memory {
            Some(Memory::Own(bytes)) => bytes,
            Some(Memory::Segment(segment)) => &segment.bytes()[..self.bytes],
            None => &[],
        }
    }
}

impl DerefMut for ObjectWriter {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Some(Memory::Own(bytes)) => bytes,
            Some(Memory::Segment(segment)) => &mut segment.bytes_mut()[..self.bytes],
            None => &mut [],
        }
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        if let Some(Memory::Segment(segment)) = self.memory.take() {
            self.objects.table.pool().give_back(segment);
        }
    }
}

impl ObjectWriter {
    /// Makes it an object: from here on nobody can change it.
    ///
    /// # Errors
    /// The store is away.
    pub async fn finish(mut self) -> Result<ObjectRef, ObjectError> {
        let table = self.objects.table.clone();
        let id = table.next_id();
        let memory = self.memory.take().expect("it is taken here and when it is dropped");
        let store = table.link.borrow().as_ref().map(|link| link.endpoint.clone());
        let in_store = matches!(memory, Memory::Segment(_));
        let within = std::mem::take(&mut self.within);
        let bytes = self.bytes as u64;
        let addr = ObjectAddr { id, owner: table.endpoint().to_owned(), store, in_store, bytes };
        match memory {
            Memory::Own(small) => {
                table.small().insert(id.number, small.into());
                table.counts().created(addr.clone(), within);
                Ok(ObjectRef::counted(addr, table))
            }
            Memory::Segment(segment) => {
                let segment = Arc::new(segment);
                let link = self.objects.link().await?;
                let addr = ObjectAddr { store: Some(link.endpoint.clone()), ..addr };
                // Dropped with this future, the ref frees the object.
                table.counts().created(addr.clone(), within);
                let object = ObjectRef::counted(addr, table.clone());
                let mut tries = Tries::new();
                loop {
                    let link = self.objects.link().await?;
                    let sent = || table.pool().publish(id.number, segment.clone(), bytes);
                    match link.publish(id, bytes, segment.clone(), sent).await {
                        Ok(()) => break,
                        Err(error @ ObjectError::StoreAway(_)) => tries.again(error).await?,
                        Err(error) => {
                            table.pool().withdraw(id.number);
                            return Err(error);
                        }
                    }
                }
                Ok(object)
            }
        }
    }
}
