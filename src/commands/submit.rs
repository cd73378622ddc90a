//! `helio submit`: ships a program to the cluster and runs its driver there, as a job.

use super::job::{self, Api};
use super::package::push;
use crate::args::SubmitProgram;
use crate::cluster::Access;
use crate::failure::say;
use anyhow::{Context, Result};
use std::path::Path;

/// What the shell of the job does: the job's own `helio` fetches the package and becomes its driver.
const ENTRYPOINT: &str = "exec \"$HELIOSTAT_PROGRAM\" package exec";

/// Runs `helio submit`.
pub(crate) async fn run(args: &SubmitProgram) -> Result<()> {
    let (binary, words) = args.program().context("name the binary")?;
    let api = Api::at(
        (args.dashboard.clone(), args.api_key_file.as_deref(), args.dashboard_ca.clone()),
        args.target.run_dir.as_deref(),
    )?;
    let cluster = Access::find(&args.target)?.connect().await?;
    let id = push(&cluster, Path::new(binary), args.replace).await?;
    if !args.json {
        say(format_args!("package {id} is registered"));
    }
    let words = if words.is_empty() { String::new() } else { format!(" -- {}", job::join(words)) };
    job::start(&api, &args.job, format!("{ENTRYPOINT} {}{words}", id.sha256), args.json).await
}
