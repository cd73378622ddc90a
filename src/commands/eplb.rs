//! `helio eplb show|rebalance`: asks the EPLB actor itself.

use super::{print, print_json};
use crate::args::{Eplb as Args, Target};
use crate::cluster::Access;
use crate::failure::{FAILED, Failure};
use crate::show::{self, Terminal};
use anyhow::{Context, Result};
use heliostat_actors::deployment::EPLB;
use heliostat_actors::eplb::{Eplb, EplbStatus};
use heliostat_actors::messages::{GetStatus, Rebalance};
use heliostat_runtime::handle::Handle;

/// Shows or rebalances.
pub(crate) async fn run(args: &Args) -> Result<()> {
    match args {
        Args::Show(args) => {
            let json =
                actor(&args.target).await?.ask(GetStatus).await.context("the EPLB actor does not answer")?;
            if args.json {
                let value: serde_json::Value =
                    serde_json::from_str(&json).context("the EPLB actor's answer")?;
                return print_json(&value);
            }
            let status: EplbStatus = serde_json::from_str(&json).context("the EPLB actor's answer")?;
            print(&show::eplb::show(&status, Terminal::of_stdout()))
        }
        Args::Rebalance(args) => {
            let answer =
                actor(&args.target).await?.ask(Rebalance).await.context("the EPLB actor does not answer")?;
            let started = answer
                .map_err(|refused| Failure::error(FAILED, format!("no remap was started: {refused}")))?;
            if args.json {
                return print_json(&started);
            }
            print(&format!(
                "remap {} is under way: {} moves in {} layers (helio eplb show)\n",
                started.epoch, started.moves, started.layers
            ))
        }
    }
}

async fn actor(target: &Target) -> Result<Handle<Eplb>> {
    let cluster = Access::find(target)?.connect().await?;
    let handle = cluster.handle::<Eplb>(EPLB).await;
    handle.context("the EPLB actor cannot be asked (helio list actors shows its state)")
}
