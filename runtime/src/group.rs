//! Groups of ranks that are supervised together, and the views that tell them who is there.
//!
//! The head makes the views; this file only says what one is.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::actor::WireMessage;
use crate::handle::ActorAddr;

/// Who is in a group, as of one membership epoch.
///
/// A message to every rank that stands in it and to every subscriber (`ActorSpec::subscribe`). A receiver may get the
/// same epoch twice, but never an older one after a newer one; what an epoch says never changes. The epoch rises when
/// a rank that stood in the view is lost, and when all ranks are ready and announced in their present incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct GroupView {
    /// Name of the group.
    pub group: String,
    /// Membership epoch. Only the head raises it.
    pub epoch: u64,
    /// One entry for each rank, in order of rank.
    pub members: Vec<Member>,
}

impl GroupView {
    /// Whether every rank is ready in its present incarnation.
    pub fn is_complete(&self) -> bool {
        !self.members.is_empty() && self.members.iter().all(|member| member.state == MemberState::Ready)
    }

    /// Ranks that are ready.
    pub fn ready(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.state == MemberState::Ready)
    }
}

impl actix::Message for GroupView {
    type Result = ();
}

impl WireMessage for GroupView {
    const NAME: &'static str = "group.view";
}

/// One rank of a group.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Member {
    /// Its rank.
    pub rank: u32,
    /// Its address; there exactly when it is ready.
    pub addr: Option<ActorAddr>,
    /// What it announced with `ActorCx::announce`.
    pub join_info: Vec<u8>,
    /// Whether it can be reached.
    pub state: MemberState,
}

/// Whether a rank can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    /// It has no process.
    Absent,
    /// It has a process, but was not created or has not announced itself yet.
    Starting,
    /// It was created and has announced itself.
    Ready,
}
