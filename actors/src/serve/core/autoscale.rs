//! How many replicas the load asks for, by Ray's rule: queued and running requests against a target per replica, averaged,
//! and believed only after a while.

use std::collections::VecDeque;
use std::time::Duration;

use crate::serve::target::Autoscaling;

/// Samples that are kept; older ones go first.
const SAMPLES_MAX: usize = 1024;

/// What was seen of the load, and since when it asks for another number.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scaler {
    samples: VecDeque<(Duration, u64)>,
    /// More, or fewer, have been wanted without a break since then.
    more_since: Option<Duration>,
    fewer_since: Option<Duration>,
}

impl Scaler {
    /// The number of replicas from now on, where there are `current` and `load` requests wait or run.
    pub(super) fn advance(&mut self, config: &Autoscaling, now: Duration, current: u32, load: u64) -> u32 {
        self.samples.push_back((now, load));
        while self.samples.len() > SAMPLES_MAX
            || self.samples.front().is_some_and(|(at, _)| now.saturating_sub(*at) > config.look_back)
        {
            self.samples.pop_front();
        }
        let (least, most) = (config.min_replicas, config.max_replicas);
        if current < least || current > most {
            return current.clamp(least, most);
        }
        // Whoever waits for the first replica waits no longer than it takes to start.
        if current == 0 {
            self.fewer_since = None;
            return if load > 0 { (config.upscaling_factor.ceil() as u32).clamp(1, most) } else { 0 };
        }
        let wanted = self.wanted(config, current).clamp(least, most);
        if wanted <= current {
            self.more_since = None;
        }
        if wanted >= current {
            self.fewer_since = None;
        }
        if wanted > current {
            let since = *self.more_since.get_or_insert(now);
            if now - since >= config.upscale_delay {
                self.more_since = None;
                return wanted;
            }
        }
        if wanted < current {
            let since = *self.fewer_since.get_or_insert(now);
            // Nobody is sent to nothing while somebody is there.
            let (wanted, delay) = match (wanted, current) {
                (0, 1) => (0, config.downscale_to_zero_delay),
                (0, _) => (1, config.downscale_delay),
                (wanted, _) => (wanted, config.downscale_delay),
            };
            if now - since >= delay && (wanted > 0 || load == 0) {
                self.fewer_since = None;
                return wanted.max(least);
            }
        }
        current
    }

    fn wanted(&self, config: &Autoscaling, current: u32) -> u32 {
        let sum: u64 = self.samples.iter().map(|(_, load)| load).sum();
        let mean = sum as f64 / self.samples.len().max(1) as f64;
        let ratio = mean / (config.target_ongoing_requests * f64::from(current));
        let factor = if ratio > 1.0 { config.upscaling_factor } else { config.downscaling_factor };
        let smoothed = 1.0 + (ratio - 1.0) * factor;
        let wanted = (f64::from(current) * smoothed).ceil().max(0.0) as u32;
        // A small gain must not keep the last step down from ever being taken.
        if ratio < 1.0 && wanted == current && mean <= config.target_ongoing_requests * f64::from(current - 1)
        {
            return current - 1;
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Autoscaling {
        Autoscaling {
            min_replicas: 0,
            initial_replicas: 1,
            max_replicas: 5,
            target_ongoing_requests: 2.0,
            look_back: Duration::from_secs(3),
            upscale_delay: Duration::from_secs(2),
            downscale_delay: Duration::from_secs(4),
            downscale_to_zero_delay: Duration::from_secs(8),
            upscaling_factor: 1.0,
            downscaling_factor: 1.0,
        }
    }

    /// Feeds a load every half second and returns when the number changed, and to what.
    fn run(
        config: &Autoscaling,
        (scaler, current): (&mut Scaler, &mut u32),
        from_s: u64,
        loads: &[(u64, u64)],
    ) -> Vec<(f64, u32)> {
        let (mut now, mut changes) = (Duration::from_secs(from_s), Vec::new());
        for &(seconds, load) in loads {
            for _ in 0..seconds * 2 {
                let next = scaler.advance(config, now, *current, load);
                if next != *current {
                    changes.push((now.as_secs_f64(), next));
                    *current = next;
                }
                now += Duration::from_millis(500);
            }
        }
        changes
    }

    #[test]
    fn it_follows_the_load_after_its_delays_and_rests_at_zero() {
        let (mut scaler, mut current) = (Scaler::default(), 1);
        assert_eq!(run(&config(), (&mut scaler, &mut current), 0, &[(10, 8)]), [(2.0, 4)]);
        let down = run(&config(), (&mut scaler, &mut current), 10, &[(30, 0)]);
        let last = down.last().copied().unwrap();
        assert_eq!(last.1, 0);
        assert!(down.iter().any(|(_, n)| *n == 1), "one stays until the longer delay has passed: {down:?}");
        assert_eq!(
            run(&config(), (&mut scaler, &mut current), 40, &[(1, 1)]),
            [(40.0, 1)],
            "the first is not waited for"
        );
    }

    #[test]
    fn a_short_peak_changes_nothing_and_bounds_hold() {
        // The peak stays in the mean for as long as it is looked back at.
        let config = Autoscaling { upscale_delay: Duration::from_secs(5), ..config() };
        let (mut scaler, mut current) = (Scaler::default(), 2);
        assert_eq!(run(&config, (&mut scaler, &mut current), 0, &[(3, 4), (1, 20), (5, 4)]), []);
        assert_eq!(run(&config, (&mut scaler, &mut current), 20, &[(20, 1000)]), [(25.0, 5)]);
        current = 9;
        assert_eq!(scaler.advance(&config, Duration::from_secs(50), current, 0), 5);
    }

    #[test]
    fn a_small_gain_still_arrives() {
        let config = Autoscaling { downscaling_factor: 0.1, downscale_delay: Duration::ZERO, ..config() };
        let (mut scaler, mut current) = (Scaler::default(), 5);
        for second in 0..60 {
            current = scaler.advance(&config, Duration::from_secs(second), current, 2);
        }
        assert_eq!(current, 1);
    }
}
