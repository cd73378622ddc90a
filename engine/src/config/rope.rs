//! Rotary position embedding: which frequencies a checkpoint asks for, plain or YaRN (arXiv 2309.00071).
//!
//! Follows the arithmetic of transformers, whose checkpoints these are. Rotates nothing itself.

use std::f64::consts::PI;

use super::fields::{ConfigError, Fields};

/// Rotary frequencies of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Rotated elements per head, even.
    pub dim: usize,
    /// Pairs are neighbours (2i, 2i + 1) rather than halves (i, i + dim / 2).
    pub interleave: bool,
    /// Radians per position, one for each pair.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosine and sine.
    pub attention_factor: f32,
    /// Multiplies the softmax scale (DeepSeek's `mscale_all_dim`, squared); 1 without YaRN.
    pub softmax_factor: f32,
}

/// YaRN's parameters as written.
struct Yarn {
    factor: f64,
    original_positions: f64,
    beta_fast: f64,
    beta_slow: f64,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
    truncate: bool,
}

impl RopeConfig {
    /// Reads `rope_parameters`, or `rope_scaling` and `rope_theta` of older files. `scale_softmax`: the model's
    /// attention applies `mscale_all_dim` (DeepSeek's does, Qwen3's does not).
    pub(super) fn read(
        fields: &Fields<'_>,
        dim: usize,
        interleave: bool,
        scale_softmax: bool,
    ) -> Result<Self, ConfigError> {
        if !dim.is_multiple_of(2) {
            return Err(
                fields.error("qk_rope_head_dim or head_dim", format!("{dim} is odd; rotary pairs need two"))
            );
        }
        let new = fields.object("rope_parameters")?;
        let rope = match fields.object("rope_scaling")? {
            Some(old) => Some(old),
            None => new,
        };
        let theta = match &rope {
            Some(rope) => rope.positive("rope_theta")?,
            None => None,
        };
        let theta = theta.or(fields.positive("rope_theta")?).unwrap_or(10000.0);
        if theta <= 1.0 {
            return Err(fields.error("rope_theta", format!("{theta} must be above 1")));
        }
        let plain = Self {
            dim,
            interleave,
            inv_freq: (0..dim / 2).map(|pair| (1.0 / frequency_base(theta, pair, dim)) as f32).collect(),
            attention_factor: 1.0,
            softmax_factor: 1.0,
        };
        let Some(rope) = rope else { return Ok(plain) };
        refuse_partial(fields)?;
        refuse_partial(&rope)?;
        let field = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
        match rope.one_of(field, &["default", "yarn"])? {
            "yarn" => Ok(plain.stretch(theta, &Yarn::read(fields, &rope)?, scale_softmax)),
            _ => Ok(plain),
        }
    }

    fn stretch(mut self, theta: f64, yarn: &Yarn, scale_softmax: bool) -> Self {
        let (low, high) = yarn.ramp(theta, self.dim);
        for (pair, inv_freq) in self.inv_freq.iter_mut().enumerate() {
            let base = frequency_base(theta, pair, self.dim);
            let keep = 1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            *inv_freq = ((1.0 - keep) / (yarn.factor * base) + keep / base) as f32;
        }
        let all_dim = yarn.mscale_all_dim.filter(|&scale| scale != 0.0);
        let inferred = match (yarn.mscale.filter(|&scale| scale != 0.0), all_dim) {
            (Some(mscale), Some(all_dim)) => yarn.mscale(mscale) / yarn.mscale(all_dim),
            _ => yarn.mscale(1.0),
        };
        self.attention_factor = yarn.attention_factor.unwrap_or(inferred) as f32;
        if let Some(all_dim) = all_dim.filter(|_| scale_softmax) {
            self.softmax_factor = yarn.mscale(all_dim).powi(2) as f32;
        }
        self
    }
}

impl Yarn {
    fn read(fields: &Fields<'_>, rope: &Fields<'_>) -> Result<Self, ConfigError> {
        let positions_max = fields.dimension("max_position_embeddings")?;
        let original = fields.optional_dimension("original_max_position_embeddings")?;
        let original = original.or(rope.optional_dimension("original_max_position_embeddings")?);
        let original_positions = original.unwrap_or(positions_max) as f64;
        Ok(Self {
            factor: rope.positive("factor")?.unwrap_or(positions_max as f64 / original_positions),
            original_positions,
            beta_fast: rope.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: rope.positive("beta_slow")?.unwrap_or(1.0),
            mscale: rope.number("mscale")?,
            mscale_all_dim: rope.number("mscale_all_dim")?,
            attention_factor: rope.positive("attention_factor")?,
            truncate: rope.bool_or("truncate", true)?,
        })
    }

    fn mscale(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }

    /// Pairs below the first bound keep their frequency, pairs above the second are interpolated.
    fn ramp(&self, theta: f64, dim: usize) -> (f64, f64) {
        let pair_of = |rotations: f64| {
            dim as f64 * (self.original_positions / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (low, high)
    }
}

/// theta^(2 pair / dim), the exponent rounded to f32 as transformers does.
fn frequency_base(theta: f64, pair: usize, dim: usize) -> f64 {
    theta.powf(f64::from((2 * pair) as f32 / dim as f32))
}

fn refuse_partial(fields: &Fields<'_>) -> Result<(), ConfigError> {
    match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(fields.unsupported("partial_rotary_factor", "1.0")),
        _ => Ok(()),
    }
}
