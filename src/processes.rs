//! Processes of this machine: children of this one, and all that belong to a run directory.
//!
//! Reads /proc only. A head, node agent, worker or keeper of a job belongs to a run directory when its command line names a path in it.

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Commands that run as long as the cluster, beside `helio up`.
const ROLES: [&str; 4] = ["head", "node", "worker", "entrypoint"];

/// A process as /proc shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its id.
    pub(crate) pid: u32,
    /// Its parent's id.
    pub(crate) parent: u32,
    /// Its command line, argument by argument.
    pub(crate) command: Vec<String>,
}

/// All processes that are not zombies.
pub(crate) fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|e| read(e.file_name().to_str()?.parse().ok()?)).collect()
}

/// One process; None where it is gone or a zombie.
pub(crate) fn read(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows the last one is fixed.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
    if matches!(state, "Z" | "X") {
        return None;
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = command.split(|&b| b == 0).filter(|a| !a.is_empty());
    Some(Process { pid, parent, command: command.map(|a| String::from_utf8_lossy(a).into_owned()).collect() })
}

/// Living children of this process, adopted ones included.
pub(crate) fn children() -> Vec<Process> {
    let me = std::process::id();
    all().into_iter().filter(|p| p.parent == me).collect()
}

/// Living processes, other than this one, that were started for the run directory or a directory in it.
pub(crate) fn of_run_dir(run_dir: &Path) -> Vec<Process> {
    let me = std::process::id();
    all().into_iter().filter(|p| p.pid != me && names_run_dir(&p.command, run_dir)).collect()
}

fn names_run_dir(command: &[String], run_dir: &Path) -> bool {
    let Some((role, args)) = command.get(1..).and_then(<[String]>::split_first) else { return false };
    let path = |arg: &String| Path::new(arg.rsplit('=').next().unwrap_or(arg)).starts_with(run_dir);
    ROLES.contains(&role.as_str()) && args.iter().any(path)
}

/// Sends a signal; a process that is gone is no error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Asks them to end, waits up to `grace` (or until `hurry` is set), then kills what is left. `list` is asked again and
/// again, so that it may grow.
pub(crate) fn end_all(list: impl Fn() -> Vec<Process>, grace: Duration, hurry: &AtomicBool) {
    let started = Instant::now();
    let mut asked: Vec<u32> = Vec::new();
    loop {
        let left = list();
        if left.is_empty() {
            return;
        }
        let late = started.elapsed() > grace || hurry.load(Ordering::Relaxed);
        for process in left {
            if late {
                signal(process.pid, Signal::KILL);
            } else if !asked.contains(&process.pid) {
                signal(process.pid, Signal::TERM);
                asked.push(process.pid);
            }
        }
        if started.elapsed() > grace + Duration::from_secs(5) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::{CommandExt, ExitStatusExt};

    #[test]
    fn this_process_is_alive_and_a_reaped_child_is_not() {
        assert!(read(std::process::id()).is_some());
        let mut child = std::process::Command::new("true").spawn().expect("spawn");
        child.wait().expect("wait");
        assert_eq!(read(child.id()), None);
    }

    #[test]
    fn a_process_belongs_to_the_run_dir_that_it_names() {
        let command = |line: &str| line.split(' ').map(str::to_string).collect::<Vec<_>>();
        let run_dir = Path::new("/a/run");
        assert!(names_run_dir(&command("helio node --join h:1 --run-dir /a/run/nodes/n0"), run_dir));
        assert!(names_run_dir(&command("helio worker --record=/a/run/workers/1.json"), run_dir));
        assert!(!names_run_dir(&command("helio node --run-dir /a/run2"), run_dir));
        assert!(!names_run_dir(&command("helio logs rank-0 --run-dir /a/run"), run_dir));
        assert!(!names_run_dir(&command("cat"), run_dir));
    }

    #[test]
    fn ending_kills_what_does_not_listen() {
        let dir = tempfile::tempdir().expect("temp dir");
        // `sh worker /nowhere/helio-test` runs the script `worker` of its directory.
        fs::write(dir.path().join("worker"), "trap '' TERM; while :; do sleep 0.05; done").expect("write");
        let mut child = std::process::Command::new("sh")
            .arg0("helio")
            .args(["worker", "/nowhere/helio-test"])
            .current_dir(dir.path())
            .spawn()
            .expect("spawn");
        let list = move || of_run_dir(Path::new("/nowhere/helio-test"));
        while list().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(50));
        let reaper = std::thread::spawn(move || child.wait().expect("wait"));
        end_all(list, Duration::from_millis(100), &AtomicBool::new(false));
        assert!(list().is_empty());
        assert_eq!(reaper.join().expect("join").signal(), Some(9));
    }
}
