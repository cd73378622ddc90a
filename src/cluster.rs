//! How a command reaches a cluster: the address it was given, else that of the run directory, else the default.

use crate::args::{self, DEFAULT_PORT, with_ports};
use crate::config::{Config, DEFAULT_FILE, Places, Token};
use crate::failure::{Failure, NO_CLUSTER, say};
use crate::rundir::{RunDir, read_token};
use anyhow::{Context, Result};
use heliostat_runtime::cluster::status::ClusterStatus;
use heliostat_runtime::cluster::{Cluster, ClusterError, Credentials};
use heliostat_runtime::system::{Secret, TlsFiles};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a head may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a head is and how to prove that one may talk to it.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    /// HOST:PORT of the head; of several, with commas between.
    pub(crate) address: String,
    /// The cluster token.
    pub(crate) token: Option<Token>,
    /// Certificates.
    pub(crate) tls: Option<TlsFiles>,
    /// Where the address comes from, for errors.
    source: String,
}

impl Access {
    /// To the heads of a configuration, from this machine.
    pub(crate) fn of(config: &Config) -> Self {
        let own = reachable(config.bind).to_string();
        let others = config.peers.iter().filter(|peer| **peer != own).cloned();
        let address = std::iter::once(own.clone()).chain(others).collect::<Vec<_>>().join(",");
        Self {
            address,
            token: config.token.clone(),
            tls: config.security.clone(),
            source: "of cluster.toml".into(),
        }
    }

    /// As the options of a command say.
    pub(crate) fn find(target: &args::Target) -> Result<Self> {
        let run = run_dir(target.run_dir.as_deref(), None)?;
        // Set in jobs; a run directory that is named by hand is another matter.
        let variable =
            |name| std::env::var_os(name).filter(|value| target.run_dir.is_none() && !value.is_empty());
        let token =
            match target.token_file.clone().or_else(|| variable("HELIOSTAT_TOKEN_FILE").map(Into::into)) {
                Some(path) => Some(read_token(&path)?),
                None => read_token(&run.token_path()).ok(),
            };
        let tls = match (target.tls.files().context("--tls")?, variable("HELIOSTAT_TLS")) {
            (Some(files), _) => Some(files),
            (None, Some(path)) => Some(heliostat::tls_files(Path::new(&path))?),
            (None, None) => run.tls(),
        };
        let in_file = || places(target.run_dir.as_deref()).map(|places| reachable(places.head).to_string());
        let of_variable = variable("HELIOSTAT_ADDRESS").and_then(|value| value.into_string().ok());
        let (address, source) = match (&target.address, of_variable, run.address()) {
            (Some(address), ..) => (with_ports(address, DEFAULT_PORT), "of --address".to_owned()),
            (None, Some(address), _) => {
                (with_ports(&address, DEFAULT_PORT), "of HELIOSTAT_ADDRESS".to_owned())
            }
            (None, None, Some(address)) => (address, format!("of {}", run.path().display())),
            (None, None, None) => match in_file() {
                Some(address) => (address, format!("of {DEFAULT_FILE}")),
                None => (
                    format!("127.0.0.1:{DEFAULT_PORT}"),
                    format!("by default; {} names none", run.path().display()),
                ),
            },
        };
        Ok(Self { address, token, tls, source })
    }

    /// By what the head lets one in, as the runtime takes it.
    pub(crate) fn credentials(&self) -> Credentials {
        let token = self.token.as_ref().map(|token| Secret::new(&token.0));
        Credentials { token, tls: self.tls.clone() }
    }

    /// Connects, or says that nothing runs there.
    pub(crate) async fn connect(&self) -> Result<Cluster> {
        let connecting = Cluster::connect_with(&self.address, self.credentials());
        match tokio::time::timeout(ANSWER_TIMEOUT, connecting).await {
            Ok(Ok(cluster)) => Ok(cluster),
            Ok(Err(ClusterError::Head { why, .. })) => Err(self.nobody(cause(&why))),
            Ok(Err(e)) => Err(e.into()),
            Err(_) => Err(self.nobody(&format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    }

    fn nobody(&self, why: &str) -> anyhow::Error {
        let Self { address, source, .. } = self;
        // Whoever speaks of tokens and certificates is a cluster.
        if ["token", "certificate", "TLS"].iter().any(|word| why.contains(word)) {
            let fix = "see --token-file, --tls and --tls-server-name, or name another head with --address";
            return Failure::error(
                NO_CLUSTER,
                format!("the cluster at {address} ({source}) refuses: {why}\n  {fix}"),
            );
        }
        let fix = "start a cluster with `helio up`, or name its head with --address HOST:PORT";
        Failure::error(NO_CLUSTER, format!("no cluster answers at {address} ({source}): {why}\n  {fix}"))
    }
}

/// The part of the runtime's sentence that a user can do something about.
fn cause(why: &str) -> &str {
    let why = why.rsplit_once("unreachable: ").map_or(why, |(_, cause)| cause);
    why.split_once(": ").filter(|(host, _)| host.contains(':')).map_or(why, |(_, cause)| cause)
}

/// The cluster's status now.
pub(crate) async fn status(access: &Access) -> Result<ClusterStatus> {
    let cluster = access.connect().await?;
    let status = cluster.status().await?;
    if let Some((head, _)) = cluster.stood_by() {
        say(format_args!("the head at {head} stands by; {} leads", status.head.endpoint));
    }
    Ok(status)
}

/// The run directory that a command works on: the one it was given, else that of its cluster.toml, else `run`.
pub(crate) fn run_dir(given: Option<&Path>, file: Option<&Path>) -> Result<RunDir> {
    if let Some(path) = given {
        return RunDir::new(path);
    }
    if file.is_some() {
        return RunDir::new(&Config::places(file)?.run_dir);
    }
    // A broken file here must not keep one from looking at a cluster that runs.
    RunDir::new(&Config::places(None).map_or_else(|_| PathBuf::from("run"), |places| places.run_dir))
}

/// Where ./cluster.toml says that its cluster is; nowhere where a run directory is named instead, or there is no such file.
pub(crate) fn places(run_dir: Option<&Path>) -> Option<Places> {
    let is_meant = run_dir.is_none() && Path::new(DEFAULT_FILE).is_file();
    is_meant.then(|| Config::places(None).ok()).flatten()
}

/// An address to connect to for an address to listen on.
fn reachable(bind: std::net::SocketAddr) -> std::net::SocketAddr {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    match bind.ip() {
        ip if !ip.is_unspecified() => bind,
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, bind.port()).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, bind.port()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cause_is_shown() {
        let refused = "Watch refused: unreachable: 127.0.0.1:6379: Connection refused (os error 111)";
        assert_eq!(cause(refused), "Connection refused (os error 111)");
        assert_eq!(cause("deadline passed"), "deadline passed");
    }
}
