//! Routes of the dashboard for its page and for `helio top`: one endpoint per view, all JSON, made to be polled once a
//! second; the page itself; and the orders that it may give. Errors are plain text.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::http::header::{CONTENT_DISPOSITION, HeaderName, HeaderValue};
use actix_web::web::{self, Data, Path, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use heliostat_runtime::cluster::Cluster;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;

use super::watcher::Watcher;
use super::{exposition, page, timeline, trace};
use crate::dashboard::refuse;
use crate::eplb::Eplb;
use crate::http::ApiKeys;
use crate::ingress::metrics::CONTENT_TYPE;
use crate::messages::{GetStatus, Rebalance};

/// Header that shows the cluster token, for what changes the cluster.
const TOKEN: HeaderName = HeaderName::from_static("x-heliostat-token");
/// How long an actor may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a log that are read at a time.
const LOG_BYTES: u32 = 64 << 10;
/// How long a drained node waits for its actors where nothing else is said.
const DRAIN_S: f64 = 300.0;

/// What the routes work on.
struct Monitor {
    cluster: Option<Cluster>,
    watcher: Watcher,
    /// The cluster token; without one whoever came in may give orders.
    token: ApiKeys,
    /// One recording at a time.
    recording: Arc<Semaphore>,
}

/// Routes of the page, for [`Dashboard::with`](crate::dashboard::Dashboard::with). Orders ask for `token` if there is one.
pub fn routes(
    cluster: Option<Cluster>,
    watcher: Watcher,
    token: Option<&str>,
) -> impl Fn(&mut ServiceConfig) + Send + Sync + 'static {
    let token = ApiKeys::new(token);
    let monitor = Monitor { cluster, watcher, token, recording: Arc::new(Semaphore::new(1)) };
    let monitor = Data::new(monitor);
    move |app| {
        page::routes(app);
        app.app_data(monitor.clone())
            .route("/metrics", web::get().to(metrics))
            .route("/api/serving", web::get().to(serving))
            .route("/api/eplb", web::get().to(balances))
            .route("/api/eplb/{actor}", web::get().to(eplb))
            .route("/api/eplb/{actor}/rebalance", web::post().to(rebalance))
            .route("/api/nodes/{node}/drain", web::post().to(drain))
            .route("/api/nodes/{node}/undrain", web::post().to(undrain))
            .route("/api/log", web::get().to(log))
            .route("/api/timeline", web::get().to(record));
    }
}

impl Monitor {
    fn cluster(&self) -> Result<&Cluster, Refused> {
        let missing = || refused(StatusCode::SERVICE_UNAVAILABLE, "This dashboard runs without a cluster.");
        self.cluster.as_ref().ok_or_else(missing)
    }

    /// The cluster, for somebody who may change it.
    fn ordered(&self, http: &HttpRequest) -> Result<&Cluster, Refused> {
        let shown = http.headers().get(&TOKEN).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|token| HeaderValue::from_str(&format!("Bearer {token}")).ok());
        if !self.token.is_empty() && self.token.find(shown.as_ref()).is_none() {
            let why = "This changes the cluster: show its token in the header `X-Heliostat-Token`.";
            return Err(refused(StatusCode::FORBIDDEN, why));
        }
        self.cluster()
    }
}

/// Why there is no answer.
struct Refused(StatusCode, String);

fn refused(status: StatusCode, why: impl ToString) -> Refused {
    Refused(status, why.to_string())
}

fn unavailable(why: impl ToString) -> Refused {
    refused(StatusCode::SERVICE_UNAVAILABLE, why)
}

/// One or the other: both are answers.
fn either(answer: Result<HttpResponse, Refused>) -> HttpResponse {
    answer.unwrap_or_else(|Refused(status, why)| refuse(status, why))
}

async fn metrics(monitor: Data<Monitor>) -> HttpResponse {
    HttpResponse::Ok().content_type(CONTENT_TYPE).body(exposition::render(&monitor.watcher.seen()))
}

/// What the client has already.
#[derive(Deserialize)]
struct Since {
    #[serde(default)]
    since_ms: u64,
}

/// Every model, of all ingresses together: the last report without buckets, and samples.
async fn serving(monitor: Data<Monitor>, since: Query<Since>) -> HttpResponse {
    let seen = monitor.watcher.seen();
    let models = seen.models.iter().filter_map(|(model, served)| {
        let report = served.line.report()?;
        let samples: Vec<_> = served.line.since(since.since_ms).collect();
        Some(json!({
            "id": model, "ingress": served.ingresses(), "model": model, "in_flight": report.in_flight, "ended": report.ended,
            "moves": report.moves, "ranks": report.ranks, "samples": samples,
        }))
    });
    HttpResponse::Ok().json(models.collect::<Vec<Json>>())
}

/// Every EPLB actor: its state now and its balancedness over time.
async fn balances(monitor: Data<Monitor>, since: Query<Since>) -> HttpResponse {
    let seen = monitor.watcher.seen();
    let all = seen.balances.iter().filter_map(|(name, balance)| {
        let samples: Vec<Json> = balance
            .since(since.since_ms)
            .map(|(at_ms, pulse)| json!({"at_ms": at_ms, "balancedness": pulse.balancedness, "map_epoch": pulse.map_epoch}))
            .collect();
        Some(json!({"eplb": name, "now": balance.pulse()?, "samples": samples}))
    });
    HttpResponse::Ok().json(all.collect::<Vec<Json>>())
}

/// One EPLB actor whole, as `helio eplb show --json` prints it.
async fn eplb(monitor: Data<Monitor>, actor: Path<String>) -> HttpResponse {
    let asked = async || {
        let handle = monitor.cluster()?.handle::<Eplb>(&actor).await.map_err(unavailable)?;
        let status = handle.with_deadline(DEADLINE).ask(GetStatus).await.map_err(unavailable)?;
        Ok(HttpResponse::Ok().content_type("application/json").body(status))
    };
    either(asked().await)
}

async fn rebalance(monitor: Data<Monitor>, actor: Path<String>, http: HttpRequest) -> HttpResponse {
    let ordered = async || {
        let handle = monitor.ordered(&http)?.handle::<Eplb>(&actor).await.map_err(unavailable)?;
        let answer = handle.with_deadline(DEADLINE).ask(Rebalance).await.map_err(unavailable)?;
        let started = answer.map_err(|why| refused(StatusCode::CONFLICT, why))?;
        Ok(HttpResponse::Accepted().json(started))
    };
    either(ordered().await)
}

/// How long actors may take to end by themselves.
#[derive(Deserialize)]
struct Grace {
    deadline_s: Option<f64>,
}

async fn drain(
    monitor: Data<Monitor>,
    node: Path<String>,
    grace: Query<Grace>,
    http: HttpRequest,
) -> HttpResponse {
    let ordered = async || {
        let cluster = monitor.ordered(&http)?;
        let wanted = grace.deadline_s.unwrap_or(DRAIN_S);
        let bad = |_| refused(StatusCode::BAD_REQUEST, "`deadline_s` is a number of seconds, 0 or more.");
        let grace = Duration::try_from_secs_f64(wanted).map_err(bad)?;
        let drained = cluster.drain_node(&node, grace, false).await;
        drained.map_err(|why| refused(StatusCode::CONFLICT, why))?;
        Ok(HttpResponse::Accepted().json(json!({"node": *node, "draining": true})))
    };
    either(ordered().await)
}

async fn undrain(monitor: Data<Monitor>, node: Path<String>, http: HttpRequest) -> HttpResponse {
    let ordered = async || {
        let undrained = monitor.ordered(&http)?.undrain_node(&node).await;
        undrained.map_err(|why| refused(StatusCode::CONFLICT, why))?;
        Ok(HttpResponse::Ok().json(json!({"node": *node, "draining": false})))
    };
    either(ordered().await)
}

/// Whose log, from where on; without an offset its end.
#[derive(Deserialize)]
struct LogOf {
    actor: String,
    offset: Option<u64>,
}

/// A piece of an actor's log, and where to go on.
async fn log(monitor: Data<Monitor>, of: Query<LogOf>) -> HttpResponse {
    let asked = async || {
        let cluster = monitor.cluster()?;
        let read = async |offset| {
            let chunk = cluster.logs(&of.actor, offset, LOG_BYTES, Duration::ZERO).await;
            chunk.map_err(|why| refused(StatusCode::NOT_FOUND, why))
        };
        let chunk = match of.offset {
            Some(offset) => read(offset).await?,
            None => {
                let end = read(u64::MAX).await?.next;
                read(end.saturating_sub(u64::from(LOG_BYTES))).await?
            }
        };
        let text = String::from_utf8_lossy(&chunk.bytes);
        Ok(HttpResponse::Ok().json(json!({"text": text, "next": chunk.next})))
    };
    either(asked().await)
}

/// How long to record.
#[derive(Deserialize)]
struct Seconds {
    seconds: Option<f64>,
}

/// A recording in Chrome's trace format.
async fn record(monitor: Data<Monitor>, seconds: Query<Seconds>) -> HttpResponse {
    let recorded = async || {
        let cluster = monitor.cluster()?;
        let busy =
            |_| refused(StatusCode::TOO_MANY_REQUESTS, "A recording is under way; ask again after it.");
        let _permit = monitor.recording.try_acquire().map_err(busy)?;
        let bad = |_| refused(StatusCode::BAD_REQUEST, "`seconds` is a number, 0 or more.");
        let duration = Duration::try_from_secs_f64(seconds.seconds.unwrap_or(3.0)).map_err(bad)?;
        let recording = timeline::record(cluster, duration).await.map_err(unavailable)?;
        let name = "attachment; filename=\"heliostat-timeline.json\"";
        Ok(HttpResponse::Ok().insert_header((CONTENT_DISPOSITION, name)).json(trace::chrome(&recording)))
    };
    either(recorded().await)
}
