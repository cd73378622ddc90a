//! The command line of `helio serve`.

use super::Target;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Shown under `helio serve --help`.
const EXAMPLES: &str = "\
Examples:
  helio serve build > serve.yaml         the model of cluster.toml as a document, to start from
  helio serve deploy serve.yaml --wait   serve exactly what the document says; return when it does
  helio serve status                     applications, deployments, replicas
  helio serve run serve.yaml             the same, until Ctrl-C
  helio serve shutdown                   drain and end all applications

Documents are Ray Serve's. Ray's own command works, too: serve deploy -a http://127.0.0.1:8265 serve.yaml

Exit codes:
  0  done
  1  failed: refused, or with --wait and run: not healthy
  2  wrong arguments
  3  no cluster runs there";

/// `helio serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Serve,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What can be done with what is served.
#[derive(Debug, Subcommand)]
pub(crate) enum Serve {
    /// Serve exactly what a document says, beside the model of cluster.toml. Only what differs changes.
    Deploy {
        /// The document, YAML or JSON.
        file: PathBuf,
        /// Return when all of it serves; fail where something of it does not work.
        #[arg(long, short)]
        wait: bool,
    },
    /// Serve what a document says until Ctrl-C, then end it.
    Run {
        /// The document, YAML or JSON.
        file: PathBuf,
    },
    /// Show applications, deployments and replicas.
    Status {
        /// Of this application only.
        #[arg(long, short)]
        name: Option<String>,
    },
    /// Print the documents that were deployed.
    Config {
        /// Of this application only.
        #[arg(long, short)]
        name: Option<String>,
    },
    /// Drain and end all applications, that of cluster.toml included.
    Shutdown {
        /// Do not wait until nothing is left.
        #[arg(long)]
        no_wait: bool,
    },
    /// Print a document that serves the model of a cluster.toml.
    Build {
        /// The cluster.toml.
        file: Option<PathBuf>,
    },
}
