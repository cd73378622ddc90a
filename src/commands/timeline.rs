//! `helio timeline`: has all ranks record, and writes what they saw.

use super::print;
use crate::args::Timeline;
use crate::cluster::Access;
use crate::failure::{FAILED, Failure};
use anyhow::{Context, Result};
use heliostat_actors::monitor::{timeline, trace};
use std::path::Path;
use std::time::Duration;

/// Records and writes.
pub(crate) async fn run(args: &Timeline) -> Result<()> {
    let cluster = Access::find(&args.target)?.connect().await?;
    let recording = timeline::record(&cluster, Duration::from_secs_f64(args.seconds)).await?;
    if recording.ranks.is_empty() {
        return Err(Failure::error(
            FAILED,
            "no model is served: there is no rank whose steps could be recorded",
        ));
    }
    let json = trace::chrome(&recording).to_string();
    if args.output == Path::new("-") {
        return print(&json);
    }
    let file = args.output.display();
    std::fs::write(&args.output, json).with_context(|| format!("cannot write {file}"))?;
    let steps: usize = recording.ranks.iter().map(|(_, rank)| rank.steps.len()).sum();
    let dropped: u64 = recording.ranks.iter().map(|(_, rank)| rank.dropped).sum();
    let ranks = recording.ranks.len();
    print(&format!("{steps} steps of {ranks} ranks are in {file}: open it in https://ui.perfetto.dev\n"))?;
    if dropped > 0 {
        print(&format!("{dropped} more found no room; record for a shorter time\n"))?;
    }
    Ok(())
}
