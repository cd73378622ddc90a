//! Ray's Jobs API as routes of the dashboard, as Ray's own clients speak it, and two routes of ours: a log as a plain
//! stream, and waiting for the end of a job. Errors are plain text, which those clients show. Who may come in is the dashboard's business.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::web::{self, Bytes, Data, Path, Payload, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::core::{Job, Refused, Status};
use super::log::whole_chars;
use super::package::PackageError;
use super::request;
use super::service::{Jobs, SubmitError};
use crate::dashboard::refuse;

/// Bytes of a log that are sent at a time.
const CHUNK: usize = 64 << 10;
/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(30);
/// Longest wait for the end of a job; whoever wants to wait longer asks again.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Logs that are followed at once.
const FOLLOWERS_MAX: usize = 256;

/// Routes of the Jobs API over these jobs, for [`Dashboard::with`](crate::dashboard::Dashboard::with).
pub fn routes(jobs: Jobs) -> impl Fn(&mut ServiceConfig) + Send + Sync + 'static {
    let (jobs, followers) = (Data::new(jobs), Data::new(Followers(Arc::new(Semaphore::new(FOLLOWERS_MAX)))));
    move |app| {
        app.app_data(jobs.clone())
            .app_data(followers.clone())
            .route("/api/packages/{protocol}/{name}", web::get().to(get_package))
            .route("/api/packages/{protocol}/{name}", web::put().to(put_package))
            .route("/api/jobs/", web::post().to(submit))
            .route("/api/jobs/", web::get().to(list))
            .route("/api/jobs/{id}", web::get().to(details))
            .route("/api/jobs/{id}", web::delete().to(delete))
            .route("/api/jobs/{id}/wait", web::get().to(wait))
            .route("/api/jobs/{id}/stop", web::post().to(stop))
            .route("/api/jobs/{id}/logs", web::get().to(logs))
            .route("/api/jobs/{id}/logs/tail", web::get().to(tail))
            .route("/api/jobs/{id}/logs/stream", web::get().to(stream_log));
    }
}

impl From<Refused> for HttpResponse {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::NoSuchJob(_) => StatusCode::NOT_FOUND,
            Refused::QueueFull(_) => StatusCode::TOO_MANY_REQUESTS,
            Refused::Exists(_) | Refused::NotEnded { .. } => StatusCode::BAD_REQUEST,
        };
        refuse(status, refused)
    }
}

/// What Ray's clients call `JobDetails`.
pub fn to_json(jobs: &Jobs, job: &Job) -> Json {
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
        "driver_node_id": (job.status != Status::Pending).then(|| jobs.node_of(&job.id)),
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

/// How long somebody waits.
#[derive(Deserialize)]
struct Patience {
    #[serde(default = "Patience::longest")]
    timeout_s: f64,
}

impl Patience {
    fn longest() -> f64 {
        WAIT_MAX.as_secs_f64()
    }
}

/// The job as soon as it has ended, or as it is after a while.
async fn wait(jobs: Data<Jobs>, id: Path<String>, patience: Query<Patience>) -> HttpResponse {
    // What is no duration (negative, not finite) is none.
    let limit = Duration::try_from_secs_f64(patience.timeout_s).unwrap_or_default().min(WAIT_MAX);
    let mut changes = jobs.changes();
    let ended = async {
        loop {
            // Seen before it is looked: a change in between is not missed.
            changes.mark_unchanged();
            if find(&jobs, &id).map_or(true, |job| job.status.is_terminal())
                || changes.changed().await.is_err()
            {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(limit, ended).await;
    details(jobs, id).await
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
        PackageError::Zip(_)
        | PackageError::Escapes(_)
        | PackageError::Loop(_)
        | PackageError::Hash { .. } => StatusCode::BAD_REQUEST,
    }
}
