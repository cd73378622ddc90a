//! Log-probabilities under the raw logits.

use std::cmp::Ordering;

use crate::request::TokenLogprob;

use super::SampleError;

/// How likely `token` was under raw `logits`, its rank, and the `top` most likely tokens. Equal logits rank by token id.
pub fn token_logprob(logits: &[f32], token: u32, top: u32) -> Result<TokenLogprob, SampleError> {
    let mut max = f32::NEG_INFINITY;
    for &logit in logits {
        if logit.is_nan() {
            return Err(SampleError::NotFinite);
        }
        max = max.max(logit);
    }
    if !max.is_finite() {
        return Err(SampleError::NotFinite);
    }
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    let log_sum = sum.ln();
    let logprob = |token: u32| (f64::from(logits[token as usize]) - f64::from(max) - log_sum) as f32;
    let best_first = |a: &u32, b: &u32| -> Ordering {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.partial_cmp(&x).expect("no logit is NaN").then(a.cmp(b))
    };
    let before = (0..logits.len() as u32).filter(|other| best_first(other, &token) == Ordering::Less).count();
    let top = (top as usize).min(logits.len());
    let mut best: Vec<u32> = Vec::new();
    if top > 0 {
        best.extend(0..logits.len() as u32);
        best.select_nth_unstable_by(top - 1, best_first);
        best.truncate(top);
        best.sort_unstable_by(best_first);
    }
    Ok(TokenLogprob {
        token,
        logprob: logprob(token),
        rank: before as u32 + 1,
        top: best.into_iter().map(|token| (token, logprob(token))).collect(),
    })
}
