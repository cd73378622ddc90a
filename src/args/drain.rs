//! Arguments of `helio drain` and `helio undrain`.

use super::Target;
use clap::Args;

/// `helio drain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio drain b                  before b is rebooted; it stays in the cluster, empty, until `helio undrain b`
  helio drain b --deadline 300   actors that fit nowhere else go on for five minutes
  helio drain b --leave          b leaves the cluster when it is empty, until it is started again; a lost node is forgotten

What fits on another node moves at once; what fits nowhere else goes on until the deadline and then waits for a place. A
move is a stop (SIGTERM first) and a start elsewhere, and does not count as a failure. Returns when the node is empty.")]
pub(crate) struct Drain {
    /// Name of the node.
    pub(crate) node: String,
    /// Seconds that actors stay which fit nowhere else.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) deadline: u64,
    /// Have the node leave the cluster when it is empty.
    #[arg(long)]
    pub(crate) leave: bool,
    /// Return at once, without waiting until the node is empty.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
}

/// `helio undrain`.
#[derive(Debug, Args)]
pub(crate) struct Undrain {
    /// Name of the node.
    pub(crate) node: String,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
}
