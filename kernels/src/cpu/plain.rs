//! The specification of every operation: one thread, f64, no tricks. Shapes are those of the methods of [`Cpu`].
//!
//! [`Cpu`]: super::Cpu

use super::attention::{ExpandedShape, GqaShape, KvPages, MlaQuery, MlaShape, Pages, Span};
use super::rope::{RopeLayout, RopeStyle, RopeTable};
use super::router::{GroupScore, Router, Scoring};
use crate::weight::Weight;

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

/// See [`Cpu::matmul`](super::Cpu::matmul).
pub fn matmul(x: &[f32], w: &Weight, y: &mut [f32]) {
    matmul_heads(x, 1, w, y);
}

/// See [`Cpu::matmul_heads`](super::Cpu::matmul_heads).
pub fn matmul_heads(x: &[f32], heads: usize, w: &Weight, y: &mut [f32]) {
    let (n, k) = (w.rows() / heads, w.cols());
    let values = w.dequantized();
    assert_eq!(x.len() / (heads * k) * w.rows(), y.len(), "matmul: length of y");
    for (x, y) in x.chunks_exact(heads * k).zip(y.chunks_exact_mut(w.rows())) {
        for (row, y) in y.iter_mut().enumerate() {
            let head = row / n;
            *y = dot(&x[head * k..(head + 1) * k], &values[row * k..(row + 1) * k]) as f32;
        }
    }
}

/// See [`Cpu::rms_norm`](super::Cpu::rms_norm).
pub fn rms_norm(x: &[f32], gamma: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: length of out");
    for (x, out) in x.chunks_exact(gamma.len()).zip(out.chunks_exact_mut(gamma.len())) {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
        for ((out, &x), &gamma) in out.iter_mut().zip(x).zip(gamma) {
            *out = (f64::from(x) * scale * f64::from(gamma)) as f32;
        }
    }
}

/// See [`Cpu::silu_mul`](super::Cpu::silu_mul).
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
    for (gate, &up) in gate.iter_mut().zip(up) {
        let g = f64::from(*gate);
        *gate = (g / (1.0 + (-g).exp()) * f64::from(up)) as f32;
    }
}

/// See [`Cpu::softmax`](super::Cpu::softmax).
pub fn softmax(x: &mut [f32], width: usize) {
    for row in x.chunks_exact_mut(width) {
        let p = softmax_f64(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        row.iter_mut().zip(p).for_each(|(x, p)| *x = p as f32);
    }
}

fn softmax_f64(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// See [`Cpu::rope`](super::Cpu::rope).
pub fn rope(style: RopeStyle, x: &mut [f32], layout: RopeLayout, positions: &[u32], table: RopeTable<'_>) {
    let RopeLayout { heads, head_dim, offset } = layout;
    assert_eq!(x.len(), positions.len() * heads * head_dim, "rope: length of x");
    for (x, &position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
        let (cos, sin) = table.at(position);
        for head in x.chunks_exact_mut(head_dim) {
            for i in 0..table.half {
                let (a, b) = match style {
                    RopeStyle::Interleaved => (offset + 2 * i, offset + 2 * i + 1),
                    RopeStyle::HalfSplit => (offset + i, offset + i + table.half),
                };
                let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
                let (xa, xb) = (f64::from(head[a]), f64::from(head[b]));
                head[a] = (xa * c - xb * s) as f32;
                head[b] = (xb * c + xa * s) as f32;
            }
        }
    }
}

/// See [`Cpu::route`](super::Cpu::route).
pub fn route(router: &Router<'_>, logits: &[f32], ids: &mut [u32], weights: &mut [f32]) {
    let rows = ids.len() / router.top_k;
    if rows == 0 {
        return;
    }
    let experts = logits.len() / rows;
    let out = ids.chunks_exact_mut(router.top_k).zip(weights.chunks_exact_mut(router.top_k));
    for (logits, (ids, weights)) in logits.chunks_exact(experts).zip(out) {
        let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let scores = match router.scoring {
            Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Scoring::Softmax => softmax_f64(&logits),
        };
        // The choice is made on f32, so that ties are those of the fast version.
        let mut choice: Vec<f32> = scores.iter().map(|&s| s as f32).collect();
        if let Some(bias) = router.bias {
            choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        if let Some(groups) = router.groups {
            let size = experts / groups.count;
            let score = |group: &[f32]| {
                let best = descending(group);
                match groups.score {
                    GroupScore::Best => group[best[0]],
                    GroupScore::TopTwo => group[best[0]] + best.get(1).map_or(0.0, |&second| group[second]),
                }
            };
            let group_scores: Vec<f32> = choice.chunks_exact(size).map(score).collect();
            for &masked in &descending(&group_scores)[groups.top..] {
                choice[masked * size..(masked + 1) * size].fill(f32::NEG_INFINITY);
            }
        }
        let chosen = &descending(&choice)[..router.top_k];
        let sum: f64 = chosen.iter().map(|&e| scores[e]).sum::<f64>() + 1e-20;
        let factor = f64::from(router.scale) / if router.normalize { sum } else { 1.0 };
        for ((id, weight), &expert) in ids.iter_mut().zip(weights).zip(chosen) {
            (*id, *weight) = (expert as u32, (scores[expert] * factor) as f32);
        }
    }
}

/// Indices by descending value; of equal values the lowest index first.
fn descending(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

/// See [`Cpu::mla_attention`](super::Cpu::mla_attention).
pub fn mla_attention(
    shape: MlaShape,
    query: MlaQuery<'_>,
    cache: Pages<'_>,
    spans: &[Span<'_>],
    out: &mut [f32],
) {
    let MlaShape { heads, kv_lora, rope, scale } = shape;
    for (span, token, head) in queries(spans, heads) {
        let at = (span.start + token) * heads + head;
        let latent = &query.latent[at * kv_lora..(at + 1) * kv_lora];
        let rope = &query.rope[at * rope..(at + 1) * rope];
        let rows: Vec<&[f32]> =
            (0..=span.context + token).map(|position| cache.row(span.block_table, position)).collect();
        let score =
            |row: &&[f32]| f64::from(scale) * (dot(latent, &row[..kv_lora]) + dot(rope, &row[kv_lora..]));
        let p = softmax_f64(&rows.iter().map(score).collect::<Vec<_>>());
        weighted_sum(&p, rows.iter().map(|row| &row[..kv_lora]), &mut out[at * kv_lora..(at + 1) * kv_lora]);
    }
}

/// See [`Cpu::expanded_attention`](super::Cpu::expanded_attention).
pub fn expanded_attention(
    shape: ExpandedShape,
    (query, up): (&[f32], &Weight),
    cache: Pages<'_>,
    spans: &[Span<'_>],
    out: &mut [f32],
) {
    let ExpandedShape { heads, kv_lora, nope, rope, v, scale } = shape;
    let up = up.dequantized();
    for (span, token, head) in queries(spans, heads) {
        let at = (span.start + token) * heads + head;
        let query = &query[at * (nope + rope)..(at + 1) * (nope + rope)];
        let rows: Vec<&[f32]> =
            (0..=span.context + token).map(|position| cache.row(span.block_table, position)).collect();
        // Row `index` of the head's up-projections with a latent.
        let expand = |row: &[f32], index: usize| {
            let from = (head * (nope + v) + index) * kv_lora;
            dot(&row[..kv_lora], &up[from..from + kv_lora])
        };
        let score = |row: &&[f32]| {
            let own: f64 = (0..nope).map(|index| f64::from(query[index]) * expand(row, index)).sum();
            f64::from(scale) * (own + dot(&query[nope..], &row[kv_lora..]))
        };
        let p = softmax_f64(&rows.iter().map(score).collect::<Vec<_>>());
        for (index, out) in out[at * v..(at + 1) * v].iter_mut().enumerate() {
            *out = p.iter().zip(&rows).map(|(p, row)| p * expand(row, nope + index)).sum::<f64>() as f32;
        }
    }
}

/// See [`Cpu::gqa_attention`](super::Cpu::gqa_attention).
pub fn gqa_attention(
    shape: GqaShape,
    query: &[f32],
    cache: KvPages<'_>,
    spans: &[Span<'_>],
    out: &mut [f32],
) {
    let GqaShape { heads, kv_heads, head_dim, scale } = shape;
    for (span, token, head) in queries(spans, heads) {
        let at = ((span.start + token) * heads + head) * head_dim;
        let kv_at = head / (heads / kv_heads) * head_dim;
        let head_of = |pages: Pages<'_>| -> Vec<Vec<f32>> {
            (0..=span.context + token)
                .map(|position| pages.row(span.block_table, position)[kv_at..kv_at + head_dim].to_vec())
                .collect()
        };
        let (keys, values) = (head_of(cache.keys), head_of(cache.values));
        let q = &query[at..at + head_dim];
        let p = softmax_f64(&keys.iter().map(|key| f64::from(scale) * dot(q, key)).collect::<Vec<_>>());
        weighted_sum(&p, values.iter().map(Vec::as_slice), &mut out[at..at + head_dim]);
    }
}

fn queries<'a>(spans: &'a [Span<'a>], heads: usize) -> impl Iterator<Item = (&'a Span<'a>, usize, usize)> {
    spans.iter().flat_map(move |span| {
        (0..span.len).flat_map(move |token| (0..heads).map(move |head| (span, token, head)))
    })
}

fn weighted_sum<'a>(p: &[f64], rows: impl Iterator<Item = &'a [f32]>, out: &mut [f32]) {
    let mut sum = vec![0.0; out.len()];
    for (p, row) in p.iter().zip(rows) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += p * f64::from(x));
    }
    out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
}
