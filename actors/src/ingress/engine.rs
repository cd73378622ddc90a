//! The seam between HTTP and the ranks: everything that the ingress asks of them, and all it must be told.
//!
//! The product implements [`EngineLink`] over remote handles; tests put an engine of their own behind it. In the other
//! direction see `on_outputs`, `on_stats`, `on_ranks` and `on_refused` of [`super::Ingress`].

use std::collections::{BTreeMap, BTreeSet};

use heliostat_engine::request::{Request, RequestId};

use crate::deployment::Duty;
use crate::serve::target::Backpressure;
use crate::telemetry::Provenance;

/// What a rank is told.
#[derive(Clone, Debug, PartialEq)]
pub enum RankCommand {
    /// Generate this sequence.
    Submit(Box<Request>),
    /// The same for one whose prompt that other rank has computed: its KV blocks may be taken from there.
    Continue(Box<Request>, u32),
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
    /// Those that take a part of a sequence only.
    pub duties: BTreeMap<u32, Duty>,
}

/// How far a sequence is, where prefill and decode are separated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It has no token yet.
    Prompt,
    /// It has some.
    Output,
}

impl Stage {
    /// Of a sequence with so many tokens of output.
    pub fn of(generated: usize) -> Self {
        if generated == 0 { Self::Prompt } else { Self::Output }
    }
}

impl Ranks {
    /// Whether a rank takes something new.
    pub fn is_open(&self, rank: u32) -> bool {
        self.ready.contains_key(&rank) && !self.closed.contains(&rank)
    }

    /// Adds those of another deployment that serve the same.
    pub fn join(&mut self, others: Self) {
        self.size = self.size.max(others.size);
        self.ready.extend(others.ready);
        self.closed.extend(others.closed);
        self.local.extend(others.local);
        self.missing.extend(others.missing);
        self.duties.extend(others.duties);
    }

    /// Those that take something new.
    pub fn open(&self) -> impl Iterator<Item = u32> {
        self.ready.keys().copied().filter(|rank| !self.closed.contains(rank))
    }

    /// What of a sequence a rank takes.
    pub fn duty(&self, rank: u32) -> Duty {
        self.duties.get(&rank).copied().unwrap_or_default()
    }

    /// Whether a rank takes sequences that are that far.
    pub fn takes(&self, rank: u32, stage: Stage) -> bool {
        match (self.duty(rank), stage) {
            (Duty::Whole, _) | (Duty::Prefill, Stage::Prompt) | (Duty::Decode, Stage::Output) => true,
            (Duty::Prefill, Stage::Output) | (Duty::Decode, Stage::Prompt) => false,
        }
    }

    /// Those that take new requests.
    pub fn doors(&self) -> impl Iterator<Item = u32> {
        self.open().filter(|&rank| self.takes(rank, Stage::Prompt))
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
