//! `Config` -> the product's actors: what `helio head` applies and `helio check` checks.

use crate::config::{All2All, Config, Cuda, KvCache, Model, PlacementStrategy, Policy, ProxyLocation, Token};
use anyhow::{Context, Result};
use heliostat_actors::deployment::{Duty, INGRESS, ModelDeployment, ReplicaNames, jobs_spec, serve_spec};
use heliostat_actors::eplb::EplbConfig;
use heliostat_actors::http::{Bounds, HttpDoor};
use heliostat_actors::ingress_actor::IngressArgs;
use heliostat_actors::jobs::JobsArgs;
use heliostat_actors::rank::{CudaArgs, EngineArgs, ExchangeBackend, KvCacheArgs, LinkArgs};
use heliostat_actors::serve::ServeArgs;
use heliostat_actors::serve::core::{ProxyLocation as Location, SiteArgs};
use heliostat_engine::config::ModelConfig;
use heliostat_engine::ep::Topology;
use heliostat_engine::eplb::{Gate, PlacementStrategy as Strategy, Policy as Planner};
use heliostat_runtime::spec::{ActorSpec, LabelSelector, Placement, RestartPolicy};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Steps between two load reports of a rank; a shorter window reports more often.
const LOAD_REPORT_STEPS: u32 = 16;
/// Layers of a remap that a rank stages ahead of their commits.
const STAGE_AHEAD: u32 = 2;
/// Name of the application that serves the model of cluster.toml.
pub(crate) const APPLICATION: &str = "cluster";

/// What a configuration asks for.
pub(crate) struct Plan {
    /// The actors that the head keeps by itself: the serve controller and the jobs actor.
    pub(crate) kept: Vec<ActorSpec>,
    /// Names of those that the controller adds from the start: the actors of the model, and the first ingress.
    pub(crate) served: Vec<String>,
    /// Ingresses from the start.
    pub(crate) ingresses: usize,
}

impl Plan {
    /// Names of all actors.
    pub(crate) fn names(&self) -> Vec<String> {
        self.served.iter().cloned().chain(self.kept.iter().map(|spec| spec.name.clone())).collect()
    }
}

/// What documents go by where there is no model: everything but the model itself.
fn no_model(config: &Config) -> Result<ModelDeployment> {
    let served = Model { path: PathBuf::new(), name: String::new(), max_model_len: u32::MAX, deploy: false };
    described(config, &served, None)
}

/// The model that a configuration describes. Reads its config.json and the initial layout.
fn model(config: &Config, served: &Model) -> Result<ModelDeployment> {
    described(config, served, Some(&ModelConfig::from_dir(&served.path)?))
}

fn described(config: &Config, served: &Model, model: Option<&ModelConfig>) -> Result<ModelDeployment> {
    let layout_file = config.eplb.initial_layout.as_deref().filter(|_| model.is_some());
    let initial_layout = layout_file
        .map(|path| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display())))
        .transpose()?;
    let strategy = match config.eplb.expert_placement_strategy {
        PlacementStrategy::Linear => Strategy::Linear,
        PlacementStrategy::RoundRobin => Strategy::RoundRobin,
    };
    Ok(ModelDeployment {
        model: served.path.clone(),
        model_name: served.name.clone(),
        duty: Duty::Whole,
        redundant_experts: config.redundant_experts,
        initial_layout,
        strategy,
        engine: engine(config, served),
        links: LinkArgs {
            timeout: Duration::from_secs_f64(config.step_timeout_s),
            ring_bytes: config.ring_bytes,
            secret: config.token.as_ref().map(|Token(text)| text.clone().into_bytes()),
            stage_ahead: STAGE_AHEAD,
        },
        eplb: eplb(config, model),
        topology: topology(config)?,
        telemetry: config.telemetry.clone(),
        spread: false,
        selector: LabelSelector::default(),
        restart: restart(config),
    })
}

fn door(config: &Config) -> HttpDoor {
    let serve = &config.serve;
    HttpDoor {
        keys: config.api_keys.clone(),
        tls: config.serve_tls.clone(),
        cors_origins: serve.cors_origins.clone(),
        bounds: Bounds {
            connections_max: serve.max_connections,
            requests_per_s: serve.max_requests_per_s,
            header_timeout: Duration::from_secs_f64(serve.header_timeout_s),
            body_timeout: Duration::from_secs_f64(serve.body_timeout_s),
            request_timeout: (serve.request_timeout_s > 0.0)
                .then(|| Duration::from_secs_f64(serve.request_timeout_s)),
        },
    }
}

/// The actors that a configuration describes. Checks the model's files on this machine.
pub(crate) fn plan(config: &Config) -> Result<Plan> {
    let mut plan = serving(config)?;
    if config.dashboard.enabled {
        let jobs = jobs_spec(&jobs_args(config), restart(config))?;
        plan.kept.push(ActorSpec { placement: jobs_placement(config), ..jobs });
    }
    Ok(plan)
}

/// The serve controller, and what it serves from the start.
fn serving(config: &Config) -> Result<Plan> {
    let names = ReplicaNames::home();
    let (model, deploy, dir) = match &config.model {
        Some(served) => {
            let model = model(config, served)?;
            // Whatever is wrong with the model is better said now than by the controller.
            model.specs(&names, 0)?;
            (model, served.deploy, served.path.parent())
        }
        None => (no_model(config)?, false, config.run_dir.parent()),
    };
    let mut served = if deploy { model.actors(&names) } else { Vec::new() };
    let sites = sites(config);
    let ingresses = match sites.location {
        Location::Disabled => 0,
        Location::HeadOnly => 1,
        Location::EveryNode => config.nodes.len(),
    };
    served.extend((ingresses > 0).then(|| INGRESS.to_owned()));
    let ingress = IngressArgs {
        bind: SocketAddr::new(config.serve.host, config.serve.port),
        body_bytes_max: config.serve.max_body_bytes.0,
        door: door(config),
        telemetry: config.telemetry.clone(),
    };
    let serve = ServeArgs {
        base: model,
        application: deploy.then(|| APPLICATION.to_owned()),
        // A checkpoint that a document names is looked for beside this one, or beside the run directory.
        dir: dir.map(Path::to_path_buf).unwrap_or_default(),
        ingress,
        sites,
    };
    Ok(Plan { kept: vec![serve_spec(&serve, restart(config))?], served, ingresses })
}

/// Where ingresses are.
fn sites(config: &Config) -> SiteArgs {
    let location = match config.serve.proxy_location {
        ProxyLocation::HeadOnly => Location::HeadOnly,
        ProxyLocation::EveryNode => Location::EveryNode,
        ProxyLocation::Disabled => Location::Disabled,
    };
    SiteArgs { location, node: config.serve.node.clone() }
}

/// Where the jobs actor goes: its records do not move, so it is pinned where there is a choice.
fn jobs_placement(config: &Config) -> Placement {
    let here = config.nodes.iter().find(|node| node.host.is_none()).or(config.nodes.first());
    match (&config.dashboard.node, here) {
        (Some(node), _) => Placement::Node(node.clone()),
        (None, Some(node)) if config.nodes.len() > 1 => Placement::Node(node.name.clone()),
        (None, _) => Placement::Anywhere,
    }
}

fn jobs_args(config: &Config) -> JobsArgs {
    let d = &config.dashboard;
    JobsArgs {
        dir: config.run_dir.join("jobs"),
        bind: SocketAddr::new(d.host, d.port),
        door: HttpDoor {
            keys: config.dashboard_keys.clone(),
            tls: config.dashboard_tls.clone(),
            cors_origins: Vec::new(),
            bounds: Bounds {
                connections_max: d.max_connections,
                requests_per_s: d.max_requests_per_s,
                ..Bounds::default()
            },
        },
        token_file: config.token.as_ref().map(|_| config.run_dir.join("token")),
        tls_file: config.security.as_ref().map(|_| config.run_dir.join(crate::rundir::TLS)),
        running_max: d.max_jobs_running,
        queued_max: d.max_jobs_queued,
        kept_max: d.max_jobs_kept,
        log_bytes_max: d.max_log_bytes.0,
        package_bytes_max: d.max_package_bytes.0,
        packages_bytes_max: d.max_packages_bytes.0,
        stop_grace: Duration::from_secs_f64(d.stop_grace_s),
        orphan_grace: Duration::from_secs_f64(d.orphan_grace_s),
    }
}

/// How often actors, head and nodes are started again.
pub(crate) fn restart(config: &Config) -> RestartPolicy {
    let s = &config.supervision;
    RestartPolicy {
        max_restarts: s.max_restarts,
        window: Duration::from_secs_f64(s.window_s),
        backoff_min: Duration::from_millis(s.backoff_min_ms.into()),
        backoff_max: Duration::from_millis(s.backoff_max_ms.into()),
    }
}

fn topology(config: &Config) -> Result<Topology> {
    let p = config.parallel;
    Ok(Topology::new(p.dp as usize, p.ep as usize, p.colocate)?)
}

fn engine(config: &Config, served: &Model) -> EngineArgs {
    EngineArgs {
        block_size: config.engine.block_size,
        kv_cache: match config.kv_cache {
            KvCache::Bytes(bytes) => KvCacheArgs::Bytes(bytes),
            KvCache::Blocks(blocks) => KvCacheArgs::Blocks(blocks),
            KvCache::Utilization(thousandths) => KvCacheArgs::Utilization(thousandths),
        },
        max_num_seqs: config.engine.max_num_seqs,
        max_num_batched_tokens: config.engine.max_num_batched_tokens,
        max_model_len: served.max_model_len,
        enable_prefix_caching: config.engine.enable_prefix_caching,
        prefill_attention: config.engine.prefill_attention,
        max_waiting: config.serve.max_queued_requests,
        load_report_steps: LOAD_REPORT_STEPS.min(config.eplb.window_size),
        cuda: config.cuda.as_ref().map_or_else(CudaArgs::default, cuda),
    }
}

fn cuda(cuda: &Cuda) -> CudaArgs {
    CudaArgs {
        library_dirs: cuda.library_dirs.clone(),
        kernel_cache: Some(cuda.kernel_cache.clone()),
        exchange: match cuda.all2all {
            All2All::Peer => ExchangeBackend::Peer,
            All2All::Nccl => ExchangeBackend::Nccl,
        },
        graph_rows_max: cuda.graph_rows_max,
        async_scheduling: cuda.async_scheduling,
        ranks_per_gpu: cuda.ranks_per_gpu,
        fault_injection: cuda.fault_injection,
    }
}

fn eplb(config: &Config, model: Option<&ModelConfig>) -> EplbConfig {
    let experts = model.map_or(0, |model| u32::try_from(model.moe.num_experts).unwrap_or(u32::MAX));
    let (ranks, slots) = (config.parallel.ep, experts.saturating_add(config.redundant_experts));
    // Hierarchical balancing wants whole ranks and slots per node.
    let nodes = u32::try_from(config.nodes.len()).unwrap_or(1);
    let even = ranks.is_multiple_of(nodes) && slots.is_multiple_of(nodes);
    let num_nodes = if even { nodes as usize } else { 1 };
    let policy = match config.eplb.policy {
        Policy::Deepseek => Planner::Deepseek { num_groups: 1, num_nodes },
        Policy::Incremental => Planner::Incremental(heliostat_engine::eplb::incremental::Search::default()),
    };
    let mut eplb = EplbConfig {
        enabled: config.eplb.enable_eplb,
        window_size: config.eplb.window_size.into(),
        step_interval: config.eplb.step_interval.into(),
        policy,
        gate: Gate::default(),
        bytes_per_expert: 0,
        plan_timeout: Duration::from_secs_f64(config.eplb.plan_timeout_s),
        log_balancedness: config.eplb.log_balancedness,
    };
    if let Some(model) = model {
        eplb.fit(model);
    }
    eplb
}
