//! One connection: what waits to be sent, who waits for an answer, and how bytes get out.
//!
//! There is no writer task. Whoever queues the first frame after a pause writes it at once; under load the flush is
//! left to a task of the same thread that runs after its other work, so that many frames share one system call. Only
//! a full socket hands over to a task of the process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bincode::Encode;
use tokio::sync::Notify;

use super::answer::RemoteAnswer;
use super::calls::{Served, Waiting};
use super::codec::{CodecError, encode_into};
use super::frame::{self, CallHead, LEN_BYTES, Want, Window};
use super::outbound::{CHUNK_BYTES, Flush, Outbound};
use super::stream::Stream;
use crate::handle::Refusal;
use crate::mailbox::Failure;
use crate::objects::scope;

/// Bounds of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) frame_bytes_max: usize,
    pub(crate) queue_bytes_max: usize,
}

/// A connection, from the first message for the peer on: what is queued before the handshake is over is sent then.
pub(crate) struct Conn {
    stream: OnceLock<Stream>,
    limits: Limits,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
    /// Told when the outbound queue has been written.
    drained: Notify,
    next_call: AtomicU64,
    /// When something was last received; of the process clock.
    heard_ms: AtomicU64,
}

#[derive(Default)]
struct State {
    outbound: Outbound,
    open: bool,
    closed: Option<Closed>,
    waiting: HashMap<u64, Waiting>,
    /// Calls of the peer that have no answer yet.
    serving: HashMap<u64, Arc<Served>>,
}

impl State {
    /// Queues a frame; says who writes it. Before the handshake is over nobody does.
    fn push(&mut self, frame: &mut Vec<u8>) -> Flush {
        self.outbound.push(frame);
        match self.open {
            true => self.outbound.flush(),
            false => Flush::Nothing,
        }
    }
}

#[derive(Clone)]
struct Closed {
    why: String,
    /// Whether it was ever open.
    was_open: bool,
}

impl Closed {
    fn failure(&self) -> Failure {
        match self.was_open {
            true => Failure::PeerLost(self.why.clone()),
            false => Failure::Refused(Refusal::Unreachable(self.why.clone())),
        }
    }
}

enum Flushed {
    All,
    /// The socket takes no more for now.
    Blocked,
}

impl Conn {
    pub(crate) fn new(limits: Limits, runtime: tokio::runtime::Handle) -> Arc<Self> {
        Arc::new(Self {
            stream: OnceLock::new(),
            limits,
            runtime,
            state: Mutex::default(),
            drained: Notify::new(),
            next_call: AtomicU64::new(1),
            heard_ms: AtomicU64::new(super::link::now_ms()),
        })
    }

    /// Queues a call, with who waits for what it wants. The returned number is what its answer comes with.
    pub(crate) fn call<M: Encode>(
        self: &Arc<Self>,
        head: &CallHead,
        message: &M,
        waiting: Option<Waiting>,
    ) -> Result<u64, Refusal> {
        debug_assert_eq!(head.want == Want::Nothing, waiting.is_none(), "somebody waits for what is wanted");
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        with_scratch(|out| {
            frame::begin_call(out, &CallHead { call, ..*head });
            scope::sent_to_one(|| encode_into(message, out))
                .map_err(|e| Refusal::Unsendable(e.to_string()))?;
            self.check_size(out).map_err(Refusal::Unsendable)?;
            frame::finish(out);
            let mut state = self.lock();
            if let Some(closed) = &state.closed {
                return Err(match closed.failure() {
                    Failure::Refused(refusal) => refusal,
                    _ => Refusal::Unreachable(closed.why.clone()),
                });
            }
            // A queue that is empty takes any frame, else one of the largest size might never go.
            if state.outbound.bytes() > 0 && state.outbound.bytes() + out.len() > self.limits.queue_bytes_max
            {
                return Err(Refusal::QueueFull);
            }
            if let Some(waiting) = waiting {
                state.waiting.insert(call, waiting);
            }
            let flush = state.push(out);
            drop(state);
            self.flush(flush);
            Ok(call)
        })
    }

    fn check_size(&self, frame: &[u8]) -> Result<(), String> {
        let bytes = frame.len() - LEN_BYTES;
        let max = self.limits.frame_bytes_max;
        match bytes <= max {
            true => Ok(()),
            false => Err(format!("frame of {bytes} bytes, {max} are allowed")),
        }
    }

    /// Queues a frame that is not a call, and may be the `last` of the answer to a call: answers are never refused,
    /// instead the reader of this connection pauses. Fails only when the frame cannot be written or is too large.
    pub(super) fn send_answer(
        self: &Arc<Self>,
        last: Option<u64>,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), CodecError>,
    ) -> Result<(), String> {
        with_scratch(|out| {
            write(out).map_err(|e| e.to_string())?;
            self.check_size(out)?;
            frame::finish(out);
            let mut state = self.lock();
            if let Some(call) = last {
                state.serving.remove(&call);
            }
            if state.closed.is_none() {
                let flush = state.push(out);
                drop(state);
                self.flush(flush);
            }
            Ok(())
        })
    }

    /// The same for a frame that is small for certain.
    pub(super) fn send_note(self: &Arc<Self>, last: Option<u64>, write: impl FnOnce(&mut Vec<u8>)) {
        let sent = self.send_answer(last, |out| {
            write(out);
            Ok(())
        });
        debug_assert!(sent.is_ok(), "a note is small");
    }

    pub(crate) fn ping(self: &Arc<Self>) {
        self.send_note(None, frame::write_ping);
    }

    pub(crate) fn goodbye(self: &Arc<Self>, why: &str) {
        self.send_note(None, |out| frame::write_goodbye(out, why));
    }

    /// Tells the peer that there is room for more of a stream.
    pub(crate) fn grant(self: &Arc<Self>, call: u64, window: Window) {
        self.send_note(None, |out| frame::write_credit(out, call, window));
    }

    /// Completes the call with that number. False if nobody waits for it (any more).
    pub(crate) fn reply(&self, call: u64, payload: &[u8]) -> bool {
        let waiting = self.lock().waiting.remove(&call);
        waiting.map(|waiting| waiting.waiter.reply(payload)).is_some()
    }

    /// Passes an item of a stream on. If it is not taken the stream is over.
    pub(super) fn item(self: &Arc<Self>, call: u64, payload: &[u8]) {
        let inlet = self.lock().waiting.get(&call).and_then(|waiting| waiting.inlet.clone());
        if let Some(inlet) = inlet
            && let Err(failure) = inlet.item(payload)
            && self.fail(call, failure)
        {
            self.send_note(None, |out| frame::write_cancel(out, call));
        }
    }

    /// Fails the call with that number.
    pub(crate) fn fail(&self, call: u64, failure: Failure) -> bool {
        let waiting = self.lock().waiting.remove(&call);
        waiting.map(|waiting| waiting.waiter.fail(failure)).is_some()
    }

    /// Notes a call of the peer; `None` if it wants no answer.
    pub(super) fn serve(self: &Arc<Self>, head: &CallHead) -> Option<RemoteAnswer> {
        let window = match head.want {
            Want::Nothing => return None,
            Want::Answer | Want::Receipt => Window::default(),
            Want::Stream(window) => window,
        };
        let served = Served::new(window);
        let mut state = self.lock();
        if state.closed.is_some() {
            served.cancel();
        } else if let Some(earlier) = state.serving.insert(head.call, served.clone()) {
            // Not of our making: each call has its own number.
            earlier.cancel();
        }
        Some(RemoteAnswer::new(self.clone(), head.call, head.want, served))
    }

    /// The peer does not wait any more for the answer of its call.
    pub(super) fn cancelled(&self, call: u64) {
        let served = self.lock().serving.remove(&call);
        if let Some(served) = served {
            served.cancel();
        }
    }

    /// The peer has room for more of a stream.
    pub(super) fn granted(&self, call: u64, window: Window) {
        let served = self.lock().serving.get(&call).cloned();
        if let Some(served) = served {
            served.grant(window);
        }
    }

    pub(super) fn no_longer_serves(&self, call: u64) {
        self.lock().serving.remove(&call);
    }

    /// Waits until the outbound queue is within its bound or the connection is closed.
    pub(super) async fn has_room(&self) {
        self.drained_to(self.limits.queue_bytes_max).await;
    }

    /// Whether it is now.
    pub(super) fn has_room_now(&self) -> bool {
        self.unsent() <= self.limits.queue_bytes_max
    }

    /// Forgets the call when the guard drops, and tells the peer if there was no answer yet.
    pub(crate) fn forget_on_drop(self: &Arc<Self>, call: u64) -> Forget {
        Forget { conn: self.clone(), call }
    }

    /// The handshake is over: sends what is queued. False if it was closed meanwhile.
    pub(crate) fn open(self: &Arc<Self>, stream: Stream) -> bool {
        self.heard();
        let mut state = self.lock();
        if state.closed.is_some() {
            return false;
        }
        assert!(self.stream.set(stream).is_ok(), "a connection opens once");
        state.open = true;
        let flush = state.outbound.flush();
        drop(state);
        self.flush(flush);
        true
    }

    /// Closes it. All who wait for an answer hear why, at once. The first reason counts.
    pub(crate) fn close(&self, why: &str) {
        let (closed, waiting, serving) = {
            let mut state = self.lock();
            if state.closed.is_some() {
                return;
            }
            let closed = Closed { why: why.to_owned(), was_open: state.open };
            state.closed = Some(closed.clone());
            state.outbound.clear();
            (closed, std::mem::take(&mut state.waiting), std::mem::take(&mut state.serving))
        };
        if let Some(stream) = self.stream.get() {
            stream.shutdown();
        }
        self.drained.notify_waiters();
        for waiting in waiting.into_values() {
            waiting.waiter.fail(closed.failure());
        }
        // Whoever asked is gone.
        for served in serving.into_values() {
            served.cancel();
        }
    }

    /// Why it was closed, if it was.
    pub(crate) fn closed(&self) -> Option<String> {
        self.lock().closed.as_ref().map(|closed| closed.why.clone())
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    pub(crate) fn is_open(&self) -> bool {
        let state = self.lock();
        state.open && state.closed.is_none()
    }

    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.stream.get()
    }

    /// Notes that the peer said something.
    pub(crate) fn heard(&self) {
        self.heard_ms.store(super::link::now_ms(), Ordering::Relaxed);
    }

    pub(crate) fn heard_ms(&self) -> u64 {
        self.heard_ms.load(Ordering::Relaxed)
    }

    /// Waits until the outbound queue is within `bytes` or the connection is closed.
    pub(crate) async fn drained_to(&self, bytes: usize) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.unsent() <= bytes {
                return;
            }
            drained.await;
        }
    }

    /// Bytes that the kernel has not got yet; none once it is closed.
    fn unsent(&self) -> usize {
        let state = self.lock();
        match state.closed {
            Some(_) => 0,
            None => state.outbound.bytes() + self.stream.get().map_or(0, Stream::unsent),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(self: &Arc<Self>, flush: Flush) {
        match flush {
            Flush::Nothing => {}
            Flush::Now => {
                if let Flushed::Blocked = self.write_queued() {
                    self.runtime.spawn(self.clone().write_when_possible());
                }
            }
            Flush::Soon => {
                let task = FlushTask { conn: self.clone(), done: false };
                match tokio::runtime::Handle::try_current() {
                    Ok(current) => drop(current.spawn(task.run())),
                    Err(_) => drop(self.runtime.spawn(task.run())),
                }
            }
        }
    }

    /// Writes until the queue is empty or the socket full.
    fn write_queued(&self) -> Flushed {
        let Some(stream) = self.stream.get() else { return Flushed::All };
        loop {
            match stream.flush() {
                Ok(true) => {}
                Ok(false) => return Flushed::Blocked,
                Err(error) => self.close(&error.to_string()),
            }
            let taken = self.lock().outbound.take();
            let Some(mut chunks) = taken else {
                self.drained.notify_waiters();
                return Flushed::All;
            };
            match chunks.write_to(stream) {
                Ok(written) => {
                    let blocked = !chunks.is_empty();
                    let mut state = self.lock();
                    if state.closed.is_none() {
                        state.outbound.wrote(written, chunks);
                        if blocked {
                            return Flushed::Blocked;
                        }
                    }
                }
                Err(error) => self.close(&error.to_string()),
            }
        }
    }

    async fn write_when_possible(self: Arc<Self>) {
        let Some(stream) = self.stream.get() else { return };
        loop {
            if let Err(error) = stream.writable().await {
                return self.close(&error.to_string());
            }
            if let Flushed::All = self.write_queued() {
                return;
            }
        }
    }
}

/// A flush that runs after the other work of its thread. If its runtime goes away before, the process's takes over.
struct FlushTask {
    conn: Arc<Conn>,
    done: bool,
}

impl FlushTask {
    async fn run(mut self) {
        tokio::task::yield_now().await;
        self.done = true;
        self.conn.flush(Flush::Now);
    }
}

impl Drop for FlushTask {
    fn drop(&mut self) {
        if !self.done {
            self.conn.runtime.spawn(self.conn.clone().write_when_possible());
        }
    }
}

/// Cancels a call that nobody waits for any more.
pub(crate) struct Forget {
    conn: Arc<Conn>,
    call: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        let waited = self.conn.lock().waiting.remove(&self.call).is_some();
        if waited {
            self.conn.send_note(None, |out| frame::write_cancel(out, self.call));
        }
    }
}

/// Lends a buffer of this thread. Not reentrant; a nested use gets a fresh buffer.
fn with_scratch<R>(work: impl FnOnce(&mut Vec<u8>) -> R) -> R {
    thread_local!(static SCRATCH: std::cell::Cell<Vec<u8>> = const { std::cell::Cell::new(Vec::new()) });
    let mut buffer = SCRATCH.take();
    buffer.clear();
    let result = work(&mut buffer);
    if buffer.capacity() <= 2 * CHUNK_BYTES {
        SCRATCH.set(buffer);
    }
    result
}
