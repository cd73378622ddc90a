//! What comes in on a connection: reading it and delivering it, on whatever thread has the time.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};

use super::answer::RemoteAnswer;
use super::conn::Conn;
use super::frame::{self, CallHead, Frame};
use super::link::now_ms;
use super::stream::Stream;
use crate::handle::{ActorId, Incarnation, ProcessId, Refusal};
use crate::mailbox::{Failure, refuse};
use crate::objects::scope;
use crate::system::Shared;

/// Room for one read.
const READ_BYTES: usize = 64 << 10;
/// A receive buffer that grew beyond this for a large frame is given up after it.
const READ_BYTES_KEPT: usize = 1 << 20;
/// Which end of a connection this process is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It connected: it sends calls and reads answers.
    Asking,
    /// It accepted: it reads calls and sends answers.
    Serving,
}

/// The incoming side of a connection.
pub(crate) struct Reader {
    shared: Arc<Shared>,
    conn: Arc<Conn>,
    end: End,
    process: ProcessId,
    /// What was read and not delivered yet. Whoever reads holds it, so that frames are delivered in their order.
    buf: Mutex<BytesMut>,
}

impl Reader {
    /// Of a connection that is open.
    pub(super) fn new(shared: Arc<Shared>, conn: Arc<Conn>, end: End, process: ProcessId) -> Arc<Self> {
        Arc::new(Self { shared, conn, end, process, buf: Mutex::new(BytesMut::with_capacity(READ_BYTES)) })
    }

    /// Reads and delivers until the connection ends; says why it did.
    pub(super) async fn read(self: &Arc<Self>) -> String {
        let apart = self.conn.stream().is_some_and(Stream::is_apart);
        if let Some(home) = self.shared.home().filter(|_| apart)
            && let Some(why) = home.read(self).await
        {
            return why;
        }
        self.read_here().await
    }

    /// The same on this thread.
    pub(crate) async fn read_here(&self) -> String {
        let inlet = match self.conn.stream().map(Stream::inlet) {
            Some(Ok(inlet)) => inlet,
            Some(Err(error)) => return error.to_string(),
            None => return "not open".into(),
        };
        loop {
            if let Err(error) = inlet.readable().await {
                return error.to_string();
            }
            if let Err(why) = self.take(|buf| inlet.try_read_buf(buf)) {
                return why;
            }
            // A peer that does not read its answers gets no more of them: its calls stay in the socket. The asking end
            // always reads on, or both could wait for each other.
            match self.end {
                End::Asking => {}
                End::Serving => self.conn.has_room().await,
            }
        }
    }

    /// Delivers what is there, for a thread that has no time.
    pub(crate) fn look(&self) {
        let Some(stream) = self.conn.stream() else { return };
        let taken = match self.end {
            End::Serving if !self.conn.has_room_now() => Ok(()),
            End::Serving | End::Asking => self.take(|buf| stream.read_now(buf)),
        };
        if let Err(why) = taken {
            self.conn.close(&why);
        }
    }

    /// Reads once and delivers what is whole; fails at the end of the connection.
    fn take(&self, read: impl FnOnce(&mut BytesMut) -> io::Result<usize>) -> Result<(), String> {
        let mut buf = self.buf.lock().unwrap_or_else(PoisonError::into_inner);
        buf.reserve(READ_BYTES);
        match read(&mut buf) {
            Ok(0) => {
                return Err(self.conn.closed().unwrap_or_else(|| "the peer closed the connection".into()));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        self.conn.heard();
        loop {
            let used = match frame::split(&buf, self.shared.limits.frame_bytes_max) {
                Ok(None) => break,
                Ok(Some((body, used))) => match frame::parse(body) {
                    Ok(Frame::Goodbye(why)) => return Err(format!("the peer said goodbye: {why}")),
                    Ok(frame) => {
                        scope::received(&self.shared.objects, || handle(&self.shared, &self.conn, frame));
                        used
                    }
                    Err(error) => return Err(malformed(self.process, &error)),
                },
                Err(error) => return Err(malformed(self.process, &error)),
            };
            buf.advance(used);
        }
        if buf.is_empty() && buf.capacity() > READ_BYTES_KEPT {
            *buf = BytesMut::with_capacity(READ_BYTES);
        }
        Ok(())
    }
}

fn malformed(process: ProcessId, error: &frame::FrameError) -> String {
    tracing::error!(%process, %error, "malformed frame, closing the connection");
    format!("malformed frame: {error}")
}

fn handle(shared: &Shared, conn: &Arc<Conn>, frame: Frame<'_>) {
    match frame {
        Frame::Call(head, payload) => {
            let answer = conn.serve(&head);
            if let Err(reason) = deliver(shared, &head, payload, answer)
                && head.call == 0
            {
                shared.refused_tells.note(ActorId(head.actor), &reason);
            }
        }
        // An answer that nobody waits for any more is dropped.
        Frame::Reply(call, payload) => {
            conn.reply(call, payload);
        }
        Frame::Refused(call, reason) => {
            conn.fail(call, Failure::Refused(reason));
        }
        Frame::Failed(call, failure) => {
            conn.fail(call, failure.into());
        }
        Frame::Item(call, payload) => conn.item(call, payload),
        Frame::Cancel(call) => conn.cancelled(call),
        Frame::Credit(call, window) => conn.granted(call, window),
        Frame::Ping | Frame::Goodbye(_) => {}
    }
}

fn deliver(
    shared: &Shared,
    head: &CallHead,
    payload: &[u8],
    answer: Option<RemoteAnswer>,
) -> Result<(), Refusal> {
    if head.process != ProcessId::ANY.0 && head.process != shared.process.0 {
        return refuse(answer, Refusal::WrongProcess);
    }
    let expires_at = match head.deadline_us {
        0 => None,
        us => Instant::now().checked_add(Duration::from_micros(us)),
    };
    match shared.registry.find(ActorId(head.actor), Incarnation(head.incarnation)) {
        Ok(entry) => entry.deliver(head.message, payload, expires_at, answer),
        Err(reason) => refuse(answer, reason),
    }
}

/// Tells that were refused here, which their senders do not hear of. Logged, at most once a second.
#[derive(Default)]
pub(crate) struct RefusedTells {
    unlogged: AtomicU64,
    logged_ms: AtomicU64,
}

impl RefusedTells {
    fn note(&self, actor: ActorId, reason: &Refusal) {
        let refused = self.unlogged.fetch_add(1, Ordering::Relaxed) + 1;
        let (now, last) = (now_ms(), self.logged_ms.load(Ordering::Relaxed));
        let due = last == 0 || now >= last + 1000;
        if due
            && self.logged_ms.compare_exchange(last, now.max(1), Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.unlogged.fetch_sub(refused, Ordering::Relaxed);
            tracing::warn!(%actor, %reason, refused, "refused messages that were told, not asked");
        }
    }
}
