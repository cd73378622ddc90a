//! `GET /api/eplb` and `POST /api/eplb/rebalance`, answered by the EPLB actor of a replica.

use std::fmt::Display;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::web::{self, Data, Query, ServiceConfig};
use heliostat_runtime::cluster::{Cluster, Named};
use serde::Deserialize;

use crate::deployment::{GROUP, eplb_of_group};
use crate::eplb::Eplb;
use crate::ingress::error::ApiError;
use crate::messages::{GetStatus, Rebalance};

/// How long the EPLB actor may take to answer a client.
const DEADLINE: Duration = Duration::from_secs(10);

/// Whose map of experts.
#[derive(Deserialize)]
struct Which {
    /// The group of the replica; without it that of cluster.toml's model.
    group: Option<String>,
}

pub(super) fn routes(app: &mut ServiceConfig, cluster: Option<Cluster>) {
    app.app_data(Data::new(cluster))
        .route("/api/eplb", web::get().to(status))
        .route("/api/eplb/rebalance", web::post().to(rebalance));
}

async fn status(cluster: Data<Option<Cluster>>, which: Query<Which>) -> Result<HttpResponse, ApiError> {
    let answer = within(eplb(&cluster, &which)?.ask(GetStatus)).await?;
    Ok(HttpResponse::Ok().content_type("application/json").body(answer))
}

async fn rebalance(cluster: Data<Option<Cluster>>, which: Query<Which>) -> Result<HttpResponse, ApiError> {
    match within(eplb(&cluster, &which)?.ask(Rebalance)).await? {
        Ok(started) => Ok(HttpResponse::Accepted().json(started)),
        Err(refused) => {
            let error = serde_json::json!({ "message": refused.to_string(), "detail": refused });
            Ok(HttpResponse::Conflict().json(serde_json::json!({ "error": error })))
        }
    }
}

/// The EPLB actor, in whichever incarnation it is.
fn eplb(cluster: &Data<Option<Cluster>>, which: &Which) -> Result<Named<Eplb>, ApiError> {
    let cluster = cluster.as_ref().as_ref().ok_or_else(|| unavailable("this process is in no cluster"))?;
    Ok(cluster.named(eplb_of_group(which.group.as_deref().unwrap_or(GROUP))))
}

async fn within<T, E: Display>(asked: impl Future<Output = Result<T, E>>) -> Result<T, ApiError> {
    let answer = tokio::time::timeout(DEADLINE, asked).await;
    let answer = answer.map_err(|_| unavailable(format!("no answer within {} s", DEADLINE.as_secs())))?;
    answer.map_err(unavailable)
}

fn unavailable(why: impl Display) -> ApiError {
    ApiError::not_ready(format!("the EPLB actor cannot be reached: {why}"))
}
