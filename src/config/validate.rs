//! `Raw` -> `Config`: what no single value shows, such as ranks against devices or slots against ranks.
//!
//! Pure: what lies outside of the file (the model's shape, the token file, the number of cores) comes in as `Facts`.
//! Everything wrong is reported at once.

mod network;

use super::error::Problem;
use super::raw::{DeviceKind, Raw};
use super::read::locate;
use super::section::ByteSize;
use super::{Config, KvCache, Model, Node, Parallel};
use heliostat_engine::config::ModelConfig;
use std::path::{Path, PathBuf};

/// What validation must know beside the file.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Where relative paths start.
    pub(crate) dir: PathBuf,
    /// Cores of this machine.
    pub(crate) cores: u32,
    /// Text of the token file; None where none is named.
    pub(crate) token_file: Option<Result<String, String>>,
    /// Text of the API key's file; None where none is named.
    pub(crate) api_key_file: Option<Result<String, String>>,
    /// The model's config.json, or why it cannot be read.
    pub(crate) model: Result<ModelConfig, String>,
}

/// Memory for KV blocks where the file says nothing.
const KV_CACHE_BYTES_DEFAULT: ByteSize = ByteSize(128 << 20);

/// Checks everything and resolves what the file left open; `text` is the file that problems point into.
pub(crate) fn validate(raw: Raw, text: &str, facts: &Facts) -> Result<Config, Vec<Problem>> {
    let mut check = Check { text, problems: Vec::new() };
    let token = check.token(&raw, facts);
    let api_key = check.secret_file("serve.api_key_file", facts.api_key_file.as_ref());
    check.listeners(&raw, token.is_some());
    let nodes = check.nodes(&raw, facts);
    check.http_node(&raw, &nodes);
    let devices = nodes.iter().map(|n| n.devices).sum();
    let parallel = check.parallel(&raw, devices);
    let model = check.model(&raw, facts);
    let redundant_experts = check.redundant_experts(&raw, facts, parallel.ep);
    check.eplb(&raw, &facts.dir);
    let kv_cache = check.engine(&raw, &model);
    let state = check.state(&raw, &facts.dir);
    check.supervision(&raw);
    if !check.problems.is_empty() {
        check.problems.sort_by_key(|p| p.span.as_ref().map_or(usize::MAX, |s| s.start));
        return Err(check.problems);
    }
    let mut raw = absolute(raw, &facts.dir);
    raw.parallel.dp = Some(parallel.dp);
    raw.parallel.ep = Some(parallel.ep);
    raw.eplb.num_redundant_experts = Some(redundant_experts);
    let effective = toml::to_string(&raw).expect("what was read from TOML can be written as TOML");
    Ok(Config {
        effective,
        name: raw.cluster.name,
        run_dir: raw.cluster.run_dir,
        token,
        bind: raw.head.bind,
        advertise: raw.head.advertise,
        state,
        nodes,
        model,
        parallel,
        redundant_experts,
        step_timeout_s: raw.parallel.step_timeout_s,
        ring_bytes: raw.parallel.ring_bytes.0,
        eplb: raw.eplb,
        kv_cache,
        engine: raw.engine,
        serve: raw.serve,
        api_key,
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
    raw.model.path = dir.join(&raw.model.path);
    for path in
        [&mut raw.state.dir, &mut raw.eplb.initial_layout, &mut raw.serve.api_key_file].into_iter().flatten()
    {
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
    /// Reports the value at `path` unless `ok`.
    fn require(&mut self, ok: bool, path: &str, message: impl Into<String>, help: impl Into<String>) {
        if !ok {
            self.problems.push(Problem::at(locate(self.text, path), message).help(help));
        }
    }

    fn nodes(&mut self, raw: &Raw, facts: &Facts) -> Vec<Node> {
        let written =
            if raw.nodes.is_empty() { vec![super::raw::Node::default()] } else { raw.nodes.clone() };
        let mut nodes: Vec<Node> = Vec::with_capacity(written.len());
        for (i, node) in written.iter().enumerate() {
            let name = node.name.clone().unwrap_or_else(|| format!("node-{i}"));
            let key = |leaf: &str| format!("nodes.{i}.{leaf}");
            self.require(
                node.kind == DeviceKind::Cpu,
                &key("kind"),
                "CUDA ranks are not in this release",
                "write kind = \"cpu\"",
            );
            self.require(
                nodes.iter().all(|n| n.name != name),
                &key("name"),
                format!("two nodes are named `{name}`"),
                "give each its own name",
            );
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            let named = !name.is_empty() && name.chars().all(plain);
            self.require(
                named,
                &key("name"),
                format!("`{name}` is no name for a node"),
                "use letters, digits, `-`, `_`, `.`",
            );
            let devices = node.devices.or(raw.devices.cpu);
            let path = if node.devices == super::section::Count::Auto {
                "devices.cpu".into()
            } else {
                key("devices")
            };
            self.require(devices > 0, &path, "a node needs at least one device", "write 1 or more");
            nodes.push(Node { name, host: node.host.clone(), devices, threads: 0 });
        }
        // Nodes of one machine share its cores.
        let here: u32 = nodes.iter().filter(|n| n.host.is_none()).map(|n| n.devices).sum();
        let threads = raw.devices.threads.or((facts.cores / here.max(1)).max(1));
        self.require(
            threads > 0,
            "devices.threads",
            "a device needs at least one thread",
            "write 1 or more, or \"auto\"",
        );
        nodes.iter_mut().for_each(|n| n.threads = threads);
        nodes
    }

    fn http_node(&mut self, raw: &Raw, nodes: &[Node]) {
        let Some(name) = &raw.serve.node else { return };
        let names: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
        let known = names.contains(&name.as_str());
        let help = format!("nodes are {}", names.join(", "));
        self.require(known, "serve.node", format!("there is no node `{name}`"), help);
    }

    fn parallel(&mut self, raw: &Raw, devices: u32) -> Parallel {
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
        self.require(
            needed <= devices,
            path,
            format!("{what}, the nodes have {devices}"),
            "lower dp and ep, or raise `cpu` in [devices]",
        );
        self.positive("parallel.step_timeout_s", raw.parallel.step_timeout_s);
        Parallel { dp, ep, colocate }
    }

    fn model(&mut self, raw: &Raw, facts: &Facts) -> Model {
        let path = facts.dir.join(&raw.model.path);
        let name = raw.model.name.clone().unwrap_or_else(|| directory_name(&path));
        let context = match &facts.model {
            Ok(model) => to_u32(model.max_position_embeddings),
            Err(e) => {
                self.require(false, "model.path", e.clone(), "name a Hugging Face checkpoint directory");
                u32::MAX
            }
        };
        let max_model_len = raw.model.max_model_len.unwrap_or(context);
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
        Model { path, name, max_model_len }
    }

    fn redundant_experts(&mut self, raw: &Raw, facts: &Facts, ep: u32) -> u32 {
        let Ok(model) = &facts.model else { return 0 };
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

    fn engine(&mut self, raw: &Raw, model: &Model) -> KvCache {
        let engine = &raw.engine;
        for (name, n) in [
            ("block_size", engine.block_size),
            ("max_num_seqs", engine.max_num_seqs),
            ("max_num_batched_tokens", engine.max_num_batched_tokens),
            ("num_gpu_blocks_override", engine.num_gpu_blocks_override.unwrap_or(1)),
        ] {
            self.require(
                n > 0,
                &format!("engine.{name}"),
                format!("`{name}` must be at least 1"),
                "leave it out for the default",
            );
        }
        self.require(
            engine.max_num_batched_tokens >= engine.max_num_seqs,
            "engine.max_num_batched_tokens",
            format!(
                "`max_num_batched_tokens` = {} is below `max_num_seqs` = {}: a full batch could not decode",
                engine.max_num_batched_tokens, engine.max_num_seqs
            ),
            format!("write {} or more", engine.max_num_seqs),
        );
        match (engine.num_gpu_blocks_override, engine.kv_cache_memory_bytes) {
            (Some(_), Some(_)) => {
                let message = "`num_gpu_blocks_override` and `kv_cache_memory_bytes` are both set";
                self.require(false, "engine.num_gpu_blocks_override", message, "keep one of them");
                KvCache::Bytes(0)
            }
            (Some(blocks), None) => {
                let tokens = u64::from(blocks) * u64::from(engine.block_size);
                self.require(
                    tokens >= u64::from(model.max_model_len),
                    "engine.num_gpu_blocks_override",
                    format!(
                        "{blocks} blocks of {} tokens hold {tokens} tokens, one sequence may have {}",
                        engine.block_size, model.max_model_len
                    ),
                    "raise it, or lower `max_model_len` in [model]",
                );
                KvCache::Blocks(blocks)
            }
            (None, bytes) => KvCache::Bytes(bytes.unwrap_or(KV_CACHE_BYTES_DEFAULT).0),
        }
    }

    fn supervision(&mut self, raw: &Raw) {
        let s = &raw.supervision;
        for (key, value) in [
            ("supervision.window_s", s.window_s),
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
