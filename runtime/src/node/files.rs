//! The files by which a node agent finds its workers again, and they it: small, written whole or not at all.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::handle::Incarnation;
use crate::package::PackageId;
use crate::wire::TlsFiles;

/// A worker, in `<run_dir>/workers/<incarnation>.json`: what it was started with and which process it became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorkerRecord {
    pub(crate) actor: String,
    pub(crate) incarnation: Incarnation,
    /// Index of the device it owns.
    pub(crate) device: Option<u32>,
    /// The package that it runs; without one the node's own program.
    #[serde(default)]
    pub(crate) package: Option<PackageId>,
    /// Name of its node.
    pub(crate) node: String,
    /// Where heads listen, with commas between.
    pub(crate) head: String,
    /// Address that the worker listens at.
    pub(crate) bind: IpAddr,
    /// Host name or address by which others reach it, if that is another one.
    pub(crate) advertise: Option<String>,
    pub(crate) token_file: Option<PathBuf>,
    #[serde(default)]
    pub(crate) tls: Option<TlsFiles>,
    /// How long it lives on without a node agent.
    pub(crate) agent_grace_ms: u64,
    /// How long it may be silent; `None` for ever.
    #[serde(default)]
    pub(crate) hang_timeout_ms: Option<u64>,
    pub(crate) process: Option<ProcessRecord>,
}

/// Tells a process from a later one of the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    pub(crate) pid: u32,
    /// Clock ticks since boot, from `/proc/<pid>/stat`.
    pub(crate) start_time: u64,
}

/// The agent, in `<run_dir>/node.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AgentRecord {
    pub(crate) endpoint: String,
    pub(crate) pid: u32,
}

/// Where things are in a node's run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The run directory of a worker, from the path of its record.
    pub(crate) fn of_worker(record: &Path) -> Option<Self> {
        Some(Self(record.parent()?.parent()?.to_owned()))
    }

    pub(crate) fn create(&self) -> std::io::Result<()> {
        fs::create_dir_all(self.workers())?;
        fs::create_dir_all(self.logs())
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.0.join("node.lock")
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.0.join("node.json")
    }

    pub(crate) fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    pub(crate) fn workers(&self) -> PathBuf {
        self.0.join("workers")
    }

    pub(crate) fn worker(&self, incarnation: Incarnation) -> PathBuf {
        self.workers().join(format!("{incarnation}.json"))
    }

    /// The socket of the object store.
    pub(crate) fn objects(&self) -> PathBuf {
        self.0.join("objects.sock")
    }

    /// Objects that have no room in memory, unless the node keeps them elsewhere.
    pub(crate) fn spilled(&self) -> PathBuf {
        self.0.join("objects")
    }

    pub(crate) fn packages(&self) -> PathBuf {
        self.0.join("packages")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    pub(crate) fn log(&self, actor: &str) -> PathBuf {
        // A full name may hold one slash, and no name holds an `@`.
        self.logs().join(format!("{}.log", actor.replace('/', "@")))
    }

    /// All records of workers that can be read.
    pub(crate) fn worker_records(&self) -> std::io::Result<Vec<WorkerRecord>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(self.workers())? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read::<WorkerRecord>(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::warn!(path = %path.display(), %error, "ignoring a worker record"),
            }
        }
        Ok(records)
    }
}

/// Reads a JSON file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> std::io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(std::io::Error::other)
}

/// Writes a JSON file so that readers see the old or the new one, whole.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    write_private(path, &serde_json::to_vec_pretty(value).map_err(std::io::Error::other)?)
}

/// Writes bytes that only this user may read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    fs::rename(&fresh, path)
}
