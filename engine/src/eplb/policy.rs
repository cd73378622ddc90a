//! What the EPLB actor asks: given the present layout and the loads, what should change, and is it worth it?

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::deepseek::{PolicyError, rebalance_map};
use super::incremental::{Search, improve};
use super::load::{drift, map_balancedness};
use super::map::{ExpertMap, Layout};
use super::plan::{LayerPlan, Plan};

/// How new maps are made.
#[derive(Clone, Debug, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// DeepSeek's `rebalance_experts`, from scratch.
    Deepseek {
        /// Expert groups of the model; 1 for a model without.
        num_groups: usize,
        /// Nodes with a fast network inside; 1 balances globally.
        num_nodes: usize,
    },
    /// The few moves from the present map that reach a target.
    Incremental(Search),
}

impl Policy {
    /// One layer's new map.
    pub fn map(&self, present: &ExpertMap, loads: &[f32]) -> Result<ExpertMap, PolicyError> {
        if loads.len() != present.shape().experts as usize {
            return Err(PolicyError::Loads);
        }
        match self {
            Self::Deepseek { num_groups, num_nodes } => {
                rebalance_map(loads, present.shape(), *num_groups, *num_nodes)
            }
            Self::Incremental(search) => Ok(improve(present, loads, search).map),
        }
    }
}

/// When a remap is worth its moves. Every threshold must be passed.
#[derive(Clone, Debug, PartialEq, Encode, Decode, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gate {
    /// Nothing is planned before the loads of some layer have drifted this far from those of the last plan, see
    /// `drift`.
    pub min_drift: f32,
    /// Layers at least this balanced stay as they are; 1 looks at all of them.
    pub balanced: f32,
    /// Share of the hottest rank's load that must be saved, `1 - before / after` in terms of balancedness.
    pub min_gain: f32,
    /// Share that each GiB that has to travel must save.
    pub min_gain_per_gib: f32,
}

impl Default for Gate {
    fn default() -> Self {
        Self { min_drift: 0.0, balanced: 1.0, min_gain: 0.01, min_gain_per_gib: 0.0 }
    }
}

impl Gate {
    /// A gate that lets every improvement through.
    pub fn open() -> Self {
        Self { min_gain: 0.0, ..Self::default() }
    }

    /// Whether planning is worth while since the last plan, whose loads were `before`; both `[moe layers][experts]`.
    pub fn has_drifted(&self, before: &[Vec<f32>], now: &[Vec<f32>]) -> bool {
        self.min_drift <= 0.0
            || before.iter().zip(now).any(|(before, now)| drift(before, now) >= self.min_drift)
    }

    /// Decides for one layer from its balancedness before and after and the bytes that have to travel.
    pub fn judge(&self, before: f32, after: f32, bytes: u64) -> Verdict {
        let gain = 1.0 - before / after;
        if before >= self.balanced {
            Verdict::Balanced
        } else if gain <= 0.0 || gain < self.min_gain {
            Verdict::SmallGain
        } else if gain < self.min_gain_per_gib * (bytes as f64 / f64::from(1 << 30)) as f32 {
            Verdict::TooDear
        } else {
            Verdict::Move
        }
    }
}

/// What the gate says of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It changes.
    Move,
    /// It is balanced well enough.
    Balanced,
    /// The new map would save too little.
    SmallGain,
    /// The new map would save too little for what it moves.
    TooDear,
}

/// What a policy offers for one layer.
#[derive(Clone, Debug, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct LayerOutlook {
    /// Balancedness of the loads under the present map.
    pub before: f32,
    /// Under the offered map.
    pub after: f32,
    /// Experts that would have to travel.
    pub receives: u32,
    /// Whether the layer is in the plan.
    pub verdict: Verdict,
}

/// A plan, and why it is what it is.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Proposal {
    /// The layers that are worth their moves.
    pub plan: Plan,
    /// All layers.
    pub layers: Vec<LayerOutlook>,
}

/// Plans the next map epoch from `loads`, `[moe layers][experts]`. Fails when the loads do not fit the layout or the
/// policy cannot deal with its shape.
pub fn propose(
    policy: &Policy,
    gate: &Gate,
    present: &Layout,
    loads: &[Vec<f32>],
    epoch: u64,
    bytes_per_expert: u64,
) -> Result<Proposal, PolicyError> {
    if loads.len() != present.layers().len() {
        return Err(PolicyError::Loads);
    }
    let mut proposal = Proposal { plan: Plan { epoch, layers: Vec::new() }, layers: Vec::new() };
    for (layer, (map, loads)) in (0..).zip(present.layers().iter().zip(loads)) {
        let next = policy.map(map, loads)?;
        let plan = LayerPlan::between(layer, map, &next);
        let (before, after) = (map_balancedness(map, loads), map_balancedness(&next, loads));
        let receives = plan.num_receives() as u32;
        let verdict = gate.judge(before, after, u64::from(receives) * bytes_per_expert);
        if verdict == Verdict::Move {
            proposal.plan.layers.push(plan);
        }
        proposal.layers.push(LayerOutlook { before, after, receives, verdict });
    }
    Ok(proposal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eplb::map::{MapShape, PlacementStrategy};

    #[test]
    fn the_gate_weighs_gain_against_cost() {
        let gate = Gate { min_drift: 0.1, balanced: 0.95, min_gain: 0.05, min_gain_per_gib: 0.1 };
        let gib = 1 << 30;
        assert_eq!(gate.judge(0.5, 1.0, gib), Verdict::Move);
        assert_eq!(gate.judge(0.96, 1.0, 0), Verdict::Balanced);
        assert_eq!(gate.judge(0.90, 0.94, 0), Verdict::SmallGain);
        assert_eq!(gate.judge(0.5, 1.0, 6 * gib), Verdict::TooDear);
        assert_eq!(Gate::open().judge(0.9, 0.9, 0), Verdict::SmallGain, "no gain is never worth a move");
        assert_eq!(Gate::open().judge(0.9, 0.901, 9 * gib), Verdict::Move);
        let loads = |x: f32| vec![vec![1.0, 1.0], vec![1.0, x]];
        assert!(gate.has_drifted(&loads(1.0), &loads(2.0)) && !gate.has_drifted(&loads(1.0), &loads(1.1)));
        assert!(Gate::open().has_drifted(&loads(1.0), &loads(1.0)));
    }

    #[test]
    fn only_layers_that_gain_are_planned() {
        let shape = MapShape { experts: 4, slots: 4, ranks: 2 };
        let present = Layout::initial(2, shape, PlacementStrategy::Linear).unwrap();
        let loads = [vec![1.0; 4], vec![3.0, 3.0, 1.0, 1.0]];
        for policy in
            [Policy::Deepseek { num_groups: 1, num_nodes: 1 }, Policy::Incremental(Search::default())]
        {
            let proposal = propose(&policy, &Gate::default(), &present, &loads, 5, 100).unwrap();
            assert_eq!((proposal.plan.epoch, proposal.plan.layers.len()), (5, 1));
            assert_eq!(proposal.plan.layers[0].layer, 1);
            let outlook = &proposal.layers[1];
            assert_eq!((outlook.before, outlook.after, outlook.receives), (4.0 / 6.0, 1.0, 2));
            assert_eq!(
                propose(&policy, &Gate::default(), &present, &loads[..1], 5, 100),
                Err(PolicyError::Loads)
            );
        }
    }
}
