//! `helio down`: asks the supervisor of the run directory to stop, and waits until nothing of the cluster is left.

use super::print;
use crate::args::Down;
use crate::cluster::run_dir;
use crate::failure::{FAILED, Failure, NO_CLUSTER};
use crate::processes::{self, Process};
use anyhow::Result;
use rustix::process::Signal;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Stops the cluster.
pub(crate) fn run(args: &Down) -> Result<()> {
    let run = run_dir(args.run_dir.as_deref(), args.file.as_deref())?;
    let owner = run.owner().filter(|_| run.is_held());
    let dir = run.path();
    if owner.is_none() && processes::of_run_dir(dir).is_empty() {
        run.clear_owner();
        return Err(Failure::error(NO_CLUSTER, format!("no cluster runs in {}", dir.display())));
    }
    if let Some(owner) = &owner {
        processes::signal(owner.pid, Signal::TERM);
        let started = Instant::now();
        while run.is_held() && started.elapsed() < Duration::from_secs(args.timeout) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if run.is_held() {
            processes::signal(owner.pid, Signal::KILL);
        }
    }
    // Nothing should be left; what is (its supervisor was killed, or it was started by hand) ends here.
    processes::end_all(|| left(dir), Duration::from_secs(5), &AtomicBool::new(false));
    let left = left(dir);
    if !left.is_empty() {
        let pids: Vec<String> = left.iter().map(|p| p.pid.to_string()).collect();
        return Err(Failure::error(FAILED, format!("these processes do not end: {}", pids.join(", "))));
    }
    run.clear_owner();
    print(&match owner {
        Some(owner) => format!("{} is stopped\n", owner.cluster),
        None => format!("stopped what was left in {}\n", dir.display()),
    })
}

fn left(dir: &Path) -> Vec<Process> {
    processes::of_run_dir(dir)
}
