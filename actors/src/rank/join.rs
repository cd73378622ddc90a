//! The first exchange of a membership epoch: all ranks agree on one layout.
//!
//! A rank may have committed a layer that another, cut off at that moment, has not: whoever has committed saw that
//! all had staged it, so the furthest state is always one that every rank can reach. A rank that starts anew brings
//! the oldest state and takes that of the others.

use std::sync::Arc;

use bincode::{Decode, Encode};
use heliostat_engine::checkpoint::Checkpoint;
use heliostat_engine::config::ModelConfig;
use heliostat_engine::cuda::PoolOffer;
use heliostat_engine::ep::{ExpertStore, ExpertWeights, PlanProgress, SharedSlots, Slot};
use heliostat_engine::eplb::map::Layout;
use heliostat_engine::model::{ExchangeError, Expert, load_expert};
use heliostat_kernels::fabric::{Fabric, FabricError, Kind, Tag};

/// What a rank brings.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub(super) struct JoinState {
    /// Where it stands.
    pub(super) progress: PlanProgress,
    /// Epoch of a plan that is open here; 0 for none.
    pub(super) open: u64,
    /// Its layout.
    pub(super) layout: Layout,
    /// Names its GPU's memory to the other ranks; empty on a CPU device.
    pub(super) heap: Vec<u8>,
    /// Names its GPU's expert weights, where others may copy them.
    pub(super) pool: Option<PoolOffer>,
    /// Rounds of its GPU's exchange were counted under epochs up to this one.
    pub(super) exchange: u64,
    /// Names a new communicator, if it is to make one; else empty.
    pub(super) nccl: Vec<u8>,
}

/// What all ranks take.
#[derive(Debug, PartialEq)]
pub(super) struct Joined {
    pub(super) progress: PlanProgress,
    pub(super) layout: Layout,
    /// By rank.
    pub(super) heaps: Vec<Vec<u8>>,
    /// By rank.
    pub(super) pools: Vec<Option<PoolOffer>>,
    /// Epoch under which rounds of the exchange are counted from now on.
    pub(super) exchange: u64,
    /// Names the communicator of this epoch; empty without NCCL.
    pub(super) nccl: Vec<u8>,
}

/// Exchanges states with all ranks and returns the one that all take.
pub(super) fn agree(fabric: &mut Fabric, size: usize, mine: &JoinState) -> Result<Joined, ExchangeError> {
    let tag = Tag { kind: Kind::Header, step: 0, layer: 0 };
    let bytes = bincode::encode_to_vec(mine, super::codec())
        .map_err(|why| ExchangeError::Other(format!("cannot encode the layout: {why}")))?;
    for rank in 0..size {
        fabric.send(rank, tag, &[&bytes])?;
    }
    let mut states = Vec::with_capacity(size);
    for rank in 0..size {
        let frame = fabric.recv(rank, tag)?;
        let (state, _) = bincode::decode_from_slice::<JoinState, _>(frame.payload(), super::codec())
            .map_err(|why| ExchangeError::Other(format!("rank {rank} sent a bad join state: {why}")))?;
        states.push(state);
    }
    choose(states).map_err(ExchangeError::Other)
}

/// Waits until all ranks hold the experts of their slots. One that starts anew may read for minutes; `slow` hears of a
/// rank each time that it has said nothing for as long as a call may take.
pub(super) fn await_filled(
    fabric: &mut Fabric,
    size: usize,
    mut slow: impl FnMut(u32),
) -> Result<(), ExchangeError> {
    let tag = Tag { kind: Kind::Header, step: 0, layer: 1 };
    for rank in 0..size {
        fabric.send(rank, tag, &[&[]])?;
    }
    for rank in 0..size {
        loop {
            match fabric.recv(rank, tag) {
                Err(FabricError::Timeout { .. }) => slow(rank as u32),
                other => {
                    other?;
                    break;
                }
            }
        }
    }
    Ok(())
}

/// The furthest state; every plan that was open anywhere counts as closed.
fn choose(states: Vec<JoinState>) -> Result<Joined, String> {
    let shape = states[0].layout.shape();
    if let Some(rank) = states.iter().position(|state| state.layout.shape() != shape) {
        return Err(format!("rank {rank} has another number of experts, slots or ranks than rank 0"));
    }
    let heaps = states.iter().map(|state| state.heap.clone()).collect();
    let pools = states.iter().map(|state| state.pool.clone()).collect();
    let exchange = states.iter().map(|state| state.exchange).max().unwrap_or(0) + 1;
    let closed = states.iter().map(|state| state.progress.closed.max(state.open)).max().unwrap_or(0);
    let nccl = states.iter().map(|state| &state.nccl).find(|id| !id.is_empty()).cloned().unwrap_or_default();
    let furthest = |state: &JoinState| (state.progress.epoch, state.progress.committed);
    let best = states.into_iter().reduce(|a, b| if furthest(&b) > furthest(&a) { b } else { a });
    let best = best.ok_or("a group has at least one rank")?;
    let progress = PlanProgress { closed: closed.max(best.progress.epoch), ..best.progress };
    Ok(Joined { progress, layout: best.layout, heaps, pools, exchange, nccl })
}

/// Puts into the slots of EP rank `ep` what `layout` says, fetching only what is not there.
pub(super) fn fill_slots(
    layout: &Layout,
    ep: usize,
    slots: &SharedSlots,
    mut fetch: impl FnMut(usize, u32) -> Result<ExpertWeights, String>,
) -> Result<(), String> {
    for (moe_layer, map) in layout.layers().iter().enumerate() {
        let present = slots.read().logical(moe_layer);
        let mut contents: Vec<(usize, Slot)> = Vec::new();
        for (slot, &logical) in map.experts_of_rank(ep as u32).iter().enumerate() {
            if present.get(slot) == Some(&Some(logical)) {
                continue;
            }
            let fetched = contents.iter().find(|(_, content)| content.logical == logical);
            let here = fetched
                .map(|(_, content)| content.weights.clone())
                .or_else(|| slots.read().find(moe_layer, logical));
            let weights = here.map_or_else(|| fetch(moe_layer, logical), Ok)?;
            contents.push((slot, Slot { logical, weights }));
        }
        slots.replace(moe_layer, contents).map_err(|why| why.to_string())?;
    }
    Ok(())
}

/// Brings experts to where the rank keeps them.
#[derive(Clone)]
pub(super) struct ExpertLoader {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) config: Arc<ModelConfig>,
    pub(super) store: ExpertStore,
}

impl ExpertLoader {
    /// Reads an expert from the checkpoint.
    ///
    /// # Errors
    /// The checkpoint is damaged, or the rank has no room.
    pub(super) fn read(&self, moe_layer: usize, logical: u32) -> Result<ExpertWeights, String> {
        let expert = load_expert(&self.checkpoint, &self.config, moe_layer, logical as usize);
        self.place(expert.map_err(|why| why.to_string())?)
    }

    /// Takes in an expert that a peer sent.
    pub(super) fn place(&self, expert: Expert) -> Result<ExpertWeights, String> {
        self.store.place(expert).map_err(|why| why.to_string())
    }
}

#[cfg(test)]
mod tests {
    use heliostat_engine::eplb::map::{MapShape, PlacementStrategy};

    use super::*;

    fn state(epoch: u64, committed: u32, closed: u64, open: u64) -> JoinState {
        let shape = MapShape { experts: 4, slots: 8, ranks: 2 };
        let strategy = if epoch == 0 { PlacementStrategy::Linear } else { PlacementStrategy::RoundRobin };
        let layout = Layout::initial(2, shape, strategy).unwrap();
        let progress = PlanProgress { epoch, committed, closed };
        let nccl = if epoch == 2 { vec![7] } else { Vec::new() };
        JoinState { progress, open, layout, heap: vec![epoch as u8], pool: None, exchange: epoch, nccl }
    }

    #[test]
    fn the_furthest_state_wins_and_open_plans_are_closed() {
        let furthest = state(3, 2, 2, 3);
        let states = vec![state(0, 0, 0, 0), state(3, 1, 2, 3), furthest.clone(), state(2, 9, 2, 4)];
        let joined = choose(states).unwrap();
        assert_eq!(joined.progress, PlanProgress { epoch: 3, committed: 2, closed: 4 });
        assert_eq!(joined.layout, furthest.layout);
        assert_eq!((joined.heaps, joined.exchange), (vec![vec![0], vec![3], vec![3], vec![2]], 4));
        assert_eq!(joined.nccl, [7]);
    }

    #[test]
    fn ranks_of_another_shape_are_refused() {
        let mut other = state(0, 0, 0, 0);
        let shape = MapShape { experts: 4, slots: 4, ranks: 2 };
        other.layout = Layout::initial(2, shape, PlacementStrategy::Linear).unwrap();
        assert!(choose(vec![state(0, 0, 0, 0), other]).unwrap_err().contains("rank 1"));
    }
}
