//! One worker process: starting it, telling it apart, watching it by its pidfd, ending it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;

use super::files::ProcessRecord;
use crate::spec::DeathCause;

/// A process that is watched. Signals reach this process and never a later one of the same id.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) record: ProcessRecord,
    pidfd: Arc<OwnedFd>,
}

/// Starts a process with its output appended to `log`, in a process group of its own, so that a Ctrl-C at the
/// terminal reaches the agent only, which ends its workers in order.
pub(super) fn start(command: &[String], args: &[String], log: File) -> std::io::Result<Process> {
    let (program, first) =
        command.split_first().ok_or_else(|| std::io::Error::other("the worker command is empty"))?;
    let errors = log.try_clone()?;
    let child = Command::new(program)
        .args(first)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(|error| std::io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let pid = child.id();
    open(pid, None)?.ok_or_else(|| std::io::Error::other("the process was gone at once"))
}

/// A process that an earlier agent started, if it still runs.
pub(super) fn adopt(record: ProcessRecord) -> std::io::Result<Option<Process>> {
    open(record.pid, Some(record.start_time))
}

fn open(pid: u32, expected: Option<u64>) -> std::io::Result<Option<Process>> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or_else(|| std::io::Error::other(format!("{pid} is no process id")))?;
    let pidfd = match pidfd_open(raw, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // Read after the pidfd was opened: if it is the expected process now, it was so when it was opened.
    match (stat(pid), expected) {
        (None, Some(_)) => Ok(None),
        (Some(stat), Some(expected)) if stat.start_time != expected || stat.ended => Ok(None),
        (stat, _) => {
            let start_time = stat.map_or(0, |stat| stat.start_time);
            Ok(Some(Process { record: ProcessRecord { pid, start_time }, pidfd: Arc::new(pidfd) }))
        }
    }
}

/// Has the runtime say when the descriptor is readable.
#[expect(
    deprecated,
    reason = "its replacement is unsafe for types that may swap descriptors, which OwnedFd does not"
)]
pub(super) fn watch_fd(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// What `/proc/<pid>/stat` says.
struct Stat {
    start_time: u64,
    /// It is a zombie: it runs no more, and nobody has read its status.
    ended: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name of the program, in brackets, may hold anything: fields are counted from the last bracket.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    // State is field 3 of the line, the start time field 22.
    Some(Stat { start_time: fields.nth(18)?.parse().ok()?, ended: matches!(state, "Z" | "X") })
}

impl Process {
    /// Waits for the end of the process and says how it ended.
    pub(super) async fn ended(&self) -> DeathCause {
        let pid = self.record.pid;
        let vanished = |why: String| DeathCause::Vanished { why };
        let watched = self.pidfd.try_clone().and_then(watch_fd);
        match watched {
            Ok(pidfd) => {
                if let Err(error) = pidfd.readable().await {
                    return vanished(format!("process {pid} cannot be watched: {error}"));
                }
            }
            Err(error) => return vanished(format!("process {pid} cannot be watched: {error}")),
        }
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
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

    /// Asks the process to end.
    pub(super) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends the process.
    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        match pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::warn!(pid = self.record.pid, ?signal, %error, "cannot signal a worker"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_brackets_does_not_shift_the_fields() {
        let fields: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = parse_stat(&format!("77 (a) b (c) S {}", fields.join(" "))).unwrap();
        assert_eq!((stat.start_time, stat.ended), (22, false));
        assert!(parse_stat("77 (x) Z 1").is_none());
    }

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
