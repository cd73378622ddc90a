//! The last minutes of one model or EPLB actor: reports come in, rates and quantiles of each second come out.
//!
//! Pure: the time is an argument.

use std::collections::VecDeque;

use heliostat_engine::request::StepPhases;
use serde::Serialize;

use super::report::{ServingReport, quantile};
use crate::eplb::EplbPulse;

/// Samples that are kept, one a second.
const SAMPLES_MAX: usize = 600;

/// One moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Output tokens per second, over all ranks.
    pub tokens_per_s: f64,
    /// Prompt tokens computed per second.
    pub prompt_tokens_per_s: f64,
    /// Sequences that ended per second.
    pub requests_per_s: f64,
    /// Sequences in running batches.
    pub running: u64,
    /// Sequences that wait.
    pub waiting: u64,
    /// Arrival to first token of those that came since the sample before, milliseconds; none without any.
    pub ttft_p50_ms: Option<f64>,
    /// See `ttft_p50_ms`.
    pub ttft_p99_ms: Option<f64>,
    /// Between two tokens, milliseconds.
    pub itl_p50_ms: Option<f64>,
    /// See `itl_p50_ms`.
    pub itl_p99_ms: Option<f64>,
    /// KV blocks in use by rank, 1 is all.
    pub kv: Vec<f64>,
    /// Steps per second, of the busiest rank.
    pub steps_per_s: f64,
    /// Milliseconds of a mean step by [`StepPhases::NAMES`]; none without a step.
    pub phases_ms: Option<[f64; 6]>,
}

/// What is kept of one model.
#[derive(Debug, Default)]
pub struct Line {
    last: Option<(u64, ServingReport)>,
    samples: VecDeque<Sample>,
}

impl Line {
    /// Takes a report of this moment.
    pub fn push(&mut self, at_ms: u64, report: ServingReport) {
        if let Some((before_ms, before)) = &self.last
            && at_ms > *before_ms
        {
            if self.samples.len() == SAMPLES_MAX {
                self.samples.pop_front();
            }
            self.samples.push_back(sample(at_ms, (at_ms - before_ms) as f64 / 1e3, before, &report));
        }
        self.last = Some((at_ms, report));
    }

    /// The newest report.
    pub fn report(&self) -> Option<&ServingReport> {
        self.last.as_ref().map(|(_, report)| report)
    }

    /// Samples after that moment, oldest first.
    pub fn since(&self, at_ms: u64) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| sample.at_ms > at_ms)
    }
}

/// What changed between two reports that lie `seconds` apart.
fn sample(at_ms: u64, seconds: f64, before: &ServingReport, now: &ServingReport) -> Sample {
    let mut sample = Sample {
        at_ms,
        requests_per_s: grown(before.ended, now.ended) as f64 / seconds,
        kv: now
            .ranks
            .values()
            .map(|rank| f64::from(rank.kv_blocks_used) / f64::from(rank.kv_blocks.max(1)))
            .collect(),
        ..Sample::default()
    };
    let (mut steps, mut phases) = (0, StepPhases::default().values());
    for (id, rank) in &now.ranks {
        let old = before.ranks.get(id).cloned().unwrap_or_default();
        sample.tokens_per_s += grown(old.output_tokens, rank.output_tokens) as f64 / seconds;
        sample.prompt_tokens_per_s += grown(old.prompt_tokens, rank.prompt_tokens) as f64 / seconds;
        sample.running += u64::from(rank.running);
        sample.waiting += u64::from(rank.waiting);
        let stepped = grown(old.steps, rank.steps);
        sample.steps_per_s = sample.steps_per_s.max(stepped as f64 / seconds);
        steps += stepped;
        let both = old.phases.values().into_iter().zip(rank.phases.values());
        phases.iter_mut().zip(both).for_each(|(sum, (old, new))| *sum += grown(old, new));
    }
    sample.phases_ms = (steps > 0).then(|| phases.map(|us| us as f64 / 1e3 / steps as f64));
    let ms = |before: &[u64], now: &[u64], q| {
        let counts: Vec<u64> =
            now.iter().enumerate().map(|(i, &now)| grown(before.get(i).copied().unwrap_or(0), now)).collect();
        quantile(&counts, q).map(|seconds| seconds * 1e3)
    };
    sample.ttft_p50_ms = ms(&before.first_token, &now.first_token, 0.5);
    sample.ttft_p99_ms = ms(&before.first_token, &now.first_token, 0.99);
    sample.itl_p50_ms = ms(&before.inter_token, &now.inter_token, 0.5);
    sample.itl_p99_ms = ms(&before.inter_token, &now.inter_token, 0.99);
    sample
}

/// What a counter grew by; one that was begun anew counts from zero.
pub(super) fn grown(before: u64, now: u64) -> u64 {
    if now >= before { now - before } else { now }
}

/// What is kept of one EPLB actor.
#[derive(Debug, Default)]
pub struct Balance {
    samples: VecDeque<(u64, EplbPulse)>,
}

impl Balance {
    /// Takes the state of this moment.
    pub fn push(&mut self, at_ms: u64, pulse: EplbPulse) {
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back((at_ms, pulse));
    }

    /// The newest.
    pub fn pulse(&self) -> Option<&EplbPulse> {
        self.samples.back().map(|(_, pulse)| pulse)
    }

    /// Those after that moment, oldest first.
    pub fn since(&self, at_ms: u64) -> impl Iterator<Item = &(u64, EplbPulse)> {
        self.samples.iter().filter(move |(at, _)| *at > at_ms)
    }
}

#[cfg(test)]
mod tests {
    use heliostat_engine::request::RankStats;

    use super::*;
    use crate::monitor::report::Latencies;

    fn report(tokens: u64, steps: u64) -> ServingReport {
        let phases = StepPhases { compute: 2000 * steps, ..StepPhases::default() };
        let rank = RankStats {
            output_tokens: tokens,
            steps,
            phases,
            kv_blocks: 8,
            kv_blocks_used: 2,
            running: 1,
            ..RankStats::default()
        };
        ServingReport { ranks: [(0, rank)].into(), ..ServingReport::default() }
    }

    #[test]
    fn rates_come_from_two_reports_and_survive_a_restart() {
        let mut line = Line::default();
        line.push(1_000, report(100, 10));
        assert_eq!(line.since(0).count(), 0, "one report has no rate");
        let latencies = Latencies::default();
        latencies.observe(std::time::Duration::from_millis(20), 5);
        let second = ServingReport { inter_token: latencies.counts(), ..report(150, 20) };
        line.push(3_000, second.clone());
        let sample = line.since(0).last().unwrap().clone();
        assert_eq!((sample.tokens_per_s, sample.steps_per_s, sample.kv.as_slice()), (25.0, 5.0, &[0.25][..]));
        assert_eq!(sample.phases_ms.unwrap()[2], 2.0);
        assert!((20.0..21.6).contains(&sample.itl_p50_ms.unwrap()));
        assert_eq!(sample.ttft_p50_ms, None);
        // The same counts again: no token came.
        line.push(4_000, second);
        assert_eq!(line.since(3_000).last().unwrap().itl_p50_ms, None);
        // A rank that was restarted counts from zero.
        line.push(5_000, report(30, 1));
        assert_eq!(line.since(4_000).last().unwrap().tokens_per_s, 30.0);
        (6..2_000).for_each(|s| line.push(s * 1_000, report(s, s)));
        assert_eq!(line.since(0).count(), SAMPLES_MAX);
    }
}
