//! cluster.toml: read once, here, and passed down as a checked `Config`.
//!
//! `raw` is the file, `read` its form, `validate` its sense, `docs` its reference page. Nothing below this module reads
//! the file or guesses a default.

mod docs;
mod error;
mod raw;
mod read;
mod section;
#[cfg(test)]
mod tests;
mod validate;

pub(crate) use docs::reference_page;
pub(crate) use error::ConfigError;
pub(crate) use raw::{
    All2All, Dashboard, Eplb, Objects, Packages, PlacementStrategy, Policy, ProxyLocation, Serve, Supervision,
};

use crate::failure::{Failure, USAGE};
use crate::gpus;
use anyhow::{Context, Result};
use heliostat_actors::http::{ApiKeys, CertFiles};
use heliostat_actors::telemetry::TelemetryArgs;

use error::Problem;
use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::config::ModelConfig;
use heliostat_runtime::spec::{Labels, Quantity};
use heliostat_runtime::state::EtcdTls;
use heliostat_runtime::system::TlsFiles;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use validate::Facts;

/// The name of the file in the current directory that commands take without an argument.
pub(crate) const DEFAULT_FILE: &str = "cluster.toml";

/// A checked cluster: every path absolute, every default filled in.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Name of the cluster.
    pub(crate) name: String,
    /// Logs, state, sockets and pids of this machine's processes.
    pub(crate) run_dir: PathBuf,
    /// What every connection must prove to know; None on loopback only.
    pub(crate) token: Option<Token>,
    /// Certificates for TLS between processes; None where they talk in clear.
    pub(crate) security: Option<TlsFiles>,
    /// Where the head listens.
    pub(crate) bind: SocketAddr,
    /// By which host others reach it, where that is not the address of `bind`.
    pub(crate) advertise: Option<String>,
    /// Where the other heads listen, each with its port.
    pub(crate) peers: Vec<String>,
    /// How long a silent leader leads, in seconds.
    pub(crate) lease_s: u32,
    /// Where the head keeps its state.
    pub(crate) state: State,
    /// At least one, with devices of one kind.
    pub(crate) nodes: Vec<Node>,
    /// What is served, if anything is.
    pub(crate) model: Option<Model>,
    /// How ranks share it.
    pub(crate) parallel: Parallel,
    /// Slots beyond one per expert; experts plus these are divisible by ep.
    pub(crate) redundant_experts: u32,
    /// A rank that is silent for longer inside a step is treated as lost, in seconds.
    pub(crate) step_timeout_s: f64,
    /// Shared memory between each two ranks of one machine, per direction.
    pub(crate) ring_bytes: u64,
    /// Load balancing.
    pub(crate) eplb: Eplb,
    /// Room for KV blocks per DP rank.
    pub(crate) kv_cache: KvCache,
    /// One rank's engine.
    pub(crate) engine: Engine,
    /// What matters on GPUs only; None where ranks compute on CPUs.
    pub(crate) cuda: Option<Cuda>,
    /// The HTTP server.
    pub(crate) serve: Serve,
    /// What HTTP clients must prove to know; empty on loopback only.
    pub(crate) api_keys: ApiKeys,
    /// Certificate of the HTTP server.
    pub(crate) serve_tls: Option<CertFiles>,
    /// Jobs and their REST API.
    pub(crate) dashboard: Dashboard,
    /// The object store of each node.
    pub(crate) objects: Objects,
    /// Programs of users.
    pub(crate) packages: Packages,
    /// What clients of the dashboard must prove to know; empty on loopback only.
    pub(crate) dashboard_keys: ApiKeys,
    /// The one that commands of this machine show.
    pub(crate) dashboard_key: Option<Token>,
    /// Certificate of the dashboard.
    pub(crate) dashboard_tls: Option<CertFiles>,
    /// Where traces of requests go; None where nobody asked for them.
    pub(crate) telemetry: Option<TelemetryArgs>,
    /// Restarts and grace periods.
    pub(crate) supervision: Supervision,
    /// The same as a cluster.toml with absolute paths and without secrets: the token is read from the run directory.
    pub(crate) effective: String,
}

/// A secret that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Where the head keeps what must survive it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// A file store.
    Embedded {
        /// Its directory.
        dir: PathBuf,
    },
    /// An etcd cluster.
    Etcd {
        /// Its servers.
        endpoints: Vec<String>,
        /// Start of every key, the cluster's name included.
        prefix: String,
        /// Certificates.
        tls: Option<EtcdTls>,
    },
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its name in the cluster.
    pub(crate) name: String,
    /// Where it is; None is this machine.
    pub(crate) host: Option<String>,
    /// What it offers.
    pub(crate) devices: Devices,
    /// CPUs that actors can reserve; None is all it has.
    pub(crate) cpus: Option<u32>,
    /// Memory that actors can reserve, bytes; None is all it has.
    pub(crate) memory: Option<u64>,
    /// What else actors can reserve.
    pub(crate) resources: BTreeMap<String, Quantity>,
    /// Its labels.
    pub(crate) labels: Labels,
}

impl Node {
    /// What it offers, as `helio node` takes it.
    pub(crate) fn offer_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut arg = |name: &str, value: String| args.extend([name.to_owned(), value]);
        self.cpus.into_iter().for_each(|cpus| arg("--cpus", cpus.to_string()));
        self.memory.into_iter().for_each(|memory| arg("--memory", memory.to_string()));
        self.resources.iter().for_each(|(name, amount)| arg("--resource", format!("{name}={amount}")));
        self.labels.iter().for_each(|(key, value)| arg("--label", format!("{key}={value}")));
        args
    }
}

impl Objects {
    /// The store of a node, as `helio node` takes it.
    pub(crate) fn args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut arg = |name: &str, value: String| args.extend([name.to_owned(), value]);
        self.memory.into_iter().for_each(|memory| arg("--objects", memory.0.to_string()));
        self.spill_dir.iter().for_each(|dir| arg("--spill-dir", dir.display().to_string()));
        arg("--spill", self.spill_bytes.0.to_string());
        self.ready.iter().for_each(|size| arg("--objects-ready", size.0.to_string()));
        args
    }
}

/// The devices of a node: at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Devices {
    /// Shares of its cores.
    Cpu {
        /// How many.
        count: u32,
        /// Threads of each, at least one.
        threads: u32,
    },
    /// GPUs.
    Cuda {
        /// Ordinal of the first; the others follow.
        first: u32,
        /// How many.
        gpus: u32,
        /// Devices that are made of each.
        ranks_per_gpu: u32,
    },
}

impl Devices {
    /// How many ranks they carry.
    pub(crate) fn count(self) -> u32 {
        match self {
            Self::Cpu { count, .. } => count,
            Self::Cuda { gpus, ranks_per_gpu, .. } => gpus.saturating_mul(ranks_per_gpu),
        }
    }

    /// As `helio node` takes them.
    pub(crate) fn args(self) -> Vec<String> {
        match self {
            Self::Cpu { count, threads } => {
                vec!["--devices".into(), format!("cpu={count}"), "--threads".into(), threads.to_string()]
            }
            Self::Cuda { first, gpus, ranks_per_gpu } => {
                let which = match first {
                    0 => format!("cuda={gpus}"),
                    _ => format!("cuda={first}-{}", first + gpus.saturating_sub(1)),
                };
                let mut args = vec!["--devices".into(), which];
                if ranks_per_gpu != 1 {
                    args.extend(["--ranks-per-gpu".into(), ranks_per_gpu.to_string()]);
                }
                args
            }
        }
    }
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Model {
    /// The checkpoint directory.
    pub(crate) path: PathBuf,
    /// Its name in the HTTP API.
    pub(crate) name: String,
    /// Longest sequence in tokens.
    pub(crate) max_model_len: u32,
    /// Whether it is served from the start.
    pub(crate) deploy: bool,
}

/// How ranks share the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parallel {
    /// Data-parallel ranks.
    pub(crate) dp: u32,
    /// Expert-parallel ranks.
    pub(crate) ep: u32,
    /// Whether DP rank i and EP rank i share device i.
    pub(crate) colocate: bool,
}

/// Room for KV blocks per DP rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KvCache {
    /// As many blocks as fit.
    Bytes(u64),
    /// So many blocks.
    Blocks(u32),
    /// What so many thousandths of a GPU's memory leave beside weights and buffers.
    Utilization(u32),
}

/// Bounds of one rank's engine, in vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Engine {
    /// Tokens per KV block.
    pub(crate) block_size: u32,
    /// Sequences that run at a time.
    pub(crate) max_num_seqs: u32,
    /// Tokens of one step.
    pub(crate) max_num_batched_tokens: u32,
    /// Whether KV blocks of equal prefixes are shared.
    pub(crate) enable_prefix_caching: bool,
    /// How rows of prompts attend.
    pub(crate) prefill_attention: PrefillAttention,
}

/// Ranks on GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cuda {
    /// Folders to search for NVIDIA's libraries first.
    pub(crate) library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept.
    pub(crate) kernel_cache: PathBuf,
    /// How rows travel.
    pub(crate) all2all: All2All,
    /// Largest decode batch that runs as a graph; 0: none does.
    pub(crate) graph_rows_max: u32,
    /// Whether the next step is scheduled while the present one runs.
    pub(crate) async_scheduling: bool,
    /// Ranks that share a GPU.
    pub(crate) ranks_per_gpu: u32,
    /// Whether GPUs may be broken on purpose.
    pub(crate) fault_injection: bool,
}

/// Where a cluster is, by its file alone.
pub(crate) struct Places {
    /// The run directory.
    pub(crate) run_dir: PathBuf,
    /// What the head binds.
    pub(crate) head: SocketAddr,
    /// URL of the dashboard, if there is one.
    pub(crate) dashboard: Option<String>,
}

fn dashboard_url(dashboard: &raw::Dashboard, is_tls: bool) -> Option<String> {
    let at = SocketAddr::new(dashboard.host, dashboard.port);
    dashboard.enabled.then(|| heliostat_actors::dashboard::url(at, is_tls))
}

impl Config {
    /// Where the HTTP server is.
    pub(crate) fn serve_url(&self) -> String {
        let scheme = if self.serve_tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", SocketAddr::new(self.serve.host, self.serve.port))
    }

    /// Where the dashboard is, if there is one.
    pub(crate) fn dashboard_url(&self) -> Option<String> {
        dashboard_url(&self.dashboard, self.dashboard_tls.is_some())
    }

    /// What others on the network could read, and how to keep them from it.
    pub(crate) fn in_clear(&self) -> Vec<String> {
        let beyond = |ip: std::net::IpAddr| !ip.is_loopback();
        let mut said = Vec::new();
        if beyond(self.bind.ip()) && self.security.is_none() {
            let bind = self.bind;
            said.push(format!(
                "connections between processes ({bind}) are not encrypted; set [security] (`helio cert --help`)"
            ));
        }
        if beyond(self.serve.host) && self.serve_tls.is_none() {
            let host = self.serve.host;
            said.push(format!(
                "HTTP on {host} is not encrypted, API keys included; set `tls_cert` and `tls_key` in [serve], or put a \
                 proxy that ends TLS before it"
            ));
        }
        if self.dashboard.enabled && beyond(self.dashboard.host) && self.dashboard_tls.is_none() {
            let host = self.dashboard.host;
            said.push(format!(
                "the dashboard on {host} is not encrypted, its key included; set `tls_cert` and `tls_key` in [dashboard]"
            ));
        }
        if self.security.is_some() && self.nodes.len() > 1 && self.nodes.iter().any(|n| n.host.is_some()) {
            let what = "rows and weights that ranks on different machines exchange are not encrypted";
            said.push(format!("{what}; keep them on a private network (docs/security.md)"));
        }
        said
    }

    /// Loads the file, or `cluster.toml` of the current directory, or (where neither is there) the default cluster.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self> {
        let source = Source::read(file)?;
        Ok(Self::parse(&source.text, &source.shown, &source.dir, gpus_if_needed)?)
    }

    /// Loads a file for a head that runs by itself. It starts no node, so GPUs that the file counts may be on any machine.
    pub(crate) fn load_for_head(file: Option<&Path>, at: HeadAt) -> Result<Self> {
        let source = Source::read(file)?;
        let gpus = |raw: &raw::Raw| validate::leaves_gpus_open(raw).then(gpus::usable);
        Ok(Self::parse_at(&source.text, &source.shown, &source.dir, at, gpus)?)
    }

    /// Loads a file whose GPUs were counted when it was written: a head must come back where a GPU was lost meanwhile.
    pub(crate) fn load_counted(file: Option<&Path>) -> Result<Self> {
        let source = Source::read(file)?;
        Ok(Self::parse(&source.text, &source.shown, &source.dir, |_| None)?)
    }

    /// Where the file says that its cluster is. Checks its form only: a file that was broken since must not keep one from
    /// looking at a cluster that runs.
    pub(crate) fn places(file: Option<&Path>) -> Result<Places> {
        let Source { text, shown, dir } = Source::read(file)?;
        let raw = read::read(&text).map_err(|problems| ConfigError { file: shown, text, problems })?;
        let is_tls = raw.dashboard.tls_cert.is_some();
        Ok(Places {
            run_dir: dir.join(&raw.cluster.run_dir),
            head: raw.head.bind,
            dashboard: dashboard_url(&raw.dashboard, is_tls),
        })
    }

    /// Reads and checks `text`; `file` names it in errors and relative paths start at `dir`. `gpus` counts those of this
    /// machine, or says None where it is not to be asked.
    fn parse(
        text: &str,
        file: &str,
        dir: &Path,
        gpus: impl FnOnce(&raw::Raw) -> Option<Result<u32, String>>,
    ) -> Result<Self, ConfigError> {
        Self::parse_at(text, file, dir, HeadAt::default(), gpus)
    }

    /// As `parse`, with a head elsewhere than the text says.
    fn parse_at(
        text: &str,
        file: &str,
        dir: &Path,
        at: HeadAt,
        gpus: impl FnOnce(&raw::Raw) -> Option<Result<u32, String>>,
    ) -> Result<Self, ConfigError> {
        let fail = |problems: Vec<Problem>| ConfigError { file: file.into(), text: text.into(), problems };
        let mut raw = read::read(text).map_err(fail)?;
        raw.head.bind = at.bind.unwrap_or(raw.head.bind);
        raw.head.advertise = at.advertise.or(raw.head.advertise);
        raw.cluster.run_dir = at.run_dir.unwrap_or(raw.cluster.run_dir);
        let secret = |path: &Option<PathBuf>| {
            let path = dir.join(path.as_ref()?);
            Some(std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display())))
        };
        let facts = Facts {
            dir: dir.to_path_buf(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            gpus: gpus(&raw),
            user_cache: user_cache(),
            token_file: secret(&raw.cluster.token_file),
            api_key_file: secret(&raw.serve.api_key_file),
            dashboard_key_file: secret(&raw.dashboard.api_key_file),
            telemetry_headers_file: secret(&raw.telemetry.headers_file),
            telemetry_environment: telemetry_environment(),
            tls: validate::tls_files(&raw, dir).map(|files| files.check().map_err(|e| e.to_string())),
            model: raw
                .model
                .as_ref()
                .map(|model| ModelConfig::from_dir(&dir.join(&model.path)).map_err(|e| e.to_string())),
        };
        validate::validate(raw, text, &facts).map_err(fail)
    }
}

/// Where a head is, as far as its command line says: on Kubernetes or Slurm nobody knows it when the file is written.
#[derive(Debug, Default)]
pub(crate) struct HeadAt {
    /// Where it listens.
    pub(crate) bind: Option<SocketAddr>,
    /// By which name or address others reach it.
    pub(crate) advertise: Option<String>,
    /// Its run directory, with state and packages in it.
    pub(crate) run_dir: Option<PathBuf>,
}

/// A file that was found, or the default cluster.
struct Source {
    text: String,
    /// Its name in errors.
    shown: String,
    /// Where relative paths start.
    dir: PathBuf,
}

impl Source {
    fn read(file: Option<&Path>) -> Result<Self> {
        let here = std::env::current_dir().context("cannot tell the current directory")?;
        let path = match file {
            Some(path) => Some(here.join(path)),
            None => Some(here.join(DEFAULT_FILE)).filter(|path| path.is_file()),
        };
        let Some(path) = path else {
            // The bundled model, in a directory that has it.
            let model = here.join(raw::Model::default().path);
            let text = if model.is_dir() { "[model]\n" } else { "" };
            return Ok(Self { text: text.into(), shown: "the default cluster".into(), dir: here });
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|why| Failure::error(USAGE, format!("cannot read {}: {why}", path.display())))?;
        let shown = file.unwrap_or(Path::new(DEFAULT_FILE)).display().to_string();
        Ok(Self { text, shown, dir: path.parent().map_or(here, Path::to_path_buf) })
    }
}

/// Counts this machine's GPUs, unless nothing in the file depends on them: asking the driver takes a while.
fn gpus_if_needed(raw: &raw::Raw) -> Option<Result<u32, String>> {
    validate::asks_for_gpus(raw).then(gpus::usable)
}

/// Every variable of OpenTelemetry that this process was started with.
fn telemetry_environment() -> BTreeMap<String, String> {
    let ours = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok().filter(|name| name.starts_with("OTEL_"))?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(ours).filter(|(_, value)| !value.is_empty()).collect()
}

/// This user's folder for what can be made again.
pub(crate) fn user_cache() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
}
