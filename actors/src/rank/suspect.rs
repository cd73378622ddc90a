//! Ranks that are connected but silent: a process that hangs or is frozen is ended, one that only waits is not.
//!
//! A rank that waits for a frozen one is silent, too, and its own peers suspect it. So a suspect is asked over the
//! control plane, which does not pass its step thread: only one that does not answer there either is restarted.

use std::time::Duration;

use heliostat_runtime::actor::ActorCx;
use heliostat_runtime::handle::{ActorAddr, AskError};
use heliostat_runtime::spec::DeathCause;
use heliostat_runtime::system::Panic;
use tokio::sync::mpsc::UnboundedReceiver;

use super::Rank;
use crate::deployment::rank_name;
use crate::messages::Ping;

/// How long a process that runs may take to answer.
const PING_DEADLINE: Duration = Duration::from_secs(3);

/// What the step thread has to say that is not for another actor.
pub(super) enum Notice {
    /// The rank cannot go on.
    Failed(String),
    /// Its GPU is lost to this process, as the driver says.
    DeviceFailed(String),
    /// The step thread panicked.
    Panicked(Panic),
    /// This rank said nothing for too long.
    Silent(u32, ActorAddr),
}

/// Acts on notices until the step thread ends; `expected` says whether it was told to.
/// Names of the group's actors begin with `prefix`.
pub(super) async fn heed(
    cx: ActorCx,
    prefix: String,
    mut notices: UnboundedReceiver<Notice>,
    expected: impl Fn() -> bool,
) {
    while let Some(notice) = notices.recv().await {
        match notice {
            Notice::Failed(message) => return cx.exit(DeathCause::Failed { message }),
            Notice::DeviceFailed(message) => return cx.exit(DeathCause::GpuFault { message }),
            Notice::Panicked(panic) => return cx.exit(DeathCause::panicked(panic)),
            Notice::Silent(rank, addr) => probe(&cx, &rank_name(&prefix, rank), addr).await,
        }
    }
    if !expected() {
        let message = "the step thread ended; its log says more".to_owned();
        cx.exit(DeathCause::Failed { message });
    }
}

async fn probe(cx: &ActorCx, rank: &str, addr: ActorAddr) {
    let answer = cx.system().handle::<Rank>(addr).with_deadline(PING_DEADLINE).ask(Ping).await;
    if !matches!(answer, Err(AskError::Deadline)) {
        return;
    }
    let Some(cluster) = cx.cluster() else { return };
    tracing::warn!(rank, "the rank is silent in its steps and does not answer: restarting it");
    if let Err(why) = cluster.restart_actor(rank).await {
        tracing::warn!(rank, "cannot have the rank restarted: {why}");
    }
}
