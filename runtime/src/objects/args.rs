//! Refs in the arguments of actors. The owner of each object keeps it for as long as the actor may be started with them,
//! by a ref of its own: whoever spawned the actor may be gone by then. (OB-5)
//!
//! The head says when that is over. It knows nothing of objects.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use tokio_util::task::AbortOnDropHandle;

use super::keeper::OwnerActor;
use super::messages::KeepForActor;
use super::table::Table;
use super::{ObjectId, ObjectRef, scope};
use crate::backoff::Backoff;
use crate::cluster::{Cluster, ClusterError};
use crate::handle::{ActorId, Handle};
use crate::head::messages::IsOver;
use crate::package::Digest;
use crate::wire::{CodecError, to_bytes};

/// How long one question to the head waits for its answer to change.
const PART: Duration = Duration::from_secs(10);

/// The refs in the arguments of a spec, in the process that made it. They keep their objects until the spec is applied or
/// dropped. They are no part of the spec: they are not sent, and make no difference between two specs.
#[derive(Debug, Clone, Default)]
pub struct ArgRefs(Vec<ObjectRef>);

impl PartialEq for ArgRefs {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for ArgRefs {}

impl Encode for ArgRefs {
    fn encode<E: Encoder>(&self, _: &mut E) -> Result<(), EncodeError> {
        Ok(())
    }
}

impl<C> Decode<C> for ArgRefs {
    fn decode<D: Decoder<Context = C>>(_: &mut D) -> Result<Self, DecodeError> {
        Ok(Self::default())
    }
}

bincode::impl_borrow_decode!(ArgRefs);

/// Arguments as a spec has them, and the refs in them.
pub(crate) fn encode<T: Encode>(args: &T) -> Result<(Vec<u8>, ArgRefs), CodecError> {
    let (bytes, refs) = scope::put(|| to_bytes(args));
    Ok((bytes?, ArgRefs(refs)))
}

/// By what arguments are told from others.
pub(crate) fn digest(args: &[u8]) -> Digest {
    Digest(Sha256::digest(args).into())
}

/// An actor with certain arguments.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub(super) struct Life {
    /// Its full name.
    pub(super) actor: String,
    /// Those it is started with.
    pub(super) args: Digest,
    /// Heads, one of which knows.
    pub(super) heads: String,
}

/// What is to be kept for an actor that is about to be applied.
pub(crate) struct Keep {
    life: Life,
    refs: Vec<ObjectRef>,
}

impl Keep {
    /// Takes the refs; none where there are none.
    pub(crate) fn of(actor: &str, args: &[u8], refs: &mut ArgRefs, heads: String) -> Option<Self> {
        let refs = std::mem::take(&mut refs.0);
        let life = || Life { actor: actor.to_owned(), args: digest(args), heads };
        (!refs.is_empty()).then(|| Self { life: life(), refs })
    }

    /// Has the owners keep their objects, now that the head knows the actor.
    pub(crate) async fn hand_over(self, cluster: &Cluster) {
        let (table, life) = (cluster.system().objects(), &self.life);
        let mut owners: BTreeMap<&str, Vec<ObjectId>> = BTreeMap::new();
        for object in &self.refs {
            owners.entry(&object.addr().owner).or_default().push(object.id());
        }
        let told = owners.into_iter().map(|(owner, objects)| async move {
            if owner == table.endpoint() {
                table.keep_for(life, &objects);
                return;
            }
            let handle: Handle<OwnerActor> = cluster.system().handle_at(owner, ActorId::OBJECTS);
            if let Err(error) = handle.ask(KeepForActor { life: life.clone(), objects }).await {
                // Then the actor hears so from whoever it asks for the object.
                let actor = &life.actor;
                tracing::warn!(actor, owner, %error, "the owner of objects in its arguments does not answer");
            }
        });
        join_all(told).await;
    }
}

impl Table {
    /// Keeps objects of this process until that life is over.
    pub(super) fn keep_for(self: &Arc<Self>, life: &Life, objects: &[ObjectId]) {
        self.run();
        let Some(system) = self.system() else { return };
        let refs: Vec<ObjectRef> = objects.iter().filter_map(|object| self.another(*object)).collect();
        if refs.is_empty() {
            return;
        }
        let (table, life, mut kept) = (self.clone(), life.clone(), self.kept());
        let (of, number) = (life.clone(), kept.next());
        let keeping = system.runtime().spawn(async move {
            tokio::select! {
                () = over(&table, &life) => {}
                () = table.stop.cancelled() => {}
            }
            drop(refs);
            table.kept().end(&life, number);
        });
        // The same arguments have the same refs: what was kept before, for the same actor, is kept by this one now.
        kept.begin(of, number, AbortOnDropHandle::new(keeping));
    }

    /// One more ref to an object of this process.
    fn another(self: &Arc<Self>, object: ObjectId) -> Option<ObjectRef> {
        let addr = self.counts().another(object)?;
        Some(ObjectRef::counted(addr, self.clone()))
    }
}

/// Who keeps objects for which lives; each by a task that is numbered.
#[derive(Debug, Default)]
pub(super) struct Kept {
    tasks: HashMap<Life, (u64, AbortOnDropHandle<()>)>,
    last: u64,
}

impl Kept {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn begin(&mut self, life: Life, number: u64, task: AbortOnDropHandle<()>) {
        self.tasks.insert(life, (number, task));
    }

    fn end(&mut self, life: &Life, number: u64) {
        if self.tasks.get(life).is_some_and(|(present, _)| *present == number) {
            self.tasks.remove(life);
        }
    }
}

impl Cluster {
    /// Whether an actor is dead for good, gone, or has other arguments: at once if so, else after at most `wait`.
    async fn is_over(&self, life: &Life, wait: Duration) -> Result<bool, ClusterError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.ask_within(IsOver { actor: life.actor.clone(), args: life.args, wait_ms }, wait, true).await
    }
}

async fn over(table: &Table, life: &Life) {
    let (mut heads, mut backoff) = (life.heads.clone(), Backoff::reconnect());
    while let Some(system) = table.system() {
        let cluster = Cluster::with_system(system, &heads);
        match cluster.is_over(life, PART).await {
            Ok(true) => return,
            Ok(false) => backoff.reset(),
            Err(error) => {
                tracing::debug!(actor = life.actor, %error, "cannot ask whether an actor may still be started");
                backoff.pause().await;
            }
        }
        heads = cluster.known_heads();
    }
}
