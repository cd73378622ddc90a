//! Brings the experts of a plan to this rank in the background, layer by layer, while the group steps on.
//!
//! An expert comes from this rank itself, from a peer that holds it under the map before the plan (from its GPU straight to
//! this one, else through both hosts), or from the checkpoint. Nothing is put into a slot here: the step thread does that
//! when all ranks have staged a layer.

use std::sync::Arc;

use heliostat_engine::ep::{ExpertWeights, SharedSlots, Slot, Topology};
use heliostat_engine::eplb::plan::LayerPlan;
use heliostat_engine::model::Expert;
use heliostat_runtime::handle::Handle;

use super::Rank;
use super::borrow::{Borrower, Wanted};
use super::join::ExpertLoader;
use super::link::Command;
use super::plan::OpenPlan;
use crate::messages::{FetchExpert, Moved};

/// Bytes asked for at once. Bounds what a reply occupies in the connection that it shares with other messages.
const CHUNK_BYTES: u64 = 8 << 20;

/// What staging needs.
pub(super) struct Stager {
    pub(super) borrower: Borrower,
    pub(super) topology: Topology,
    pub(super) rank: usize,
    pub(super) slots: SharedSlots,
    pub(super) loader: ExpertLoader,
    /// Layers that may wait for their commit.
    pub(super) ahead: u32,
}

impl Stager {
    /// Stages all layers in order. A layer that cannot be staged ends the plan on all ranks.
    pub(super) async fn run(self, plan: Arc<OpenPlan>) {
        for layer in &plan.plan.layers {
            if !plan.room(self.ahead).await {
                return;
            }
            match self.stage(plan.plan.epoch, layer).await {
                Ok((contents, moved)) => plan.stage(contents, moved),
                Err(why) => {
                    tracing::error!(epoch = plan.plan.epoch, layer = layer.layer, "cannot stage: {why}");
                    plan.fail(why);
                    self.borrower.link.send(Command::Abandon(plan.plan.epoch));
                    return;
                }
            }
            self.borrower.link.ring();
        }
    }

    async fn stage(&self, plan: u64, layer: &LayerPlan) -> Result<(Vec<(usize, Slot)>, Moved), String> {
        let mut moved = Moved::default();
        let mut contents: Vec<(usize, Slot)> = Vec::new();
        let Some(ep) = self.topology.role(self.rank).ep else {
            return Ok((contents, moved));
        };
        let moe_layer = layer.layer as usize;
        let present = self.slots.read().logical(moe_layer);
        let wanted = &layer.physical_to_logical[ep * present.len()..][..present.len()];
        for (slot, (&logical, present)) in wanted.iter().zip(present).enumerate() {
            if present == Some(logical) {
                continue;
            }
            let fetched = contents.iter().find(|(_, content)| content.logical == logical);
            let here = fetched
                .map(|(_, content)| content.weights.clone())
                .or_else(|| self.slots.read().find(moe_layer, logical));
            let weights = match here {
                Some(weights) => {
                    moved.local += 1;
                    weights
                }
                None => {
                    let wanted = Wanted { moe_layer: layer.layer, logical, plan };
                    self.fetch(wanted, &layer.sources(logical, ep as u32), &mut moved).await?
                }
            };
            contents.push((slot, Slot { logical, weights }));
        }
        Ok((contents, moved))
    }

    /// Fetches an expert from the first of the EP ranks `sources` that delivers it whole, else from the checkpoint.
    async fn fetch(
        &self,
        wanted: Wanted,
        sources: &[u32],
        moved: &mut Moved,
    ) -> Result<ExpertWeights, String> {
        let Wanted { moe_layer, logical, .. } = wanted;
        let ranks = || sources.iter().map(|&source| self.topology.rank_of_ep(source as usize));
        for rank in ranks().filter(|&rank| self.borrower.reaches(rank)) {
            match self.borrower.borrow(rank, wanted).await {
                Ok(weights) => {
                    moved.nvlink.count(weights.size_bytes() as u64);
                    return Ok(weights);
                }
                Err(why) => tracing::warn!(rank, moe_layer, logical, "cannot borrow an expert: {why}"),
            }
        }
        for rank in ranks() {
            let peer = self.borrower.system.handle::<Rank>(self.borrower.peers[rank].clone());
            match fetch_from(&peer, moe_layer, logical).await {
                Ok((expert, bytes)) => {
                    moved.host.count(bytes);
                    return self.blocking(move |loader| loader.place(expert)).await;
                }
                Err(why) => tracing::warn!(rank, moe_layer, logical, "cannot fetch an expert: {why}"),
            }
        }
        let weights = self.blocking(move |loader| loader.read(moe_layer as usize, logical)).await?;
        moved.disk.count(weights.size_bytes() as u64);
        Ok(weights)
    }

    /// Reads or copies weights where blocking is allowed.
    async fn blocking(
        &self,
        work: impl FnOnce(&ExpertLoader) -> Result<ExpertWeights, String> + Send + 'static,
    ) -> Result<ExpertWeights, String> {
        let loader = self.loader.clone();
        tokio::task::spawn_blocking(move || work(&loader)).await.map_err(|why| why.to_string())?
    }
}

/// Reads an expert from a peer in chunks and checks that it is the right one and whole.
async fn fetch_from(peer: &Handle<Rank>, moe_layer: u32, logical: u32) -> Result<(Expert, u64), String> {
    let mut bytes: Vec<u8> = Vec::new();
    loop {
        let ask = FetchExpert { moe_layer, logical, offset: bytes.len() as u64, len: CHUNK_BYTES };
        let chunk = peer.ask(ask).await.map_err(|why| why.to_string())?.map_err(|why| why.to_string())?;
        if chunk.bytes.is_empty() && chunk.total > bytes.len() as u64 {
            return Err(format!("the transfer stopped after {} of {} bytes", bytes.len(), chunk.total));
        }
        bytes.extend_from_slice(&chunk.bytes);
        if (bytes.len() as u64) < chunk.total {
            continue;
        }
        let expert = Expert::from_bytes(&bytes).map_err(|why| why.to_string())?;
        if expert.checksum() != chunk.checksum {
            return Err("the checksum does not match".to_owned());
        }
        return Ok((expert, bytes.len() as u64));
    }
}
