//! One worker process: starting it, telling it apart, watching it by its pidfd, ending it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::Signal;

use super::files::ProcessRecord;
use crate::process::Watched;
use crate::spec::DeathCause;

/// How often, and after which pause, a program is tried that somebody is said to write.
const BUSY_ATTEMPTS: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// A process that is watched. Signals reach this process and never a later one of the same id.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) record: ProcessRecord,
    watched: Watched,
    /// This agent has killed it.
    killed: Arc<AtomicBool>,
}

/// Starts a process with its output appended to `log`, in a process group of its own, so that a Ctrl-C at the
/// terminal reaches the agent only, which ends its workers in order.
pub(super) fn start(command: &[String], args: &[String], log: File) -> std::io::Result<Process> {
    let (program, first) =
        command.split_first().ok_or_else(|| std::io::Error::other("the worker command is empty"))?;
    let errors = log.try_clone()?;
    let mut worker = Command::new(program);
    worker.args(first).args(args).stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
    let child = spawn(&mut worker)
        .map_err(|error| std::io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let pid = child.id();
    open(pid, None)?.ok_or_else(|| std::io::Error::other("the process was gone at once"))
}

/// A file that this process has just written cannot be run while a child that is being started has inherited it: until
/// that one has become its own program.
fn spawn(command: &mut Command) -> std::io::Result<std::process::Child> {
    for _ in 0..BUSY_ATTEMPTS {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(BUSY_PAUSE);
            }
            started => return started,
        }
    }
    command.spawn()
}

/// A process that an earlier agent started, if it still runs.
pub(super) fn adopt(record: ProcessRecord) -> std::io::Result<Option<Process>> {
    open(record.pid, Some(record.start_time))
}

fn open(pid: u32, expected: Option<u64>) -> std::io::Result<Option<Process>> {
    let process = |watched: Watched| {
        let record = ProcessRecord { pid: watched.pid(), start_time: watched.start_time() };
        Process { record, watched, killed: Arc::default() }
    };
    Ok(Watched::open(pid, expected)?.map(process))
}

impl Process {
    /// Waits for the end of the process and says how it ended.
    pub(super) async fn ended(&self) -> DeathCause {
        let pid = self.record.pid;
        let vanished = |why: String| DeathCause::Vanished { why };
        if let Err(error) = self.watched.ended().await {
            return vanished(format!("process {pid} cannot be watched: {error}"));
        }
        match self.watched.reap() {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => DeathCause::Exited { code },
                (None, Some(signal)) => DeathCause::Killed { signal },
                (None, None) => vanished(format!("process {pid} ended in an unknown way")),
            },
            Ok(None) => vanished(format!("process {pid} ended without a status")),
            // It is a child of the agent before this one: only its parent is told how it ended.
            Err(Errno::CHILD) => {
                vanished(format!("process {pid} ended; it was started by an earlier node agent"))
            }
            Err(error) => vanished(format!("status of process {pid}: {error}")),
        }
    }

    /// Asks the worker to end when its actor has handled what it has.
    pub(super) fn finish(&self) {
        self.signal(crate::worker::FINISH);
    }

    /// Asks the process to end.
    pub(super) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends the process.
    pub(super) fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        self.signal(Signal::KILL);
    }

    /// What the kernel says of it, for the cause of its end.
    pub(super) fn state(&self) -> &'static str {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.record.pid)).unwrap_or_default();
        let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().next());
        match state {
            Some("T" | "t") => "it is stopped (SIGSTOP, or a debugger)",
            Some("D") => "it waits for a device",
            Some("R") => "it computes",
            Some(_) => "it waits in the kernel",
            None => "its state cannot be read",
        }
    }

    /// Whether this agent has ended it by force.
    pub(super) fn was_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    fn signal(&self, signal: Signal) {
        if let Err(error) = self.watched.signal(signal) {
            tracing::warn!(pid = self.record.pid, ?signal, %error, "cannot signal a worker");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_killed_process_is_noticed_with_its_signal_and_a_reused_pid_is_not_adopted() {
        let log = File::options().write(true).open("/dev/null").unwrap();
        let process = start(&["sleep".into()], &["100".into()], log).unwrap();
        assert!(adopt(process.record).unwrap().is_some());
        let other = ProcessRecord { start_time: process.record.start_time + 1, ..process.record };
        assert!(adopt(other).unwrap().is_none());
        process.kill();
        assert_eq!(process.ended().await, DeathCause::Killed { signal: 9 });
        assert!(adopt(process.record).unwrap().is_none());
    }
}
