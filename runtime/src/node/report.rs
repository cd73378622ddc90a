//! The agent's side of the connection to the head: reports when there is news, as a heartbeat, and after every loss.

use super::agent::Agent;
use super::logs;
use crate::backoff::Backoff;
use crate::handle::{ActorId, Handle, ProcessId};
use crate::head::HeadActor;
use crate::head::messages::{NodeStage, NodeVerdict};
use crate::system::{PeerEvent, PeerEvents};

/// Attempts to tell the head goodbye.
const GOODBYES: u32 = 5;

/// Reports until the node has left.
pub(super) async fn report(agent: &Agent) {
    let timing = agent.config.timing;
    let head: Handle<HeadActor> = agent.system.handle_at(&agent.config.head, ActorId::HEAD);
    let head = head.with_deadline(timing.report_timeout);
    let mut peers = agent.system.peer_events();
    let mut backoff = Backoff::reconnect();
    let mut registering = true;
    let mut goodbyes = 0;
    loop {
        let report = agent.report(registering);
        let left = report.stage == NodeStage::Left;
        let outcome = match head.ask(report.clone()).await {
            Ok(NodeVerdict::Accepted { head }) => Ok(head),
            Ok(NodeVerdict::Refused { why }) => {
                Err(format!("the head at {} refused: {why}", agent.config.head))
            }
            Err(error) => Err(format!("cannot reach the head at {}: {error}", agent.config.head)),
        };
        goodbyes += u32::from(left);
        match outcome {
            Ok(process) => {
                if registering {
                    tracing::info!(node = agent.config.name, head = agent.config.head, "joined the cluster");
                }
                agent.heard(&report);
                agent.judged(Ok(()));
                if left {
                    return;
                }
                backoff.reset();
                registering = wait(agent, &mut peers, process).await;
            }
            Err(why) => {
                if left && goodbyes >= GOODBYES {
                    return;
                }
                if agent.joined() != Err(why.clone()) {
                    tracing::warn!(node = agent.config.name, why, "retrying");
                }
                agent.judged(Err(why));
                registering = true;
                tokio::select! {
                    () = backoff.pause() => {}
                    () = agent.news.notified() => {}
                }
            }
        }
    }
}

/// Waits until there is something to report; true if the head is to be joined anew.
async fn wait(agent: &Agent, peers: &mut PeerEvents, head: ProcessId) -> bool {
    let heartbeat = tokio::time::sleep(agent.config.timing.heartbeat);
    tokio::pin!(heartbeat);
    loop {
        tokio::select! {
            () = agent.news.notified() => return false,
            () = &mut heartbeat => return false,
            event = peers.next() => match event {
                Some(PeerEvent::Lost { process, .. }) if process == head => return true,
                Some(PeerEvent::Missed(_)) => return true,
                Some(PeerEvent::Lost { .. } | PeerEvent::Connected { .. }) => {}
                None => return true,
            },
        }
    }
}

/// Keeps logs within their bound.
pub(super) async fn check_logs(agent: &Agent) {
    let mut checks = tokio::time::interval(agent.config.timing.log_check);
    loop {
        checks.tick().await;
        for actor in agent.running() {
            let path = agent.dir.log(&actor);
            if let Err(error) = logs::rotate(&path, agent.config.log_bytes_max) {
                tracing::warn!(path = %path.display(), %error, "cannot rotate a log");
            }
        }
    }
}
