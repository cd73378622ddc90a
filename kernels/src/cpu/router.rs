//! The choice of experts.

use super::Cpu;

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
        let top_k = router.top_k;
        assert!(top_k > 0 && ids.len().is_multiple_of(top_k), "route: {} ids for top {top_k}", ids.len());
        assert_eq!(ids.len(), weights.len(), "route: lengths of ids and weights");
        let tokens = ids.len() / top_k;
        if tokens == 0 {
            assert!(logits.is_empty(), "route: {} logits of no tokens", logits.len());
            return;
        }
        assert!(logits.len().is_multiple_of(tokens), "route: {} logits of {tokens} tokens", logits.len());
        let experts = logits.len() / tokens;
        router.check(experts);
        let mut scores = logits.to_vec();
        match router.scoring {
            Scoring::Sigmoid => self.sigmoid(&mut scores),
            Scoring::Softmax => self.softmax(&mut scores, experts),
        }
        let mut choice = vec![0.0; experts];
        let out = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
        for (scores, (ids, weights)) in scores.chunks_exact(experts).zip(out) {
            router.choose(scores, &mut choice, ids, weights);
        }
    }
}

impl Router<'_> {
    fn check(&self, experts: usize) {
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), experts, "route: length of the bias");
        }
        let candidates = match self.groups {
            None => experts,
            Some(Groups { count, top, .. }) => {
                assert!(
                    count > 0 && experts.is_multiple_of(count),
                    "route: {count} groups of {experts} experts"
                );
                assert!((1..=count).contains(&top), "route: {top} of {count} groups");
                experts / count * top
            }
        };
        assert!(self.top_k <= candidates, "route: top {} of {candidates} experts", self.top_k);
    }

    /// The choice of one token. `choice` is scratch, one per expert.
    fn choose(&self, scores: &[f32], choice: &mut [f32], ids: &mut [u32], weights: &mut [f32]) {
        for (index, (choice, score)) in choice.iter_mut().zip(scores).enumerate() {
            // `max` also turns NaN into a number, so that a broken model still chooses different experts.
            *choice = (score + self.bias.map_or(0.0, |bias| bias[index])).max(f32::MIN);
        }
        if let Some(groups) = self.groups {
            keep_top_groups(groups, choice);
        }
        for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
            let expert = take_best(choice);
            (*id, *weight) = (expert as u32, scores[expert]);
        }
        if self.normalize {
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        weights.iter_mut().for_each(|weight| *weight *= self.scale);
    }
}

/// Takes the experts of all but the best groups out of the choice.
fn keep_top_groups(groups: Groups, choice: &mut [f32]) {
    let size = choice.len() / groups.count;
    let score = |group: &[f32]| {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in group {
            if score > best {
                (best, second) = (score, best);
            } else if score > second {
                second = score;
            }
        }
        match groups.score {
            GroupScore::TopTwo if size > 1 => (best + second).max(f32::MIN),
            GroupScore::TopTwo | GroupScore::Best => best,
        }
    };
    let mut scores: Vec<f32> = choice.chunks_exact(size).map(score).collect();
    let mut kept = vec![false; groups.count];
    for _ in 0..groups.top {
        kept[take_best(&mut scores)] = true;
    }
    for (group, _) in choice.chunks_exact_mut(size).zip(kept).filter(|(_, kept)| !kept) {
        group.fill(TAKEN);
    }
}

/// Below every score.
const TAKEN: f32 = f32::NEG_INFINITY;

/// The index of the best of `choice`, the first of equals, which is then taken out.
fn take_best(choice: &mut [f32]) -> usize {
    let mut best = 0;
    for (index, &score) in choice.iter().enumerate() {
        if score > choice[best] {
            best = index;
        }
    }
    choice[best] = TAKEN;
    best
}
