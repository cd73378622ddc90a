//! The connection of this process with the store of its node: calls and their answers.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::map::Segment;
use super::messages::{ToProcess, ToStore};
use super::socket::{self, Inbox};
use super::{ObjectAddr, ObjectError, ObjectId};
use crate::handle::ProcessId;

/// Messages that wait for the store.
const OUTBOX_MAX: usize = 1024;

pub(super) type Outgoing = (ToStore, Option<Arc<Segment>>);
type Answer = Result<Option<OwnedFd>, ObjectError>;

/// The connection. It is over when the node agent is gone.
pub(super) struct StoreLink {
    /// Where the node agent listens.
    pub(super) endpoint: String,
    out: mpsc::Sender<Outgoing>,
    calls: Mutex<Calls>,
    next_call: AtomicU64,
}

/// Who waits for an answer; `None` once the connection is over.
type Calls = Option<HashMap<u64, Call>>;

struct Call {
    answer: oneshot::Sender<Answer>,
    /// What to say if nobody waits any more for an answer that succeeds.
    undo: Option<ToStore>,
}

/// The side of a connection that its keeper reads and writes.
pub(super) struct Ends {
    pub(super) stream: UnixStream,
    pub(super) inbox: Inbox,
    pub(super) outgoing: mpsc::Receiver<Outgoing>,
}

impl StoreLink {
    /// Connects with the store at that socket.
    pub(super) async fn connect(path: &Path, process: ProcessId) -> io::Result<(Arc<Self>, Ends)> {
        let stream = socket::short(path, |short| std::os::unix::net::UnixStream::connect(short))?;
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        socket::send(&stream, &ToStore::Hello { process }, None).await?;
        let mut inbox = Inbox::default();
        let endpoint = match inbox.next(&stream, carries).await? {
            Some((ToProcess::Welcome { endpoint }, _)) => endpoint,
            Some(_) | None => return Err(io::Error::other("the object store does not answer as one")),
        };
        let (out, outgoing) = mpsc::channel(OUTBOX_MAX);
        let calls = Mutex::new(Some(HashMap::new()));
        let link = Arc::new(Self { endpoint, out, calls, next_call: AtomicU64::new(1) });
        Ok((link, Ends { stream, inbox, outgoing }))
    }

    /// Tells the store something. After the end of the connection nobody hears it.
    pub(super) async fn tell(&self, message: ToStore) {
        let _ = self.out.send((message, None)).await;
    }

    /// The same from where nothing may wait; false if too much is waiting already.
    pub(super) fn try_tell(&self, message: ToStore) -> bool {
        !matches!(self.out.try_send((message, None)), Err(mpsc::error::TrySendError::Full(_)))
    }

    /// Reserves memory; that memory itself, where the store has some ready.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<Option<OwnedFd>, ObjectError> {
        let undo = Some(ToStore::Unreserve { bytes });
        self.call(|call| ToStore::Reserve { call, bytes }, undo, None).await
    }

    /// Shows the store a segment with an object.
    pub(super) async fn publish(
        &self,
        object: ObjectId,
        bytes: u64,
        segment: Arc<Segment>,
        sent: impl FnOnce(),
    ) -> Result<(), ObjectError> {
        let capacity = segment.capacity() as u64;
        let publish = |call| {
            sent();
            ToStore::Publish { call, object, bytes, capacity }
        };
        self.call(publish, None, Some(segment)).await.map(drop)
    }

    /// The memory of an object, wherever it is now.
    pub(super) async fn open(&self, object: ObjectAddr) -> Result<OwnedFd, ObjectError> {
        let undo = Some(ToStore::Close { object: object.id });
        let opened = self.call(|call| ToStore::Open { call, object }, undo, None).await?;
        opened.ok_or_else(|| ObjectError::Io("the store sent no memory".to_owned()))
    }

    async fn call(
        &self,
        message: impl FnOnce(u64) -> ToStore,
        undo: Option<ToStore>,
        segment: Option<Arc<Segment>>,
    ) -> Answer {
        let over = || ObjectError::StoreAway("its node agent has ended".to_owned());
        let place = self.out.reserve().await.map_err(|_| over())?;
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        match self.calls.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(calls) => calls.insert(call, Call { answer, undo }),
            None => return Err(over()),
        };
        place.send((message(call), segment));
        answered.await.unwrap_or_else(|_| Err(over()))
    }

    /// Notes an answer.
    pub(super) fn answered(&self, call: u64, answer: Answer) {
        let waiting = self
            .calls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
            .and_then(|calls| calls.remove(&call));
        let Some(Call { answer: waiter, undo }) = waiting else { return };
        if let Err(Ok(_)) = waiter.send(answer)
            && let Some(undo) = undo
        {
            // Where too much waits the store is told by the end of this process.
            self.try_tell(undo);
        }
    }

    /// The connection is over.
    pub(super) fn end(&self) {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Which messages of a store have a descriptor.
pub(super) fn carries(message: &ToProcess) -> bool {
    matches!(message, ToProcess::Opened { result: Ok(()), .. } | ToProcess::Ready { .. })
}

/// Writes what waits for the store, until the connection is over.
pub(super) async fn write(stream: &UnixStream, mut outgoing: mpsc::Receiver<Outgoing>) -> io::Result<()> {
    while let Some((message, segment)) = outgoing.recv().await {
        socket::send(stream, &message, segment.as_ref().map(|segment| segment.fd())).await?;
    }
    Ok(())
}
