//! The command line of `helio list`, `helio get` and `helio summary`.

use super::Target;
use clap::{Args, ValueEnum};
use heliostat_actors::state::query::Filter;

/// What the cluster is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Machines and their devices.
    Nodes,
    /// Processes that host actors.
    Workers,
    /// Actors and their states.
    Actors,
    /// Groups of ranks.
    Groups,
    /// Bundles of resources that were set aside together.
    #[value(alias = "pgs")]
    PlacementGroups,
    /// Commands that were submitted.
    Jobs,
    /// Large values in the object stores of the nodes.
    Objects,
}

/// `helio list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio list actors
  helio list actors -f state=ready -f type_name!=rank
  helio list actors -f last_death.signal=9
  helio list nodes -f labels.zone=east
  helio list workers --json | jq -r '.[].pid'
  helio list objects -f state=disk

Filters are the keys of --json; a key within another is written A.B. Text is compared without regard to case, and null is
nothing. Ray's command works, too: ray list actors --address http://127.0.0.1:8265")]
pub(crate) struct List {
    /// What to list.
    pub(crate) what: Kind,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Only what fulfils KEY=VALUE or KEY!=VALUE; of several all must hold.
    #[arg(long = "filter", short = 'f', value_name = "KEY[!]=VALUE")]
    pub(crate) filters: Vec<Filter>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `helio get`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio get actors rank-0
  helio get nodes node-0 --json | jq .devices")]
pub(crate) struct Get {
    /// What it is.
    pub(crate) what: Kind,
    /// Its name; of a worker its actor's, of a job its submission id, of an object its id.
    pub(crate) name: String,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `helio summary`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio summary actors                 how many of each type are in which state
  helio summary actors -f node=node-1
  helio summary jobs --json")]
pub(crate) struct Summary {
    /// What to count.
    pub(crate) what: Kind,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Only what fulfils KEY=VALUE or KEY!=VALUE; of several all must hold.
    #[arg(long = "filter", short = 'f', value_name = "KEY[!]=VALUE")]
    pub(crate) filters: Vec<Filter>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
