//! The driver's side: how it finds its cluster and makes its own program known there.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use heliostat_runtime::actor::Spawn;
use heliostat_runtime::cluster::{
    Cluster, ClusterError, Credentials, Driver as Registered, Named, SpawnFailed,
};
use heliostat_runtime::function::{FunctionPool, PoolError, PoolOptions};
use heliostat_runtime::package::{self, PackageId, PushError, RegisterMode};
use heliostat_runtime::spec::ActorSpec;
use heliostat_runtime::system::{Secret, TlsFiles};
use heliostat_runtime::wire::CodecError;

/// Where a head is unless something says otherwise.
const DEFAULT_ADDRESS: &str = "127.0.0.1:6379";
/// How long an actor may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// This very program, also where its file was replaced since.
const SELF: &str = "/proc/self/exe";

/// Why a driver could not begin, or an actor not be started.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The token cannot be read.
    #[error("HELIOSTAT_TOKEN_FILE={}: {source}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The certificates cannot be found.
    #[error("HELIOSTAT_TLS={}: {source}", path.display())]
    Tls {
        /// The directory or file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// No cluster answers.
    #[error("{source}; start a cluster with `helio up`, or set HELIOSTAT_ADDRESS to HOST:PORT of its head")]
    Connect {
        /// What went wrong.
        source: ClusterError,
    },
    /// This program cannot be read.
    #[error("cannot read this program: {0}")]
    Program(std::io::Error),
    /// This program could not be uploaded, or is not the one that is registered.
    #[error(transparent)]
    Package(#[from] PushError),
    /// The arguments of an actor cannot be encoded.
    #[error(transparent)]
    Args(#[from] CodecError),
    /// An actor did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnFailed),
}

/// Connects to the head at HELIOSTAT_ADDRESS with the token of HELIOSTAT_TOKEN_FILE and the certificates of HELIOSTAT_TLS,
/// where these are set, as they are in jobs.
pub async fn connect() -> Result<Cluster, DriverError> {
    let address = std::env::var("HELIOSTAT_ADDRESS").unwrap_or_else(|_| DEFAULT_ADDRESS.to_owned());
    let path = |name| std::env::var_os(name).map(PathBuf::from);
    let token = match path("HELIOSTAT_TOKEN_FILE") {
        Some(path) => match std::fs::read_to_string(&path) {
            Ok(text) => Some(Secret::new(text.trim())),
            Err(source) => return Err(DriverError::Token { path, source }),
        },
        None => None,
    };
    let tls = path("HELIOSTAT_TLS").map(|path| tls(&path)).transpose()?;
    let cluster = Cluster::connect_with(&address, Credentials { token, tls }).await;
    cluster.map_err(|source| DriverError::Connect { source })
}

/// HELIOSTAT_TLS: a directory as `helio cert` writes it, or a file with the paths of the three, as a run directory has it.
pub fn tls(path: &Path) -> Result<TlsFiles, DriverError> {
    if path.is_dir() {
        return Ok(TlsFiles::in_dir(path));
    }
    let failed = |source| DriverError::Tls { path: path.to_owned(), source };
    let text = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

/// What a driver has: its cluster and its arguments.
pub struct Driver {
    cluster: Cluster,
    args: Vec<String>,
}

impl Driver {
    /// Connects, and registers this program there, as a package and as a driver, which ends what it owns when it ends.
    pub(super) async fn connect(
        name: &str,
        version: &str,
        args: Vec<String>,
    ) -> Result<(Self, Registered), DriverError> {
        let cluster = connect().await?;
        let package = register(&cluster, name, version).await?;
        let registered = cluster.with_package(package).driver(name).await;
        let registered = registered.map_err(|source| DriverError::Connect { source })?;
        Ok((Self { cluster: registered.cluster().clone(), args }, registered))
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The arguments of the program.
    pub fn args(&self) -> &[String] {
        &self.args
    }

    /// Starts an actor with defaults and waits until it takes messages, 60 s at most. It ends with this driver; one that is to
    /// stay has `Lifetime::Detached` in its spec, for `Cluster::spawn`.
    pub async fn spawn<A: Spawn>(
        &self,
        name: impl Into<String>,
        args: &A::Args,
    ) -> Result<Named<A>, DriverError> {
        let name = name.into();
        let actor = self.cluster.spawn(ActorSpec::of::<A>(&name, args)?).await.map_err(SpawnFailed::from)?;
        self.cluster.ready(&name, READY_PATIENCE).await?;
        Ok(actor)
    }

    /// Starts workers for this program's functions.
    pub async fn functions(&self, options: PoolOptions) -> Result<FunctionPool, PoolError> {
        FunctionPool::start(&self.cluster, options).await
    }
}

/// Makes sure that the cluster has this very binary under its name and version. A driver that differs from what is
/// registered, and so from what workers would run, is refused.
async fn register(cluster: &Cluster, name: &str, version: &str) -> Result<PackageId, DriverError> {
    let sha256 = File::open(SELF).and_then(package::sha256_of).map_err(DriverError::Program)?;
    let id = PackageId { name: name.to_owned(), version: version.to_owned(), sha256 };
    package::push(cluster, Path::new(SELF), &id, RegisterMode::Keep).await?;
    Ok(id)
}
