//! The line from the rank's actor to its step thread.
//!
//! The actor never waits for a step: it queues a command and rings. The thread takes commands between two steps.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_engine::grammar::Constraint;
use heliostat_engine::request::{Request, RequestId};
use heliostat_engine::scheduler::BlockHash;
use heliostat_kernels::cuda::exchange::AbortHandle;
use heliostat_kernels::fabric::{Abort, Waker};
use heliostat_runtime::group::GroupView;
use heliostat_runtime::handle::{ActorAddr, ProcessId};
use tokio::sync::oneshot;

use super::kv::{Fetched, StoreKv};
use super::plan::OpenPlan;
use super::spans::Traced;
use crate::messages::{Busy, FetchKv, KvChunk, RankJoined, StepLoad, Submit};
use crate::monitor::trace::RankTrace;

/// A sequence to be queued.
pub(super) struct Submission {
    pub(super) request: Request,
    /// How its grammar was compiled, if it has one.
    pub(super) constraint: Option<Constraint>,
    pub(super) owner: Owner,
    /// Its trace, if that is recorded.
    pub(super) traced: Option<Traced>,
}

impl Submission {
    /// What an ingress asked for; `traced` as it came.
    pub(super) fn of(asked: Submit, traced: Option<Traced>, constraint: Option<Constraint>) -> Self {
        let owner = Owner { ingress: asked.reply_to, request_id: asked.from.request_id };
        Self { request: asked.request, constraint, owner, traced }
    }
}

/// Who asked for a sequence.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub(super) ingress: ActorAddr,
    /// The request of its client, for logs.
    pub(super) request_id: String,
}

/// What the step thread is asked to do between two steps.
pub(super) enum Command {
    /// Queue a sequence.
    Submit(Box<Submission>),
    /// Stop a sequence.
    Abort(RequestId),
    /// Name the full blocks of this prompt, and say how many of them are here.
    FindKv(Vec<u32>, oneshot::Sender<(Vec<BlockHash>, usize)>),
    /// Read blocks that are cached.
    ReadKv(FetchKv, oneshot::Sender<KvChunk>),
    /// Take blocks in that were read elsewhere.
    StoreKv(StoreKv),
    /// Blocks of a sequence came from another rank, or did not.
    Fetched(Fetched),
    /// Stop all sequences of ingresses in this process: nobody hears them.
    PeerLost(ProcessId),
    /// Stage a plan; its stager runs already.
    Open(Arc<OpenPlan>),
    /// Give a plan up.
    Abandon(u64),
    /// Break the GPU on purpose.
    BreakDevice,
    /// Somebody else noticed that the GPU is lost.
    DeviceFailed(String),
    /// Report the load that was counted since the last report.
    ReportLoad(oneshot::Sender<Option<StepLoad>>),
    /// Report to this EPLB actor, and answer with the last join.
    AttachEplb(ActorAddr, oneshot::Sender<Option<RankJoined>>),
    /// Send figures to this ingress.
    AttachIngress(ActorAddr),
    /// Record single steps, at most so many.
    StartTrace(u32),
    /// Stop recording, and answer with what there is.
    TakeTrace(oneshot::Sender<RankTrace>),
    /// The group changed.
    View(GroupView),
    /// End.
    Stop,
}

/// The actor's end.
#[derive(Clone)]
pub(super) struct Link {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

/// The thread's end.
pub(super) struct Inbox {
    commands: Receiver<Command>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Set while the thread is connected to its group: how to wake it and how to end its step.
    bell: Mutex<Option<(Waker, Abort)>>,
    /// Set while a GPU may wait for its peers: how to end that, and the epoch to end.
    device: Mutex<Option<(AbortHandle, u64)>>,
    /// Requests that wait in the scheduler or on their way to it.
    waiting: AtomicU32,
    /// Those that are not ready yet, since their grammars are being compiled or their blocks fetched, with the process of
    /// their ingress.
    coming: Mutex<HashMap<RequestId, ProcessId>>,
    /// Newest plan that ended.
    closed: AtomicU64,
    /// Whether the actor asked the thread to end.
    stopped: AtomicBool,
    /// Newest membership epoch that was passed on.
    membership: AtomicU64,
}

/// Makes both ends.
pub(super) fn link() -> (Link, Inbox) {
    let (sender, receiver) = channel();
    let shared = Arc::new(Shared::default());
    (Link { commands: sender, shared: Arc::clone(&shared) }, Inbox { commands: receiver, shared })
}

impl Link {
    /// Queues a command and wakes the thread.
    pub(super) fn send(&self, command: Command) {
        // A send fails only when the thread is gone; its end stops the actor, so nobody waits for this command.
        let _ = self.commands.send(command);
        self.ring();
    }

    /// Wakes the thread if it sleeps.
    pub(super) fn ring(&self) {
        if let Some((waker, _)) = &*self.bell() {
            waker.wake();
        }
    }

    /// Queues a view and ends the step that runs in an older one. Views that are not newer are dropped.
    pub(super) fn send_view(&self, view: GroupView) {
        let epoch = view.epoch;
        if self.shared.membership.fetch_max(epoch, Ordering::AcqRel) < epoch {
            self.interrupt(Command::View(view), epoch);
        }
    }

    /// Ends the rank: its GPU is lost.
    pub(super) fn device_failed(&self, why: String) {
        self.interrupt(Command::DeviceFailed(why), u64::MAX);
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.interrupt(Command::Stop, u64::MAX);
    }

    /// Whether [`Link::stop`] was called.
    pub(super) fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    fn interrupt(&self, command: Command, reason: u64) {
        let _ = self.commands.send(command);
        if let Some((_, abort)) = &*self.bell() {
            abort.abort(reason);
        }
        if let Some((abort, epoch)) = &*self.shared.device.lock().unwrap_or_else(PoisonError::into_inner) {
            abort.abort(*epoch);
        }
    }

    /// Counts a request in, or refuses it when `max_waiting` are there already.
    pub(super) fn admit(&self, max_waiting: u32) -> Result<(), Busy> {
        let admitted = self.shared.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
            (waiting < max_waiting).then_some(waiting + 1)
        });
        admitted.map(|_| ()).map_err(|waiting| Busy::QueueFull { waiting })
    }

    /// Notes a request that comes later, once its grammar is compiled and its blocks are here.
    pub(super) fn note_coming(&self, id: RequestId, ingress: ProcessId) {
        self.coming().insert(id, ingress);
    }

    /// Queues a request.
    pub(super) fn submit(&self, submission: Submission) {
        self.send(Command::Submit(Box::new(submission)));
    }

    /// Queues a request that was noted, unless it was given up meanwhile.
    pub(super) fn submit_coming(&self, submission: Submission) {
        // Locked until it is queued, so that it is either not noted any more or queued before a command to stop it.
        let mut coming = self.coming();
        if coming.remove(&submission.request.id).is_some() {
            self.submit(submission);
        }
    }

    /// Stops a sequence, wherever it is; true when it was still to come.
    pub(super) fn abort(&self, id: RequestId) -> bool {
        let was_coming = self.coming().remove(&id).is_some();
        if !was_coming {
            self.send(Command::Abort(id));
        }
        was_coming
    }

    /// Stops all sequences of ingresses in that process.
    pub(super) fn peer_lost(&self, process: ProcessId) {
        let mut coming = self.coming();
        coming.retain(|_, ingress| *ingress != process);
        self.send(Command::PeerLost(process));
    }

    fn coming(&self) -> MutexGuard<'_, HashMap<RequestId, ProcessId>> {
        self.shared.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Newest plan that ended on this rank.
    pub(super) fn closed_plan(&self) -> u64 {
        self.shared.closed.load(Ordering::Acquire)
    }

    fn bell(&self) -> MutexGuard<'_, Option<(Waker, Abort)>> {
        self.shared.bell.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    /// Waits for a command; `None` when the actor is gone.
    pub(super) fn wait(&self) -> Option<Command> {
        self.commands.recv().ok()
    }

    /// Takes a command if there is one.
    pub(super) fn take(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Tells the actor how to reach the thread inside the group; `None` when it leaves.
    pub(super) fn set_bell(&self, bell: Option<(Waker, Abort)>) {
        *self.shared.bell.lock().unwrap_or_else(PoisonError::into_inner) = bell;
    }

    /// Tells the actor how to end what the GPU waits for; `None` when it waits no more.
    pub(super) fn set_device(&self, device: Option<(AbortHandle, u64)>) {
        *self.shared.device.lock().unwrap_or_else(PoisonError::into_inner) = device;
    }

    /// Says how many requests wait now.
    pub(super) fn set_waiting(&self, waiting: u32) {
        self.shared.waiting.store(waiting, Ordering::Relaxed);
    }

    /// Says that no plan up to `epoch` is open.
    pub(super) fn set_closed_plan(&self, epoch: u64) {
        self.shared.closed.store(epoch, Ordering::Release);
    }
}
