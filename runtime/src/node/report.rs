//! The agent's side of the connection to the head: reports when there is news, as a heartbeat, and after every loss.

use std::time::Duration;

use super::agent::Agent;
use super::logs;
use crate::backoff::Backoff;
use crate::handle::{ActorId, AskError, Handle, ProcessId, Refusal};
use crate::head::HeadActor;
use crate::head::messages::{HeadSeen, NodeReport, NodeStage, NodeVerdict};
use crate::system::{PeerEvent, PeerEvents};

/// How often it is looked whether workers were heard of.
const PULSE_LOOK: Duration = Duration::from_millis(500);
/// Attempts to tell the head goodbye.
const GOODBYES: u32 = 5;

/// Reports until the node has left.
pub(super) async fn report(agent: &Agent) {
    let mut peers = agent.system.peer_events();
    let mut backoff = Backoff::reconnect();
    let mut registering = true;
    let mut goodbyes = 0;
    loop {
        let report = agent.report(registering);
        let left = report.stage == NodeStage::Left;
        goodbyes += u32::from(left);
        match tell(agent, &report).await {
            Ok(head) => {
                agent.heads().found();
                agent.heads().learn(head.heads.iter().map(String::as_str));
                if registering {
                    let at = agent.heads().current().to_owned();
                    tracing::info!(
                        node = agent.config.name,
                        head = at,
                        term = head.term,
                        "joined the cluster"
                    );
                }
                agent.heard(&report);
                agent.judged(Ok(()));
                if left {
                    return;
                }
                backoff.reset();
                registering = wait(agent, &mut peers, head.process).await;
            }
            Err(Miss { leader, why }) => {
                if left && goodbyes >= GOODBYES {
                    return;
                }
                if agent.joined() != Err(why.clone()) {
                    tracing::warn!(node = agent.config.name, why, "retrying");
                }
                agent.judged(Err(why));
                registering = true;
                if agent.heads().missed(&leader) {
                    continue;
                }
                tokio::select! {
                    () = backoff.pause() => {}
                    () = agent.news.notified() => {}
                }
            }
        }
    }
}

/// Why a report was not taken, and where the leader is, if the one that was asked knows.
struct Miss {
    leader: String,
    why: String,
}

/// Reports to the present head.
async fn tell(agent: &Agent, report: &NodeReport) -> Result<HeadSeen, Miss> {
    let at = agent.heads().current().to_owned();
    let head: Handle<HeadActor> = agent.system.handle_at(&at, ActorId::HEAD);
    let miss = |why: String| Miss { leader: String::new(), why };
    match head.with_deadline(agent.config.timing.report_timeout).ask(report.clone()).await {
        // HA-2: a head that is older than one that was heard of is left alone.
        Ok(NodeVerdict::Accepted(head)) => match agent.obey(head.term) {
            Ok(()) => Ok(head),
            Err(superseded) => Err(miss(format!("the head at {at}: {superseded}"))),
        },
        Ok(NodeVerdict::Superseded(superseded)) => Err(miss(format!("the head at {at}: {superseded}"))),
        Ok(NodeVerdict::Refused { why }) => Err(miss(format!("the head at {at} refused: {why}"))),
        Err(AskError::Refused(refused)) => match refused.reason {
            Refusal::Elsewhere(leader) => Err(Miss { why: format!("the head at {at} stands by"), leader }),
            reason => Err(miss(format!("cannot reach the head at {at}: {reason}"))),
        },
        Err(error) => Err(miss(format!("cannot reach the head at {at}: {error}"))),
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

/// Has workers that say nothing ended.
pub(super) async fn check_pulses(agent: &Agent) {
    loop {
        tokio::time::sleep(PULSE_LOOK).await;
        agent.check_pulses(PULSE_LOOK);
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
