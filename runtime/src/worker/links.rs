//! The worker's connections to head and node agent: registered again whenever one was lost.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::host::{Ending, Host};
use crate::backoff::Backoff;
use crate::handle::{ActorId, AskError, Handle, ProcessId, Refusal, Refused};
use crate::head::messages::{HeadSeen, WorkerHello, WorkerReport};
use crate::node::NodeActor;
use crate::node::files::{self, AgentRecord, RunDir};
use crate::system::{PeerEvent, PeerEvents};

/// Limit of one report or hello.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// A worker without news reports this often.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Progress is reported at most this often.
const PROGRESS_PAUSE: Duration = Duration::from_millis(50);

/// Reports to the head for ever. While the head is away the worker serves.
pub(super) async fn to_head(host: Arc<Host>) {
    let mut peers = host.system.peer_events();
    let mut backoff = Backoff::reconnect();
    let mut registering = true;
    loop {
        let report = host.report(registering);
        match tell(&host, &report).await {
            Ok(head) => {
                host.cluster.found(&head.heads);
                host.heard(&report);
                backoff.reset();
                // Until this answer an older head was obeyed: what it sent meanwhile is told as well.
                if registering && host.has_other_views(&report.views) {
                    continue;
                }
                let pause = Instant::now() + PROGRESS_PAUSE;
                tokio::select! {
                    () = host.news.notified() => registering = false,
                    () = progress(&host, pause) => registering = false,
                    // A head that is frozen or cut off keeps its connections.
                    () = tokio::time::sleep(HEARTBEAT) => registering = false,
                    () = lost(&mut peers, head.process) => registering = true,
                }
            }
            Err((leader, why)) => {
                tracing::debug!(why, "cannot report to the head");
                registering = true;
                if !host.cluster.missed(&leader) {
                    backoff.pause().await;
                }
            }
        }
    }
}

/// Reports to the present head. The error names the leader, if the one that was asked knows.
async fn tell(host: &Host, report: &WorkerReport) -> Result<HeadSeen, (String, String)> {
    let head = host.cluster.head_handle().with_deadline(ANSWER_TIMEOUT);
    let at = head.addr().endpoint.clone();
    match head.ask(report.clone()).await {
        // HA-2: a head that is older than one that was heard of is left alone.
        Ok(Ok(head)) => match host.obey(head.term) {
            Ok(()) => Ok(head),
            Err(superseded) => Err((String::new(), format!("the head at {at}: {superseded}"))),
        },
        Ok(Err(superseded)) => Err((String::new(), format!("the head at {at}: {superseded}"))),
        Err(AskError::Refused(Refused { reason: Refusal::Elsewhere(leader), .. })) => {
            Err((leader, format!("the head at {at} stands by")))
        }
        Err(error) => Err((String::new(), format!("the head at {at}: {error}"))),
    }
}

async fn progress(host: &Host, not_before: Instant) {
    host.progress.notified().await;
    tokio::time::sleep_until(not_before).await;
}

/// Keeps in touch with the node agent, or with the one that takes over from it. Returns when the worker is to end.
pub(super) async fn to_node(host: Arc<Host>, dir: RunDir) -> Ending {
    let grace = Duration::from_millis(host.record.agent_grace_ms);
    let mut peers = host.system.peer_events();
    let mut backoff = Backoff::reconnect();
    let mut alone_since = Instant::now();
    loop {
        match hello(&host, &dir).await {
            Ok(reply) if reply.known => {
                backoff.reset();
                // The next hello says that this process still runs.
                let _ = tokio::time::timeout(HEARTBEAT, lost(&mut peers, reply.node)).await;
                alone_since = Instant::now();
            }
            Ok(_) => return Ending::Fenced("the node agent does not know this worker".into()),
            Err(why) if alone_since.elapsed() >= grace => {
                return Ending::Fenced(format!("no node agent for {} s: {why}", grace.as_secs_f32()));
            }
            Err(why) => {
                tracing::debug!(why, "cannot reach the node agent");
                let left = grace.saturating_sub(alone_since.elapsed());
                let _ = tokio::time::timeout(left, backoff.pause()).await;
            }
        }
    }
}

async fn hello(host: &Host, dir: &RunDir) -> Result<crate::head::messages::HelloReply, String> {
    let agent: AgentRecord = files::read(&dir.agent()).map_err(|error| error.to_string())?;
    let node: Handle<NodeActor> = host.system.handle_at(&agent.endpoint, ActorId::NODE);
    let hello =
        WorkerHello { incarnation: host.record.incarnation, endpoint: host.system.endpoint().to_owned() };
    node.with_deadline(ANSWER_TIMEOUT).ask(hello).await.map_err(|error| error.to_string())
}

/// Waits until no connection with that process is left.
async fn lost(peers: &mut PeerEvents, process: ProcessId) {
    loop {
        match peers.next().await {
            Some(PeerEvent::Lost { process: gone, .. }) if gone == process => return,
            Some(PeerEvent::Missed(_)) | None => return,
            Some(PeerEvent::Lost { .. } | PeerEvent::Connected { .. }) => {}
        }
    }
}
