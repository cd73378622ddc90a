//! HTTP -> a message to a replica, and its answer -> HTTP.
//!
//! Which replica gets it, and when another one does, is `serve::calls`' affair.

use std::time::Duration;

use actix_web::dev::ServiceRequest;
use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use actix_web::{HttpResponse, HttpResponseBuilder};
use bytes::Bytes;
use futures_util::{Stream, stream};
use heliostat_runtime::handle::{AskError, Refusal, Replies, Window};

use super::error::ApiError;
use super::openai::not_whole;
use super::server::RequestLimit;
use crate::serve::calls::{Begun, CallError, NoPlace, Place, Pool, begin};
use crate::serve::replica::{AnyReplica, HttpHead, HttpPart, HttpRequest};

/// The replicas of a deployment that answers HTTP, or stands behind one that does.
pub(crate) type ActorPool = Pool<AnyReplica>;

/// Of an answer that is on its way: chunks are sent on at once, so few need to be ahead.
const WINDOW: Window = Window { items: 16, bytes: 1 << 20 };
/// What concerns one connection alone (RFC 9110, 7.6.1), and the length, which is that of what is sent.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What a request may cost, and what of it is not for actors.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    /// Until when it must be done.
    pub(super) limit: Option<RequestLimit>,
    /// `Authorization` has a key of the server, which no actor should see.
    pub(super) hide_key: bool,
}

/// Answers a request whose path begins at the route.
pub(super) async fn answer(pool: &ActorPool, request: &mut ServiceRequest, terms: Terms) -> HttpResponse {
    let asked = async {
        let message = message(request, terms.hide_key).await?;
        call(pool, message, terms.limit).await
    };
    let answered = match terms.limit {
        None => asked.await,
        Some((until, time)) => match tokio::time::timeout_at(until, asked).await {
            Ok(answered) => answered,
            Err(_) => Err(late(time)),
        },
    };
    answered.unwrap_or_else(HttpResponse::from_error)
}

fn late(time: Duration) -> ApiError {
    ApiError::timed_out(format!("The application did not answer within {} s.", time.as_secs_f64()))
}

async fn message(request: &mut ServiceRequest, hide_key: bool) -> Result<HttpRequest, ApiError> {
    let body = request.extract::<Bytes>().await.map_err(|error| not_whole(&error))?;
    let hidden = |name: &HeaderName| hide_key && *name == AUTHORIZATION;
    let headers = end_to_end(request.headers()).filter(|(name, _)| !hidden(name));
    Ok(HttpRequest {
        method: request.method().to_string(),
        path: request.path().to_owned(),
        query: request.query_string().to_owned(),
        headers: headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect(),
        body: body.into(),
    })
}

fn end_to_end(headers: &HeaderMap) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
    headers.iter().filter(|(name, _)| !HOP_BY_HOP.contains(&name.as_str()))
}

/// Has a replica answer. Dropping it, as when the client is gone, cancels the call.
async fn call(
    pool: &ActorPool,
    message: HttpRequest,
    limit: Option<RequestLimit>,
) -> Result<HttpResponse, ApiError> {
    let until = limit.map(|(until, _)| until);
    let Begun { place, first, replies } = match begin(pool, message, until, WINDOW).await {
        Ok(begun) => begun,
        Err(CallError::NotSent { why, .. }) => return Err(not_sent(why, limit)),
        Err(CallError::Failed { why: AskError::Deadline, .. }) => return Err(too_late(limit)),
        Err(CallError::Failed { replica, why }) => return Err(failed(replica, &why)),
    };
    let number = place.number();
    let first =
        first.ok_or_else(|| gateway(format!("Replica {number} ended its answer before it began.")))?;
    respond(first, place, replies)
}

fn too_late(limit: Option<RequestLimit>) -> ApiError {
    late(limit.map_or(Duration::ZERO, |(_, time)| time))
}

fn not_sent(why: NoPlace, limit: Option<RequestLimit>) -> ApiError {
    let message = why.to_string();
    match why {
        NoPlace::Full(_) => ApiError::busy(message),
        NoPlace::NotReady(_) => ApiError::not_ready(message),
        NoPlace::Late => too_late(limit),
    }
}

/// Why a replica that may have begun a request has not answered it.
fn failed(number: u64, why: &AskError<HttpRequest>) -> ApiError {
    match why {
        AskError::Refused(refused) if refused.reason == Refusal::UnknownMessage => ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "The actor takes no HTTP: have it accept `HttpRequest` with `accept_stream` in its table of messages.",
        )
        .with_code("not_http"),
        AskError::Panicked(panic) => {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("Replica {number} panicked: {panic}"))
                .with_code("replica_failed")
        }
        AskError::PeerLost(_) | AskError::Stopped | AskError::NoReply => gateway(format!(
            "Replica {number} died before it answered; it may have begun the request, which was not tried again: {why}."
        )),
        AskError::Refused(_)
        | AskError::Deadline
        | AskError::Cancelled
        | AskError::Codec(_)
        | AskError::Handler(_) => gateway(format!("Replica {number} could not be asked: {why}.")),
    }
}

fn gateway(message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_GATEWAY, message).with_code("replica_lost")
}

fn respond(
    part: HttpPart,
    place: Place<AnyReplica>,
    replies: Replies<HttpRequest>,
) -> Result<HttpResponse, ApiError> {
    let number = place.number();
    match part {
        HttpPart::Whole { head, body } => Ok(response(&head, number)?.body(body)),
        HttpPart::Head(head) => Ok(response(&head, number)?.streaming(chunks(place, replies))),
        HttpPart::Chunk(_) | HttpPart::Failed(_) => {
            Err(gateway(format!("Replica {number} began its answer with a body that has no head.")))
        }
    }
}

fn response(head: &HttpHead, number: u64) -> Result<HttpResponseBuilder, ApiError> {
    let odd = |what: String| gateway(format!("Replica {number} answered with {what}."));
    let status = StatusCode::from_u16(head.status).map_err(|_| odd(format!("the status {}", head.status)))?;
    let mut response = HttpResponse::build(status);
    for (name, value) in &head.headers {
        let parsed = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value));
        let (Ok(name), Ok(value)) = parsed else {
            return Err(odd(format!("a header {name:?} that cannot be sent")));
        };
        if !HOP_BY_HOP.contains(&name.as_str()) {
            response.append_header((name, value));
        }
    }
    Ok(response)
}

/// The body as it comes. The place is held to its end; an error breaks the connection off, so that the client sees that
/// the answer is not whole.
fn chunks(
    place: Place<AnyReplica>,
    replies: Replies<HttpRequest>,
) -> impl Stream<Item = Result<Bytes, ChunkError>> {
    stream::unfold(Some((place, replies)), |both| async {
        let (mut place, mut replies) = both?;
        let error = match replies.next().await? {
            Ok(HttpPart::Chunk(bytes)) => return Some((Ok(bytes.into()), Some((place, replies)))),
            Ok(HttpPart::Failed(why)) => why,
            Ok(HttpPart::Whole { .. } | HttpPart::Head(_)) => "a second head".to_owned(),
            Err(why) => why.to_string(),
        };
        place.failed(false);
        tracing::info!(replica = place.number(), "an answer is broken off: {error}");
        Some((Err(ChunkError(error)), None))
    })
}

/// Why a body is not whole; only the log says it, since the head has been sent.
#[derive(Debug, thiserror::Error)]
#[error("the answer was broken off: {0}")]
struct ChunkError(String);
