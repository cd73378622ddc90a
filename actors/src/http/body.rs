//! Bodies that must come in time: a client that trickles its request holds a connection for a bounded time only.

use std::io;
use std::time::Duration;

use actix_web::HttpMessage;
use actix_web::dev::{Payload, ServiceRequest};
use actix_web::error::PayloadError;
use futures_util::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};

/// How long a body may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyTime {
    /// All of it.
    Whole(Duration),
    /// Between two parts of it; for uploads of any size.
    Pause(Duration),
}

/// Has the body of the request fail when it is late.
pub fn within(request: &mut ServiceRequest, time: BodyTime) {
    let payload = request.take_payload();
    if matches!(payload, Payload::None) {
        return;
    }
    let started = Instant::now();
    let parts = stream::unfold(Some(payload), move |payload| async move {
        let mut payload = payload?;
        let (limit, until) = match time {
            BodyTime::Whole(limit) => (limit, started + limit),
            BodyTime::Pause(limit) => (limit, Instant::now() + limit),
        };
        match timeout_at(until, payload.next()).await {
            Ok(part) => part.map(|part| (part, Some(payload))),
            Err(_) => {
                let why = format!("nothing more of it came within {} s", limit.as_secs_f64());
                let late = PayloadError::Io(io::Error::new(io::ErrorKind::TimedOut, why));
                Some((Err(late), None))
            }
        }
    });
    request.set_payload(Payload::Stream { payload: Box::pin(parts) });
}
