//! The seam between HTTP and the ranks: everything that the ingress asks of them, and all it must be told.
//!
//! The product implements [`EngineLink`] over remote handles; tests put an engine of their own behind it. In the other
//! direction see `on_outputs`, `on_stats`, `on_ranks` and `on_refused` of [`super::Ingress`].

use std::collections::{BTreeMap, BTreeSet};

use heliostat_engine::request::{Request, RequestId};

use crate::serve::target::Backpressure;
use crate::telemetry::Provenance;

/// What a rank is told.
#[derive(Clone, Debug, PartialEq)]
pub enum RankCommand {
    /// Generate this sequence.
    Submit(Box<Request>),
    /// Stop this sequence and free its blocks. Unknown ones are ignored.
    Abort(RequestId),
}

/// A command that could not be handed over, with why.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank} is unavailable: {cause:?}")]
pub struct Unavailable {
    /// The rank.
    pub rank: u32,
    /// The command, handed back.
    pub command: Box<RankCommand>,
    /// Why.
    pub cause: Refusal,
}

/// Why a rank did not take a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its queue or mailbox is full: another rank may take it, or this one later.
    Full,
    /// There is no such rank at present.
    Gone,
    /// No rank ever could; says why.
    Unservable(String),
}

/// Hands commands to ranks. Commands to one rank arrive in order, or not at all.
pub trait EngineLink: Send + 'static {
    /// Sends without waiting; `from` is the request that the command belongs to. It is called with the ingress locked: it
    /// must neither block nor call back into it.
    ///
    /// # Errors
    /// The rank cannot be reached or its mailbox is full; the command comes back. A refusal that is known only later
    /// is reported by `Ingress::on_refused`.
    fn send(&self, rank: u32, command: RankCommand, from: Provenance) -> Result<(), Unavailable>;
}

/// Which ranks can take requests, of one group or of several that serve the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranks {
    /// DP ranks of a group, ready or not.
    pub size: u32,
    /// Those that are ready, each with its incarnation: a rank whose incarnation changed has forgotten its sequences.
    pub ready: BTreeMap<u32, u64>,
    /// Those that finish what they have and take nothing new.
    pub closed: BTreeSet<u32>,
    /// Their numbers in their groups, where these are others: what clients call them.
    pub local: BTreeMap<u32, u32>,
    /// What is still waited for, in words for people; empty when a group is complete.
    pub missing: Vec<String>,
}

impl Ranks {
    /// Whether a rank takes something new.
    pub fn is_open(&self, rank: u32) -> bool {
        self.ready.contains_key(&rank) && !self.closed.contains(&rank)
    }

    /// Those that take something new.
    pub fn open(&self) -> impl Iterator<Item = u32> {
        self.ready.keys().copied().filter(|rank| !self.closed.contains(rank))
    }

    /// The number of a rank in its group.
    pub fn local(&self, rank: u32) -> u32 {
        self.local.get(&rank).copied().unwrap_or(rank)
    }
}

/// How many requests may be there, beside what the queues of the ranks take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// In flight at once; none: no bound.
    pub in_flight_max: Option<usize>,
    /// Whether requests may wait where no rank takes any: one is started for them.
    pub may_wait: bool,
    /// How a request is refused for which there is no room.
    pub backpressure: Option<Backpressure>,
}
