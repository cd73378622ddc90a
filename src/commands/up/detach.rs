//! `helio up --detach`: runs the supervisor as a daemon, shows its reports and returns when the cluster serves.
//!
//! The daemon is this program again, in a session of its own; it speaks through its stdout, which it closes when it is
//! ready. If the one who waits goes away before that, the daemon stops the cluster.

use super::report::{self, Display, Report};
use crate::args;
use crate::failure::{Failure, NOT_STARTED};
use crate::rundir::{RunDir, tail};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Name of the daemon's log.
const LOG: &str = "up";

/// Starts the daemon and waits until it serves.
pub(super) fn run(args: &args::Up, run: &RunDir) -> Result<()> {
    if !run.is_held() {
        run.begin_log(LOG);
    }
    let exe = std::env::current_exe().context("cannot tell the path of this program")?;
    let mut command = Command::new(exe);
    command.args(["up", "--daemon"]);
    command.args(args.file.as_deref());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(run.log_file(LOG)?);
    let mut daemon = command.spawn().context("cannot start the supervisor")?;
    let stdout = daemon.stdout.take().context("the supervisor has no output")?;
    let mut display = Display::for_stderr();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read from the supervisor")?;
        let report: Report =
            serde_json::from_str(&line).with_context(|| format!("the supervisor said: {line}"))?;
        // The cluster is not to suffer from a terminal that went away.
        let _ = display.show(&report);
        match report {
            Report::Note { .. } | Report::Progress { .. } => {}
            Report::Ready(ready) => {
                report::welcome(&ready, true);
                return Ok(());
            }
            Report::Failed { code, message } => {
                daemon.wait().context("cannot wait for the supervisor")?;
                return Err(Failure::error(code, message));
            }
        }
    }
    let status = daemon.wait().context("cannot wait for the supervisor")?;
    let log = tail(&run.log_path(LOG), super::TAIL_LINES);
    Err(Failure::error(
        NOT_STARTED,
        format!("the supervisor ended ({status}) before the cluster was ready:\n{log}"),
    ))
}

/// Leaves the session of the one who started the daemon. Called first thing in the daemon.
pub(super) fn leave_session() -> Result<()> {
    rustix::process::setsid().map(drop).context("cannot start a session")
}

/// Lets the one who waits go on: the daemon has nothing more to say.
pub(super) fn close_stdout() -> Result<()> {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdout(&null).context("cannot close stdout")
}
