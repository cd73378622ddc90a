//! What is served, as Ray Serve tells it (`ServeInstanceDetails`).
//!
//! Pure. Ray's clients refuse fields that they do not know, so nothing is added to its shape but at proxies, where they do
//! not.

use std::net::SocketAddr;

use heliostat_runtime::cluster::status::{ActorState, ActorStatus, ClusterStatus};
use heliostat_runtime::spec::Resources;
use serde_json::{Map, Value as Json, json};

use super::core::{App, Deployment, DeploymentState, Replica, Seen, ServeState, Site, SiteStage, Stage};
use super::target::{Backpressure, Scale, Source};
use super::workload::{ActorDeployment, Workload};
use crate::deployment::SERVE;

/// Everything.
pub(super) fn instance(
    core: &ServeState,
    seen: &Seen,
    status: Option<&ClusterStatus>,
    http: SocketAddr,
) -> Json {
    let actor = |name: &str| status.and_then(|status| status.actor(name));
    let mut controller = who(actor(SERVE));
    controller.remove("pid");
    let mut proxies = Map::new();
    // Of two on one node the one that takes connections.
    let (serving, others): (Vec<&Site>, Vec<&Site>) =
        core.sites().all().iter().partition(|site| site.stage == SiteStage::Serving);
    for site in others.into_iter().chain(serving) {
        proxies.insert(site.node.clone(), proxy(site, actor(&site.name), http));
    }
    let targets: Vec<Json> = proxies.values().filter_map(target).collect();
    let groups = if targets.is_empty() {
        json!([])
    } else {
        json!([{ "targets": targets, "route_prefix": "/", "protocol": "HTTP" }])
    };
    let apps = core.apps().iter().map(|(name, app)| (name.clone(), application(name, app, seen, status)));
    json!({
        "controller_info": controller,
        "proxy_location": core.sites().location(),
        "http_options": { "host": http.ip().to_string(), "port": http.port() },
        "proxies": proxies,
        "target_groups": groups,
        "applications": apps.collect::<Map<_, _>>(),
        "target_capacity": null,
    })
}

/// An ingress, and where it listens: a field of our own, which Ray's clients leave aside.
fn proxy(site: &Site, actor: Option<&ActorStatus>, http: SocketAddr) -> Json {
    let mut proxy = who(actor);
    proxy.remove("pid");
    let status = match (site.stage, actor.map(|actor| &actor.state)) {
        (SiteStage::Serving, Some(ActorState::Ready)) => "HEALTHY",
        (SiteStage::Serving, Some(ActorState::Dead { .. } | ActorState::Restarting { .. })) => "UNHEALTHY",
        (SiteStage::Serving, _) => "STARTING",
        (SiteStage::Draining, _) => "DRAINING",
        (SiteStage::Stopping, _) => "DRAINED",
    };
    let ip = match proxy.get("node_ip").and_then(Json::as_str) {
        Some(ip) if http.ip().is_unspecified() => ip.to_owned(),
        _ => http.ip().to_string(),
    };
    let port = if site.configured && http.port() != 0 { Some(http.port()) } else { site.port };
    proxy.insert("node_id".into(), site.node.clone().into());
    proxy.insert("actor_name".into(), site.name.clone().into());
    proxy.insert("status".into(), status.into());
    proxy.insert("http_address".into(), port.map(|port| format!("{ip}:{port}")).into());
    Json::Object(proxy)
}

/// A proxy that takes connections, for a load balancer before all of them.
fn target(proxy: &Json) -> Option<Json> {
    let (ip, port) = proxy["http_address"].as_str()?.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let target = || json!({ "ip": ip, "port": port, "instance_id": "", "name": proxy["actor_name"] });
    (proxy["status"] == "HEALTHY").then(target)
}

/// Where an actor is, in Ray's words.
fn who(actor: Option<&ActorStatus>) -> Map<String, Json> {
    let mut who = Map::new();
    if let Some(actor) = actor {
        who.insert("node_id".into(), actor.node.clone().into());
        who.insert(
            "node_ip".into(),
            actor.endpoint.as_deref().and_then(|it| it.rsplit_once(':')).map(|it| it.0).into(),
        );
        who.insert("actor_id".into(), format!("{:032x}", actor.incarnation.0).into());
        who.insert("actor_name".into(), actor.name.clone().into());
        who.insert("pid".into(), actor.pid.into());
    }
    who
}

fn application(name: &str, app: &App, seen: &Seen, status: Option<&ClusterStatus>) -> Json {
    let deployments: Vec<(&String, &Deployment)> = app.deployments.iter().collect();
    let states: Vec<(DeploymentState, String)> = deployments.iter().map(|(_, it)| it.state()).collect();
    let problem = deployments.iter().find_map(|(it, _)| seen.problems.get(&(name.to_owned(), (*it).clone())));
    let any = |state| states.iter().any(|(other, _)| *other == state);
    let state = if app.deleting {
        "DELETING"
    } else if any(DeploymentState::DeployFailed) || problem.is_some() {
        "DEPLOY_FAILED"
    } else if any(DeploymentState::Updating) {
        "DEPLOYING"
    } else if any(DeploymentState::Unhealthy) {
        "UNHEALTHY"
    } else {
        "RUNNING"
    };
    let said = deployments.iter().zip(&states).filter(|(_, (_, message))| !message.is_empty());
    let mut message: Vec<String> = said.map(|((it, _), (_, message))| format!("{it}: {message}")).collect();
    message.extend(problem.cloned());
    let shown = deployments.iter().map(|(it, state)| ((*it).clone(), deployment((name, it), state, status)));
    json!({
        "name": name,
        "route_prefix": app.route_prefix,
        "docs_path": null,
        "status": state,
        "message": message.join("; "),
        "last_deployed_time_s": app.deployed_at_ms as f64 / 1000.0,
        "deployed_app_config": serde_json::from_str::<Json>(&app.config).unwrap_or(Json::Null),
        "source": match app.source {
            Source::Cluster => "imperative",
            Source::Document => "declarative",
        },
        "deployments": shown.collect::<Map<_, _>>(),
        "external_scaler_enabled": false,
        "deployment_topology": null,
    })
}

fn deployment((app, name): (&str, &str), deployment: &Deployment, status: Option<&ClusterStatus>) -> Json {
    let (state, message) = deployment.state();
    let (state, trigger) = match state {
        DeploymentState::Updating => ("UPDATING", "CONFIG_UPDATE_STARTED"),
        DeploymentState::Healthy => ("HEALTHY", "CONFIG_UPDATE_COMPLETED"),
        DeploymentState::Unhealthy => ("UNHEALTHY", "HEALTH_CHECK_FAILED"),
        DeploymentState::DeployFailed => ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED"),
        DeploymentState::Upscaling => ("UPSCALING", "AUTOSCALING"),
        DeploymentState::Downscaling => ("DOWNSCALING", "AUTOSCALING"),
    };
    let settings = deployment.settings();
    let mut config = json!({
        "name": name,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_timeout.as_secs_f64(),
    });
    match &settings.scale {
        Scale::Fixed(replicas) => config["num_replicas"] = (*replicas).into(),
        Scale::Auto(auto) => {
            config["autoscaling_config"] = json!({
                "min_replicas": auto.min_replicas,
                "initial_replicas": auto.initial_replicas,
                "max_replicas": auto.max_replicas,
                "target_ongoing_requests": auto.target_ongoing_requests,
                "look_back_period_s": auto.look_back.as_secs_f64(),
                "upscale_delay_s": auto.upscale_delay.as_secs_f64(),
                "downscale_delay_s": auto.downscale_delay.as_secs_f64(),
                "downscale_to_zero_delay_s": auto.downscale_to_zero_delay.as_secs_f64(),
                "upscaling_factor": auto.upscaling_factor,
                "downscaling_factor": auto.downscaling_factor,
            });
        }
    }
    if let Some(max) = settings.max_ongoing_requests {
        config["max_ongoing_requests"] = max.into();
    }
    if let Some(max) = settings.max_queued_requests {
        config["max_queued_requests"] = max.into();
    }
    if let Some(Backpressure { status_code, retry_after_s }) = settings.backpressure {
        config["backpressure_config"] = json!({ "status_code": status_code, "retry_after_s": retry_after_s });
    }
    if let Some(actor) = deployment.workload().actor() {
        actor_config(actor, &mut config);
    }
    let replicas = deployment.replicas().iter().map(|it| replica((app, name), it, status));
    json!({
        "name": name,
        "status": state,
        "status_trigger": trigger,
        "message": message,
        "deployment_config": config,
        "target_num_replicas": deployment.replicas_wanted(),
        "required_resources": required(deployment.workload()),
        "replicas": replicas.collect::<Vec<_>>(),
    })
}

/// What a replica takes, in Ray's words where it has some.
fn required(workload: &Workload) -> Json {
    match workload {
        Workload::Model(model) => json!({ "devices": model.topology.size() }),
        Workload::Actor(actor) => {
            let Resources { devices, cpus, memory, custom } = &actor.resources;
            let mut shown = Map::from_iter([("CPU".to_owned(), json!(cpus.as_f64()))]);
            if *devices > 0 {
                shown.insert("GPU".to_owned(), json!(devices));
            }
            if *memory > 0 {
                shown.insert("memory".to_owned(), json!(memory));
            }
            shown.extend(custom.iter().map(|(name, amount)| (name.clone(), json!(amount.as_f64()))));
            Json::Object(shown)
        }
    }
}

/// What only deployments of users' actors say.
fn actor_config(actor: &ActorDeployment, config: &mut Json) {
    let user_config = actor.user_config.as_deref().and_then(|it| serde_json::from_str::<Json>(it).ok());
    config["user_config"] = user_config.unwrap_or_default();
    config["health_check_period_s"] = actor.health.period.as_secs_f64().into();
    config["health_check_timeout_s"] = actor.health.timeout.as_secs_f64().into();
}

fn replica((app, name): (&str, &str), replica: &Replica, status: Option<&ClusterStatus>) -> Json {
    let actors = replica.workload.actors(&replica.names(app, name));
    let first = actors.first().and_then(|first| status?.actor(first));
    let mut shown = who(first);
    let state = match replica.stage {
        Stage::Starting => "STARTING",
        Stage::Running => "RUNNING",
        Stage::Draining | Stage::Stopping => "STOPPING",
    };
    shown.insert("replica_id".into(), format!("{}", replica.number).into());
    shown.insert("state".into(), state.into());
    shown.insert("start_time_s".into(), (replica.started_at_ms as f64 / 1000.0).into());
    Json::Object(shown)
}
