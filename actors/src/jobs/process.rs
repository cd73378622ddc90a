//! Processes of jobs: the keeper of each entrypoint, watched by a pidfd whoever started it, and trees of processes.
//!
//! It reads `/proc` and sends signals; it decides nothing.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use heliostat_runtime::process::{Stat, Watched, as_pid};
use rustix::process::{Signal, kill_process, kill_process_group};

use super::core::ProcessId;

/// A keeper that is watched. Signals reach it and never a later process of the same id.
#[derive(Clone, Debug)]
pub struct Keeper(Watched);

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
        let watched = Watched::open(child.id(), None)?;
        watched.map(Self).ok_or_else(|| io::Error::other("the process was gone at once"))
    }

    /// One that was started by an earlier actor, if it still runs.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn adopt(id: ProcessId) -> io::Result<Option<Self>> {
        Ok(Watched::open(id.pid, Some(id.start_time))?.map(Self))
    }

    /// Which process it is.
    pub fn id(&self) -> ProcessId {
        ProcessId { pid: self.0.pid(), start_time: self.0.start_time() }
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        if let Err(error) = self.0.ended().await {
            tracing::error!(pid = self.0.pid(), %error, "a job's process cannot be watched");
        }
        // Reaps it where it is a child; how the job ended is said in a file.
        let _ = self.0.reap();
    }

    /// Asks it to end what it keeps.
    pub fn terminate(&self) {
        if let Err(error) = self.0.signal(Signal::TERM) {
            tracing::warn!(pid = self.0.pid(), %error, "cannot signal a job's process");
        }
    }
}

/// A process that runs now.
pub fn identify(pid: u32) -> Option<ProcessId> {
    Some(ProcessId { pid, start_time: Stat::of(pid)?.start_time })
}

fn all() -> HashMap<u32, Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return HashMap::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, Stat::of(pid)?))).collect()
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
