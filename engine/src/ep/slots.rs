//! The expert weights that one EP rank owns, by layer and local slot.
//!
//! A slot is an address: EP rank g owns physical slots [g*S, (g+1)*S) of every layer for ever. What lies in a slot
//! changes by [`Slots::replace`], between two steps. Weights are shared, not copied: two slots with the same expert,
//! a staged expert and one that a peer is fetching cost one copy.

use std::sync::{Arc, RwLock, RwLockReadGuard};

use heliostat_kernels::cuda::CudaError;

use crate::cuda::{ExpertPool, LentPlace, PoolError, PooledExpert};
use crate::model::Expert;

/// One expert's weights, wherever they lie. Clones share them.
#[derive(Clone, Debug)]
pub enum ExpertWeights {
    /// In this process's memory.
    Host(Arc<Expert>),
    /// In a pool on a GPU.
    Cuda(Arc<PooledExpert>),
}

impl ExpertWeights {
    /// The weights in this process's memory, copied there if need be. Blocks.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn to_host(&self) -> Result<Arc<Expert>, CudaError> {
        match self {
            Self::Host(expert) => Ok(Arc::clone(expert)),
            Self::Cuda(pooled) => pooled.to_host().map(Arc::new),
        }
    }

    /// What another GPU has to know to copy them while this keeps them where they are; `None` on the host.
    pub fn lent(&self) -> Option<LentPlace> {
        match self {
            Self::Host(_) => None,
            Self::Cuda(pooled) => pooled.lent(),
        }
    }

    /// Bytes of the weights.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Host(expert) => expert.size_bytes(),
            Self::Cuda(pooled) => pooled.size_bytes(),
        }
    }

    /// Whether both are one and the same copy.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Host(a), Self::Host(b)) => Arc::ptr_eq(a, b),
            (Self::Cuda(a), Self::Cuda(b)) => Arc::ptr_eq(a, b),
            (Self::Host(_), Self::Cuda(_)) | (Self::Cuda(_), Self::Host(_)) => false,
        }
    }
}

/// Where a rank keeps expert weights.
#[derive(Clone, Debug)]
pub enum ExpertStore {
    /// In this process's memory.
    Host,
    /// On a GPU.
    Cuda(ExpertPool),
}

impl ExpertStore {
    /// Takes in an expert that was read or fetched. Blocks while it is copied.
    ///
    /// # Errors
    /// The GPU has no place left, or failed.
    pub fn place(&self, expert: Expert) -> Result<ExpertWeights, PoolError> {
        match self {
            Self::Host => Ok(ExpertWeights::Host(Arc::new(expert))),
            Self::Cuda(pool) => pool.put(&expert).map(|pooled| ExpertWeights::Cuda(Arc::new(pooled))),
        }
    }

    /// Whether experts of `rank` can be copied from its GPU to this one.
    pub fn reaches(&self, rank: usize) -> bool {
        match self {
            Self::Host => false,
            Self::Cuda(pool) => pool.reaches(rank),
        }
    }

    /// Copies an expert that `rank` lends, from its GPU to this one. Blocks until it is there.
    ///
    /// # Errors
    /// Those of [`ExpertPool::borrow`].
    pub fn borrow(&self, rank: usize, lent: LentPlace) -> Result<ExpertWeights, PoolError> {
        match self {
            Self::Host => Err(PoolError::OutOfReach(rank)),
            Self::Cuda(pool) => pool.borrow(rank, lent).map(|pooled| ExpertWeights::Cuda(Arc::new(pooled))),
        }
    }
}

/// What lies in one slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Logical expert. Travels with the weights and is asserted on arrival.
    pub logical: u32,
    /// Its weights.
    pub weights: ExpertWeights,
}

/// A slot that should hold weights does not, or holds others.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// The layer or slot does not exist on this rank.
    #[error("MoE layer {layer} has no local slot {slot} on this rank")]
    NoSuchSlot {
        /// MoE layer index.
        layer: usize,
        /// Local slot index.
        slot: usize,
    },
    /// The slot is empty.
    #[error("local slot {slot} of MoE layer {layer} holds no weights")]
    Empty {
        /// MoE layer index.
        layer: usize,
        /// Local slot index.
        slot: usize,
    },
}

/// The slots of one EP rank.
#[derive(Debug, Default)]
pub struct Slots {
    layers: Vec<Vec<Option<Slot>>>,
}

impl Slots {
    /// Empty slots: `layers` MoE layers of `per_layer` slots.
    pub fn new(layers: usize, per_layer: usize) -> Self {
        Self { layers: vec![vec![None; per_layer]; layers] }
    }

    /// What lies in a slot.
    pub fn get(&self, layer: usize, slot: usize) -> Result<&Slot, SlotError> {
        let place = self.layers.get(layer).and_then(|slots| slots.get(slot));
        place.ok_or(SlotError::NoSuchSlot { layer, slot })?.as_ref().ok_or(SlotError::Empty { layer, slot })
    }

    /// A local copy of a logical expert, wherever it lies in the layer.
    pub fn find(&self, layer: usize, logical: u32) -> Option<ExpertWeights> {
        let slots = self.layers.get(layer)?;
        slots.iter().flatten().find(|slot| slot.logical == logical).map(|slot| slot.weights.clone())
    }

    /// Puts weights into a slot.
    pub fn replace(&mut self, layer: usize, slot: usize, content: Slot) -> Result<(), SlotError> {
        let place = self.layers.get_mut(layer).and_then(|slots| slots.get_mut(slot));
        *place.ok_or(SlotError::NoSuchSlot { layer, slot })? = Some(content);
        Ok(())
    }

    /// Logical experts of a layer by local slot; `None` for an empty slot.
    pub fn logical(&self, layer: usize) -> Vec<Option<u32>> {
        let slots = self.layers.get(layer).map_or(&[][..], Vec::as_slice);
        slots.iter().map(|slot| slot.as_ref().map(|slot| slot.logical)).collect()
    }
}

/// Slots shared by the rank's step thread, its stager and the peers that fetch from it.
#[derive(Clone, Debug, Default)]
pub struct SharedSlots(Arc<RwLock<Slots>>);

impl SharedSlots {
    /// Shares `slots`.
    pub fn new(slots: Slots) -> Self {
        Self(Arc::new(RwLock::new(slots)))
    }

    /// Reads; held for one layer's computation at most.
    pub fn read(&self) -> RwLockReadGuard<'_, Slots> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts weights into slots of one layer, all at once for readers.
    pub fn replace(&self, layer: usize, contents: Vec<(usize, Slot)>) -> Result<(), SlotError> {
        let mut slots = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        contents.into_iter().try_for_each(|(slot, content)| slots.replace(layer, slot, content))
    }
}
