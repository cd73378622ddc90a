//! The command line of `helio submit` and `helio package`.

use super::{Submit, Target};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Shown under `helio submit --help`.
const EXAMPLES: &str = "\
Examples:
  helio submit target/release/counter -- 5        ships it, runs its driver, prints what it writes
  helio submit --no-wait --submission-id nightly target/release/train
  helio submit --replace target/release/counter   another build of the same version

The binary is one made with heliostat::Program, linked so that it runs on every node (--target x86_64-unknown-linux-musl,
or the same distribution everywhere). It is uploaded once, under its SHA-256; nodes fetch it when they first need it and
check it before it runs. The driver runs as a job: helio job status|logs|stop|list show and end it.

Exit codes: those of helio job submit.";

/// `helio submit`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SubmitProgram {
    /// Take the place of another binary with the same name and version; what runs goes on with the old one.
    #[arg(long)]
    pub(crate) replace: bool,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// URL of the dashboard. Without it: that of the cluster in the run directory, else http://127.0.0.1:8265.
    #[arg(long, value_name = "URL", env = "HELIOSTAT_DASHBOARD")]
    pub(crate) dashboard: Option<String>,
    /// File that holds the dashboard's key.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Certificates that the dashboard's is checked against, where it speaks HTTPS.
    #[arg(long, value_name = "FILE")]
    pub(crate) dashboard_ca: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// How the driver runs; the program and its arguments.
    #[command(flatten)]
    pub(crate) job: Submit,
}

impl SubmitProgram {
    /// The binary and the arguments of its driver; one `--` between them is not the driver's.
    pub(crate) fn program(&self) -> Option<(&str, &[String])> {
        let (binary, words) = self.job.entrypoint.split_first()?;
        let own = words.split_first().filter(|(first, _)| *first == "--").map(|(_, own)| own);
        Some((binary, own.unwrap_or(words)))
    }
}

/// `helio package`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  helio package list
  helio package push target/release/counter      registers it; drivers that are run by hand find it
  helio package remove counter 0.1.0             refused while actors run it")]
pub(crate) struct PackageArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Package,
    /// Which cluster.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// What can be done with packages.
#[derive(Debug, Subcommand)]
pub(crate) enum Package {
    /// List all packages, their actors and the nodes that have them.
    List,
    /// Upload and register a program.
    Push {
        /// The binary.
        binary: PathBuf,
        /// Take the place of another binary with the same name and version.
        #[arg(long)]
        replace: bool,
    },
    /// Forget a package that no actor runs.
    Remove {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
    },
    /// Become the driver of a package (started by a job).
    #[command(hide = true)]
    Exec {
        /// Its SHA-256.
        sha256: String,
        /// The driver's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn what_follows_the_binary_is_the_drivers() {
        for line in ["submit app -- -n 5", "submit --replace app -n 5", "submit -- app -n 5"] {
            let cli = Cli::try_parse_from(std::iter::once("helio").chain(line.split(' '))).expect("parses");
            let Command::Submit(submit) = cli.command else { panic!("{line} is another command") };
            let (binary, words) = submit.program().expect("a binary");
            assert_eq!((binary, words.join(" ").as_str()), ("app", "-n 5"), "{line}");
        }
    }
}
