//! The head's knowledge as a status for clients.

use super::HeadState;
use super::actors::{Actor, Life, Phase, Then};
use super::nodes::{Node, Reach};
use crate::cluster::status::{
    ActorState, ActorStatus, DeviceStatus, GroupStatus, HeadStatus, MemberStatus, NodeState, NodeStatus,
    WorkerState, WorkerStatus,
};
use crate::group::MemberState;
use crate::head::messages::{Found, Located};
use crate::head::placement::Offer;
use crate::objects::args_digest;
use crate::package::Digest;
use crate::spec::{ActorSpec, SupervisorSpec};

/// Backtraces and last words in one status; what is more is left out, so that many deaths do not make it too large.
const DETAILS_BYTES_MAX: usize = 4 << 20;

impl HeadState {
    /// Where the actor is, if it is ready.
    pub fn lookup(&self, name: &str) -> Option<Located> {
        let actor = self.actors.get(name)?;
        let ActorSpec { max_pending_calls, max_task_retries, .. } = actor.spec;
        Some(Located { addr: actor.ready()?.clone(), max_pending_calls, max_task_retries })
    }

    /// Name of the node that an actor runs on or ran on last.
    pub fn node_of(&self, name: &str) -> Option<&str> {
        self.actors.get(name)?.slot.as_ref().map(|slot| slot.node.as_str())
    }

    /// Whether an actor of that name is known.
    pub fn knows(&self, name: &str) -> bool {
        self.actors.contains_key(name)
    }

    /// Completes the head's own status.
    pub fn head_status(&self, status: HeadStatus) -> HeadStatus {
        HeadStatus { closing: self.closing, recovering: self.hold.is_some(), ..status }
    }

    /// All nodes.
    pub fn node_status(&self) -> Vec<NodeStatus> {
        self.nodes.values().zip(self.offers()).map(|(node, offer)| status_of(node, offer)).collect()
    }

    /// All worker processes.
    pub fn worker_status(&self) -> Vec<WorkerStatus> {
        self.actors.iter().filter_map(|(name, actor)| worker(name, actor)).collect()
    }

    /// All actors.
    pub fn actor_status(&self) -> Vec<ActorStatus> {
        let mut left = DETAILS_BYTES_MAX;
        let mut within = |mut status: ActorStatus| {
            status.keep_details(&mut left);
            status
        };
        self.actors.values().map(|actor| within(self.actor(actor))).collect()
    }

    /// All groups that have ranks.
    pub fn group_status(&self) -> Vec<GroupStatus> {
        let groups = self.groups.iter().filter(|(_, group)| !group.members().is_empty());
        groups
            .map(|(name, group)| {
                let now = self.members_now(group);
                GroupStatus {
                    name: name.clone(),
                    epoch: group.view().epoch,
                    complete: now.iter().all(|member| member.state == MemberState::Ready),
                    members: now
                        .iter()
                        .map(|member| MemberStatus {
                            rank: member.rank,
                            actor: group.members().get(&member.rank).cloned(),
                            state: member.state,
                        })
                        .collect(),
                }
            })
            .collect()
    }

    /// All supervisors.
    pub fn supervisor_status(&self) -> Vec<SupervisorSpec> {
        self.supervisors.values().map(|it| it.spec.clone()).collect()
    }

    /// Whether the actor will not be started any more with these arguments.
    pub fn is_over(&self, name: &str, args: Digest) -> bool {
        let Some(actor) = self.actors.get(name) else { return true };
        match &actor.life {
            Life::Dead { .. } | Life::Stopping { then: Then::StayDead | Then::Down | Then::Forget, .. } => {
                true
            }
            Life::Pending { .. }
            | Life::Backoff { .. }
            | Life::Live(_)
            | Life::Judged { .. }
            | Life::Stopping { .. } => args_digest(&actor.spec.args) != args,
        }
    }

    /// What a client needs to reach an actor, whether it is ready or not.
    pub fn find(&self, name: &str) -> Option<Found> {
        let actor = self.actors.get(name)?;
        let (type_name, addr) = (actor.spec.type_name.clone(), actor.ready().cloned());
        Some(Found { type_name, state: self.state(actor), addr })
    }

    fn actor(&self, actor: &Actor) -> ActorStatus {
        let process = actor.process();
        let member = actor.spec.group.as_ref();
        let slot = process.map(|live| &live.slot);
        ActorStatus {
            name: actor.spec.name.clone(),
            type_name: actor.spec.type_name.clone(),
            state: self.state(actor),
            restarts: actor.restarts,
            last_death: actor.last_death.clone(),
            last_words: actor.last_words.clone(),
            incarnation: actor.incarnation,
            group: member.map(|member| member.group.clone()),
            rank: member.map(|member| member.rank),
            node: slot.map(|slot| slot.node.clone()),
            device: slot.and_then(|slot| slot.device),
            pid: process.and_then(|live| live.pid),
            endpoint: actor.ready().map(|addr| addr.endpoint.clone()),
            lifetime: actor.spec.lifetime.clone(),
            seat: actor.spec.seat.clone(),
        }
    }

    fn state(&self, actor: &Actor) -> ActorState {
        match &actor.life {
            Life::Pending { reason } => ActorState::Pending { reason: reason.clone() },
            Life::Backoff { attempt, at } => {
                let wait = at.saturating_sub(self.now);
                let in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                ActorState::Restarting { attempt: *attempt, in_ms }
            }
            Life::Live(live) => match &live.phase {
                Phase::Starting(progress) => ActorState::Starting { progress: progress.clone() },
                Phase::Ready(_) => ActorState::Ready,
            },
            Life::Judged { cause, .. } => {
                ActorState::Pending { reason: format!("its supervisor decides what follows: {cause}") }
            }
            Life::Stopping { .. } => ActorState::Stopping,
            Life::Dead { cause } => ActorState::Dead { cause: cause.clone() },
        }
    }
}

fn status_of(node: &Node, offer: Offer) -> NodeStatus {
    NodeStatus {
        name: node.name().to_owned(),
        state: match &node.reach {
            Reach::Connected { .. } if node.is_leaving() => NodeState::Leaving,
            Reach::Connected { .. } if node.drain_until().is_some() => match offer.actors {
                0 => NodeState::Drained,
                actors => NodeState::Draining { actors: u32::try_from(actors).unwrap_or(u32::MAX) },
            },
            Reach::Connected { .. } => NodeState::Ready,
            Reach::Unreachable { why, .. } => NodeState::Unreachable { why: why.clone() },
            Reach::Lost { why } => NodeState::Lost { why: why.clone() },
        },
        endpoint: node.endpoint.clone(),
        pid: node.pid,
        cpus: node.record().capacity.cpus,
        memory: offer.memory,
        resources: offer.custom,
        used: offer.used,
        labels: offer.labels,
        devices: node
            .devices()
            .iter()
            .zip(offer.devices)
            .map(|(device, (_, owner))| DeviceStatus { device: device.clone(), owner })
            .collect(),
    }
}

fn worker(name: &str, actor: &Actor) -> Option<WorkerStatus> {
    let live = actor.process()?;
    let state = match (&actor.life, &live.phase) {
        (Life::Stopping { .. }, _) => WorkerState::Stopping,
        (_, Phase::Ready(_)) => WorkerState::Ready,
        (_, Phase::Starting(_)) if live.pid.is_some() => WorkerState::Starting,
        (_, Phase::Starting(_)) => WorkerState::Ordered,
    };
    Some(WorkerStatus {
        actor: name.to_owned(),
        incarnation: live.incarnation,
        node: live.slot.node.clone(),
        pid: live.pid,
        state,
    })
}
