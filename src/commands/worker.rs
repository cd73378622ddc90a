//! `helio worker`: hosts one actor. The node agent starts it and writes its arguments; the runtime reads them.

use crate::args::Worker;
use anyhow::Result;
use heliostat_runtime::worker::{self, WorkerConfig};

/// Runs until its actor, its node agent or the head ends it, and exits with the code that this means.
pub(crate) async fn run(args: &Worker) -> Result<()> {
    let config = WorkerConfig::from_args(args.args.iter().cloned())?;
    let ended = worker::run(config, heliostat_actors::actor_types()).await?;
    // Threads that the actor left behind must not keep the process.
    std::process::exit(ended.code())
}
