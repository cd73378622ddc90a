//! Ray Serve's REST on the dashboard: what the unmodified `serve deploy`, `serve status`, `serve config` and `serve
//! shutdown` ask for. The controller answers.

use std::fmt::Display;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::ContentType;
use actix_web::web::{self, Data, Json, ServiceConfig};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::handle::Handle;
use serde_json::Value;

use super::ServeController;
use super::messages::{DeleteApps, DeployApps, DeployRefused, GetDetails};
use crate::deployment::SERVE;

/// How long the controller may take.
const DEADLINE: Duration = Duration::from_secs(15);
const PATH: &str = "/api/serve/applications/";

/// Routes, for [`Dashboard::with`](crate::dashboard::Dashboard::with).
pub fn routes(cluster: Option<Cluster>) -> impl Fn(&mut ServiceConfig) + Send + Sync + 'static {
    let cluster = Data::new(cluster);
    move |app| {
        app.app_data(cluster.clone())
            .route(PATH, web::put().to(deploy))
            .route(PATH, web::get().to(details))
            .route(PATH, web::delete().to(delete));
    }
}

async fn deploy(cluster: Data<Option<Cluster>>, document: Json<Value>) -> HttpResponse {
    let json = document.into_inner().to_string();
    match ask(&cluster).await {
        Ok(controller) => match controller.ask(DeployApps { json }).await {
            Ok(done) => answer(done),
            Err(why) => unavailable(why),
        },
        Err(response) => response,
    }
}

async fn delete(cluster: Data<Option<Cluster>>) -> HttpResponse {
    match ask(&cluster).await {
        Ok(controller) => match controller.ask(DeleteApps).await {
            Ok(done) => answer(done),
            Err(why) => unavailable(why),
        },
        Err(response) => response,
    }
}

async fn details(cluster: Data<Option<Cluster>>) -> HttpResponse {
    match ask(&cluster).await {
        Ok(controller) => match controller.ask(GetDetails).await {
            Ok(json) => HttpResponse::Ok().content_type(ContentType::json()).body(json),
            Err(why) => unavailable(why),
        },
        Err(response) => response,
    }
}

async fn ask(cluster: &Data<Option<Cluster>>) -> Result<Handle<ServeController>, HttpResponse> {
    let cluster = cluster.as_ref().as_ref().ok_or_else(|| unavailable("this process is in no cluster"))?;
    // The controller may have been started anew since it was last looked for.
    cluster.forget(SERVE);
    let handle = cluster.handle::<ServeController>(SERVE).await.map_err(unavailable)?;
    Ok(handle.with_deadline(DEADLINE))
}

fn answer(done: Result<(), DeployRefused>) -> HttpResponse {
    match done {
        Ok(()) => HttpResponse::Ok().finish(),
        Err(refused @ DeployRefused::Document(_)) => HttpResponse::BadRequest().body(refused.to_string()),
        Err(refused @ DeployRefused::NotKept(_)) => {
            HttpResponse::ServiceUnavailable().body(refused.to_string())
        }
    }
}

fn unavailable(why: impl Display) -> HttpResponse {
    HttpResponse::ServiceUnavailable().body(format!("the serve controller does not answer: {why}"))
}
