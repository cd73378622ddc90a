//! Ray's Jobs API over HTTP, as Ray's own clients speak it, and one route of ours: a log as a plain stream.
//!
//! Errors are plain text, which those clients show. A web page cannot use it: requests of browsers and for other host
//! names are refused, since whoever may submit a job may run anything.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use actix_web::body::MessageBody;
use actix_web::dev::{ServerHandle, ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use actix_web::middleware::{Next, from_fn};
use actix_web::web::{self, Bytes, Data, Path, Payload, PayloadConfig, Query, ServiceConfig};
use actix_web::{App, HttpRequest, HttpResponse};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;

use super::core::{Job, Refused, Status};
use super::log::whole_chars;
use super::package::PackageError;
use super::request;
use super::service::{Jobs, SubmitError};
use crate::ingress::server::{ApiKey, ServeError};

/// The version of Ray whose Jobs API this is.
const RAY_VERSION: &str = "2.60.0";
/// Version of that API.
const API_VERSION: &str = "4";
/// Largest submission, bytes.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Bytes of a log that are sent at a time.
const CHUNK: usize = 64 << 10;
/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(30);
/// Logs that are followed at once.
const FOLLOWERS_MAX: usize = 256;

/// Where to serve.
#[derive(Clone, Debug)]
pub struct HttpArgs {
    /// Exactly this address is bound.
    pub bind: SocketAddr,
    /// If set, all asks for `Authorization: Bearer KEY`. Required beyond loopback.
    pub api_key: Option<String>,
}

impl HttpArgs {
    /// Binds.
    ///
    /// # Errors
    /// The address is taken, or would be open to others without a key.
    pub fn listen(&self) -> Result<TcpListener, ServeError> {
        if !self.bind.ip().is_loopback() && self.api_key.is_none() {
            return Err(ServeError::OpenWithoutKey(self.bind));
        }
        TcpListener::bind(self.bind).map_err(|cause| ServeError::Bind { bind: self.bind, cause })
    }
}

/// A running server; dropping it closes it.
pub struct HttpServer {
    handle: ServerHandle,
    task: JoinHandle<()>,
}

impl HttpServer {
    /// Serves. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn start(args: HttpArgs, listener: TcpListener, jobs: Jobs) -> Result<Self, ServeError> {
        let failed = |cause| ServeError::Bind { bind: args.bind, cause };
        let door =
            Data::new(Door { key: args.api_key.clone().map(ApiKey), loopback: args.bind.ip().is_loopback() });
        let (jobs, followers) =
            (Data::new(jobs), Data::new(Followers(Arc::new(Semaphore::new(FOLLOWERS_MAX)))));
        let app = move || {
            App::new()
                .app_data(jobs.clone())
                .app_data(door.clone())
                .app_data(followers.clone())
                .app_data(PayloadConfig::new(BODY_BYTES_MAX))
                .wrap(from_fn(guard))
                .configure(routes)
                .default_service(web::to(no_such_route))
        };
        let server = actix_web::HttpServer::new(app).workers(2).shutdown_timeout(0).disable_signals();
        let server = server.listen(listener).map_err(failed)?.run();
        let handle = server.handle();
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "the dashboard ended");
            }
        });
        Ok(Self { handle, task })
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        // The order to stop is sent when it is called; its future only waits.
        drop(self.handle.stop(false));
        self.task.abort();
    }
}

/// By which URL clients on this machine reach an address.
pub fn url(bind: SocketAddr) -> String {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, bind.port()))
}

fn routes(app: &mut ServiceConfig) {
    app.route("/api/version", web::get().to(version))
        .route("/api/packages/{protocol}/{name}", web::get().to(get_package))
        .route("/api/packages/{protocol}/{name}", web::put().to(put_package))
        .route("/api/jobs/", web::post().to(submit))
        .route("/api/jobs/", web::get().to(list))
        .route("/api/jobs/{id}", web::get().to(details))
        .route("/api/jobs/{id}", web::delete().to(delete))
        .route("/api/jobs/{id}/stop", web::post().to(stop))
        .route("/api/jobs/{id}/logs", web::get().to(logs))
        .route("/api/jobs/{id}/logs/tail", web::get().to(tail))
        .route("/api/jobs/{id}/logs/stream", web::get().to(stream_log));
}

/// Who may come in.
struct Door {
    key: Option<ApiKey>,
    /// Only this machine can reach it: then only under a name of this machine.
    loopback: bool,
}

impl Door {
    fn refuse(&self, headers: &HeaderMap) -> Option<HttpResponse> {
        let text = |status, text: &'static str| Some(HttpResponse::build(status).body(text));
        if self.key.as_ref().is_some_and(|key| !key.matches(headers.get(AUTHORIZATION))) {
            let why = "The header `Authorization: Bearer KEY` is missing or has another key.";
            return text(StatusCode::UNAUTHORIZED, why);
        }
        if headers.contains_key(ORIGIN) || headers.contains_key("sec-fetch-site") {
            return text(StatusCode::FORBIDDEN, "Jobs cannot be used from a browser.");
        }
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if self.loopback && !is_local(host) {
            return text(StatusCode::FORBIDDEN, "Jobs are served under names of this machine only.");
        }
        None
    }
}

/// Whether a `Host` names this machine by a loopback name: another name was made to lead here.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|ip| ip.is_loopback())
}

async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let refused = match request.app_data::<Data<Door>>() {
        Some(door) => door.refuse(request.headers()),
        None => Some(HttpResponse::InternalServerError().finish()),
    };
    match refused {
        None => Ok(next.call(request).await?.map_into_left_body()),
        Some(refused) => Ok(request.into_response(refused).map_into_right_body()),
    }
}

fn refuse(status: StatusCode, why: impl ToString) -> HttpResponse {
    HttpResponse::build(status).content_type("text/plain; charset=utf-8").body(why.to_string())
}

impl From<Refused> for HttpResponse {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::NoSuchJob(_) => StatusCode::NOT_FOUND,
            Refused::QueueFull(_) => StatusCode::TOO_MANY_REQUESTS,
            Refused::Exists(_) | Refused::TooLarge { .. } | Refused::NotEnded { .. } => {
                StatusCode::BAD_REQUEST
            }
        };
        refuse(status, refused)
    }
}

async fn no_such_route(http: HttpRequest) -> HttpResponse {
    refuse(StatusCode::NOT_FOUND, format!("There is no `{} {}`.", http.method(), http.path()))
}

async fn version() -> HttpResponse {
    HttpResponse::Ok().json(json!({
        "version": API_VERSION,
        "ray_version": RAY_VERSION,
        "ray_commit": "",
        "session_name": "heliostat",
        "heliostat_version": env!("CARGO_PKG_VERSION"),
    }))
}

/// What Ray's clients call `JobDetails`.
fn to_json(jobs: &Jobs, job: &Job) -> Json {
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let message = job.message.as_deref().unwrap_or(match job.status {
        Status::Pending => "Job has not started yet. It may be waiting for other jobs to end.",
        Status::Running => "Job is currently running.",
        Status::Stopped => "Job was intentionally stopped.",
        Status::Succeeded => "Job finished successfully.",
        Status::Failed => "Job failed.",
    });
    let url = &jobs.config().url;
    let ip = url.trim_start_matches("http://").rsplit_once(':').map_or("", |(ip, _)| ip);
    let driver = jobs.driver_pid(&job.id);
    let driver = driver.map(|pid| json!({"id": job.id, "node_ip_address": ip, "pid": pid.to_string()}));
    json!({
        "type": "SUBMISSION",
        "job_id": null,
        "submission_id": job.id,
        "driver_info": driver,
        "status": job.status,
        "entrypoint": job.submission.entrypoint,
        "message": message,
        "error_type": job.error_type,
        "start_time": job.start_time,
        "end_time": job.end_time,
        "metadata": job.submission.metadata,
        "runtime_env": job.submission.runtime_env,
        "driver_agent_http_address": (job.status != Status::Pending).then_some(url),
        "driver_node_id": (job.status != Status::Pending).then_some(node),
        "driver_exit_code": job.exit_code,
    })
}

async fn submit(jobs: Data<Jobs>, body: Bytes) -> HttpResponse {
    let (id, submission) = match request::parse(&body) {
        Ok(parsed) => parsed,
        Err(why) => return refuse(StatusCode::BAD_REQUEST, why),
    };
    match jobs.submit(id, submission) {
        Ok(id) => HttpResponse::Ok().json(json!({"job_id": id, "submission_id": id})),
        Err(SubmitError::Refused(refused)) => refused.into(),
        Err(why @ SubmitError::NoPackage(_)) => refuse(StatusCode::BAD_REQUEST, why),
        Err(why @ SubmitError::Store(_)) => refuse(StatusCode::INSUFFICIENT_STORAGE, why),
    }
}

async fn list(jobs: Data<Jobs>) -> HttpResponse {
    let all: Vec<Json> = jobs.list().iter().map(|job| to_json(&jobs, job)).collect();
    HttpResponse::Ok().json(all)
}

fn find(jobs: &Jobs, id: &str) -> Result<Job, Refused> {
    jobs.get(id).ok_or_else(|| Refused::NoSuchJob(id.to_owned()))
}

async fn details(jobs: Data<Jobs>, id: Path<String>) -> HttpResponse {
    find(&jobs, &id).map_or_else(HttpResponse::from, |job| HttpResponse::Ok().json(to_json(&jobs, &job)))
}

async fn stop(jobs: Data<Jobs>, id: Path<String>) -> HttpResponse {
    match jobs.stop(&id) {
        Ok(stopped) => HttpResponse::Ok().json(json!({"stopped": stopped})),
        Err(refused) => refused.into(),
    }
}

async fn delete(jobs: Data<Jobs>, id: Path<String>) -> HttpResponse {
    match jobs.delete(&id) {
        Ok(()) => HttpResponse::Ok().json(json!({"deleted": true})),
        Err(refused) => refused.into(),
    }
}

async fn logs(jobs: Data<Jobs>, id: Path<String>) -> HttpResponse {
    if let Err(refused) = find(&jobs, &id) {
        return refused.into();
    }
    let read = web::block(move || jobs.whole_log(&id)).await;
    match read {
        Ok(Ok(chunk)) => {
            let text = dropped(chunk.start) + &String::from_utf8_lossy(&chunk.bytes);
            HttpResponse::Ok().json(json!({"logs": text}))
        }
        Ok(Err(why)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, why),
        Err(why) => refuse(StatusCode::INTERNAL_SERVER_ERROR, why),
    }
}

/// What is said instead of bytes that are kept no more.
fn dropped(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        bytes => format!("[{bytes} earlier bytes were dropped: `max_log_bytes` in [dashboard]]\n"),
    }
}

/// Bounds how many follow.
struct Followers(Arc<Semaphore>);

/// Why a log cannot be followed.
#[derive(Debug, thiserror::Error)]
enum CannotFollow {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{FOLLOWERS_MAX} logs are followed already; ask for /logs instead")]
    TooMany,
}

impl From<CannotFollow> for HttpResponse {
    fn from(why: CannotFollow) -> Self {
        match why {
            CannotFollow::Refused(refused) => refused.into(),
            CannotFollow::TooMany => refuse(StatusCode::SERVICE_UNAVAILABLE, why),
        }
    }
}

/// Somebody who reads a log from a place on, to the end of the job.
struct Follower {
    jobs: Data<Jobs>,
    id: String,
    offset: u64,
    changes: watch::Receiver<u64>,
    _permit: OwnedSemaphorePermit,
}

impl Follower {
    fn new(jobs: Data<Jobs>, id: &str, offset: u64, followers: &Followers) -> Result<Self, CannotFollow> {
        find(&jobs, id)?;
        let permit = Arc::clone(&followers.0).try_acquire_owned().map_err(|_| CannotFollow::TooMany)?;
        let changes = jobs.changes();
        Ok(Self { jobs, id: id.to_owned(), offset, changes, _permit: permit })
    }

    /// What comes next; none when the job has ended and all was said, or the job was deleted.
    async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            // Before the log is read: what a job wrote before its end is not missed.
            let ended = self.jobs.get(&self.id)?.status.is_terminal();
            let chunk = self.jobs.read_log(&self.id, self.offset, CHUNK).ok()?;
            let lost = chunk.start.saturating_sub(self.offset);
            let whole = match whole_chars(&chunk.bytes) {
                0 if ended => chunk.bytes.len(),
                whole => whole,
            };
            if whole > 0 {
                self.offset = chunk.start + whole as u64;
                let mut bytes = dropped(lost).into_bytes();
                bytes.extend(&chunk.bytes[..whole]);
                return Some(bytes);
            }
            if ended {
                return None;
            }
            let _ = tokio::time::timeout(POLL, self.changes.changed()).await;
        }
    }
}

async fn tail(
    http: HttpRequest,
    jobs: Data<Jobs>,
    followers: Data<Followers>,
    id: Path<String>,
    body: Payload,
) -> Result<HttpResponse, actix_web::Error> {
    let mut follower = match Follower::new(jobs, &id, 0, &followers) {
        Ok(follower) => follower,
        Err(refused) => return Ok(refused.into()),
    };
    let (response, mut session, mut messages) = actix_ws::handle(&http, body)?;
    actix_web::rt::spawn(async move {
        loop {
            tokio::select! {
                next = follower.next() => {
                    let Some(bytes) = next else { break };
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    if session.text(text).await.is_err() {
                        return;
                    }
                }
                said = messages.next() => match said {
                    Some(Ok(actix_ws::Message::Ping(bytes))) => {
                        if session.pong(&bytes).await.is_err() {
                            return;
                        }
                    }
                    Some(Ok(actix_ws::Message::Close(_)) | Err(_)) | None => break,
                    Some(Ok(_)) => {}
                },
            }
        }
        let _ = session.close(Some(actix_ws::CloseCode::Normal.into())).await;
    });
    Ok(response)
}

/// Where a stream begins.
#[derive(Deserialize)]
struct Place {
    #[serde(default)]
    offset: u64,
}

/// The log from a byte on, as it is written, to the end of the job.
async fn stream_log(
    jobs: Data<Jobs>,
    followers: Data<Followers>,
    id: Path<String>,
    from: Query<Place>,
) -> HttpResponse {
    let follower = match Follower::new(jobs, &id, from.offset, &followers) {
        Ok(follower) => follower,
        Err(refused) => return refused.into(),
    };
    let parts = stream::unfold(follower, async |mut follower| {
        let bytes = follower.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(bytes)), follower))
    });
    HttpResponse::Ok().content_type("text/plain; charset=utf-8").streaming(Box::pin(parts))
}

/// The name of a package, if it can be one.
fn package_name(protocol: &str, name: &str) -> Result<String, String> {
    if protocol != "gcs" {
        return Err(format!("packages are gcs://NAME.zip, not {protocol}://"));
    }
    if !request::is_id(name) || !name.ends_with(".zip") {
        return Err(format!("{name:?} is no name of a zip file"));
    }
    Ok(name.to_owned())
}

async fn get_package(jobs: Data<Jobs>, path: Path<(String, String)>) -> HttpResponse {
    match package_name(&path.0, &path.1) {
        Ok(name) if jobs.has_package(&name) => HttpResponse::Ok().finish(),
        Ok(name) => refuse(StatusCode::NOT_FOUND, format!("Package gcs://{name} does not exist")),
        Err(why) => refuse(StatusCode::BAD_REQUEST, why),
    }
}

async fn put_package(jobs: Data<Jobs>, path: Path<(String, String)>, mut body: Payload) -> HttpResponse {
    let name = match package_name(&path.0, &path.1) {
        Ok(name) => name,
        Err(why) => return refuse(StatusCode::BAD_REQUEST, why),
    };
    let mut upload = match jobs.receive(&name) {
        Ok(upload) => upload,
        Err(why) => return refuse(StatusCode::INSUFFICIENT_STORAGE, why),
    };
    while let Some(part) = body.next().await {
        let written = match part {
            Ok(part) => upload.write(&part),
            Err(why) => return refuse(StatusCode::BAD_REQUEST, why),
        };
        if let Err(why) = written {
            return refuse(package_status(&why), why);
        }
    }
    match web::block(move || jobs.keep(upload)).await {
        Ok(Ok(())) => HttpResponse::Ok().finish(),
        Ok(Err(why)) => refuse(package_status(&why), why),
        Err(why) => refuse(StatusCode::INTERNAL_SERVER_ERROR, why),
    }
}

fn package_status(why: &PackageError) -> StatusCode {
    match why {
        PackageError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        PackageError::Io { .. } => StatusCode::INSUFFICIENT_STORAGE,
        PackageError::Zip(_) | PackageError::Escapes(_) | PackageError::Hash { .. } => {
            StatusCode::BAD_REQUEST
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["127.0.0.1:8265", "localhost:8265", "localhost", "[::1]:8265", "127.0.0.2"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "evil.example:8265", "127.0.0.1.evil.example", "10.0.0.1:8265", "localhost.evil:1"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
