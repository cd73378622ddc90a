//! `helio down`: asks the supervisor of the run directory to stop, or the head to end its cluster, and waits until nothing
//! of it is left.

use super::print;
use crate::args::Down;
use crate::cluster::{Access, run_dir};
use crate::failure::{FAILED, Failure, NO_CLUSTER};
use crate::processes;
use crate::rundir::RunDir;
use anyhow::{Context, Result};
use rustix::process::Signal;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How long what is left may take to end by itself.
const LEFTOVER_GRACE: Duration = Duration::from_secs(5);

/// Stops the cluster.
pub(crate) async fn run(args: &Down) -> Result<()> {
    let timeout = Duration::from_secs(args.timeout);
    if args.target.address.is_some() {
        end_remotely(args, timeout).await?;
        return print("the cluster is stopped, with its nodes on all machines\n");
    }
    let run = run_dir(args.target.run_dir.as_deref(), args.file.as_deref())?;
    let mut name = None;
    if let Some(owner) = run.owner().filter(|_| run.is_held()) {
        end_supervisor(&run, owner.pid, timeout);
        name = Some(owner.cluster);
    } else if run.address().is_some() && end_remotely(args, timeout).await.is_ok() {
        name = Some("the cluster".into());
    }
    // Nothing should be left; what is (its supervisor was killed, or it was started by hand) ends here.
    let left = || processes::of_run_dir(run.path());
    if name.is_none() && left().is_empty() {
        run.clear_owner();
        return Err(Failure::error(NO_CLUSTER, format!("no cluster runs in {}", run.path().display())));
    }
    processes::end_all(left, LEFTOVER_GRACE, &AtomicBool::new(false));
    let pids: Vec<String> = left().iter().map(|p| p.pid.to_string()).collect();
    if !pids.is_empty() {
        return Err(Failure::error(FAILED, format!("these processes do not end: {}", pids.join(", "))));
    }
    run.clear_owner();
    print(&match name {
        Some(name) => format!("{name} is stopped\n"),
        None => format!("stopped what was left in {}\n", run.path().display()),
    })
}

/// Has `helio up` stop its cluster; kills it when it does not.
fn end_supervisor(run: &RunDir, pid: u32, timeout: Duration) {
    processes::signal(pid, Signal::TERM);
    let started = Instant::now();
    // It gives the directory free a moment before it is gone itself.
    let runs = || run.is_held() || processes::read(pid).is_some();
    while runs() && started.elapsed() < timeout {
        std::thread::sleep(Duration::from_millis(10));
    }
    if run.is_held() {
        processes::signal(pid, Signal::KILL);
    }
}

/// Has the head end its cluster: workers, nodes, itself.
async fn end_remotely(args: &Down, timeout: Duration) -> Result<()> {
    let mut target = args.target.clone();
    if target.run_dir.is_none() {
        target.run_dir = Some(run_dir(None, args.file.as_deref())?.path().to_path_buf());
    }
    let cluster = Access::find(&target)?.connect().await?;
    let ended = tokio::time::timeout(timeout, cluster.shutdown()).await;
    Ok(ended.context("the cluster does not end; look at `helio status`")??)
}
