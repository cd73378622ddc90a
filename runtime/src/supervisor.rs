//! Supervisors that users write: an actor is asked what follows from the death of a child.
//!
//! The head asks ([`ChildDied`]), the actor answers ([`Verdict`]), the head carries it out. An actor becomes the judge of
//! a supervisor by [`SupervisorStrategy::Ask`](crate::spec::SupervisorStrategy::Ask).

use actix::{Actor, Context, Handler};
use bincode::{Decode, Encode};

use crate::actor::{Accepts, RemoteActor, WireMessage};
use crate::handle::Incarnation;
use crate::spec::DeathCause;
pub use crate::spec::Verdict;

/// A child of a supervisor died. It may be asked twice about the same death, after a change of heads.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ChildDied {
    /// Name of the supervisor.
    pub supervisor: String,
    /// Name of the child.
    pub child: String,
    /// The life that ended.
    pub incarnation: Incarnation,
    /// Why.
    pub cause: DeathCause,
    /// How often it was restarted before.
    pub restarts: u64,
}

impl actix::Message for ChildDied {
    type Result = Verdict;
}

impl WireMessage for ChildDied {
    const NAME: &'static str = "supervisor.child_died";
}

/// Stands for any actor that accepts `ChildDied`: the head knows no more of it.
pub(crate) struct Judge;

impl Actor for Judge {
    type Context = Context<Self>;
}

impl RemoteActor for Judge {
    const TYPE: &'static str = "judge";

    fn messages(m: &mut Accepts<Self>) {
        m.accept::<ChildDied>();
    }
}

impl Handler<ChildDied> for Judge {
    type Result = Verdict;

    fn handle(&mut self, _: ChildDied, _: &mut Context<Self>) -> Verdict {
        Verdict::Escalate
    }
}
