//! What an ingress tells of itself when it is asked: figures since its start, whose differences are rates.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bincode::{Decode, Encode};
use heliostat_engine::request::RankStats;
use serde::{Deserialize, Serialize};

/// Buckets of [`Latencies`].
const BUCKETS: usize = 224;
/// Upper bound of the first one, seconds.
const FIRST_S: f64 = 10e-6;
/// From one bound to the next: a quantile is at most 7 % too high. The last bound is about 36 s.
const FACTOR: f64 = 1.07;

/// An ingress, with the figures that its DP ranks sent last.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct ServingReport {
    /// Name of the model.
    pub model: String,
    /// Sequences between HTTP and the ranks.
    pub in_flight: u64,
    /// Sequences that ended, since start.
    pub ended: u64,
    /// Sequences that went on at another rank, since start.
    pub moves: u64,
    /// Arrival to first token, by [`Latencies::counts`].
    pub first_token: Vec<u64>,
    /// Between two tokens.
    pub inter_token: Vec<u64>,
    /// By DP rank.
    pub ranks: BTreeMap<u32, RankStats>,
}

impl ServingReport {
    /// Adds what other ranks do for a model of the same name.
    pub(super) fn join(&mut self, other: &Self) {
        self.in_flight += other.in_flight;
        self.ended += other.ended;
        self.moves += other.moves;
        let buckets =
            [(&mut self.first_token, &other.first_token), (&mut self.inter_token, &other.inter_token)];
        for (own, other) in buckets {
            own.resize(own.len().max(other.len()), 0);
            own.iter_mut().zip(other).for_each(|(sum, count)| *sum += count);
        }
        self.ranks.extend(other.ranks.iter().map(|(id, rank)| (*id, rank.clone())));
    }
}

/// Durations in buckets that are narrow enough for quantiles.
#[derive(Debug)]
pub struct Latencies([AtomicU64; BUCKETS]);

impl Default for Latencies {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }
}

impl Latencies {
    /// Counts a duration so many times.
    pub fn observe(&self, duration: Duration, times: u64) {
        let above = (duration.as_secs_f64() / FIRST_S).max(1.0).ln() / FACTOR.ln();
        let bucket = (above.ceil() as usize).min(BUCKETS - 1);
        self.0[bucket].fetch_add(times, Ordering::Relaxed);
    }

    /// How many fell into each bucket.
    pub fn counts(&self) -> Vec<u64> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

/// The duration, in seconds, that a share `q` of the counted ones does not exceed; none where nothing was counted.
pub fn quantile(counts: &[u64], q: f64) -> Option<f64> {
    let total: u64 = counts.iter().sum();
    let wanted = (q * total as f64).ceil().max(1.0) as u64;
    let mut seen = 0;
    let bucket = counts.iter().position(|count| {
        seen += count;
        total > 0 && seen >= wanted
    });
    bucket.map(|bucket| FIRST_S * FACTOR.powi(bucket as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close_from_above() {
        let latencies = Latencies::default();
        assert_eq!(quantile(&latencies.counts(), 0.5), None);
        (1..=1000).for_each(|ms| latencies.observe(Duration::from_millis(ms), 1));
        for (q, exact) in [(0.5, 0.5), (0.99, 0.99), (0.001, 0.001)] {
            let found = quantile(&latencies.counts(), q).unwrap();
            assert!((exact..exact * 1.08).contains(&found), "{q}: {found}");
        }
        latencies.observe(Duration::ZERO, 1);
        latencies.observe(Duration::from_secs(100_000), 1);
        assert_eq!(latencies.counts().iter().sum::<u64>(), 1002);
    }
}
