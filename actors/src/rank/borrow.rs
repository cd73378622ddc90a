//! Experts from peers' GPUs straight to this rank's: a peer lends an expert, this rank copies it, and gives it back.
//!
//! The messages say where weights lie; the weights themselves never pass a host.

use std::time::Duration;

use heliostat_engine::cuda::PoolError;
use heliostat_engine::ep::{ExpertStore, ExpertWeights};
use heliostat_runtime::handle::{ActorAddr, Handle, ProcessId};
use heliostat_runtime::system::System;

use super::Rank;
use super::link::Link;
use crate::messages::{LendExpert, Lent, NotLent, ReturnExpert};

/// How long a peer may take to say where an expert lies.
const LEND_DEADLINE: Duration = Duration::from_secs(2);

/// What borrowing needs.
#[derive(Clone)]
pub(super) struct Borrower {
    pub(super) system: System,
    /// This rank's process.
    pub(super) me: ProcessId,
    /// The ranks' actors in the present membership.
    pub(super) peers: Vec<ActorAddr>,
    pub(super) store: ExpertStore,
    pub(super) link: Link,
    /// Ranks that are not asked any more.
    pub(super) given_up: Vec<usize>,
}

/// Which expert, and what for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) moe_layer: u32,
    pub(super) logical: u32,
    /// Epoch of the plan; 0: this rank fills its slots.
    pub(super) plan: u64,
}

/// Why an expert was not borrowed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotBorrowed {
    /// The peer does not lend it.
    #[error(transparent)]
    NotLent(NotLent),
    /// The peer could not be asked.
    #[error("the rank did not answer: {0}")]
    Lost(String),
    /// The peer lent another one.
    #[error("expert {1} of MoE layer {0} was lent instead")]
    Another(u32, u32),
    /// It did not arrive.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// A lease that is given back when this is dropped.
struct Loan {
    peer: Handle<Rank>,
    lease: u64,
}

impl Drop for Loan {
    fn drop(&mut self) {
        // A return that is lost costs the peer a place until the lease runs out.
        let _ = self.peer.tell(ReturnExpert { lease: self.lease });
    }
}

impl Borrower {
    /// Nobody to borrow from yet.
    pub(super) fn new(system: &System, store: ExpertStore, link: Link) -> Self {
        let (peers, given_up) = (Vec::new(), Vec::new());
        Self { me: system.process(), system: system.clone(), peers, store, link, given_up }
    }

    /// Whether experts of that rank can be copied from its GPU.
    pub(super) fn reaches(&self, rank: usize) -> bool {
        self.store.reaches(rank) && !self.given_up.contains(&rank)
    }

    /// Asks that rank no more.
    pub(super) fn give_up(&mut self, rank: usize) {
        self.given_up.push(rank);
    }

    /// Copies an expert from the GPU of `rank`.
    ///
    /// # Errors
    /// The peer does not lend it, is gone or lent another one, or it arrived damaged.
    pub(super) async fn borrow(&self, rank: usize, wanted: Wanted) -> Result<ExpertWeights, NotBorrowed> {
        let lost = |why: &dyn std::fmt::Display| NotBorrowed::Lost(why.to_string());
        let addr = self.peers.get(rank).ok_or_else(|| lost(&"it is not connected"))?.clone();
        let peer = self.system.handle::<Rank>(addr).with_deadline(LEND_DEADLINE);
        let Wanted { moe_layer, logical, plan } = wanted;
        let ask = LendExpert { moe_layer, logical, plan, borrower: self.me };
        let answer = peer.ask(ask).await.map_err(|why| lost(&why))?;
        let Lent { lease, moe_layer, logical, place } = answer.map_err(NotBorrowed::NotLent)?;
        let loan = Loan { peer, lease };
        // The id travels with the weights: a mix-up of slots is noticed here and not in the answers.
        if (moe_layer, logical) != (wanted.moe_layer, wanted.logical) {
            return Err(NotBorrowed::Another(moe_layer, logical));
        }
        let store = self.store.clone();
        let copied = tokio::task::spawn_blocking(move || {
            let copied = store.borrow(rank, place);
            drop(loan);
            copied
        });
        let copied = copied.await.map_err(|why| lost(&why))?;
        // A rank whose device is lost ends.
        let copied = copied.inspect_err(|why| {
            if why.is_fatal() {
                self.link.device_failed(why.to_string())
            }
        });
        Ok(copied?)
    }
}
