//! `helio eplb show|rebalance`: asks the EPLB actor itself.

use super::{print, print_json};
use crate::args::{Eplb as Args, EplbOf};
use crate::cluster::Access;
use crate::failure::{FAILED, Failure};
use crate::show::{self, Terminal};
use anyhow::{Context, Result};
use heliostat_actors::deployment::eplb_of_group;
use heliostat_actors::eplb::{Eplb, EplbStatus};
use heliostat_actors::messages::{GetStatus, Rebalance};
use heliostat_runtime::handle::Handle;

/// Shows or rebalances.
pub(crate) async fn run(args: &Args) -> Result<()> {
    match args {
        Args::Show(args) => {
            let json = actor(args).await?.ask(GetStatus).await.context("the EPLB actor does not answer")?;
            if args.show.json {
                let value: serde_json::Value =
                    serde_json::from_str(&json).context("the EPLB actor's answer")?;
                return print_json(&value);
            }
            let status: EplbStatus = serde_json::from_str(&json).context("the EPLB actor's answer")?;
            print(&show::eplb::show(&status, Terminal::of_stdout()))
        }
        Args::Rebalance(args) => {
            let answer = actor(args).await?.ask(Rebalance).await.context("the EPLB actor does not answer")?;
            let started = answer
                .map_err(|refused| Failure::error(FAILED, format!("no remap was started: {refused}")))?;
            if args.show.json {
                return print_json(&started);
            }
            print(&format!(
                "remap {} is under way: {} moves in {} layers (helio eplb show)\n",
                started.epoch, started.moves, started.layers
            ))
        }
    }
}

async fn actor(args: &EplbOf) -> Result<Handle<Eplb>> {
    let cluster = Access::find(&args.show.target)?.connect().await?;
    let handle = cluster.handle::<Eplb>(&eplb_of_group(&args.group)).await;
    handle.context("the EPLB actor cannot be asked (helio list actors shows its state)")
}
