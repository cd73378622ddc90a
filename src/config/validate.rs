//! `Raw` -> `Config`: what no single value shows, such as ranks against devices or slots against ranks.
//!
//! Pure: what lies outside of the file (the model's shape, the token file, the number of cores and GPUs) comes in as
//! `Facts`. Everything wrong is reported at once.

mod devices;
mod engine;
mod network;
mod telemetry;

pub(super) use devices::{asks_for_gpus, leaves_gpus_open};
pub(super) use network::tls_files;

use super::error::Problem;
use super::raw::{Device, ProxyLocation, Raw};
use super::read::locate;
use super::section::{ByteSize, Count};
use super::{Config, Model, Node, Parallel};
use crate::args::{DEFAULT_PORT, with_port};
use heliostat_engine::config::ModelConfig;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What validation must know beside the file.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Where relative paths start.
    pub(crate) dir: PathBuf,
    /// Cores of this machine.
    pub(crate) cores: u32,
    /// GPUs of this machine, or why none can be used; None where it was not asked: what the file says is then believed.
    pub(crate) gpus: Option<Result<u32, String>>,
    /// This user's cache directory.
    pub(crate) user_cache: Option<PathBuf>,
    /// Text of the token file; None where none is named.
    pub(crate) token_file: Option<Result<String, String>>,
    /// Whether the certificates can be used; None where none are named.
    pub(crate) tls: Option<Result<(), String>>,
    /// Text of the API key's file; None where none is named.
    pub(crate) api_key_file: Option<Result<String, String>>,
    /// Text of the file of the dashboard's key; None where none is named.
    pub(crate) dashboard_key_file: Option<Result<String, String>>,
    /// Text of the file of headers for the collector; None where none is named.
    pub(crate) telemetry_headers_file: Option<Result<String, String>>,
    /// OpenTelemetry's variables.
    pub(crate) telemetry_environment: BTreeMap<String, String>,
    /// The model's config.json, or why it cannot be read; None where no model is named.
    pub(crate) model: Option<Result<ModelConfig, String>>,
}

/// What all ranks of a cluster compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cpu,
    Cuda,
}

/// Checks everything and resolves what the file left open; `text` is the file that problems point into.
pub(crate) fn validate(raw: Raw, text: &str, facts: &Facts) -> Result<Config, Vec<Problem>> {
    let mut check = Check { text, problems: Vec::new() };
    let token = check.token(&raw, facts);
    let api_keys = check.keys_file("serve.api_key_file", facts.api_key_file.as_ref());
    let serve_tls = check.https("serve", (&raw.serve.tls_cert, &raw.serve.tls_key), &facts.dir);
    check.serve_bounds(&raw);
    let dashboard_keys = check.keys_file("dashboard.api_key_file", facts.dashboard_key_file.as_ref());
    let dashboard_tls =
        check.https("dashboard", (&raw.dashboard.tls_cert, &raw.dashboard.tls_key), &facts.dir);
    check.listeners(&raw, token.is_some());
    let security = check.security(&raw, facts);
    check.heads(&raw);
    let kind = check.kind(&raw, facts);
    let nodes = check.nodes(&raw, facts, kind);
    check.ingresses(&raw, &nodes);
    check.dashboard(&raw, &nodes);
    let parallel = check.parallel(&raw, &nodes, kind);
    let model = check.model(&raw, facts);
    let redundant_experts = check.redundant_experts(&raw, facts, parallel.ep);
    check.eplb(&raw, &facts.dir);
    let engine = check.engine(&raw, kind);
    check.prefill(&engine, facts);
    let kv_cache = check.kv_cache(&raw, &engine, model.as_ref(), kind);
    let cuda = check.cuda(&raw, facts, kind);
    let state = check.state(&raw, &facts.dir);
    let telemetry = check.telemetry(&raw, facts);
    check.objects(&raw);
    check.supervision(&raw);
    check.finish()?;
    let mut raw = absolute(raw, &facts.dir);
    devices::write_out(&mut raw, &nodes, cuda.as_ref());
    engine::write_out(&mut raw, &engine);
    raw.parallel.dp = Some(parallel.dp);
    raw.parallel.ep = Some(parallel.ep);
    raw.eplb.num_redundant_experts = Some(redundant_experts);
    let effective = toml::to_string(&raw).expect("what was read from TOML can be written as TOML");
    Ok(Config {
        effective,
        name: raw.cluster.name,
        run_dir: raw.cluster.run_dir,
        token,
        security,
        bind: raw.head.bind,
        advertise: raw.head.advertise,
        peers: raw.head.peers.iter().map(|peer| with_port(peer, DEFAULT_PORT)).collect(),
        lease_s: raw.head.lease_s,
        state,
        nodes,
        model,
        parallel,
        redundant_experts,
        step_timeout_s: raw.parallel.step_timeout_s,
        ring_bytes: raw.parallel.ring_bytes.0,
        eplb: raw.eplb,
        kv_cache,
        engine,
        cuda,
        serve: raw.serve,
        api_keys,
        serve_tls,
        dashboard: raw.dashboard,
        dashboard_keys,
        dashboard_key: network::first_key(facts.dashboard_key_file.as_ref()),
        dashboard_tls,
        objects: raw.objects,
        packages: raw.packages,
        telemetry,
        supervision: raw.supervision,
    })
}

/// The same file without relative paths and without the token itself.
fn absolute(mut raw: Raw, dir: &Path) -> Raw {
    let cluster = &mut raw.cluster;
    cluster.run_dir = dir.join(&cluster.run_dir);
    if cluster.token.take().is_some() || cluster.token_file.is_some() {
        cluster.token_file = Some(cluster.run_dir.join("token"));
    }
    if let Some(model) = &mut raw.model {
        model.path = dir.join(&model.path);
    }
    raw.devices.library_dirs.iter_mut().for_each(|path| *path = dir.join(&*path));
    let others = [
        &mut raw.state.dir,
        &mut raw.state.ca,
        &mut raw.state.cert,
        &mut raw.state.key,
        &mut raw.security.dir,
        &mut raw.security.ca,
        &mut raw.security.cert,
        &mut raw.security.key,
        &mut raw.eplb.initial_layout,
        &mut raw.serve.api_key_file,
        &mut raw.serve.tls_cert,
        &mut raw.serve.tls_key,
        &mut raw.dashboard.api_key_file,
        &mut raw.dashboard.tls_cert,
        &mut raw.dashboard.tls_key,
        &mut raw.telemetry.headers_file,
        &mut raw.objects.spill_dir,
    ];
    for path in others.into_iter().flatten() {
        *path = dir.join(&*path);
    }
    raw
}

/// Collects problems.
struct Check<'t> {
    text: &'t str,
    problems: Vec<Problem>,
}

impl Check<'_> {
    /// All problems in the order of the file, if there are any.
    fn finish(mut self) -> Result<(), Vec<Problem>> {
        self.problems.sort_by_key(|p| p.span.as_ref().map_or(usize::MAX, |s| s.start));
        if self.problems.is_empty() { Ok(()) } else { Err(self.problems) }
    }

    /// Reports the value at `path` unless `ok`.
    fn require(&mut self, ok: bool, path: &str, message: impl Into<String>, help: impl Into<String>) {
        if !ok {
            self.problems.push(Problem::at(locate(self.text, path), message).help(help));
        }
    }

    /// Where ingresses are.
    fn ingresses(&mut self, raw: &Raw, nodes: &[Node]) {
        self.known_node("serve.node", raw.serve.node.as_deref(), nodes);
        self.require(
            raw.serve.node.is_none() || raw.serve.proxy_location == ProxyLocation::HeadOnly,
            "serve.node",
            "`node` is that of the one ingress of `HeadOnly`",
            "leave out `node`, or `proxy_location`",
        );
    }

    fn known_node(&mut self, key: &str, name: Option<&str>, nodes: &[Node]) {
        let Some(name) = name else { return };
        let names: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
        let known = names.contains(&name);
        let help = format!("nodes are {}", names.join(", "));
        self.require(known, key, format!("there is no node `{name}`"), help);
    }

    fn parallel(&mut self, raw: &Raw, nodes: &[Node], kind: Kind) -> Parallel {
        let devices = nodes.iter().map(|n| n.devices.count()).sum::<u32>();
        let colocate = raw.parallel.colocate;
        let share = if colocate { devices } else { devices / 2 };
        let dp = raw.parallel.dp.unwrap_or(share);
        let ep = raw.parallel.ep.unwrap_or(if colocate { dp } else { devices.saturating_sub(dp) });
        for (key, n) in [("parallel.dp", dp), ("parallel.ep", ep)] {
            let short = &key["parallel.".len()..];
            self.require(
                n > 0,
                key,
                format!("`{short}` must be at least 1"),
                format!("write {short} = 1 or more"),
            );
        }
        let needed = if colocate { dp.max(ep) } else { dp + ep };
        let path = if colocate && ep > dp { "parallel.ep" } else { "parallel.dp" };
        let what = if colocate {
            format!("dp = {dp} and ep = {ep} need {needed} devices")
        } else {
            format!("dp = {dp} and ep = {ep} with colocate = false need {needed} devices")
        };
        let fix = match (kind, raw.devices.device) {
            (Kind::Cpu, _) => "lower dp and ep, or raise `cpu` in [devices]",
            (Kind::Cuda, Device::Auto) => "lower dp and ep, or write device = \"cpu\" in [devices]",
            (Kind::Cuda, Device::Cpu | Device::Cuda) => "lower dp and ep, or offer more GPUs",
        };
        self.require(
            needed <= devices || raw.model.is_none(),
            path,
            format!("{what}, the nodes have {devices}"),
            fix,
        );
        self.positive("parallel.step_timeout_s", raw.parallel.step_timeout_s);
        Parallel { dp, ep, colocate }
    }

    fn model(&mut self, raw: &Raw, facts: &Facts) -> Option<Model> {
        let written = raw.model.as_ref()?;
        let path = facts.dir.join(&written.path);
        let name = written.name.clone().unwrap_or_else(|| directory_name(&path));
        let context = match &facts.model {
            Some(Ok(model)) => to_u32(model.max_position_embeddings),
            Some(Err(e)) => {
                self.require(false, "model.path", e.clone(), "name a Hugging Face checkpoint directory");
                u32::MAX
            }
            None => u32::MAX,
        };
        let max_model_len = written.max_model_len.unwrap_or(context);
        let key = "model.max_model_len";
        self.require(
            max_model_len > 0,
            key,
            "`max_model_len` must be at least 1",
            "leave it out for the model's limit",
        );
        self.require(
            max_model_len <= context,
            key,
            format!("`max_model_len` = {max_model_len} is beyond the model's {context} positions"),
            format!("write {context} or less"),
        );
        Some(Model { path, name, max_model_len, deploy: written.deploy })
    }

    fn redundant_experts(&mut self, raw: &Raw, facts: &Facts, ep: u32) -> u32 {
        let Some(Ok(model)) = &facts.model else { return 0 };
        let experts = to_u32(model.moe.num_experts);
        let ep = ep.max(1);
        let fill = (ep - experts % ep) % ep;
        let auto = if raw.eplb.enable_eplb && ep > 1 { fill + ep } else { fill };
        let redundant = raw.eplb.num_redundant_experts.unwrap_or(auto);
        let slots = experts + redundant;
        let above = redundant + (ep - slots % ep);
        let fix = match redundant.checked_sub(slots % ep) {
            Some(below) => format!("write {below} or {above}"),
            None => format!("write {above}"),
        };
        self.require(
            slots.is_multiple_of(ep),
            "eplb.num_redundant_experts",
            format!("{experts} experts + {redundant} redundant = {slots} slots, not divisible by ep = {ep}"),
            fix,
        );
        self.require(
            redundant <= experts * (ep - 1),
            "eplb.num_redundant_experts",
            format!("{redundant} redundant experts are more than one copy of each on every rank"),
            format!("write at most {}", experts * (ep - 1)),
        );
        redundant
    }

    fn eplb(&mut self, raw: &Raw, dir: &Path) {
        let eplb = &raw.eplb;
        self.require(
            eplb.window_size > 0,
            "eplb.window_size",
            "`window_size` must be at least 1",
            "vLLM's default is 1000",
        );
        self.require(
            eplb.step_interval > 0,
            "eplb.step_interval",
            "`step_interval` must be at least 1",
            "vLLM's default is 3000",
        );
        self.require(
            eplb.use_async,
            "eplb.use_async",
            "weights always move in the background in this release",
            "leave `use_async` out",
        );
        self.positive("eplb.plan_timeout_s", eplb.plan_timeout_s);
        if let Some(layout) = &eplb.initial_layout {
            let layout = dir.join(layout);
            let message = format!("there is no file {}", layout.display());
            self.require(
                layout.is_file(),
                "eplb.initial_layout",
                message,
                "a JSON file with `physical_to_logical_map`",
            );
        }
    }

    fn objects(&mut self, raw: &Raw) {
        let objects = &raw.objects;
        self.require(
            objects.memory.is_none_or(|memory| memory.0 > 0),
            "objects.memory",
            "`memory` must be above 0",
            "leave it out for 30 % of the machine's memory",
        );
        self.require(
            objects.ready.iter().all(|size| size.0 > 0),
            "objects.ready",
            "`ready` has a size of 0: such an object needs no memory",
            "leave it out",
        );
        let ready = objects.ready.iter().fold(0_u64, |sum, size| sum.saturating_add(size.0));
        // The store keeps none ready beyond the half of its memory.
        if let Some(memory) = objects.memory.filter(|memory| memory.0 > 0 && ready > memory.0 / 2) {
            let message =
                format!("{} to be kept ready are more than half of the store's {memory}", ByteSize(ready));
            self.require(false, "objects.ready", message, "leave sizes out, or raise `memory`");
        }
    }

    fn supervision(&mut self, raw: &Raw) {
        let s = &raw.supervision;
        for (key, value) in [
            ("supervision.window_s", s.window_s),
            ("supervision.agent_grace_s", s.agent_grace_s),
            ("supervision.node_grace_s", s.node_grace_s),
            ("supervision.worker_grace_s", s.worker_grace_s),
            ("supervision.heartbeat_ms", f64::from(s.heartbeat_ms)),
        ] {
            self.positive(key, value);
        }
        self.require(
            s.backoff_min_ms <= s.backoff_max_ms,
            "supervision.backoff_min_ms",
            format!(
                "`backoff_min_ms` = {} is above `backoff_max_ms` = {}",
                s.backoff_min_ms, s.backoff_max_ms
            ),
            "swap them",
        );
        self.require(
            s.node_grace_s * 1000.0 >= 2.0 * f64::from(s.heartbeat_ms),
            "supervision.node_grace_s",
            format!(
                "`node_grace_s` = {} is less than two heartbeats of {} ms: a late one would cost a node",
                s.node_grace_s, s.heartbeat_ms
            ),
            "raise it, or lower `heartbeat_ms`",
        );
    }

    fn positive(&mut self, path: &str, value: f64) {
        let name = path.rsplit('.').next().unwrap_or(path);
        self.require(
            value.is_finite() && value > 0.0,
            path,
            format!("`{name}` must be above 0"),
            "leave it out for the default",
        );
    }
}

/// A size of a model; none comes near the limit.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Last part of a path, for a model without a name.
fn directory_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}
