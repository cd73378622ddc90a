//! The processes that `helio up` keeps alive: the head and this machine's node agents.
//!
//! They are restarted at once when they die, up to the limit of `[supervision]`. Everything below them ends with them: this
//! process is a subreaper, so a worker whose node agent died becomes a child here and is ended like the rest.

use crate::failure::say;
use crate::processes;
use crate::rundir::RunDir;
use anyhow::{Context, Result};
use heliostat_runtime::head::supervise::{Action, History};
use heliostat_runtime::spec::{DeathCause, RestartPolicy};
use rustix::process::{WaitOptions, WaitStatus, wait};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Name of the head among the members.
pub(crate) const HEAD: &str = "head";
/// Until a process is started again that could not be.
const SPAWN_AGAIN: Duration = Duration::from_secs(1);

/// One process that is kept alive.
#[derive(Debug)]
struct Member {
    name: String,
    args: Vec<String>,
    pid: Option<u32>,
    history: History,
    restart_at: Option<Instant>,
}

/// The death of a member, and what follows from it.
#[derive(Debug, Clone)]
pub(crate) struct Death {
    /// Name of the process, which is also that of its log.
    pub(crate) name: String,
    /// Exit code or signal, in words.
    pub(crate) cause: String,
    /// What becomes of it.
    pub(crate) next: Next,
}

/// What follows from a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// It is started again.
    Restart,
    /// It died too often.
    GiveUp,
    /// A node that ended in good order: it has left the cluster, and stays away.
    Left,
}

/// All members.
#[derive(Debug)]
pub(crate) struct Family {
    members: Vec<Member>,
    policy: RestartPolicy,
    run: RunDir,
    exe: PathBuf,
    born: Instant,
}

impl Family {
    /// No process yet. From now on orphans below this process become its children.
    pub(crate) fn new(run: RunDir, policy: RestartPolicy) -> Result<Self> {
        let me = rustix::process::getpid();
        rustix::process::set_child_subreaper(Some(me)).context("cannot become the reaper of orphans")?;
        let exe = std::env::current_exe().context("cannot tell the path of this program")?;
        // A program that was replaced since (a new build) is still reachable here.
        let exe = if exe.exists() { exe } else { PathBuf::from("/proc/self/exe") };
        Ok(Self { members: Vec::new(), policy, run, exe, born: Instant::now() })
    }

    /// Starts a process `helio ARGS`; its output goes to the log `name`.
    pub(crate) fn add(&mut self, name: &str, mut args: Vec<String>) -> Result<()> {
        self.run.begin_log(name);
        args.extend(["--supervised-by".into(), std::process::id().to_string()]);
        let mut member =
            Member { name: name.into(), args, pid: None, history: History::default(), restart_at: None };
        member.pid = Some(self.spawn(&member)?);
        self.members.push(member);
        Ok(())
    }

    /// Process id of a member, while it lives.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.members.iter().find(|m| m.name == name)?.pid
    }

    fn spawn(&self, member: &Member) -> Result<u32> {
        let log = self.run.log_file(&member.name)?;
        let errors = log.try_clone().context("cannot share the log file")?;
        let child = Command::new(&self.exe)
            .arg0("helio")
            .args(&member.args)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C on the terminal must reach this process only, which then stops the others in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", member.name))?;
        Ok(child.id())
    }

    /// Reaps every child that has ended, adopted orphans included, and plans restarts of members.
    pub(crate) fn reap(&mut self) -> Vec<Death> {
        let mut deaths = Vec::new();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            let Some(member) = self.members.iter_mut().find(|m| m.pid == Some(pid)) else { continue };
            member.pid = None;
            let cause = cause(status);
            let left = member.name != HEAD && cause == DeathCause::Exited { code: 0 };
            let next = match member.history.died(&self.policy, &cause, self.born.elapsed()) {
                _ if left => Next::Left,
                Action::Restart { delay, .. } => {
                    member.restart_at = Some(Instant::now() + delay);
                    Next::Restart
                }
                Action::GiveUp => Next::GiveUp,
            };
            deaths.push(Death { name: member.name.clone(), cause: describe(&cause), next });
        }
        deaths
    }

    /// When the next restart is due.
    pub(crate) fn next_restart(&self) -> Option<Instant> {
        self.members.iter().filter_map(|m| m.restart_at).min()
    }

    /// Starts what is due. What cannot be started now (no memory, no room for its log) is tried again.
    pub(crate) fn restart_due(&mut self) {
        let now = Instant::now();
        for i in 0..self.members.len() {
            if self.members[i].restart_at.is_some_and(|at| at <= now) {
                match self.spawn(&self.members[i]) {
                    Ok(pid) => (self.members[i].restart_at, self.members[i].pid) = (None, Some(pid)),
                    Err(why) => {
                        say(format_args!("{why:#}; tried again in {} s", SPAWN_AGAIN.as_secs()));
                        self.members[i].restart_at = Some(now + SPAWN_AGAIN);
                    }
                }
            }
        }
    }

    /// Ends all: nodes (which end their workers), then what is left below this process (the keepers of jobs, which end their
    /// jobs), then the head. Blocks; each step takes at most `grace` before it kills, and no time at all once `hurry` is set.
    pub(crate) fn stop(self, grace: Duration, hurry: &AtomicBool) {
        let head = self.pid(HEAD);
        let nodes = || {
            reap_all();
            self.members.iter().filter(|m| m.name != HEAD).filter_map(|m| processes::read(m.pid?)).collect()
        };
        processes::end_all(nodes, grace, hurry);
        let left = || {
            reap_all();
            processes::children().into_iter().filter(|child| Some(child.pid) != head).collect()
        };
        processes::end_all(left, grace, hurry);
        let all = || {
            reap_all();
            processes::children()
        };
        processes::end_all(all, grace, hurry);
        reap_all();
    }
}

fn reap_all() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

fn cause(status: WaitStatus) -> DeathCause {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => DeathCause::Exited { code },
        (None, Some(signal)) => DeathCause::Killed { signal },
        (None, None) => DeathCause::Vanished { why: "no exit status".into() },
    }
}

fn describe(cause: &DeathCause) -> String {
    match cause {
        DeathCause::Exited { code } => format!("exited with code {code}"),
        DeathCause::Killed { signal } => format!("was killed by signal {signal}"),
        other => other.to_string(),
    }
}

/// Sends SIGTERM to this process when its supervisor dies. Called first thing by a process that `helio up` started.
pub(crate) fn end_with_supervisor(supervisor: u32) -> Result<()> {
    heliostat_runtime::node::terminate_with_parent().context("cannot watch the supervisor")?;
    // It may have died before the line above.
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    anyhow::ensure!(parent == Some(supervisor), "the supervisor that started this process is gone");
    Ok(())
}
