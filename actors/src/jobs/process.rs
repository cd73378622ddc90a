//! Processes of jobs: the keeper of each entrypoint, watched by a pidfd whoever started it, and trees of processes.
//!
//! It reads `/proc` and sends signals; it decides nothing.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;

use super::core::ProcessId;

/// A keeper that is watched. Signals reach it and never a later process of the same id.
#[derive(Clone, Debug)]
pub struct Keeper {
    id: ProcessId,
    pidfd: Arc<OwnedFd>,
}

impl Keeper {
    /// Starts `COMMAND DIR` in a process group of its own; what it says goes to `keeper.log` in the directory.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(command: &[String], dir: &Path) -> io::Result<Self> {
        let (program, args) = command.split_first().ok_or_else(|| io::Error::other("no command"))?;
        let log = File::create(dir.join("keeper.log"))?;
        let child = Command::new(program)
            .arg0("helio")
            .args(args)
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
        Self::open(child.id(), None)?.ok_or_else(|| io::Error::other("the process was gone at once"))
    }

    /// One that was started by an earlier actor, if it still runs.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn adopt(id: ProcessId) -> io::Result<Option<Self>> {
        Self::open(id.pid, Some(id.start_time))
    }

    fn open(pid: u32, expected: Option<u64>) -> io::Result<Option<Self>> {
        let raw = as_pid(pid).ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
        let pidfd = match pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => Arc::new(pidfd),
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the pidfd was opened: if it is the expected process now, it was so when it was opened.
        match (stat(pid), expected) {
            (None, Some(_)) => Ok(None),
            (Some(stat), Some(expected)) if stat.start_time != expected || stat.ended => Ok(None),
            (stat, _) => {
                let start_time = stat.map_or(0, |stat| stat.start_time);
                Ok(Some(Self { id: ProcessId { pid, start_time }, pidfd }))
            }
        }
    }

    /// Which process it is.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        #[expect(deprecated, reason = "its replacement is not safe for types that may swap descriptors")]
        let watched = self.pidfd.try_clone().and_then(AsyncFd::new);
        let readable = match &watched {
            Ok(pidfd) => pidfd.readable().await.map(drop),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        if let Err(error) = readable {
            tracing::error!(pid = self.id.pid, %error, "a job's process cannot be watched");
        }
        // Reaps it where it is a child; how the job ended is said in a file.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }

    /// Asks it to end what it keeps.
    pub fn terminate(&self) {
        match pidfd_send_signal(self.pidfd.as_fd(), Signal::TERM) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::warn!(pid = self.id.pid, %error, "cannot signal a job's process"),
        }
    }
}

fn as_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// What `/proc/<pid>/stat` says.
#[derive(Clone, Copy, Debug)]
struct Stat {
    parent: u32,
    group: u32,
    start_time: u64,
    /// It is a zombie.
    ended: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in brackets, may hold anything: fields are counted from the last bracket.
    let (_, fields) = text.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
        ended: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// A process that runs now.
pub fn identify(pid: u32) -> Option<ProcessId> {
    Some(ProcessId { pid, start_time: stat(pid)?.start_time })
}

fn all() -> HashMap<u32, Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return HashMap::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, stat(pid)?))).collect()
}

/// Living processes below `root`, which adopts what its descendants leave behind.
pub fn descendants(root: u32) -> Vec<u32> {
    let all = all();
    let is_below = |mut pid: u32| {
        // A chain of parents is short; a bound keeps a torn listing from looping.
        for _ in 0..all.len() {
            match all.get(&pid).map(|stat| stat.parent) {
                Some(parent) if parent == root => return true,
                Some(parent) if parent != 0 => pid = parent,
                _ => return false,
            }
        }
        false
    };
    all.iter().filter(|(pid, stat)| !stat.ended && is_below(**pid)).map(|(pid, _)| *pid).collect()
}

/// Sends a signal to processes; one that is gone is no error.
pub fn signal_all(pids: &[u32], signal: Signal) {
    for pid in pids.iter().filter_map(|&pid| as_pid(pid)) {
        let _ = kill_process(pid, signal);
    }
}

/// Kills what is left of a process group whose leader was `leader`, and nothing that took its number later.
pub fn kill_group(leader: ProcessId) {
    let all = all();
    let reused = all.get(&leader.pid).is_some_and(|stat| stat.start_time != leader.start_time);
    let is_there = all.values().any(|stat| stat.group == leader.pid && !stat.ended);
    if let Some(group) = as_pid(leader.pid).filter(|_| is_there && !reused) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}
