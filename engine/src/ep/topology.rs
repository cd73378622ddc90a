//! Which ranks of a group do attention, which own experts, and where each sits.

use bincode::{Decode, Encode};

/// The part that one rank plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Role {
    /// Index among the attention (data-parallel) ranks.
    pub dp: Option<usize>,
    /// Index among the expert (expert-parallel) ranks.
    pub ep: Option<usize>,
}

/// A group of `size()` ranks, one device each: `dp` of them run attention, `ep` of them own experts.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Topology {
    /// Number of attention ranks.
    pub dp: usize,
    /// Number of expert ranks.
    pub ep: usize,
    /// Whether DP rank i and EP rank i share device i. If not, the expert ranks follow the attention ranks.
    pub colocate: bool,
}

/// A group cannot have this shape.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TopologyError {
    /// No attention or no expert rank.
    #[error("a group needs at least one DP rank and one EP rank, not dp = {dp} and ep = {ep}")]
    Empty {
        /// Asked for.
        dp: usize,
        /// Asked for.
        ep: usize,
    },
}

impl Topology {
    /// Checks and builds the shape.
    pub fn new(dp: usize, ep: usize, colocate: bool) -> Result<Self, TopologyError> {
        if dp == 0 || ep == 0 {
            return Err(TopologyError::Empty { dp, ep });
        }
        Ok(Self { dp, ep, colocate })
    }

    /// Number of ranks, which is the number of devices.
    pub fn size(&self) -> usize {
        if self.colocate { self.dp.max(self.ep) } else { self.dp + self.ep }
    }

    /// The part of `rank`.
    pub fn role(&self, rank: usize) -> Role {
        let ep = if self.colocate { Some(rank) } else { rank.checked_sub(self.dp) };
        Role { dp: (rank < self.dp).then_some(rank), ep: ep.filter(|&ep| ep < self.ep) }
    }

    /// The rank that is the `dp`-th attention rank.
    pub fn rank_of_dp(&self, dp: usize) -> usize {
        dp
    }

    /// The rank that is the `ep`-th expert rank.
    pub fn rank_of_ep(&self, ep: usize) -> usize {
        if self.colocate { ep } else { self.dp + ep }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_cover_every_rank_once() {
        for (dp, ep, colocate) in [(4, 4, true), (1, 4, true), (4, 2, true), (2, 3, false), (1, 1, true)] {
            let topology = Topology::new(dp, ep, colocate).unwrap();
            let roles: Vec<Role> = (0..topology.size()).map(|rank| topology.role(rank)).collect();
            for index in 0..dp {
                assert_eq!(roles[topology.rank_of_dp(index)].dp, Some(index));
            }
            for index in 0..ep {
                assert_eq!(roles[topology.rank_of_ep(index)].ep, Some(index));
            }
            assert_eq!(roles.iter().filter(|role| role.dp.is_some()).count(), dp);
            assert_eq!(roles.iter().filter(|role| role.ep.is_some()).count(), ep);
            assert!(roles.iter().all(|role| role.dp.is_some() || role.ep.is_some()));
        }
    }
}
