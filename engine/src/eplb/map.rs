//! Where experts live: for each MoE layer, which logical expert each physical slot holds.
//!
//! A slot id is an address: rank `g` owns slots `[g * S, (g + 1) * S)` with `S = slots / ranks`. Maps are immutable and
//! valid by construction, also when they arrive over the wire.

use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use serde::{Deserialize, Serialize};

/// The sizes that all layers of a layout share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct MapShape {
    /// Logical experts of a layer.
    pub experts: u32,
    /// Physical slots of a layer over all ranks: the logical experts and the redundant ones.
    pub slots: u32,
    /// Expert-parallel ranks.
    pub ranks: u32,
}

impl MapShape {
    /// Fails when the slots cannot hold every expert or do not divide evenly among the ranks.
    pub fn validate(self) -> Result<Self, MapError> {
        let Self { experts, slots, ranks } = self;
        if experts == 0 || ranks == 0 {
            return Err(MapError::Empty { experts, ranks });
        }
        if slots < experts {
            return Err(MapError::TooFewSlots { experts, slots });
        }
        if !slots.is_multiple_of(ranks) {
            let redundant = slots.next_multiple_of(ranks) - experts;
            return Err(MapError::Uneven { slots, ranks, redundant });
        }
        Ok(self)
    }

    /// Slots of one rank.
    pub fn slots_per_rank(self) -> u32 {
        self.slots / self.ranks
    }

    /// The rank that owns `slot`.
    pub fn rank_of(self, slot: u32) -> u32 {
        slot / self.slots_per_rank()
    }
}

/// What is wrong with a map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// No experts or no ranks.
    #[error("an expert map needs at least one expert and one rank, got {experts} experts and {ranks} ranks")]
    Empty {
        /// Logical experts.
        experts: u32,
        /// Ranks.
        ranks: u32,
    },
    /// Some expert would have no slot.
    #[error("{slots} slots cannot hold {experts} experts: raise num_redundant_experts")]
    TooFewSlots {
        /// Logical experts.
        experts: u32,
        /// Slots over all ranks.
        slots: u32,
    },
    /// Ranks would own different numbers of slots.
    #[error(
        "{slots} slots do not divide evenly among {ranks} ranks: set num_redundant_experts to {redundant}"
    )]
    Uneven {
        /// Slots over all ranks.
        slots: u32,
        /// Ranks.
        ranks: u32,
        /// The next number of redundant experts that works.
        redundant: u32,
    },
    /// The map has the wrong number of slots.
    #[error("the map has {found} slots, {expected} were expected")]
    WrongLength {
        /// Entries of the map.
        found: usize,
        /// Slots of the shape.
        expected: u32,
    },
    /// A slot names an expert that the model lacks.
    #[error("slot {slot} holds expert {expert}, but the model has experts 0 to {last}")]
    NoSuchExpert {
        /// The slot.
        slot: usize,
        /// What it holds.
        expert: i64,
        /// The last expert of the model.
        last: u32,
    },
    /// An expert has no slot, so its tokens could go nowhere.
    #[error("expert {expert} has no slot")]
    Missing {
        /// The expert.
        expert: u32,
    },
    /// One of the errors above, in one layer of a layout.
    #[error("MoE layer {layer}: {source}")]
    Layer {
        /// Index of the layer among the MoE layers.
        layer: usize,
        /// What is wrong with it.
        source: Box<MapError>,
    },
    /// Likewise, in one row of a file.
    #[error("layer {layer}: {source}")]
    Row {
        /// Index of the layer in the model.
        layer: usize,
        /// What is wrong with it.
        source: Box<MapError>,
    },
    /// A layout has no layers, or layers of different shapes.
    #[error("the layout needs one map of the same shape for each MoE layer: {0}")]
    Layers(String),
    /// An initial layout in JSON is not of the expected form.
    #[error("not an expert layout of SGLang's form {{\"physical_to_logical_map\": [[...], ...]}}: {0}")]
    Json(String),
}

/// How experts are laid out before any load is known. vLLM's `expert_placement_strategy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlacementStrategy {
    /// Slot `i` holds expert `i`, then `i mod experts`: neighbours share a rank.
    #[default]
    Linear,
    /// The same sequence dealt out to the ranks one by one: neighbours live on different ranks.
    RoundRobin,
}

/// One layer's map. Every logical expert has at least one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawMap", into = "RawMap")]
pub struct ExpertMap {
    shape: MapShape,
    physical_to_logical: Vec<u32>,
    /// Slots grouped by expert, ascending within one; those of expert `e` are `replicas[starts[e]..starts[e + 1]]`.
    replicas: Vec<u32>,
    starts: Vec<u32>,
}

impl ExpertMap {
    /// Fails when the shape is impossible, a slot names no expert, or an expert has no slot.
    pub fn new(shape: MapShape, physical_to_logical: Vec<u32>) -> Result<Self, MapError> {
        let shape = shape.validate()?;
        if physical_to_logical.len() != shape.slots as usize {
            return Err(MapError::WrongLength { found: physical_to_logical.len(), expected: shape.slots });
        }
        let mut starts = vec![0u32; shape.experts as usize + 1];
        for (slot, &expert) in physical_to_logical.iter().enumerate() {
            if expert >= shape.experts {
                return Err(MapError::NoSuchExpert { slot, expert: expert.into(), last: shape.experts - 1 });
            }
            starts[expert as usize + 1] += 1;
        }
        if let Some(expert) = (0..shape.experts).find(|&e| starts[e as usize + 1] == 0) {
            return Err(MapError::Missing { expert });
        }
        for e in 0..shape.experts as usize {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let mut replicas = vec![0; physical_to_logical.len()];
        for (slot, &expert) in (0u32..).zip(&physical_to_logical) {
            replicas[next[expert as usize] as usize] = slot;
            next[expert as usize] += 1;
        }
        Ok(Self { shape, physical_to_logical, replicas, starts })
    }

    /// The map before any load is known.
    pub fn initial(shape: MapShape, strategy: PlacementStrategy) -> Result<Self, MapError> {
        let shape = shape.validate()?;
        let per_rank = shape.slots_per_rank();
        let place = |slot: u32| match strategy {
            PlacementStrategy::Linear => slot % shape.experts,
            PlacementStrategy::RoundRobin => {
                (slot % per_rank * shape.ranks + slot / per_rank) % shape.experts
            }
        };
        Self::new(shape, (0..shape.slots).map(place).collect())
    }

    /// Its sizes.
    pub fn shape(&self) -> MapShape {
        self.shape
    }

    /// The expert of each slot, `[slots]`.
    pub fn physical_to_logical(&self) -> &[u32] {
        &self.physical_to_logical
    }

    /// The expert in `slot`.
    pub fn expert_in(&self, slot: u32) -> u32 {
        self.physical_to_logical[slot as usize]
    }

    /// The slots that hold `expert`, ascending, at least one.
    pub fn slots_of(&self, expert: u32) -> &[u32] {
        let e = expert as usize;
        &self.replicas[self.starts[e] as usize..self.starts[e + 1] as usize]
    }

    /// How many slots hold `expert`.
    pub fn replica_count(&self, expert: u32) -> u32 {
        self.starts[expert as usize + 1] - self.starts[expert as usize]
    }

    /// Replica counts of all experts, `[experts]`.
    pub fn replica_counts(&self) -> Vec<u32> {
        self.starts.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// The slots of each expert, `[experts][..]`.
    pub fn logical_to_physical(&self) -> Vec<Vec<u32>> {
        (0..self.shape.experts).map(|e| self.slots_of(e).to_vec()).collect()
    }

    /// The rank that owns `slot`.
    pub fn rank_of(&self, slot: u32) -> u32 {
        self.shape.rank_of(slot)
    }

    /// The experts of `rank`, in the order of its slots.
    pub fn experts_of_rank(&self, rank: u32) -> &[u32] {
        let per_rank = self.shape.slots_per_rank() as usize;
        &self.physical_to_logical[rank as usize * per_rank..][..per_rank]
    }

    /// How many ranks can be lost, whichever they are, before some expert has no copy left.
    pub fn losses_survived(&self) -> u32 {
        let ranks_of = |expert: u32| {
            let mut ranks: Vec<u32> = self.slots_of(expert).iter().map(|&slot| self.rank_of(slot)).collect();
            ranks.dedup();
            ranks.len() as u32
        };
        (0..self.shape.experts).map(ranks_of).min().map_or(0, |fewest| fewest - 1)
    }

    /// The slot that serves `expert` for the token that `token_key` names. The same key gives the same slot anywhere;
    /// different keys spread evenly over the replicas.
    pub fn slot_for(&self, expert: u32, token_key: u64) -> u32 {
        let slots = self.slots_of(expert);
        if let &[only] = slots {
            return only;
        }
        // The finaliser of splitmix64, keyed by the expert too, so that two experts of one token do not pick alike.
        let mut x = token_key ^ (u64::from(expert) << 40) ^ 0x9e37_79b9_7f4a_7c15;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        let pick = (u128::from(x) * slots.len() as u128) >> 64;
        slots[pick as usize]
    }

    /// Tokens per slot when each expert's load is spread evenly over its replicas, `[slots]`.
    pub fn slot_loads(&self, expert_loads: &[f32]) -> Vec<f32> {
        self.physical_to_logical
            .iter()
            .map(|&e| expert_loads[e as usize] / self.replica_count(e) as f32)
            .collect()
    }
}

/// The part of a map that is stored and sent; the rest follows from it.
#[derive(Clone, Encode, Decode, Serialize, Deserialize)]
struct RawMap {
    shape: MapShape,
    physical_to_logical: Vec<u32>,
}

impl TryFrom<RawMap> for ExpertMap {
    type Error = MapError;
    fn try_from(raw: RawMap) -> Result<Self, MapError> {
        Self::new(raw.shape, raw.physical_to_logical)
    }
}

impl From<ExpertMap> for RawMap {
    fn from(map: ExpertMap) -> Self {
        Self { shape: map.shape, physical_to_logical: map.physical_to_logical }
    }
}

impl Encode for ExpertMap {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.shape.encode(encoder)?;
        self.physical_to_logical.encode(encoder)
    }
}

impl<C> Decode<C> for ExpertMap {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let raw = RawMap::decode(decoder)?;
        Self::try_from(raw).map_err(|e| DecodeError::OtherString(e.to_string()))
    }
}

impl<'de, C> BorrowDecode<'de, C> for ExpertMap {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}

/// The maps of all MoE layers, of one shape.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Layout {
    layers: Vec<ExpertMap>,
}

impl Layout {
    /// Fails when there is no layer or the shapes differ.
    pub fn new(layers: Vec<ExpertMap>) -> Result<Self, MapError> {
        let Some(first) = layers.first() else {
            return Err(MapError::Layers("it has none".into()));
        };
        let shape = first.shape;
        if let Some(layer) = layers.iter().position(|map| map.shape != shape) {
            return Err(MapError::Layers(format!("MoE layer {layer} differs from layer 0")));
        }
        Ok(Self { layers })
    }

    /// The layout before any load is known.
    pub fn initial(
        moe_layers: usize,
        shape: MapShape,
        strategy: PlacementStrategy,
    ) -> Result<Self, MapError> {
        Self::new(vec![ExpertMap::initial(shape, strategy)?; moe_layers])
    }

    /// The sizes that all layers share.
    pub fn shape(&self) -> MapShape {
        self.layers[0].shape
    }

    /// The maps, by MoE layer.
    pub fn layers(&self) -> &[ExpertMap] {
        &self.layers
    }

    /// The map of one MoE layer.
    pub fn layer(&self, moe_layer: usize) -> &ExpertMap {
        &self.layers[moe_layer]
    }

    /// Replaces the map of one MoE layer; fails when its shape differs.
    pub fn set_layer(&mut self, moe_layer: usize, map: ExpertMap) -> Result<(), MapError> {
        if map.shape != self.shape() {
            return Err(MapError::Layers(format!("the new map of MoE layer {moe_layer} differs in shape")));
        }
        self.layers[moe_layer] = map;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: MapShape = MapShape { experts: 4, slots: 6, ranks: 2 };

    #[test]
    fn initial_maps_follow_the_strategy() {
        let linear = ExpertMap::initial(SHAPE, PlacementStrategy::Linear).unwrap();
        assert_eq!(linear.physical_to_logical(), [0, 1, 2, 3, 0, 1]);
        let dealt = ExpertMap::initial(SHAPE, PlacementStrategy::RoundRobin).unwrap();
        assert_eq!(dealt.physical_to_logical(), [0, 2, 0, 1, 3, 1]);
        assert_eq!(linear.logical_to_physical(), [vec![0, 4], vec![1, 5], vec![2], vec![3]]);
        assert_eq!((linear.replica_counts(), linear.losses_survived()), (vec![2, 2, 1, 1], 0));
        assert_eq!((linear.experts_of_rank(1), linear.rank_of(3)), ([3, 0, 1].as_slice(), 1));
        let double = MapShape { experts: 3, slots: 6, ranks: 2 };
        assert_eq!(ExpertMap::initial(double, PlacementStrategy::Linear).unwrap().losses_survived(), 1);
    }

    #[test]
    fn impossible_maps_are_refused_also_from_the_wire() {
        let why = |shape, slots: &[u32]| ExpertMap::new(shape, slots.to_vec()).unwrap_err().to_string();
        assert!(why(SHAPE, &[0, 1, 2, 3, 0]).contains("5 slots, 6 were expected"));
        assert!(why(SHAPE, &[0, 1, 2, 2, 0, 1]).contains("expert 3 has no slot"));
        assert!(why(SHAPE, &[0, 1, 2, 3, 4, 1]).contains("slot 4 holds expert 4"));
        assert!(why(MapShape { ranks: 4, ..SHAPE }, &[0; 6]).contains("set num_redundant_experts to 4"));
        assert!(why(MapShape { slots: 2, ..SHAPE }, &[0; 2]).contains("raise num_redundant_experts"));

        let wire = bincode::config::standard();
        let map = ExpertMap::initial(SHAPE, PlacementStrategy::Linear).unwrap();
        let mut bytes = bincode::encode_to_vec(&map, wire).unwrap();
        assert_eq!(bincode::decode_from_slice::<ExpertMap, _>(&bytes, wire).unwrap().0, map);
        *bytes.last_mut().unwrap() = 9;
        assert!(bincode::decode_from_slice::<ExpertMap, _>(&bytes, wire).is_err());
        let json = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<ExpertMap>(&json).unwrap(), map);
        assert!(serde_json::from_str::<ExpertMap>(&json.replace("3,0,1]", "3,0,9]")).is_err());
    }

    #[test]
    fn tokens_spread_evenly_over_replicas_and_always_alike() {
        let shape = MapShape { experts: 2, slots: 4, ranks: 4 };
        let map = ExpertMap::new(shape, vec![0, 1, 0, 0]).unwrap();
        let mut counts = [0u32; 4];
        for key in 0..30_000 {
            assert_eq!(map.slot_for(1, key), 1);
            assert_eq!(map.slot_for(0, key), map.slot_for(0, key));
            counts[map.slot_for(0, key) as usize] += 1;
        }
        assert!([0, 2, 3].iter().all(|&slot| counts[slot].abs_diff(10_000) < 300), "{counts:?}");
    }
}
