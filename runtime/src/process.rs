//! Processes of this machine: told from later ones of the same id by their start time, watched by their pidfd.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;

/// What `/proc/<pid>/stat` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Process id of the parent.
    pub parent: u32,
    /// Its process group.
    pub group: u32,
    /// Field 22: when it started, in ticks since the machine did.
    pub start_time: u64,
    /// It is a zombie: it runs no more, and nobody has read its status.
    pub ended: bool,
}

impl Stat {
    /// That of a process that is there.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name of the program, in brackets, may hold anything: fields are counted from the last bracket.
    fn parse(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(')')?;
        // State is field 3 of the line.
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            group: fields.get(2)?.parse().ok()?,
            start_time: fields.get(19)?.parse().ok()?,
            ended: matches!(*fields.first()?, "Z" | "X"),
        })
    }
}

/// A process that is watched. Signals reach this process and never a later one of the same id.
#[derive(Clone, Debug)]
pub struct Watched {
    pid: u32,
    start_time: u64,
    pidfd: Arc<OwnedFd>,
}

impl Watched {
    /// Watches process `pid`; with `expected` only if it runs and started then. `None` when it is gone.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn open(pid: u32, expected: Option<u64>) -> io::Result<Option<Self>> {
        let raw = as_pid(pid).ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
        let pidfd = match pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => Arc::new(pidfd),
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Read after the pidfd was opened: if it is the expected process now, it was so when it was opened.
        match (Stat::of(pid), expected) {
            (None, Some(_)) => Ok(None),
            (Some(stat), Some(expected)) if stat.start_time != expected || stat.ended => Ok(None),
            (stat, _) => {
                let start_time = stat.map_or(0, |stat| stat.start_time);
                Ok(Some(Self { pid, start_time, pidfd }))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// See [`Stat::start_time`].
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It cannot be watched.
    pub async fn ended(&self) -> io::Result<()> {
        self.pidfd.try_clone().and_then(watch_fd)?.readable().await.map(drop)
    }

    /// Reads how it ended, which the system then forgets.
    ///
    /// # Errors
    /// It is not a child of this process, among others.
    pub fn reap(&self) -> rustix::io::Result<Option<WaitIdStatus>> {
        waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Sends it a signal; if it is gone, that is no error.
    ///
    /// # Errors
    /// What else the system says.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A process id as the system's calls take it; `None` for what can be none.
pub fn as_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Has the runtime say when the descriptor is readable.
#[expect(
    deprecated,
    reason = "its replacement is unsafe for types that may swap descriptors, which OwnedFd does not"
)]
pub(crate) fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_brackets_does_not_shift_the_fields() {
        let fields: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = Stat::parse(&format!("77 (a) b (c) S {}", fields.join(" "))).unwrap();
        assert_eq!(stat, Stat { parent: 4, group: 5, start_time: 22, ended: false });
        assert!(Stat::parse("77 (x) Z 1").is_none());
    }
}
