//! What an actor is to the cluster: its messages, the table of what it accepts, how the head has it created.
//!
//! An actor is an actix actor. This file adds the names that cross the wire and nothing of how they get there.

mod accepts;
mod stream;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use actix::{Arbiter, ArbiterHandle};
use bincode::{Decode, Encode};
use futures_util::future::BoxFuture;
use rustix::process::Pid;
use tokio::sync::{Notify, SetOnce};

use crate::cluster::Cluster;
use crate::function::{FunctionActor, FunctionTable};
use crate::handle::{ActorAddr, ActorId, Incarnation};
use crate::mesh::MeshSeat;
use crate::objects::scope;
use crate::spec::{DeathCause, Device, GroupMember, Progress};
use crate::system::{Panic, SpawnError, SpawnOptions, System};
use crate::wire::from_bytes;

pub use self::accepts::{Accepts, Fallible};
pub use self::stream::{Items, StreamMessage};

/// A message that may cross processes. It is an actix message too.
pub trait WireMessage:
    actix::Message<Result: Encode + Decode<()> + Send + 'static> + Encode + Decode<()> + Send + 'static
{
    /// Its name on the wire; unique among the messages of an actor.
    const NAME: &'static str;
}

/// Names messages on the wire: `Message = "name" -> Reply;`.
macro_rules! wire {
    ($($message:ty = $name:literal -> $result:ty;)*) => {
        $(
            impl actix::Message for $message {
                type Result = $result;
            }
            impl $crate::actor::WireMessage for $message {
                const NAME: &'static str = $name;
            }
        )*
    };
}
pub(crate) use wire;

/// An actor that can be reached from other processes.
pub trait RemoteActor: actix::Actor<Context = actix::Context<Self>> {
    /// Name of the type, unique in the binary.
    const TYPE: &'static str;

    /// The visible table of what may be sent to it: `m.accept::<Add>().accept::<Get>()`.
    fn messages(m: &mut Accepts<Self>);
}

/// An actor that the head can have created on a worker.
pub trait Spawn: RemoteActor {
    /// What `ActorSpec::args` holds.
    type Args: Encode + Decode<()> + 'static;

    /// Creates the actor, on the thread it will live on. It may take long: it blocks no other actor. The actor is
    /// ready when this returns. What it awaits may take as long as it likes; where it holds the thread for longer than
    /// `ActorSpec::hang_timeout` without a word (`ActorCx::progress`) it counts as hung.
    fn create(args: Self::Args, cx: ActorCx) -> impl Future<Output = Result<Self, CreateError>>;
}

/// Why an actor could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The binary has no such actor type.
    #[error("no actor type {type_name:?} in this binary; it has {known}")]
    UnknownType {
        /// The name asked for.
        type_name: String,
        /// Those there are.
        known: String,
    },
    /// The arguments are not what the type takes.
    #[error("arguments of actor type {type_name:?}: {why}")]
    Args {
        /// The type.
        type_name: &'static str,
        /// What the codec says.
        why: String,
    },
    /// `Spawn::create` said no.
    #[error("{0}")]
    Failed(String),
    /// `Spawn::create` panicked.
    #[error("panicked: {0}")]
    Panicked(Panic),
    /// The actor could not be registered.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

impl CreateError {
    /// Wraps any error, with its sources, as the reason of `Spawn::create`.
    pub fn failed(error: impl std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::Failed(text)
    }
}

/// The visible table of actor types that a worker can create.
#[derive(Default)]
pub struct ActorTypes {
    create: HashMap<&'static str, CreateFn>,
}

type Creating = BoxFuture<'static, Result<ActorAddr, CreateError>>;
type CreateFn = Box<dyn Fn(Vec<u8>, usize, ActorCx) -> Creating + Send + Sync>;

impl ActorTypes {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an actor type.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn with<A: Spawn>(mut self) -> Self {
        let create = |args, mailbox_capacity, cx| creating(args, mailbox_capacity, cx, <A as Spawn>::create);
        let earlier = self.create.insert(A::TYPE, Box::new(create));
        assert!(earlier.is_none(), "two actor types named {:?}", A::TYPE);
        self
    }

    /// Adds the actor that runs stateless functions, with a program's table of them.
    pub fn with_functions(mut self, table: FunctionTable) -> Self {
        let create = move |args, mailbox_capacity, cx| {
            let table = table.clone();
            let create = async move |max: u32, cx: ActorCx| {
                let cluster = cx
                    .cluster()
                    .ok_or_else(|| CreateError::Failed("functions run in a cluster".to_owned()))?;
                Ok(FunctionActor::new(table, max, cluster))
            };
            creating(args, mailbox_capacity, cx, create)
        };
        self.create.insert(FunctionActor::TYPE, Box::new(create));
        self
    }

    /// Names of all types, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.create.keys().copied().collect();
        names.sort_unstable();
        names
    }

    /// Creates the actor that `cx` is of, from encoded arguments; it is registered under the id and incarnation of
    /// `cx` when this returns.
    pub async fn create(
        &self,
        type_name: &str,
        args: Vec<u8>,
        mailbox_capacity: usize,
        cx: ActorCx,
    ) -> Result<ActorAddr, CreateError> {
        let Some(create) = self.create.get(type_name) else {
            return Err(CreateError::UnknownType {
                type_name: type_name.to_owned(),
                known: self.names().join(", "),
            });
        };
        create(args, mailbox_capacity, cx).await
    }
}

fn creating<A, T, F>(
    args: Vec<u8>,
    mailbox_capacity: usize,
    cx: ActorCx,
    create: impl FnOnce(T, ActorCx) -> F + Send + 'static,
) -> Creating
where
    A: RemoteActor,
    T: Decode<()>,
    F: Future<Output = Result<A, CreateError>>,
{
    Box::pin(async move {
        let system = cx.system().clone();
        let options = SpawnOptions { id: cx.actor_id(), incarnation: cx.incarnation(), mailbox_capacity };
        let made = move || async move {
            cx.parts.reports.begun();
            let args = scope::received(cx.system().objects(), || from_bytes::<T>(&args))
                .map_err(|e| CreateError::Args { type_name: A::TYPE, why: e.to_string() })?;
            create(args, cx).await
        };
        system.spawn_async(options, made).await
    })
}

/// What an actor knows of its place in the cluster and what it can say to it. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct ActorCx {
    parts: Arc<CxParts>,
    cluster: Option<Cluster>,
    mesh: Option<MeshSeat>,
}

/// What a worker gives to an actor that it creates.
pub struct CxParts {
    /// The system of the process.
    pub system: System,
    /// Name of the actor in the cluster.
    pub name: String,
    /// Its id.
    pub actor: ActorId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The device it owns, if it asked for one.
    pub device: Option<Device>,
    /// Its seat in a group, if it has one.
    pub group: Option<GroupMember>,
    /// Where what it says of itself is collected.
    pub reports: Reports,
}

impl ActorCx {
    /// For the worker, and for tests of actors.
    pub fn new(parts: CxParts) -> Self {
        Self { parts: Arc::new(parts), cluster: None, mesh: None }
    }

    /// The same, in a cluster.
    pub fn in_cluster(self, cluster: Cluster) -> Self {
        Self { cluster: Some(cluster), ..self }
    }

    /// The same, at that place in a mesh.
    pub(crate) fn in_mesh(self, mesh: Option<MeshSeat>) -> Self {
        Self { mesh, ..self }
    }

    /// Its place in a mesh, if it is a rank of one.
    pub fn mesh(&self) -> Option<&MeshSeat> {
        self.mesh.as_ref()
    }

    /// The cluster that the worker belongs to; `None` only in tests of actors without one.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// The system of the process.
    pub fn system(&self) -> &System {
        &self.parts.system
    }

    /// Name of the actor in the cluster.
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// Its id.
    pub fn actor_id(&self) -> ActorId {
        self.parts.actor
    }

    /// Its incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.parts.incarnation
    }

    /// Its address, good once it was created.
    pub fn addr(&self) -> ActorAddr {
        ActorAddr {
            actor: self.parts.actor,
            incarnation: self.parts.incarnation,
            process: self.parts.system.process(),
            endpoint: self.parts.system.endpoint().to_owned(),
        }
    }

    /// The device it owns, if it asked for one.
    pub fn device(&self) -> Option<&Device> {
        self.parts.device.as_ref()
    }

    /// Its seat in a group, if it has one.
    pub fn group(&self) -> Option<&GroupMember> {
        self.parts.group.as_ref()
    }

    /// Tells the other members of its group how to reach it. The last word counts.
    pub fn announce(&self, join_info: Vec<u8>) {
        self.parts.reports.update(|pending| pending.announce = Some(join_info));
    }

    /// Says how far starting is. Cheap: only the latest is kept until it is sent. It counts as a sign of life of a creation that
    /// holds its thread.
    pub fn progress(&self, progress: Progress) {
        self.parts.reports.start.words.fetch_add(1, Ordering::Relaxed);
        self.parts.reports.update(|pending| pending.progress = Some(progress));
    }

    /// Asks for the end of this incarnation, with a cause. The first cause counts.
    pub fn exit(&self, cause: DeathCause) {
        self.parts.reports.update(|pending| {
            pending.exit.get_or_insert(cause);
        });
    }
}

/// What an actor has said of itself and the worker has not yet passed on: one slot each, so it is bounded.
#[derive(Debug, Default)]
pub struct Pending {
    /// The latest progress.
    pub progress: Option<Progress>,
    /// The latest join info.
    pub announce: Option<Vec<u8>>,
    /// The first cause given for an exit.
    pub exit: Option<DeathCause>,
}

/// The slots between an actor and its worker.
#[derive(Clone, Default)]
pub struct Reports {
    shared: Arc<(Mutex<Pending>, Notify)>,
    start: Arc<Start>,
}

/// What is known of an actor's creation from outside of its thread.
#[derive(Default)]
struct Start {
    thread: SetOnce<(ArbiterHandle, Pid)>,
    /// How often it has said how far it is.
    words: AtomicU64,
}

impl Reports {
    /// Empty slots.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until there is something and takes it. For one waiter only.
    pub async fn next(&self) -> Pending {
        loop {
            self.shared.1.notified().await;
            let pending = std::mem::take(&mut *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner));
            if pending.progress.is_some() || pending.announce.is_some() || pending.exit.is_some() {
                return pending;
            }
        }
    }

    /// Notes that the creation begins, on the thread that calls this.
    fn begun(&self) {
        // Only the first creation counts; there is no other.
        let _ = self.start.thread.set((Arbiter::current(), rustix::thread::gettid()));
    }

    /// Waits for the thread on which the actor is created.
    pub(crate) async fn thread(&self) -> (ArbiterHandle, Pid) {
        self.start.thread.wait().await.clone()
    }

    /// How often the actor has said how far its creation is.
    pub(crate) fn words(&self) -> u64 {
        self.start.words.load(Ordering::Relaxed)
    }

    fn update(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.shared.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.1.notify_one();
    }
}
