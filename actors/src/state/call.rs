//! Calling named actors over HTTP: a message and its answer as JSON.
//!
//! It reaches exactly what an actor offers with `Accepts::accept_json`. A refusal says what kind it is and whether the
//! message may have been handled, so that a caller knows whether it may be sent again.

use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::web::{self, Bytes, Data, Path, Query, ServiceConfig};
use heliostat_runtime::cluster::{Cluster, ClusterError, NamedError};
use heliostat_runtime::handle::{AskError, Refusal};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;

/// Calls that are under way at once.
const CALLS_MAX: usize = 1024;
/// Deadline of a call that names none.
const TIMEOUT_S: f64 = 30.0;
/// Longest deadline.
const TIMEOUT_MAX_S: f64 = 3600.0;

/// Routes that call actors, for [`Dashboard::with`](crate::dashboard::Dashboard::with).
pub fn routes(cluster: Option<Cluster>) -> impl Fn(&mut ServiceConfig) + Send + Sync + 'static {
    let caller = Data::new(Caller { cluster, free: Arc::new(Semaphore::new(CALLS_MAX)) });
    move |app| {
        app.app_data(caller.clone())
            .route("/api/actors/{actor}/ask/{message}", web::post().to(ask))
            .route("/api/actors/{actor}/tell/{message}", web::post().to(tell));
    }
}

struct Caller {
    cluster: Option<Cluster>,
    free: Arc<Semaphore>,
}

/// How long an answer may take.
#[derive(Deserialize)]
struct Limit {
    timeout_s: Option<f64>,
}

/// `{"value": ...}`; without it, null.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    #[serde(default)]
    value: Json,
}

/// What went wrong, in a word that programs compare. Clients know these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No actor has that name.
    NoSuchActor,
    /// The actor takes no such message, or not this one.
    Refused,
    /// It, or the head, is not there, or takes no more.
    Unavailable,
    /// The connection to it broke.
    Lost,
    /// The deadline passed.
    Deadline,
    /// The handler returned an error.
    Handler,
    /// The handler panicked.
    Panicked,
}

/// A call without an answer.
#[derive(Debug)]
struct Failed {
    kind: Kind,
    why: String,
    /// Whether the message may have been handled.
    may_have_run: bool,
}

impl Failed {
    fn new(kind: Kind, why: impl ToString) -> Self {
        let may_have_run = match kind {
            Kind::NoSuchActor | Kind::Refused | Kind::Unavailable => false,
            Kind::Lost | Kind::Deadline | Kind::Handler | Kind::Panicked => true,
        };
        Self { kind, why: why.to_string(), may_have_run }
    }
}

impl From<Failed> for HttpResponse {
    fn from(failed: Failed) -> Self {
        let (status, kind) = match failed.kind {
            Kind::NoSuchActor => (StatusCode::NOT_FOUND, "no_such_actor"),
            Kind::Refused => (StatusCode::BAD_REQUEST, "refused"),
            Kind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Kind::Lost => (StatusCode::BAD_GATEWAY, "lost"),
            Kind::Deadline => (StatusCode::GATEWAY_TIMEOUT, "deadline"),
            Kind::Handler => (StatusCode::UNPROCESSABLE_ENTITY, "handler"),
            Kind::Panicked => (StatusCode::INTERNAL_SERVER_ERROR, "panicked"),
        };
        let error = json!({"kind": kind, "message": failed.why, "may_have_run": failed.may_have_run});
        HttpResponse::build(status).json(json!({"error": error}))
    }
}

impl<M> From<AskError<M>> for Failed {
    fn from(error: AskError<M>) -> Self {
        let kind = match &error {
            AskError::Refused(refused) => match &refused.reason {
                Refusal::UnknownMessage | Refusal::Malformed(_) | Refusal::Unsendable(_) => Kind::Refused,
                Refusal::MailboxFull
                | Refusal::NoSuchActor
                | Refusal::WrongIncarnation
                | Refusal::WrongProcess
                | Refusal::QueueFull
                | Refusal::Cancelled
                | Refusal::TooManyPending(_)
                | Refusal::Elsewhere(_)
                | Refusal::Unreachable(_) => Kind::Unavailable,
            },
            AskError::Deadline => Kind::Deadline,
            AskError::PeerLost(_) | AskError::Stopped | AskError::Cancelled => Kind::Lost,
            AskError::Panicked(_) => Kind::Panicked,
            AskError::NoReply | AskError::Codec(_) | AskError::Handler(_) => Kind::Handler,
        };
        let why = match &error {
            AskError::Refused(refused) => refused.reason.to_string(),
            AskError::Handler(words) => words.clone(),
            _ => error.to_string(),
        };
        Self::new(kind, why)
    }
}

impl Caller {
    /// A cluster, or why there is none.
    fn cluster(&self) -> Result<&Cluster, Failed> {
        let none = || Failed::new(Kind::Unavailable, "this dashboard runs without a cluster");
        self.cluster.as_ref().ok_or_else(none)
    }

    /// What went wrong on the way to the actor: one that is not ready is told from one that is not there.
    async fn failed<M>(&self, actor: &str, error: NamedError<M>) -> Failed {
        match error {
            NamedError::Ask(error) => error.into(),
            NamedError::Cluster(ClusterError::NotReady(_)) => {
                let status = match self.cluster() {
                    Ok(cluster) => cluster.status().await,
                    Err(failed) => return failed,
                };
                match status.as_ref().map(|status| status.actor(actor)) {
                    Ok(None) => Failed::new(Kind::NoSuchActor, format!("there is no actor {actor:?}")),
                    Ok(Some(_)) => Failed::new(Kind::Unavailable, format!("actor {actor} is not ready")),
                    Err(why) => Failed::new(Kind::Unavailable, why),
                }
            }
            NamedError::Cluster(why) => Failed::new(Kind::Unavailable, why),
        }
    }
}

/// The message of a request; an empty body is null.
fn value(body: &[u8]) -> Result<Json, Failed> {
    if body.is_empty() {
        return Ok(Json::Null);
    }
    let call: Result<Call, _> = serde_json::from_slice(body);
    call.map(|call| call.value)
        .map_err(|why| Failed::new(Kind::Refused, format!("the body must be {{\"value\": ...}}: {why}")))
}

fn deadline(limit: &Limit) -> Result<Duration, Failed> {
    let asked = limit.timeout_s.unwrap_or(TIMEOUT_S);
    if !(asked > 0.0 && asked <= TIMEOUT_MAX_S) {
        let why = format!("timeout_s={asked}: it takes seconds, more than 0 and at most {TIMEOUT_MAX_S}");
        return Err(Failed::new(Kind::Refused, why));
    }
    Ok(Duration::from_secs_f64(asked))
}

async fn ask(
    caller: Data<Caller>,
    path: Path<(String, String)>,
    limit: Query<Limit>,
    body: Bytes,
) -> HttpResponse {
    let (actor, message) = path.into_inner();
    let answered = async || -> Result<Json, Failed> {
        let busy = |_| Failed::new(Kind::Unavailable, format!("{CALLS_MAX} calls are under way; call again"));
        let _permit = caller.free.try_acquire().map_err(busy)?;
        let (value, deadline) = (value(&body)?, deadline(&limit)?);
        let named = caller.cluster()?.json(&actor).with_deadline(deadline);
        let asked = named.ask(&message, value);
        // The deadline travels with the message; finding the actor takes time as well.
        match tokio::time::timeout(deadline, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(caller.failed(&actor, error).await),
            Err(_) => {
                Err(Failed::new(Kind::Deadline, format!("no answer within {} s", deadline.as_secs_f64())))
            }
        }
    };
    match answered().await {
        Ok(answer) => HttpResponse::Ok().json(json!({"answer": answer})),
        Err(failed) => failed.into(),
    }
}

async fn tell(caller: Data<Caller>, path: Path<(String, String)>, body: Bytes) -> HttpResponse {
    let (actor, message) = path.into_inner();
    let told = async || -> Result<(), Failed> {
        let value = value(&body)?;
        match caller.cluster()?.json(&actor).tell(&message, value).await {
            Ok(()) => Ok(()),
            Err(error) => Err(caller.failed(&actor, error).await),
        }
    };
    match told().await {
        Ok(()) => HttpResponse::Accepted().json(json!({})),
        Err(failed) => failed.into(),
    }
}
