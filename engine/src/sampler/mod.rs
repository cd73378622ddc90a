//! Draws the next token from logits.
//!
//! A draw depends on nothing but the logits, the parameters, the tokens so far, the seed and the position: a sequence
//! that moves to another rank, or is computed again, draws the same tokens. Order of operations as in vLLM: bias,
//! forbidden tokens, penalties, temperature, min-p, top-k, top-p, draw. Ties always go to the smaller token id.

mod filter;
mod logprob;

use std::collections::HashMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::grammar::TokenMask;
use crate::request::SamplingParams;

pub use logprob::token_logprob;

use filter::Candidate;

/// A lower temperature is greedy, as in vLLM: dividing by it would overflow.
pub(crate) const TEMPERATURE_MIN: f32 = 1e-5;

/// Why no token could be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model computed nonsense for this sequence.
    #[error("the model computed logits that are not numbers or are infinite")]
    NotFinite,
    /// Bias and forbidden tokens left nothing.
    #[error("no token may be drawn: all are forbidden")]
    NothingLeft,
    /// What the output must look like cannot be followed within bounds.
    #[error("the grammar of the output became too complex to be followed")]
    GrammarTooComplex,
}

/// Everything a draw depends on.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Raw logits, `[vocab]`. Minus infinity is a token that cannot be drawn.
    pub logits: &'a [f32],
    /// How to draw; checked by `check_params`.
    pub params: &'a SamplingParams,
    /// Prompt tokens.
    pub prompt: &'a [u32],
    /// Output tokens so far.
    pub output: &'a [u32],
    /// Index of the token among the output tokens; keys the generator together with `params.seed`.
    pub position: u64,
    /// Tokens that must not be drawn, such as stop tokens before `min_tokens`.
    pub forbidden: [&'a [u32]; 2],
    /// Tokens that a grammar allows; `None` without one.
    pub mask: Option<&'a TokenMask>,
}

/// Says which parameter is out of range, if any.
pub fn check_params(params: &SamplingParams, vocab_size: usize) -> Result<(), String> {
    let p = params;
    let ranges = [
        ("temperature", p.temperature, p.temperature.is_finite() && p.temperature >= 0.0, "at least 0"),
        ("top_p", p.top_p, p.top_p > 0.0 && p.top_p <= 1.0, "in (0, 1]"),
        ("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "in [0, 1]"),
        (
            "repetition_penalty",
            p.repetition_penalty,
            p.repetition_penalty.is_finite() && p.repetition_penalty > 0.0,
            "above 0",
        ),
        ("presence_penalty", p.presence_penalty, p.presence_penalty.is_finite(), "finite"),
        ("frequency_penalty", p.frequency_penalty, p.frequency_penalty.is_finite(), "finite"),
    ];
    if let Some((name, value, _, range)) = ranges.iter().find(|(_, _, ok, _)| !ok) {
        return Err(format!("{name} must be {range}, got {value}"));
    }
    for &(token, bias) in &p.logit_bias {
        if token as usize >= vocab_size {
            return Err(format!("logit_bias: token id {token} is not in the vocabulary of {vocab_size}"));
        }
        if !bias.is_finite() {
            return Err(format!("logit_bias of token {token} must be finite, got {bias}"));
        }
    }
    Ok(())
}

/// Draws tokens; keeps nothing between draws but memory.
#[derive(Debug, Default)]
pub struct Sampler {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Draws one token.
    pub fn draw(&mut self, draw: &Draw) -> Result<u32, SampleError> {
        if draw.logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(SampleError::NotFinite);
        }
        self.logits.clear();
        self.logits.extend_from_slice(draw.logits);
        adjust(&mut self.logits, draw);
        let best = argmax(&self.logits)?;
        let params = draw.params;
        if params.temperature < TEMPERATURE_MIN {
            return Ok(best);
        }
        let max = self.logits[best as usize];
        let scaled = self.logits.iter().map(|x| (x - max) / params.temperature);
        filter::min_p(&mut self.candidates, scaled, params.min_p);
        filter::top_k(&mut self.candidates, params.top_k as usize);
        filter::top_p(&mut self.candidates, params.top_p);
        Ok(filter::pick(&mut self.candidates, uniform(params.seed, draw.position)))
    }
}

/// Bias, forbidden tokens and penalties.
fn adjust(logits: &mut [f32], draw: &Draw) {
    let params = draw.params;
    if let Some(mask) = draw.mask {
        mask.apply(logits);
    }
    for &(token, bias) in &params.logit_bias {
        logits[token as usize] += bias;
    }
    for &token in draw.forbidden.into_iter().flatten() {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if params.repetition_penalty == 1.0 && params.presence_penalty == 0.0 && params.frequency_penalty == 0.0 {
        return;
    }
    // Occurrences in the output; tokens of the prompt only have none.
    let mut counts: HashMap<u32, u32> = draw.prompt.iter().map(|&token| (token, 0)).collect();
    for &token in draw.output {
        *counts.entry(token).or_insert(0) += 1;
    }
    for (token, count) in counts {
        let Some(logit) = logits.get_mut(token as usize) else {
            continue;
        };
        let penalty = params.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        *logit -= params.frequency_penalty * count as f32;
        if count > 0 {
            *logit -= params.presence_penalty;
        }
    }
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> Result<u32, SampleError> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(logits) {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    if best.1 == f32::NEG_INFINITY { Err(SampleError::NothingLeft) } else { Ok(best.0) }
}

/// A number in [0, 1) that depends on the seed and the position only: ChaCha8 with the seed as key and the position as
/// nonce.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_stream(position);
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
