//! What `GET /api/eplb` and `helio eplb show` show.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::messages::{Moved, PlanEnd, StepTimes};

/// The expert maps in force, the load on them and how they came to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EplbStatus {
    /// Epoch of the last remap of which a layer was committed; 0 for the initial layout.
    pub map_epoch: u64,
    /// Membership epoch of the group.
    pub membership_epoch: u64,
    /// Whether remaps start by themselves.
    pub enabled: bool,
    /// Policy in use.
    pub policy: String,
    /// Steps between two remaps.
    pub step_interval: u64,
    /// Steps that the loads below cover, and at most cover.
    pub window_steps: u64,
    /// See `window_steps`.
    pub window_size: u64,
    /// EP ranks.
    pub ranks: u32,
    /// Ranks of the group that are connected, and all.
    pub ready: u32,
    /// See `ready`.
    pub size: u32,
    /// Physical slots of one rank, per layer.
    pub slots_per_rank: u32,
    /// One entry per MoE layer.
    pub layers: Vec<LayerStatus>,
    /// Over the layers that have load.
    pub balancedness: Balancedness,
    /// Sums over all remaps that have ended since the actor started.
    pub totals: Totals,
    /// The remap under way.
    pub open: Option<Remap>,
    /// Ended remaps, newest first.
    pub history: Vec<Remap>,
}

/// One MoE layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// Index among the MoE layers.
    pub layer: u32,
    /// Logical expert of each physical slot.
    pub physical_to_logical: Vec<u32>,
    /// Slots of each logical expert.
    pub replica_counts: Vec<u32>,
    /// Tokens routed to each logical expert within the window.
    pub expert_loads: Vec<u64>,
    /// Tokens per rank within the window under the present map.
    pub rank_loads: Vec<f64>,
    /// Mean over ranks / max over ranks of the load; none without load.
    pub balancedness: Option<f64>,
}

/// Spread of the layers' balancedness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct Balancedness {
    /// Least balanced layer.
    pub min: f64,
    /// Median layer.
    pub p50: f64,
    /// Mean of the layers.
    pub avg: f64,
    /// Most balanced layer.
    pub max: f64,
}

impl Balancedness {
    /// Of the layers that have load; all zero when none has.
    pub fn of(layers: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = layers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        let avg = sorted.iter().sum::<f64>() / sorted.len() as f64;
        Self { min, p50: sorted[sorted.len() / 2], avg, max }
    }
}

/// All remaps that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Those that were committed whole.
    pub committed: u64,
    /// The others.
    pub rolled_back: u64,
    /// What they moved.
    pub moved: Moved,
}

/// Who wanted a remap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// Its interval came round.
    Interval,
    /// Somebody asked.
    Request,
}

/// One remap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Remap {
    /// Its map epoch.
    pub epoch: u64,
    /// Who wanted it.
    pub trigger: Trigger,
    /// Milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// How long it took, or has taken so far.
    pub duration_ms: u64,
    /// How it ended; none while it is under way.
    pub end: Option<PlanEnd>,
    /// Why it was rolled back.
    pub error: Option<String>,
    /// Layers that it changes, and how many are committed.
    pub layers: u32,
    /// See `layers`.
    pub layers_committed: u32,
    /// Slots whose expert changes.
    pub moves: u32,
    /// What all ranks moved.
    pub moved: Moved,
    /// Balancedness of the window's load under the map before, averaged over layers.
    pub balancedness_before: f64,
    /// The same load under the planned map.
    pub balancedness_planned: f64,
    /// Steps during the remap, of the rank with the longest one.
    pub steps: StepTimes,
}

/// What of the status is worth a look every second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct EplbPulse {
    /// See [`EplbStatus::map_epoch`].
    pub map_epoch: u64,
    /// See [`EplbStatus::membership_epoch`].
    pub membership_epoch: u64,
    /// See [`EplbStatus::ready`].
    pub ready: u32,
    /// See [`EplbStatus::size`].
    pub size: u32,
    /// Whether a remap is under way.
    pub remapping: bool,
    /// Remaps that were committed, and that were rolled back, in the life of the actor.
    pub committed: u64,
    /// See `committed`.
    pub rolled_back: u64,
    /// What remaps brought to the ranks, in the life of the actor.
    pub moved: Moved,
    /// See [`EplbStatus::balancedness`].
    pub balancedness: Balancedness,
}
