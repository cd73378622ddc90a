//! What a round must give, computed on the host.

use half::bf16;
use heliostat_kernels::cuda::exchange::{ExchangeShape, RowFormat};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Who is in a group, and its sizes.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    /// Rank ids of the DP ranks.
    pub(crate) dp: Vec<u32>,
    /// Rank ids of the EP ranks.
    pub(crate) ep: Vec<u32>,
    pub(crate) slots: usize,
    pub(crate) shape: ExchangeShape,
}

impl Scenario {
    pub(crate) fn new(
        (dp, ep): (&[u32], &[u32]),
        (tokens_max, top_k): (usize, usize),
        hidden: usize,
        slots: usize,
        format: RowFormat,
    ) -> Self {
        let rows_max = ExchangeShape::rows_worst(dp.len(), tokens_max, top_k, slots);
        let (dp_max, ep_max, slots_max) = (dp.len(), ep.len(), slots);
        let shape = ExchangeShape { tokens_max, top_k, hidden, format, dp_max, ep_max, slots_max, rows_max };
        Self { dp: dp.to_vec(), ep: ep.to_vec(), slots, shape }
    }

    pub(crate) fn one(tokens: usize, top_k: usize, hidden: usize, slots: usize, format: RowFormat) -> Self {
        Self::new((&[0], &[0]), (tokens, top_k), hidden, slots, format)
    }
}

/// What one DP rank brings to one round.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) tokens: usize,
    /// `[tokens_max][row bytes]`
    pub(crate) rows: Vec<u8>,
    /// `[blocks][tokens_max]`
    pub(crate) scales: Vec<f32>,
    /// `[tokens_max][top_k]`
    pub(crate) slots: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    /// bf16 `[tokens_max][hidden]`
    pub(crate) shared: Vec<bf16>,
}

impl Input {
    /// Fully random but for `tokens`: some choices are none, some slots get nothing, one gets much.
    pub(crate) fn random(scenario: &Scenario, seed: u64, tokens: usize) -> Self {
        let shape = &scenario.shape;
        let mut rng = StdRng::seed_from_u64(seed);
        let all = (scenario.slots * scenario.ep.len()) as u32;
        let mut order: Vec<u32> = (0..all).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.random_range(0..=i));
        }
        // The last quarter of a random order is never chosen by tokens that can choose among enough others.
        let used = (order.len() * 3 / 4).max(shape.top_k.min(order.len()));
        let slots = (0..shape.tokens_max)
            .flat_map(|_| {
                let mut left = order[..used].to_vec();
                let mut picks = vec![u32::MAX; shape.top_k];
                for (choice, pick) in picks.iter_mut().enumerate().take(used) {
                    let skewed = choice == 0 && rng.random_range(0..2) == 0;
                    let at = if skewed { 0 } else { rng.random_range(0..left.len()) };
                    let slot = left.swap_remove(at);
                    if rng.random_range(0..23) != 0 {
                        *pick = slot;
                    }
                }
                picks
            })
            .collect();
        let (bytes, blocks) = match shape.format {
            RowFormat::Fp8 => (shape.hidden, shape.hidden.div_ceil(128)),
            RowFormat::Bf16 => (shape.hidden * 2, 0),
        };
        let mut float = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-2.0..2.0)).collect() };
        let scales = float(blocks * shape.tokens_max);
        let weights = float(shape.tokens_max * shape.top_k);
        let shared = float(shape.tokens_max * shape.hidden).into_iter().map(bf16::from_f32).collect();
        let rows = (0..shape.tokens_max * bytes).map(|_| rng.random_range(0..=255)).collect();
        Self { tokens, rows, scales, slots, weights, shared }
    }

    /// The test's expert: a number of 8 bits, exact in bf16, from all that arrived of the row and from the slot.
    fn expert(&self, scenario: &Scenario, slot: u32, token: usize, h: usize) -> f32 {
        let shape = &scenario.shape;
        let seen = match shape.format {
            RowFormat::Fp8 => {
                let scale = self.scales[h / 128 * shape.tokens_max + token];
                u32::from(self.rows[token * shape.hidden + h]) + (scale.to_bits() >> 9)
            }
            RowFormat::Bf16 => {
                let at = (token * shape.hidden + h) * 2;
                u32::from(self.rows[at]) + 3 * u32::from(self.rows[at + 1])
            }
        };
        (seen.wrapping_add(37 * slot) & 255) as f32 / 16.0
    }

    /// The reduced rows, `[tokens][hidden]`.
    pub(crate) fn reduced(&self, scenario: &Scenario) -> Vec<bf16> {
        let shape = &scenario.shape;
        let value = |token: usize, h: usize| {
            let mut sum = 0.0f32;
            for k in 0..shape.top_k {
                let entry = token * shape.top_k + k;
                let slot = self.slots[entry];
                if slot != u32::MAX {
                    sum = self.weights[entry].mul_add(self.expert(scenario, slot, token, h), sum);
                }
            }
            bf16::from_f32(sum + self.shared[token * shape.hidden + h].to_f32())
        };
        let rows = 0..self.tokens;
        rows.flat_map(|token| (0..shape.hidden).map(move |h| (token, h))).map(|(t, h)| value(t, h)).collect()
    }
}

/// The layout of one EP rank: segments, and the source of each row as (DP index, token, choice).
pub(crate) struct Layout {
    pub(crate) start: Vec<u32>,
    pub(crate) rows: Vec<u32>,
    pub(crate) source: Vec<Option<(usize, usize, usize)>>,
}

impl Layout {
    pub(crate) fn new(scenario: &Scenario, inputs: &[Input], ep: usize) -> Self {
        let (slots, top_k) = (scenario.slots, scenario.shape.top_k);
        let mut layout = Self { start: vec![0], rows: Vec::new(), source: Vec::new() };
        for slot in ep * slots..(ep + 1) * slots {
            let mut rows = 0;
            for (dp, input) in inputs.iter().enumerate() {
                for (entry, _) in input.slots[..input.tokens * top_k]
                    .iter()
                    .enumerate()
                    .filter(|(_, at)| **at as usize == slot)
                {
                    layout.source.push(Some((dp, entry / top_k, entry % top_k)));
                    rows += 1;
                }
            }
            layout.source.resize(layout.source.len().next_multiple_of(128), None);
            layout.rows.push(rows);
            layout.start.push(layout.source.len() as u32);
        }
        layout
    }
}
