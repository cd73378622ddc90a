//! What is open at a server, and whether it goes: one that goes accepts no connection, and ends with its last answer.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceResponse;
use bytes::Bytes;

/// The last bytes of an answer are on their way for so long after it was handed to the server.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Of one server. Cheap to clone.
#[derive(Clone)]
pub struct Presence(Arc<Inner>);

struct Inner {
    leaving: AtomicBool,
    open: AtomicU64,
    started: Instant,
    /// When the last answer ended, milliseconds since the start; 0: none has.
    ended_ms: AtomicU64,
}

/// A request that is open; it is not when this is dropped.
pub(super) struct Visit(Presence);

impl Default for Presence {
    fn default() -> Self {
        Self(Arc::new(Inner {
            leaving: AtomicBool::new(false),
            open: AtomicU64::new(0),
            started: Instant::now(),
            ended_ms: AtomicU64::new(0),
        }))
    }
}

impl Presence {
    /// A request comes.
    pub(super) fn enter(&self) -> Visit {
        self.0.open.fetch_add(1, Ordering::AcqRel);
        Visit(self.clone())
    }

    /// The server goes.
    pub(super) fn leave(&self) {
        self.0.leaving.store(true, Ordering::Release);
    }

    /// Whether it goes.
    pub fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Acquire)
    }

    /// Requests that are open, or were just now: 0 means that the server may end.
    pub fn open(&self) -> u64 {
        let open = self.0.open.load(Ordering::Acquire);
        let ended = self.0.ended_ms.load(Ordering::Acquire);
        let just_now = ended > 0 && self.elapsed_ms().saturating_sub(ended) < LAST_BYTES.as_millis() as u64;
        open.max(u64::from(just_now))
    }

    fn elapsed_ms(&self) -> u64 {
        self.0.started.elapsed().as_millis() as u64
    }
}

impl Visit {
    /// It has an answer; one that is streamed takes this along.
    pub(super) fn answer(self, response: ServiceResponse<impl MessageBody + 'static>) -> ServiceResponse {
        let response = response.map_into_boxed_body();
        if matches!(response.response().body().size(), BodySize::Stream) {
            return response.map_body(|_, body| BoxBody::new(Open { body, _visit: self }));
        }
        response
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let inner = &self.0.0;
        inner.ended_ms.fetch_max(self.0.elapsed_ms().max(1), Ordering::AcqRel);
        inner.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A streamed answer.
struct Open {
    body: BoxBody,
    _visit: Visit,
}

impl MessageBody for Open {
    type Error = <BoxBody as MessageBody>::Error;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_next(cx)
    }
}
