//! What can go wrong with a mesh, and which rank it was.

use std::fmt;

use bincode::{Decode, Encode};

use super::dims::ShapeError;
use crate::cluster::ClusterError;
use crate::handle::{ActorAddr, AskError, Refused};

/// Why one rank has no part in a round's result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum RankError {
    /// Its process cannot be reached, or went away before it answered. It may have handled the message.
    #[error("its process was lost: {0}")]
    Lost(String),
    /// It was replaced, or declared lost, while the round was under way. It may have handled the message.
    #[error("it left the mesh in epoch {epoch}")]
    Moved {
        /// The epoch in which it is not there, or not in this incarnation.
        epoch: u64,
    },
    /// The way to it in the tree goes through a rank that failed. It may have handled the message.
    #[error("it was not heard, because it is behind rank {rank}")]
    Behind {
        /// The rank that failed.
        rank: u32,
    },
    /// It did not answer in time. It may have handled the message.
    #[error("no answer before the deadline")]
    Deadline,
    /// It did not accept the message.
    #[error("refused: {0}")]
    Refused(String),
    /// It stopped before it answered.
    #[error("it stopped before it answered")]
    Stopped,
    /// Its handler panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// Its handler dropped the reply.
    #[error("its handler gave no reply")]
    NoReply,
    /// A message or an answer did not decode, or cannot be sent.
    #[error("codec: {0}")]
    Codec(String),
}

impl RankError {
    /// The rank, if it failed only because another one did.
    pub fn behind(&self) -> Option<u32> {
        match self {
            Self::Behind { rank } => Some(*rank),
            Self::Lost(_)
            | Self::Moved { .. }
            | Self::Deadline
            | Self::Refused(_)
            | Self::Stopped
            | Self::Panicked(_)
            | Self::NoReply
            | Self::Codec(_) => None,
        }
    }
}

impl<M> From<AskError<M>> for RankError {
    fn from(error: AskError<M>) -> Self {
        match error {
            AskError::Refused(Refused { reason, .. }) => Self::Refused(reason.to_string()),
            AskError::Deadline => Self::Deadline,
            AskError::PeerLost(why) => Self::Lost(why),
            AskError::Stopped => Self::Stopped,
            AskError::Panicked(message) => Self::Panicked(message),
            AskError::NoReply => Self::NoReply,
            AskError::Codec(why) | AskError::Handler(why) => Self::Codec(why),
            AskError::Cancelled => Self::Deadline,
        }
    }
}

/// A rank that has no part in a round's result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
#[error("rank {rank} ({addr}): {why}")]
pub struct RankFailure {
    /// Its rank in the mesh.
    pub rank: u32,
    /// Which incarnation, and where.
    pub addr: ActorAddr,
    /// What happened.
    pub why: RankError,
}

/// A round without a whole result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundFailure {
    /// Name of the mesh.
    pub mesh: String,
    /// The round's epoch.
    pub epoch: u64,
    /// Ranks that were spoken to.
    pub ranks: u32,
    /// Those without a part in the result, by rank.
    pub failed: Vec<RankFailure>,
}

impl RoundFailure {
    /// Those that failed by themselves; the others were only behind them in the tree.
    pub fn culprits(&self) -> impl Iterator<Item = &RankFailure> {
        self.failed.iter().filter(|failure| failure.why.behind().is_none())
    }
}

/// Culprits that an error names before it counts the rest.
const NAMED_MAX: usize = 8;

impl fmt::Display for RoundFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let culprits: Vec<String> = self.culprits().take(NAMED_MAX).map(ToString::to_string).collect();
        let (all, behind) =
            (self.culprits().count(), self.failed.iter().filter(|f| f.why.behind().is_some()));
        let Self { mesh, epoch, ranks, .. } = self;
        write!(f, "{} of {ranks} ranks of mesh {mesh} failed in epoch {epoch}: ", self.failed.len())?;
        f.write_str(&culprits.join("; "))?;
        if all > NAMED_MAX {
            write!(f, "; and {} more", all - NAMED_MAX)?;
        }
        match behind.count() {
            0 => Ok(()),
            1 => f.write_str("; 1 rank behind these in the tree was not heard"),
            n => write!(f, "; {n} ranks behind these in the tree were not heard"),
        }
    }
}

/// Why something asked of a mesh did not work.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// A shape, or a part of one, makes no sense.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The cluster refused or does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// There is no such mesh.
    #[error("{0}")]
    Unknown(String),
    /// There is a mesh of that name and of another size.
    #[error("there is a mesh {mesh} of shape {known}, which cannot become {wanted}: remove it first")]
    OtherShape {
        /// Name of the mesh.
        mesh: String,
        /// Its shape.
        known: String,
        /// The shape asked for.
        wanted: String,
    },
    /// The mesh did not come up, and was removed again if this call had created it.
    #[error("mesh {mesh} did not come up: {why}")]
    Spawn {
        /// Name of the mesh.
        mesh: String,
        /// Which rank, and why.
        why: String,
    },
    /// Ranks are not ready; nothing was sent. `Mesh::ready` waits for them.
    #[error("ranks {ranks:?} of mesh {mesh} are not ready (epoch {epoch}); nothing was sent")]
    NotReady {
        /// Name of the mesh.
        mesh: String,
        /// The present epoch; 0 before the mesh was complete for the first time.
        epoch: u64,
        /// Those that are not.
        ranks: Vec<u32>,
    },
    /// The message cannot be encoded, or an answer not decoded.
    #[error("codec: {0}")]
    Codec(String),
    /// Some ranks have no part in the result.
    #[error("{0}")]
    Ranks(RoundFailure),
    /// The deadline passed before there was anybody to send to.
    #[error("mesh {0} was not ready before the deadline")]
    Deadline(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::{ActorId, Incarnation, ProcessId};

    #[test]
    fn a_failed_round_names_who_failed_and_counts_who_was_behind() {
        let failure = |rank: u32, why: RankError| RankFailure {
            rank,
            addr: ActorAddr {
                actor: ActorId(rank.into()),
                incarnation: Incarnation(7),
                process: ProcessId(1),
                endpoint: "h:1".into(),
            },
            why,
        };
        let mut round = RoundFailure {
            mesh: "m".into(),
            epoch: 3,
            ranks: 8,
            failed: vec![
                failure(2, RankError::Lost("closed".into())),
                failure(3, RankError::Behind { rank: 2 }),
            ],
        };
        assert_eq!(
            round.to_string(),
            "2 of 8 ranks of mesh m failed in epoch 3: rank 2 (0000000000000002#7@h:1): its process was lost: closed; \
             1 rank behind these in the tree was not heard"
        );
        round.failed = (0..20).map(|rank| failure(rank, RankError::Deadline)).collect();
        assert!(round.to_string().ends_with("; and 12 more"));
    }
}
