//! Ray's state API as routes of the dashboard: what the unmodified `ray list`, `ray get` and `ray summary` ask for. And
//! one route of ours: the whole status.
//!
//! Every answer is JSON of Ray's shape, refusals too: its clients show `msg`. What Heliostat has no record of is refused
//! by name, not answered with an empty list.

use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::web::{self, Data, Path, Query as Parameters, ServiceConfig};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::cluster::status::ClusterStatus;
use heliostat_runtime::objects::ObjectStatus;
use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;

use super::query::{Query, QueryError, Row, Schema};
use super::ray;
use crate::jobs::http::to_json;
use crate::jobs::service::Jobs;

/// Requests that are answered at once; each holds a status of the whole cluster.
const REQUESTS_MAX: usize = 16;

/// Routes of the state API, for [`Dashboard::with`](crate::dashboard::Dashboard::with). Without a cluster only jobs are
/// known.
pub fn routes(cluster: Option<Cluster>, jobs: Jobs) -> impl Fn(&mut ServiceConfig) + Send + Sync + 'static {
    let source = Data::new(Source { cluster, jobs, free: Arc::new(Semaphore::new(REQUESTS_MAX)) });
    move |app| {
        app.app_data(source.clone())
            .route("/api/status", web::get().to(status))
            .route("/api/v0/{kind}", web::get().to(list))
            .route("/api/v0/{kind}/summarize", web::get().to(summarize));
    }
}

/// Where the facts come from.
struct Source {
    cluster: Option<Cluster>,
    jobs: Jobs,
    free: Arc<Semaphore>,
}

/// What can be listed.
#[derive(Clone, Copy)]
enum Kind {
    Actors,
    Nodes,
    Workers,
    Jobs,
    PlacementGroups,
    Objects,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Query(#[from] QueryError),
    #[error(
        "Heliostat keeps no record of {0}; it lists actors, nodes, workers, jobs, placement_groups and objects"
    )]
    NotKept(String),
    #[error("there is no summary of {0}; there is one of actors")]
    NoSummary(String),
    #[error("{REQUESTS_MAX} requests are being answered; ask again")]
    Busy,
    #[error("the head does not answer: {0}")]
    Head(String),
}

impl From<Failure> for HttpResponse {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Query(_) => StatusCode::BAD_REQUEST,
            Failure::NotKept(_) | Failure::NoSummary(_) => StatusCode::NOT_FOUND,
            Failure::Busy => StatusCode::TOO_MANY_REQUESTS,
            Failure::Head(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body = json!({"result": false, "msg": failure.to_string(), "data": {"result": null}});
        HttpResponse::build(status).json(body)
    }
}

impl Kind {
    fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "actors" => Ok(Self::Actors),
            "nodes" => Ok(Self::Nodes),
            "workers" => Ok(Self::Workers),
            "jobs" => Ok(Self::Jobs),
            "placement_groups" => Ok(Self::PlacementGroups),
            "objects" => Ok(Self::Objects),
            other => Err(Failure::NotKept(other.to_owned())),
        }
    }

    fn schema(self) -> &'static Schema {
        match self {
            Self::Actors => &ray::ACTORS,
            Self::Nodes => &ray::NODES,
            Self::Workers => &ray::WORKERS,
            Self::Jobs => &ray::JOBS,
            Self::PlacementGroups => &ray::PLACEMENT_GROUPS,
            Self::Objects => &ray::OBJECTS,
        }
    }
}

impl Source {
    async fn rows(&self, kind: Kind, query: &Query) -> Result<Vec<Row>, Failure> {
        let _permit = self.free.try_acquire().map_err(|_| Failure::Busy)?;
        Ok(match kind {
            Kind::Jobs => self.jobs.list().iter().map(|job| ray::row(to_json(&self.jobs, job))).collect(),
            Kind::Actors => ray::actors(&self.status(query.timeout_s).await?),
            Kind::Nodes => ray::nodes(&self.status(query.timeout_s).await?),
            Kind::Workers => ray::workers(&self.status(query.timeout_s).await?),
            Kind::PlacementGroups => ray::placement_groups(&self.status(query.timeout_s).await?),
            Kind::Objects => ray::objects(&self.objects(query.timeout_s).await?),
        })
    }

    /// What is in the stores of all nodes.
    async fn objects(&self, timeout_s: u64) -> Result<Vec<ObjectStatus>, Failure> {
        let Some(cluster) = &self.cluster else {
            return Err(Failure::Head("this dashboard runs without one".into()));
        };
        match tokio::time::timeout(Duration::from_secs(timeout_s), cluster.object_stores()).await {
            Ok(Ok(stores)) => Ok(stores.into_iter().flat_map(|store| store.objects).collect()),
            Ok(Err(why)) => Err(Failure::Head(why.to_string())),
            Err(_) => Err(Failure::Head(format!("not within {timeout_s} s"))),
        }
    }

    async fn status(&self, timeout_s: u64) -> Result<ClusterStatus, Failure> {
        let Some(cluster) = &self.cluster else {
            return Err(Failure::Head("this dashboard runs without one".into()));
        };
        match tokio::time::timeout(Duration::from_secs(timeout_s), cluster.status()).await {
            Ok(status) => status.map_err(|why| Failure::Head(why.to_string())),
            Err(_) => Err(Failure::Head(format!("not within {timeout_s} s"))),
        }
    }
}

/// Of Ray's shape for lists and for summaries; nothing is ever cut off at the source.
fn answer(total: usize, num_filtered: usize, result: Json) -> HttpResponse {
    let result = json!({
        "total": total,
        "num_after_truncation": total,
        "num_filtered": num_filtered,
        "result": result,
        "partial_failure_warning": "",
        "warnings": null,
    });
    HttpResponse::Ok().json(json!({"result": true, "msg": "", "data": {"result": result}}))
}

/// The whole cluster in our own words, as `helio status --json` prints it.
async fn status(source: Data<Source>) -> HttpResponse {
    let Ok(_permit) = source.free.try_acquire() else { return Failure::Busy.into() };
    match source.status(Query::TIMEOUT_S).await {
        Ok(status) => HttpResponse::Ok().json(status),
        Err(failure) => failure.into(),
    }
}

async fn list(
    source: Data<Source>,
    kind: Path<String>,
    parameters: Parameters<Vec<(String, String)>>,
) -> HttpResponse {
    let listed = async || -> Result<HttpResponse, Failure> {
        let (kind, query) = (Kind::parse(&kind)?, Query::parse(&parameters)?);
        let page = query.answer(source.rows(kind, &query).await?, kind.schema())?;
        Ok(answer(page.total, page.num_filtered, page.rows.into_iter().map(Json::Object).collect()))
    };
    listed().await.unwrap_or_else(HttpResponse::from)
}

async fn summarize(
    source: Data<Source>,
    kind: Path<String>,
    parameters: Parameters<Vec<(String, String)>>,
) -> HttpResponse {
    let summed = async || -> Result<HttpResponse, Failure> {
        let mut query = Query::parse(&parameters)?;
        query.limit = Query::LIMIT_MAX;
        let kind = match Kind::parse(&kind)? {
            Kind::Actors => Kind::Actors,
            Kind::Nodes | Kind::Workers | Kind::Jobs | Kind::PlacementGroups | Kind::Objects => {
                return Err(Failure::NoSummary(kind.into_inner()));
            }
        };
        let page = query.answer(source.rows(kind, &query).await?, kind.schema())?;
        let summary = json!({"node_id_to_summary": ray::actor_summary(&page.rows)});
        Ok(answer(page.total, page.num_filtered, summary))
    };
    summed().await.unwrap_or_else(HttpResponse::from)
}
