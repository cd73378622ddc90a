//! Brings the experts of the layout that was agreed on to a rank that joins: what it has staged, then what a peer's GPU
//! holds, then the checkpoint. Peers lend while they wait in their own joins.

use heliostat_engine::ep::{ExpertWeights, Topology};
use heliostat_engine::eplb::map::Layout;
use tokio::runtime::Handle;

use super::borrow::{Borrower, NotBorrowed, Wanted};
use super::join::ExpertLoader;
use super::plan::OpenPlan;
use crate::messages::Moved;

/// One filling of a rank's slots.
pub(super) struct Refill<'a> {
    pub(super) topology: &'a Topology,
    pub(super) rank: usize,
    pub(super) layout: &'a Layout,
    /// A plan that the join ends.
    pub(super) staged: Option<&'a OpenPlan>,
    pub(super) loader: &'a ExpertLoader,
    /// Where its waits run.
    pub(super) runtime: &'a Handle,
    pub(super) borrower: Borrower,
    pub(super) moved: Moved,
}

impl Refill<'_> {
    /// Brings one expert. Blocks.
    ///
    /// # Errors
    /// Neither a peer nor the checkpoint has it whole, or there is no room for it.
    pub(super) fn bring(&mut self, moe_layer: usize, logical: u32) -> Result<ExpertWeights, String> {
        if let Some(weights) = self.staged.and_then(|plan| plan.find_staged(moe_layer, logical)) {
            self.moved.local += 1;
            return Ok(weights);
        }
        let wanted = Wanted { moe_layer: moe_layer as u32, logical, plan: 0 };
        for rank in self.holders(moe_layer, logical) {
            match self.runtime.block_on(self.borrower.borrow(rank, wanted)) {
                Ok(weights) => {
                    self.moved.nvlink.count(weights.size_bytes() as u64);
                    return Ok(weights);
                }
                // It starts anew as well.
                Err(NotBorrowed::NotLent(why)) => tracing::debug!(rank, moe_layer, logical, "{why}"),
                Err(why) => {
                    tracing::warn!(rank, moe_layer, logical, "cannot borrow an expert: {why}");
                    // The next ones would take as long to fail.
                    self.borrower.give_up(rank);
                }
            }
        }
        let weights = self.loader.read(moe_layer, logical)?;
        self.moved.disk.count(weights.size_bytes() as u64);
        Ok(weights)
    }

    /// Other ranks that hold the expert under the layout and can be reached, in an order that differs from rank to rank.
    fn holders(&self, moe_layer: usize, logical: u32) -> Vec<usize> {
        let map = self.layout.layer(moe_layer);
        let ep = 0..self.topology.ep;
        let mut ranks: Vec<usize> = ep
            .filter(|&ep| map.experts_of_rank(ep as u32).contains(&logical))
            .map(|ep| self.topology.rank_of_ep(ep))
            .filter(|&rank| rank != self.rank && self.borrower.reaches(rank))
            .collect();
        if !ranks.is_empty() {
            let first = (self.rank + logical as usize) % ranks.len();
            ranks.rotate_left(first);
        }
        ranks
    }
}
