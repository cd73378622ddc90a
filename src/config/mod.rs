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
pub(crate) use raw::{Engine, Eplb, PlacementStrategy, Policy, Serve, Supervision};

use anyhow::{Context, Result};
use error::Problem;
use heliostat_engine::config::ModelConfig;
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
    /// Where the head listens.
    pub(crate) bind: SocketAddr,
    /// By which host others reach it, where that is not the address of `bind`.
    pub(crate) advertise: Option<String>,
    /// Where the head keeps its state.
    pub(crate) state: State,
    /// At least one.
    pub(crate) nodes: Vec<Node>,
    /// What is served.
    pub(crate) model: Model,
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
    /// The HTTP server.
    pub(crate) serve: Serve,
    /// What HTTP clients must prove to know; None on loopback only.
    pub(crate) api_key: Option<Token>,
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
    },
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its name in the cluster.
    pub(crate) name: String,
    /// Where it is; None is this machine.
    pub(crate) host: Option<String>,
    /// CPU devices that it offers, at least one.
    pub(crate) devices: u32,
    /// Threads of each, at least one.
    pub(crate) threads: u32,
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
}

impl Config {
    /// Loads the file, or `cluster.toml` of the current directory, or (where neither is there) the default cluster.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self> {
        let here = std::env::current_dir().context("cannot tell the current directory")?;
        let path = match file {
            Some(path) => Some(here.join(path)),
            None => Some(here.join(DEFAULT_FILE)).filter(|path| path.is_file()),
        };
        let Some(path) = path else {
            return Ok(Self::parse("", "the default cluster", &here)?);
        };
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let shown = file.unwrap_or(Path::new(DEFAULT_FILE)).display().to_string();
        let dir = path.parent().unwrap_or(&here);
        Ok(Self::parse(&text, &shown, dir)?)
    }

    /// Reads and checks `text`; `file` names it in errors and relative paths start at `dir`.
    pub(crate) fn parse(text: &str, file: &str, dir: &Path) -> Result<Self, ConfigError> {
        let fail = |problems: Vec<Problem>| ConfigError { file: file.into(), text: text.into(), problems };
        let raw = read::read(text).map_err(fail)?;
        let secret = |path: &Option<PathBuf>| {
            let path = dir.join(path.as_ref()?);
            Some(std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display())))
        };
        let facts = Facts {
            dir: dir.to_path_buf(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            token_file: secret(&raw.cluster.token_file),
            api_key_file: secret(&raw.serve.api_key_file),
            model: ModelConfig::from_dir(&dir.join(&raw.model.path)).map_err(|e| e.to_string()),
        };
        validate::validate(raw, text, &facts).map_err(fail)
    }
}
