//! The choice of experts.

use super::{Cpu, plain};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Each expert by itself (DeepSeek-V3).
    Sigmoid,
    /// Over all experts (DeepSeek-V2, Qwen3-MoE).
    Softmax,
}

/// How the score of a group of experts is made of theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of the two best (DeepSeek-V3 `noaux_tc`).
    TopTwo,
    /// The best (DeepSeek-V2 `group_limited_greedy`).
    Best,
}

/// Node-limited routing: experts are chosen from the best groups only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups, of equal size.
    pub count: usize,
    /// Groups to choose from.
    pub top: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// A router's rule. Experts are chosen by score + bias and weighted by score.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// How logits become scores.
    pub scoring: Scoring,
    /// Correction added to the scores for the choice only, one per expert (`e_score_correction_bias`).
    pub bias: Option<&'a [f32]>,
    /// Limits the choice to some groups.
    pub groups: Option<Groups>,
    /// Experts per token.
    pub top_k: usize,
    /// Divide the weights by their sum + 1e-20.
    pub normalize: bool,
    /// Factor of the weights, applied last (`routed_scaling_factor`).
    pub scale: f32,
}

impl Cpu {
    /// Chooses experts: `logits[t][experts]` to `ids[t][top_k]` and `weights[t][top_k]`, in descending order of the
    /// choice score; of equal scores the lowest index comes first.
    ///
    /// # Panics
    /// If the lengths do not fit, or the rule asks for more experts or groups than there are.
    pub fn route(&self, router: &Router<'_>, logits: &[f32], ids: &mut [u32], weights: &mut [f32]) {
        plain::route(router, logits, ids, weights);
    }
}
