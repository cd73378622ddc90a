//! `helio entrypoint`: keeps one job. The jobs actor starts it; it outlives the actor.

use crate::args::Entrypoint;
use anyhow::{Context, Result};
use heliostat_actors::jobs::keeper;

/// Runs until the job has ended and its end is written down.
pub(crate) async fn run(args: &Entrypoint) -> Result<()> {
    let kept = keeper::run(&args.dir, |name| std::env::var(name).ok()).await;
    kept.with_context(|| format!("the job in {} cannot be kept", args.dir.display()))
}
