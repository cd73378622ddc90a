//! Supervisors: what becomes of the others when one of several actors dies.
//!
//! Plain data. `head::core` keeps the tree and decides.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::{InvalidSpec, Lifetime, RestartPolicy, is_full_name};

/// A supervisor: an inner node of the tree. It is no process; the head does what it says.
///
/// Its children are the actors and supervisors that have a [`Seat`] below it. One that ended because its work is done,
/// or that was stopped by request, is no failure: nothing follows from it, and it is not started again with the others.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct SupervisorSpec {
    /// Unique among the supervisors of the cluster; built like the name of an actor.
    pub name: String,
    /// What follows from the death of a child.
    pub strategy: SupervisorStrategy,
    /// How often and how fast. One-for-one counts the restarts of each child, the others count theirs together. One
    /// more failure escalates. The children's own policies are not asked.
    pub restart: RestartPolicy,
    /// Its own place below another supervisor, to which it escalates. One that has none escalates to the actor that
    /// owns it, by which that fails; else its children stay dead.
    pub seat: Option<Seat>,
    /// How long it is there. Its end is the end of its children.
    pub lifetime: Lifetime,
}

impl SupervisorSpec {
    /// A supervisor with the default limit, at the top.
    pub fn new(name: impl Into<String>, strategy: SupervisorStrategy) -> Self {
        Self {
            name: name.into(),
            strategy,
            restart: RestartPolicy::default(),
            seat: None,
            lifetime: Lifetime::Caller,
        }
    }

    /// Says what is wrong with the spec by itself.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        let fail = |why: String| Err(InvalidSpec::supervisor(&self.name, why));
        if !is_full_name(&self.name) {
            return fail(super::name_rule("the supervisor's name"));
        }
        if let Some(seat) = &self.seat
            && seat.supervisor == self.name
        {
            return fail("it is its own supervisor".into());
        }
        if let SupervisorStrategy::Ask { actor, .. } = &self.strategy
            && !is_full_name(actor)
        {
            return fail(super::name_rule(&format!("the name {actor:?} of the actor to be asked")));
        }
        Ok(())
    }
}

/// A child's place below a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Seat {
    /// Name of the supervisor.
    pub supervisor: String,
    /// Its place among the children: rest-for-one restarts those after it. Equal orders are neither before nor after.
    pub order: u32,
}

impl Seat {
    /// A place below that supervisor.
    pub fn new(supervisor: impl Into<String>, order: u32) -> Self {
        Self { supervisor: supervisor.into(), order }
    }
}

/// What follows from the death of a child.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SupervisorStrategy {
    /// It is restarted.
    OneForOne,
    /// All children are ended; when the last is gone, all are started again.
    OneForAll,
    /// It and the children after it are ended; when the last of them is gone, they are started again.
    RestForOne,
    /// Nothing is restarted here: all children are ended, and the failure is that of the supervisor.
    Escalate,
    /// An actor decides: it is sent a [`ChildDied`] and answers with a [`Verdict`].
    ///
    /// [`ChildDied`]: crate::supervisor::ChildDied
    /// [`Verdict`]: crate::supervisor::Verdict
    Ask {
        /// Name of the actor. It must accept `ChildDied`.
        actor: String,
        /// What follows if it does not answer.
        otherwise: Verdict,
    },
}

/// What a supervisor does about the death of a child.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize, actix::MessageResponse,
)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As one-for-one.
    Restart,
    /// As one-for-all.
    RestartAll,
    /// As rest-for-one.
    RestartRest,
    /// The child stays dead; nothing else follows.
    Stop,
    /// The supervisor fails.
    Escalate,
}

impl SupervisorStrategy {
    /// What it says about any death; `None` if somebody is asked.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            SupervisorStrategy::OneForOne => Some(Verdict::Restart),
            SupervisorStrategy::OneForAll => Some(Verdict::RestartAll),
            SupervisorStrategy::RestForOne => Some(Verdict::RestartRest),
            SupervisorStrategy::Escalate => Some(Verdict::Escalate),
            SupervisorStrategy::Ask { .. } => None,
        }
    }
}
