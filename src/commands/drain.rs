//! `helio drain` and `helio undrain`.

use super::print;
use crate::args::{Drain, Undrain};
use crate::cluster::Access;
use crate::failure::{FAILED, Failure};
use anyhow::Result;
use heliostat_runtime::cluster::status::{ClusterStatus, NodeState};
use std::time::Duration;

/// What a node may take beyond the deadline: its actors get SIGTERM, and SIGKILL after their grace.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Empties a node, and waits until it is empty.
pub(crate) async fn run(args: &Drain) -> Result<()> {
    let cluster = Access::find(&args.target)?.connect().await?;
    let (node, deadline) = (&args.node, Duration::from_secs(args.deadline));
    cluster.drain_node(node, deadline, args.leave).await?;
    if args.no_wait {
        return print(&format!("node {node} is being drained\n"));
    }
    let state =
        |status: &ClusterStatus| status.nodes.iter().find(|n| n.name == *node).map(|n| n.state.clone());
    let leave = args.leave;
    let over = move |status: &ClusterStatus| match state(status) {
        None => true,
        Some(NodeState::Drained | NodeState::Lost { .. }) => !leave,
        // Somebody ended the drain.
        Some(NodeState::Ready) => true,
        Some(NodeState::Draining { .. } | NodeState::Leaving | NodeState::Unreachable { .. }) => false,
    };
    let status = cluster.wait_until(deadline.saturating_add(STOP_PATIENCE), over).await;
    match status.as_ref().map(state) {
        Some(None) => print(&format!("node {node} has left the cluster\n")),
        Some(Some(NodeState::Drained | NodeState::Lost { .. })) => {
            print(&format!("node {node} is empty; `helio undrain {node}` has it take actors again\n"))
        }
        Some(Some(_)) => {
            Err(Failure::error(FAILED, format!("the drain of node {node} was ended by `helio undrain`")))
        }
        None => Err(Failure::error(
            FAILED,
            format!("node {node} is not empty yet; `helio status` shows what is left, the drain goes on"),
        )),
    }
}

/// Has a node take actors again.
pub(crate) async fn undo(args: &Undrain) -> Result<()> {
    Access::find(&args.target)?.connect().await?.undrain_node(&args.node).await?;
    print(&format!("node {} takes actors again\n", args.node))
}
