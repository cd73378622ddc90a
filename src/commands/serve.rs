//! `helio serve`: documents in, what is served out. The serve controller decides.

use super::{print, print_json};
use crate::args::{Serve, ServeArgs};
use crate::cluster::Access;
use crate::config::{Config, KvCache};
use crate::failure::{FAILED, Failure, USAGE, say};
use anyhow::{Context, Result};
use heliostat_actors::deployment::SERVE;
use heliostat_actors::serve::ServeController;
use heliostat_actors::serve::messages::{DeleteApps, DeployApps, GetDetails};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::handle::Handle;
use serde_json::{Map, Value as Json, json};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Between two looks at what is being deployed.
const POLL: Duration = Duration::from_millis(100);
/// How long the controller may take to answer.
const DEADLINE: Duration = Duration::from_secs(15);

/// Runs `helio serve`.
pub(crate) async fn run(args: &ServeArgs) -> Result<()> {
    if let Serve::Build { file } = &args.command {
        return print(&yaml(&build(file.as_deref())?)?);
    }
    let client = Client { cluster: Access::find(&args.target)?.connect().await? };
    match &args.command {
        Serve::Deploy { file, wait } => {
            let names = client.deploy(file).await?;
            if *wait { client.until_running(&names).await } else { Ok(()) }
        }
        Serve::Run { file } => {
            let names = client.deploy(file).await?;
            client.until_running(&names).await?;
            say(format_args!("{} serves; Ctrl-C ends it", names.join(", ")));
            tokio::signal::ctrl_c().await.context("cannot wait for Ctrl-C")?;
            client.send(r#"{"applications": []}"#.to_owned()).await?;
            client.until_gone(|app| names.contains(app)).await
        }
        Serve::Status { name } => {
            let mut details = client.details().await?;
            let proxies = details["proxies"].take();
            let apps = named(details, name.as_deref())?;
            if args.json { print_json(&apps) } else { print(&(shown(&apps) + &ingresses(&proxies))) }
        }
        Serve::Config { name } => {
            let apps = client.apps(name.as_deref()).await?;
            let configs = apps.values().map(|app| app["deployed_app_config"].clone());
            let configs: Vec<Json> = configs.filter(|config| !config.is_null()).collect();
            if args.json { print_json(&configs) } else { print(&yaml(&json!({ "applications": configs }))?) }
        }
        Serve::Shutdown { no_wait } => {
            let done = client.controller().await?.ask(DeleteApps).await;
            done.context("the serve controller does not answer")?
                .map_err(|refused| Failure::error(FAILED, refused.to_string()))?;
            if *no_wait { Ok(()) } else { client.until_gone(|_| true).await }
        }
        Serve::Build { .. } => Ok(()),
    }
}

/// Why an application will not serve by itself any more; `None` where it may yet, or the controller does not say.
pub(crate) async fn given_up(cluster: &Cluster, application: &str) -> Option<String> {
    let client = Client { cluster: cluster.clone() };
    let apps = client.apps(Some(application)).await.ok()?;
    let app = apps.get(application).filter(|app| app["status"] == "DEPLOY_FAILED")?;
    let deployments = app["deployments"].as_object().into_iter().flat_map(|all| all.values());
    let said = deployments.chain([app]).filter_map(|it| it["message"].as_str()).find(|said| !said.is_empty());
    Some(said.unwrap_or("it could not be deployed").to_owned())
}

struct Client {
    cluster: Cluster,
}

impl Client {
    async fn controller(&self) -> Result<Handle<ServeController>> {
        self.cluster.forget(SERVE);
        let handle = self.cluster.handle::<ServeController>(SERVE).await;
        let handle =
            handle.context("the serve controller cannot be asked: helio get actors serve shows why")?;
        Ok(handle.with_deadline(DEADLINE))
    }

    /// Deploys a document and returns the names of its applications.
    async fn deploy(&self, file: &Path) -> Result<Vec<String>> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut document: Json = serde_saphyr::from_str(&text)
            .map_err(|why| Failure::error(USAGE, format!("{}: {why}", file.display())))?;
        let dir = std::path::absolute(file).with_context(|| format!("cannot resolve {}", file.display()))?;
        find_models(&mut document, dir.parent().unwrap_or(&dir));
        self.send(document.to_string())
            .await
            .with_context(|| format!("{} was not deployed", file.display()))?;
        let name = |app: &Json| app["name"].as_str().unwrap_or("default").to_owned();
        Ok(document["applications"]
            .as_array()
            .map(|apps| apps.iter().map(name).collect())
            .unwrap_or_default())
    }

    async fn send(&self, json: String) -> Result<()> {
        let done = self.controller().await?.ask(DeployApps { json }).await;
        let done = done.context("the serve controller does not answer")?;
        done.map_err(|refused| Failure::error(FAILED, refused.to_string()))
    }

    /// All that the controller tells.
    async fn details(&self) -> Result<Json> {
        let details = self.controller().await?.ask(GetDetails).await;
        let details = details.context("the serve controller does not answer")?;
        serde_json::from_str(&details).context("the serve controller's answer")
    }

    /// All applications, or one.
    async fn apps(&self, name: Option<&str>) -> Result<Map<String, Json>> {
        named(self.details().await?, name)
    }

    /// Waits until these applications serve.
    async fn until_running(&self, names: &[String]) -> Result<()> {
        loop {
            let apps = self.apps(None).await?;
            let status = |name: &String| apps.get(name).map(|app| app["status"].as_str().unwrap_or_default());
            if let Some(failed) = names.iter().find(|name| status(name) == Some("DEPLOY_FAILED")) {
                let why = apps[failed]["message"].as_str().unwrap_or_default();
                return Err(Failure::error(FAILED, format!("application {failed} was not deployed: {why}")));
            }
            if names.iter().all(|name| status(name) == Some("RUNNING")) {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until no such application is left.
    async fn until_gone(&self, which: impl Fn(&String) -> bool) -> Result<()> {
        while self.apps(None).await?.keys().any(&which) {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

/// The applications of what the controller tells, or one of them.
fn named(mut details: Json, name: Option<&str>) -> Result<Map<String, Json>> {
    let Json::Object(mut apps) = details["applications"].take() else { return Ok(Map::new()) };
    let Some(name) = name else { return Ok(apps) };
    match apps.shift_remove(name) {
        Some(app) => Ok(Map::from_iter([(name.to_owned(), app)])),
        None => Err(Failure::error(FAILED, format!("no application is named {name:?}"))),
    }
}

/// Writes out the checkpoint directories that lie beside the document: the cluster knows nothing of where it lies.
fn find_models(document: &mut Json, dir: &Path) {
    match document {
        Json::Object(object) => {
            if let Some(Json::String(source)) = object.get_mut("model_source")
                && dir.join(&*source).is_dir()
            {
                *source = dir.join(&*source).display().to_string();
            }
            object.values_mut().for_each(|value| find_models(value, dir));
        }
        Json::Array(items) => items.iter_mut().for_each(|item| find_models(item, dir)),
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => {}
    }
}

/// The model of a cluster.toml as a document.
fn build(file: Option<&Path>) -> Result<Json> {
    let config = Config::load(file)?;
    let none = || Failure::error(USAGE, "the cluster.toml has no [model] to write down");
    let model = config.model.as_ref().ok_or_else(none)?;
    let (engine, eplb) = (&config.engine, &config.eplb);
    let mut kwargs = json!({
        "data_parallel_size": config.parallel.dp,
        "enable_expert_parallel": true,
        "expert_parallel_size": config.parallel.ep,
        "max_model_len": model.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "block_size": engine.block_size,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "enable_eplb": eplb.enable_eplb,
        "eplb_config": {
            "window_size": eplb.window_size,
            "step_interval": eplb.step_interval,
            "num_redundant_experts": config.redundant_experts,
        },
    });
    match config.kv_cache {
        KvCache::Bytes(bytes) => kwargs["kv_cache_memory_bytes"] = bytes.into(),
        KvCache::Blocks(blocks) => kwargs["num_gpu_blocks_override"] = blocks.into(),
        KvCache::Utilization(share) => kwargs["gpu_memory_utilization"] = (f64::from(share) / 1000.0).into(),
    }
    let llm = json!({
        "model_loading_config": { "model_id": model.name, "model_source": model.path },
        "engine_kwargs": kwargs,
        "deployment_config": { "num_replicas": 1 },
    });
    Ok(json!({
        "applications": [{
            "name": model.name,
            "route_prefix": format!("/{}", model.name),
            "import_path": "heliostat:build_openai_app",
            "args": { "llm_configs": [llm] },
        }],
    }))
}

fn yaml(value: &Json) -> Result<String> {
    serde_saphyr::to_string(value).context("cannot write YAML")
}

/// Where HTTP is served, for people.
fn ingresses(proxies: &Json) -> String {
    let text = |value: &Json| value.as_str().unwrap_or("-").to_owned();
    let mut out = String::new();
    for (node, proxy) in proxies.as_object().into_iter().flatten() {
        let (name, status, at) = (&proxy["actor_name"], &proxy["status"], &proxy["http_address"]);
        let _ = writeln!(out, "{} on {node}  {}  at {}", text(name), text(status), text(at));
    }
    out
}

/// Applications, their deployments and replicas, for people.
fn shown(apps: &Map<String, Json>) -> String {
    let text = |value: &Json| value.as_str().unwrap_or("-").to_owned();
    let mut out = String::new();
    if apps.is_empty() {
        out.push_str("nothing is served\n");
    }
    for (name, app) in apps {
        let _ = writeln!(out, "{name}  {}  at {}", text(&app["status"]), text(&app["route_prefix"]));
        for (name, deployment) in app["deployments"].as_object().into_iter().flatten() {
            let replicas = deployment["replicas"].as_array().map(Vec::as_slice).unwrap_or_default();
            let running = replicas.iter().filter(|replica| replica["state"] == "RUNNING").count();
            let wanted = &deployment["target_num_replicas"];
            let _ = writeln!(
                out,
                "  {name}  {}  {running} of {wanted} replicas serve",
                text(&deployment["status"])
            );
            for replica in replicas {
                let _ = writeln!(
                    out,
                    "    {}  {}  {}",
                    text(&replica["replica_id"]),
                    text(&replica["state"]),
                    text(&replica["actor_name"])
                );
            }
            if let Some(message) = deployment["message"].as_str().filter(|message| !message.is_empty()) {
                let _ = writeln!(out, "    {message}");
            }
        }
    }
    out
}
