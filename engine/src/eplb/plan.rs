//! From one layout to the next: which rank must receive which expert, and from whom.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::map::{ExpertMap, Layout, MapError};

/// The layers whose maps change with a map epoch. Layers are staged and committed in this order, one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Plan {
    /// The map epoch that it leads to.
    pub epoch: u64,
    /// The layers that change.
    pub layers: Vec<LayerPlan>,
}

/// The change of one layer's map.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Index among the MoE layers.
    pub layer: u32,
    /// The new map: the expert of each slot.
    pub physical_to_logical: Vec<u32>,
    /// The map that it replaces: where experts can be copied from.
    pub previous: Vec<u32>,
    /// Slots of one EP rank.
    pub slots_per_rank: u32,
}

/// A slot that gets another expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receive {
    /// The slot.
    pub slot: u32,
    /// What it will hold.
    pub logical: u32,
    /// A slot of the same rank that holds the expert already: a local copy. It may be overwritten by this plan too,
    /// so copies must be taken before any slot changes.
    pub local: Option<u32>,
    /// EP ranks that hold the expert, best first; empty only when `local` is set.
    pub sources: Vec<u32>,
}

impl Plan {
    /// The layers in which `next` differs from `present`. Fails when the layouts differ in shape or in layers.
    pub fn between(epoch: u64, present: &Layout, next: &Layout) -> Result<Self, MapError> {
        if present.shape() != next.shape() || present.layers().len() != next.layers().len() {
            return Err(MapError::Layers("the new layout differs in shape from the present one".into()));
        }
        let pairs = (0u32..).zip(present.layers().iter().zip(next.layers()));
        let changed = pairs.filter(|(_, (old, new))| old != new);
        let layers = changed.map(|(layer, (old, new))| LayerPlan::between(layer, old, new)).collect();
        Ok(Self { epoch, layers })
    }

    /// Fails when the plan does not lead from `present` to a valid layout: a rank refuses such a plan.
    pub fn check(&self, present: &Layout) -> Result<(), MapError> {
        let shape = present.shape();
        for plan in &self.layers {
            let layer = plan.layer as usize;
            let Some(map) = present.layers().get(layer) else {
                let layers = present.layers().len();
                return Err(MapError::Layers(format!("the plan changes MoE layer {layer} of {layers}")));
            };
            if plan.slots_per_rank != shape.slots_per_rank() || plan.previous != map.physical_to_logical() {
                return Err(MapError::Layers(format!(
                    "the plan for MoE layer {layer} was made for another layout"
                )));
            }
            ExpertMap::new(shape, plan.physical_to_logical.clone())
                .map_err(|source| MapError::Layer { layer, source: Box::new(source) })?;
        }
        Ok(())
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Experts that ranks must get from other ranks, over all layers and ranks.
    pub fn num_receives(&self) -> usize {
        self.layers.iter().map(LayerPlan::num_receives).sum()
    }
}

impl LayerPlan {
    /// The change from `old` to `new`, which have one shape.
    pub fn between(layer: u32, old: &ExpertMap, new: &ExpertMap) -> Self {
        assert_eq!(old.shape(), new.shape(), "a layer's map keeps its shape");
        Self {
            layer,
            physical_to_logical: new.physical_to_logical().to_vec(),
            previous: old.physical_to_logical().to_vec(),
            slots_per_rank: old.shape().slots_per_rank(),
        }
    }

    /// EP ranks other than `ep_rank` that hold `logical` before the change. The order differs from rank to rank, so
    /// that those who need a popular expert do not all ask the same one.
    pub fn sources(&self, logical: u32, ep_rank: u32) -> Vec<u32> {
        let mut ranks: Vec<u32> = (0..)
            .zip(&self.previous)
            .filter(|(_, expert)| **expert == logical)
            .map(|(slot, _): (u32, _)| slot / self.slots_per_rank)
            .filter(|rank| *rank != ep_rank)
            .collect();
        ranks.dedup();
        if !ranks.is_empty() {
            let first = (ep_rank as usize + logical as usize) % ranks.len();
            ranks.rotate_left(first);
        }
        ranks
    }

    /// The slots of `ep_rank` that change, ascending.
    pub fn receives(&self, ep_rank: u32) -> Vec<Receive> {
        let first = ep_rank * self.slots_per_rank;
        let own = first as usize..(first + self.slots_per_rank) as usize;
        let (old, new) = (&self.previous[own.clone()], &self.physical_to_logical[own]);
        let changed = (first..).zip(old.iter().zip(new)).filter(|(_, (old, new))| old != new);
        changed
            .map(|(slot, (_, &logical))| {
                let local = (first..).zip(old).find(|(_, expert)| **expert == logical).map(|(slot, _)| slot);
                Receive { slot, logical, local, sources: self.sources(logical, ep_rank) }
            })
            .collect()
    }

    /// Experts that ranks must get from other ranks; one that fills two slots of a rank travels once.
    pub fn num_receives(&self) -> usize {
        let size = self.slots_per_rank as usize;
        let pairs = self.previous.chunks(size).zip(self.physical_to_logical.chunks(size));
        pairs
            .map(|(old, new)| {
                let mut missing: Vec<u32> = new.iter().filter(|e| !old.contains(e)).copied().collect();
                missing.sort_unstable();
                missing.dedup();
                missing.len()
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eplb::map::{MapShape, PlacementStrategy};

    #[test]
    fn receives_prefer_what_the_rank_has_and_spread_over_sources() {
        let shape = MapShape { experts: 4, slots: 6, ranks: 3 };
        let old = Layout::initial(2, shape, PlacementStrategy::Linear).unwrap(); // 01 23 01
        let mut new = old.clone();
        new.set_layer(1, ExpertMap::new(shape, vec![1, 0, 0, 3, 2, 2]).unwrap()).unwrap();
        let plan = Plan::between(7, &old, &new).unwrap();
        assert_eq!((plan.epoch, plan.layers.len(), plan.layers[0].layer), (7, 1, 1));
        let layer = &plan.layers[0];
        let receive = |slot, logical, local, sources| Receive { slot, logical, local, sources };
        assert_eq!(layer.receives(0), [receive(0, 1, Some(1), vec![2]), receive(1, 0, Some(0), vec![2])]);
        assert_eq!(layer.receives(1), [receive(2, 0, None, vec![2, 0])]);
        assert_eq!(layer.receives(2), [receive(4, 2, None, vec![1]), receive(5, 2, None, vec![1])]);
        assert_eq!(
            plan.num_receives(),
            2,
            "swapping two local slots is free, an expert travels once to a rank"
        );
        assert!(Plan::between(8, &new, &new).unwrap().is_empty());

        assert_eq!(plan.check(&old), Ok(()));
        assert!(plan.check(&new).unwrap_err().to_string().contains("another layout"));
        let mut broken = plan.clone();
        broken.layers[0].physical_to_logical = vec![0, 0, 0, 1, 2, 2];
        assert_eq!(broken.check(&old).unwrap_err().to_string(), "MoE layer 1: expert 3 has no slot");
        broken.layers[0].layer = 2;
        assert!(broken.check(&old).is_err());
    }
}
