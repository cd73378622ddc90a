//! Draws, against the engine's rules written down plainly.

use heliostat_kernels::cuda::Buffer;
use heliostat_kernels::cuda::sample::{
    LogprobsOut, NOT_FINITE, NOTHING_LEFT, NextTokensArgs, OK, SampleArgs, SampleRow, Sampling,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::cuda_support::normal;
use crate::{Gpu, NONE};

const TOP_MAX: usize = 20;
const GREEDY: SampleRow =
    SampleRow { uniform: 0.0, temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0, logprobs: None };

/// What the kernel wrote.
#[derive(Debug, PartialEq)]
struct Drawn {
    tokens: Vec<u32>,
    status: Vec<u32>,
    logprobs: Vec<f32>,
    ranks: Vec<u32>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<f32>,
}

fn draw(
    gpu: &Gpu,
    kernels: &Sampling,
    logits: &Buffer<f32>,
    vocab: usize,
    params: &[Option<SampleRow>],
) -> Drawn {
    let rows = params.len();
    let words: Vec<u32> = params.iter().flat_map(|row| SampleRow::words(row.as_ref())).collect();
    let [tokens, status, ranks] = [(); 3].map(|()| gpu.up(&vec![77u32; rows]));
    let logprobs = gpu.up(&vec![77f32; rows]);
    let (top_tokens, top_logprobs) =
        (gpu.up(&vec![77u32; rows * TOP_MAX]), gpu.up(&vec![77f32; rows * TOP_MAX]));
    let args = SampleArgs {
        rows,
        vocab,
        logits,
        stride: vocab,
        params: &gpu.up(&words),
        tokens: &tokens,
        status: &status,
        logprobs: LogprobsOut {
            logprobs: &logprobs,
            ranks: &ranks,
            top_tokens: &top_tokens,
            top_logprobs: &top_logprobs,
            top_max: TOP_MAX,
        },
    };
    kernels.sample(&gpu.stream, &args).unwrap();
    Drawn {
        tokens: gpu.down(&tokens),
        status: gpu.down(&status),
        logprobs: gpu.down(&logprobs),
        ranks: gpu.down(&ranks),
        top_tokens: gpu.down(&top_tokens),
        top_logprobs: gpu.down(&top_logprobs),
    }
}

/// Tokens with their weights after the filters, in order of tokens.
fn kept(logits: &[f32], row: &SampleRow) -> Vec<(u32, f64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: &f32| ((x - max) / row.temperature).exp();
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().map(weight)).collect();
    tokens.retain(|(_, weight)| *weight > 0.0 && *weight >= row.min_p);
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if row.top_k > 0 {
        tokens.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        let total: f64 = tokens.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let mut sum = 0.0;
        let enough = tokens.iter().position(|(_, weight)| {
            sum += f64::from(*weight);
            sum >= f64::from(row.top_p) * total
        });
        tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
    }
    tokens.sort_by_key(|(token, _)| *token);
    tokens.into_iter().map(|(token, weight)| (token, f64::from(weight))).collect()
}

/// Whether `token` is drawn at `uniform`, give or take rounding: the exponential of the device is another one.
fn is_drawn(kept: &[(u32, f64)], uniform: f64, token: u32) -> bool {
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut through = 0.0;
    for &(candidate, weight) in kept {
        let from = through / total;
        through += weight;
        if candidate == token {
            return (from - 1e-6..through / total + 1e-6).contains(&uniform);
        }
    }
    false
}

fn settings() -> Vec<SampleRow> {
    let plain = SampleRow { temperature: 1.0, ..GREEDY };
    vec![
        plain,
        SampleRow { temperature: 0.3, ..plain },
        SampleRow { temperature: 2.5, ..plain },
        SampleRow { top_k: 1, ..plain },
        SampleRow { top_k: 50, ..plain },
        SampleRow { top_k: 3, temperature: 5.0, ..plain },
        SampleRow { top_p: 1e-9, ..plain },
        SampleRow { top_p: 0.5, ..plain },
        SampleRow { top_p: 0.95, temperature: 0.7, ..plain },
        SampleRow { top_p: 0.999, ..plain },
        SampleRow { min_p: 0.1, ..plain },
        SampleRow { min_p: 1.0, ..plain },
        SampleRow { top_k: 100, top_p: 0.9, min_p: 0.001, ..plain },
        SampleRow { top_k: u32::MAX, ..plain },
    ]
}

#[test]
fn draws_are_those_of_the_rules() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Sampling::new(&gpu.device).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    for (vocab, spread) in [(1, 1.0), (7, 1.0), (256, 1.0), (1003, 3.0), (32_000, 2.5), (129_280, 1.0)] {
        let settings = settings();
        let mut rows: Vec<SampleRow> = Vec::new();
        for round in 0..6 {
            let uniform = |_| match round {
                0 => 0.0,
                1 => 1.0 - f64::EPSILON / 2.0,
                _ => rng.random_range(0.0..1.0),
            };
            let uniforms: Vec<f64> = settings.iter().map(uniform).collect();
            rows.extend(settings.iter().zip(uniforms).map(|(row, uniform)| SampleRow { uniform, ..*row }));
        }
        // bf16 logits of which many tie, then others.
        let mut logits: Vec<f32> = normal(2, rows.len() * vocab).iter().map(|x| x * spread).collect();
        let tied = logits.len() / 2 / vocab * vocab;
        logits[..tied].iter_mut().for_each(|x| *x = (*x * 8.0).round() / 8.0);
        if vocab > 7 {
            logits.iter_mut().skip(5).step_by(97).for_each(|x| *x = f32::NEG_INFINITY);
        }
        let on_device = gpu.up(&logits);
        let asked: Vec<Option<SampleRow>> = rows.iter().copied().map(Some).collect();
        let drawn = draw(&gpu, &kernels, &on_device, vocab, &asked);
        assert!(drawn.status.iter().all(|&status| status == OK));
        for ((row, logits), &token) in rows.iter().zip(logits.chunks(vocab)).zip(&drawn.tokens) {
            let kept = kept(logits, row);
            assert!(
                is_drawn(&kept, row.uniform, token),
                "vocab {vocab}, {row:?}: {token}, {} kept",
                kept.len()
            );
        }
        // The same again, and each row alone.
        assert_eq!(draw(&gpu, &kernels, &on_device, vocab, &asked).tokens, drawn.tokens);
        for row in (0..rows.len()).step_by(11) {
            let alone = on_device.slice(row * vocab..(row + 1) * vocab);
            assert_eq!(
                draw(&gpu, &kernels, &alone, vocab, &asked[row..=row]).tokens,
                drawn.tokens[row..=row]
            );
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Sampling::new(&gpu.device).unwrap();
    let logits = [0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, 1.6];
    let mut rng = StdRng::seed_from_u64(3);
    for setting in [settings()[0], settings()[2], SampleRow { top_p: 0.8, ..settings()[0] }] {
        let rows = 8192;
        let asked: Vec<_> =
            (0..rows).map(|_| Some(SampleRow { uniform: rng.random_range(0.0..1.0), ..setting })).collect();
        let drawn = draw(&gpu, &kernels, &gpu.up(&logits.repeat(rows)), logits.len(), &asked);
        let kept = kept(&logits, &setting);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let chi_square: f64 = kept
            .iter()
            .map(|(token, weight)| {
                let want = weight / total * rows as f64;
                let got = drawn.tokens.iter().filter(|drawn| *drawn == token).count() as f64;
                (got - want).powi(2) / want
            })
            .sum();
        // At most 7 degrees of freedom: 24.3 is exceeded once in a thousand; the seed is fixed.
        assert!(chi_square < 24.3, "{setting:?}: {chi_square}");
        assert!(drawn.tokens.iter().all(|token| kept.iter().any(|(kept, _)| kept == token)));
    }
}

#[test]
fn greedy_draws_and_log_probabilities_are_exact() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Sampling::new(&gpu.device).unwrap();
    for vocab in [5, 1003, 129_280] {
        let rows = 9;
        // Many ties, at the top too.
        let logits: Vec<f32> = normal(4, rows * vocab).iter().map(|x| (x * 4.0).round() / 4.0).collect();
        let row = |row: usize| match row % 3 {
            0 => SampleRow { logprobs: Some(TOP_MAX as u32), ..GREEDY },
            1 => SampleRow { logprobs: Some(0), temperature: 1.0, uniform: 0.7, ..GREEDY },
            _ => SampleRow { logprobs: Some(3), temperature: 1.0, top_k: 1, ..GREEDY },
        };
        let asked: Vec<_> = (0..rows).map(|at| Some(row(at))).collect();
        let drawn = draw(&gpu, &kernels, &gpu.up(&logits), vocab, &asked);
        for (at, logits) in logits.chunks(vocab).enumerate() {
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let max = logits[order[0] as usize];
            let log_sum = logits.iter().map(|x| f64::from((x - max).exp())).sum::<f64>().ln();
            let logprob = |token: u32| f64::from(logits[token as usize]) - f64::from(max) - log_sum;
            let token = drawn.tokens[at];
            if at % 3 != 1 {
                assert_eq!(token, order[0], "vocab {vocab}");
            }
            let rank = order.iter().position(|&other| other == token).unwrap() as u32 + 1;
            assert_eq!(drawn.ranks[at], rank, "vocab {vocab}");
            assert!((f64::from(drawn.logprobs[at]) - logprob(token)).abs() < 2e-6, "vocab {vocab}");
            let named = [TOP_MAX, 0, 3][at % 3];
            for n in 0..TOP_MAX {
                let (token, got) = (drawn.top_tokens[at * TOP_MAX + n], drawn.top_logprobs[at * TOP_MAX + n]);
                match order.get(n) {
                    _ if n >= named => assert_eq!((token, got), (77, 77.0)),
                    None => assert_eq!((token, got), (NONE, f32::NEG_INFINITY)),
                    Some(&want) => {
                        assert_eq!(token, want, "vocab {vocab}, name {n}");
                        assert!((f64::from(got) - logprob(want)).abs() < 2e-6, "vocab {vocab}, name {n}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_unusable_row_ends_alone() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Sampling::new(&gpu.device).unwrap();
    for vocab in [40, 5000] {
        let mut logits = normal(5, 6 * vocab);
        logits[vocab + vocab - 1] = f32::NAN;
        logits[2 * vocab + 3] = f32::INFINITY;
        logits[3 * vocab..4 * vocab].fill(f32::NEG_INFINITY);
        let some = SampleRow { temperature: 1.0, uniform: 0.5, logprobs: Some(2), ..GREEDY };
        let asked = [Some(some), Some(some), Some(GREEDY), Some(some), None, Some(GREEDY)];
        let drawn = draw(&gpu, &kernels, &gpu.up(&logits), vocab, &asked);
        assert_eq!(drawn.status, [OK, NOT_FINITE, NOT_FINITE, NOTHING_LEFT, 77, OK]);
        assert_eq!(drawn.tokens[1..5], [NONE, NONE, NONE, 77]);
        assert!(drawn.tokens[0] < vocab as u32 && drawn.tokens[5] < vocab as u32);
    }
}

#[test]
fn the_next_step_takes_tokens_from_host_and_device() {
    let Some(gpu) = Gpu::open() else { return };
    let kernels = Sampling::new(&gpu.device).unwrap();
    let tokens = gpu.up(&[77u32; 5]);
    let args = NextTokensArgs {
        rows: 4,
        known: &gpu.up(&[10, 11, 12, 13]),
        from_previous: &gpu.up(&[NONE, 2, 0, 9]),
        drawn: &gpu.up(&[100, 101, 102]),
        tokens: &tokens,
    };
    kernels.next_tokens(&gpu.stream, &args).unwrap();
    assert_eq!(gpu.down(&tokens), [10, 102, 100, NONE, 77]);
}
