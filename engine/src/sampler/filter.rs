//! Which tokens stay in the draw, and the draw itself.

use std::cmp::Ordering;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    /// Its probability relative to the most likely token's.
    pub(super) weight: f32,
    pub(super) token: u32,
}

/// Most likely first; ties by token id.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

/// Fills `candidates` from logits relative to the largest one (so at most 0), with the tokens at least `min_p` times as
/// likely as the most likely one. In order of token ids.
pub(super) fn min_p(candidates: &mut Vec<Candidate>, logits: impl Iterator<Item = f32>, min_p: f32) {
    candidates.clear();
    for (token, logit) in (0..).zip(logits) {
        let weight = logit.exp();
        if weight > 0.0 && weight >= min_p {
            candidates.push(Candidate { weight, token });
        }
    }
}

/// Keeps the `k` most likely; 0 keeps all.
pub(super) fn top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, best_first);
        candidates.truncate(k);
    }
}

/// Keeps the fewest most likely tokens whose share of the remaining probability reaches `p`; at least one.
pub(super) fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    // In order of token ids, so that the sum does not depend on how a selection left the candidates.
    candidates.sort_unstable_by_key(|c| c.token);
    let target = f64::from(p) * total(candidates);
    // The nucleus is usually tiny: sort a growing front instead of the whole vocabulary.
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let front = (sorted * 8).max(128).min(candidates.len());
        if front < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(front - sorted - 1, best_first);
        }
        candidates[sorted..front].sort_unstable_by(best_first);
        for i in sorted..front {
            sum += f64::from(candidates[i].weight);
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        sorted = front;
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

/// The token at the fraction `u` in [0, 1) of the total weight, counted in order of token ids.
pub(super) fn pick(candidates: &mut [Candidate], u: f64) -> u32 {
    candidates.sort_unstable_by_key(|c| c.token);
    let mut left = u * total(candidates);
    for candidate in candidates.iter() {
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            return candidate.token;
        }
    }
    // Only rounding gets here.
    candidates.last().expect("the most likely token passes every filter").token
}
