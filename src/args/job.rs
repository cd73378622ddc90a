//! The command line of `helio job`.

use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Shown under `helio job --help`.
const EXAMPLES: &str = "\
Examples:
  helio job submit -- python train.py --epochs 3            waits, and prints what it writes
  helio job submit --working-dir . --env LR=0.1 -- sh run.sh
  helio job submit --no-wait --submission-id nightly -- make
  helio job logs nightly -f
  helio job list --json | jq -r '.[].status'

Ray's clients work, too: RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 ray job submit -- python train.py

Exit codes:
  0  done; with submit: the job succeeded, or was stopped
  1  failed; with submit, logs -f and stop: the job failed
  2  wrong arguments
  3  no dashboard answers there";

/// `helio job`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct JobArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Job,
    /// URL of the dashboard. Without it: that of the cluster in the run directory, else http://127.0.0.1:8265.
    #[arg(long, value_name = "URL", global = true, env = "HELIOSTAT_DASHBOARD")]
    pub(crate) address: Option<String>,
    /// Run directory of the cluster. Without it: that of ./cluster.toml, else ./run.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) run_dir: Option<PathBuf>,
    /// File that holds the dashboard's key.
    #[arg(long, value_name = "FILE", global = true, env = "HELIOSTAT_DASHBOARD_KEY_FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Certificate of the CA of a dashboard with HTTPS. Without it: the CA of the cluster in the run directory.
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What can be done with jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// Run a command on the cluster; print its log until it ends.
    Submit(Submit),
    /// Show one job.
    Status {
        /// Its submission id.
        id: String,
    },
    /// Print a job's log.
    Logs {
        /// Its submission id.
        id: String,
        /// Go on printing until the job ends; exit with 1 if it failed.
        #[arg(long, short)]
        follow: bool,
    },
    /// Stop a job: SIGTERM to all its processes, then SIGKILL. Waits until it has ended.
    Stop {
        /// Its submission id.
        id: String,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// List all jobs that are kept.
    List,
    /// Forget a job that has ended, and its log.
    Delete {
        /// Its submission id.
        id: String,
    },
}

/// `helio job submit`.
#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// Directory that is sent along, without .git; the command runs in a copy of it.
    #[arg(long, value_name = "DIR")]
    pub(crate) working_dir: Option<PathBuf>,
    /// Environment variable for the command; ${NAME} in a value stands for one of the cluster's.
    #[arg(long = "env", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Words to keep with the job.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Id of the job. Without it: a random one.
    #[arg(long, value_name = "ID")]
    pub(crate) submission_id: Option<String>,
    /// CPUs to set aside on any node, where the job then runs; it waits until they are free.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) entrypoint_num_cpus: Option<f64>,
    /// Devices that the command is to own; GPUs are those of its CUDA_VISIBLE_DEVICES.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) entrypoint_num_gpus: Option<u32>,
    /// Bytes of memory to set aside.
    #[arg(long, value_name = "BYTES")]
    pub(crate) entrypoint_memory: Option<u64>,
    /// Custom resources to set aside.
    #[arg(long, value_name = "NAME=NUMBER", value_parser = amount)]
    pub(crate) entrypoint_resource: Vec<(String, f64)>,
    /// What a label of the node must be: VALUE, !VALUE, in(A,B) or !in(A,B).
    #[arg(long, value_name = "KEY=RULE", value_parser = pair)]
    pub(crate) entrypoint_label: Vec<(String, String)>,
    /// Print the id and return.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// The command and its arguments, after `--`.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) entrypoint: Vec<String>,
}

/// `helio entrypoint`: written by the jobs actor.
#[derive(Debug, Args)]
pub(crate) struct Entrypoint {
    /// Directory of the job.
    pub(crate) dir: PathBuf,
}

fn amount(text: &str) -> Result<(String, f64), String> {
    let (name, amount) = pair(text).map_err(|_| "write NAME=NUMBER".to_owned())?;
    let amount = amount.parse().map_err(|_| format!("{amount:?} is no number"))?;
    Ok((name, amount))
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}
