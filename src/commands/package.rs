//! `helio package`: the registry of users' programs, and the way from a package to the driver of a job.

use super::{print, print_json};
use crate::args::{Package, PackageArgs};
use crate::cluster::Access;
use crate::failure::{FAILED, Failure, USAGE};
use crate::show;
use anyhow::{Context, Result};
use heliostat_runtime::cluster::Cluster;
use heliostat_runtime::package::{self, DESCRIBE, Digest, PackageId, RegisterMode};
use serde::Deserialize;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where a driver's binary lies in the working directory of its job, which goes with the job.
const DRIVER_DIR: &str = ".heliostat";
/// How long a program may take to say what it is.
const DESCRIBE_PATIENCE: Duration = Duration::from_secs(10);

/// Runs `helio package`.
pub(crate) async fn run(args: &PackageArgs) -> Result<()> {
    let access = Access::find(&args.target)?;
    match &args.command {
        Package::List => {
            let packages = access.connect().await?.packages().await?;
            if args.json { print_json(&packages) } else { print(&show::package::list(&packages)) }
        }
        Package::Push { binary, replace } => {
            let id = push(&access.connect().await?, binary, *replace).await?;
            if args.json { print_json(&id) } else { print(&format!("package {id} is registered\n")) }
        }
        Package::Remove { name, version } => {
            let removed = access.connect().await?.remove_package(name, version).await;
            removed.map_err(|error| Failure::error(FAILED, error.to_string()))?;
            print(&format!("package {name} {version} is removed\n"))
        }
        Package::Exec { sha256, args } => exec(sha256, args).await,
    }
}

/// What a program says of itself.
#[derive(Debug, Deserialize)]
struct About {
    name: String,
    version: String,
    heliostat: String,
}

/// Uploads a program, unless the cluster has it, and registers it under its name and version.
pub(super) async fn push(cluster: &Cluster, binary: &Path, replace: bool) -> Result<PackageId> {
    let about = describe(binary).await?;
    let ours = env!("CARGO_PKG_VERSION");
    if about.heliostat != ours {
        return Err(Failure::error(
            USAGE,
            format!(
                "{} was built with heliostat {}, and this is {ours}; build it with the cluster's version",
                binary.display(),
                about.heliostat
            ),
        ));
    }
    let file = File::open(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let sha256 = package::sha256_of(file).with_context(|| format!("cannot read {}", binary.display()))?;
    let id = PackageId { name: about.name, version: about.version, sha256 };
    let mode = if replace { RegisterMode::Replace } else { RegisterMode::Keep };
    let pushed = package::push(cluster, binary, &id, mode).await;
    pushed.map_err(|error| Failure::error(FAILED, error.to_string()))?;
    Ok(id)
}

/// Asks a program what it is, by running it.
async fn describe(binary: &Path) -> Result<About> {
    let path = std::path::absolute(binary).with_context(|| format!("cannot resolve {}", binary.display()))?;
    let not_ours = |why: String| {
        let fix = "is it a program made with heliostat::Program?";
        Failure::error(USAGE, format!("{} does not say what it is: {why}; {fix}", binary.display()))
    };
    let mut command = tokio::process::Command::new(&path);
    command.arg(DESCRIBE).stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match tokio::time::timeout(DESCRIBE_PATIENCE, command.output()).await {
        Ok(output) => output.with_context(|| format!("cannot run {}", binary.display()))?,
        Err(_) => return Err(not_ours(format!("it still runs after {} s", DESCRIBE_PATIENCE.as_secs()))),
    };
    if !output.status.success() {
        return Err(not_ours(format!("it ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| not_ours(error.to_string()))
}

/// Fetches a package from the cluster of this job and becomes its driver. Returns only if that fails.
async fn exec(sha256: &str, args: &[String]) -> Result<()> {
    let digest = Digest::try_from(sha256.to_owned()).map_err(|why| Failure::error(USAGE, why))?;
    let cluster = heliostat::connect().await?;
    let known = cluster.packages().await?;
    let package = known.iter().find(|package| package.id.sha256 == digest);
    let package = package.with_context(|| {
        format!("package {} is not registered any more; submit the program again", digest.short())
    })?;
    let path = package::download(&cluster, digest, Path::new(DRIVER_DIR)).await?;
    let error = Command::new(&path).arg0(&package.id.name).args(args).exec();
    Err(error).with_context(|| format!("cannot run package {}", package.id))
}
