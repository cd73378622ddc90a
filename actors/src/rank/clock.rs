//! Durations of a rank's steps: the last ones, those while a plan is open, and where the time of all went.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use heliostat_engine::request::StepPhases;

use super::recorder::Recorder;
use crate::messages::StepTimes;

/// Steps whose durations are kept, for the median before a plan and for one while it is open.
const STEPS_KEPT: usize = 512;

/// Step durations in microseconds.
#[derive(Debug, Default)]
pub(super) struct StepClock {
    recent: VecDeque<u64>,
    watched: Option<Watch>,
    last_us: u64,
    phases: StepPhases,
    steps: u64,
    /// Of single steps, while somebody wants one.
    pub(super) recorder: Recorder,
}

/// Reads the clock between the parts of a step.
pub(super) struct Lap(Instant);

impl Lap {
    /// From now on.
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }

    /// Microseconds since the last call, or the beginning.
    pub(super) fn us(&mut self) -> u64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now)).as_micros() as u64
    }
}

#[derive(Debug, Default)]
struct Watch {
    before_median_us: u64,
    count: u64,
    longest_us: u64,
    steps: VecDeque<u64>,
}

impl StepClock {
    /// Records a step, with its parts.
    pub(super) fn record(&mut self, duration: Duration, phases: &StepPhases) {
        self.steps += 1;
        self.phases.add(phases);
        let us = duration.as_micros() as u64;
        self.last_us = us;
        push(&mut self.recent, us);
        if let Some(watch) = &mut self.watched {
            watch.count += 1;
            watch.longest_us = watch.longest_us.max(us);
            push(&mut watch.steps, us);
        }
    }

    /// Steps since start.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Where the time of all steps went.
    pub(super) fn phases(&self) -> StepPhases {
        self.phases
    }

    /// The last step.
    pub(super) fn last_us(&self) -> u64 {
        self.last_us
    }

    /// A plan was opened.
    pub(super) fn begin_watch(&mut self) {
        self.watched = Some(Watch { before_median_us: median(&self.recent), ..Watch::default() });
    }

    /// The steps since the plan was opened.
    pub(super) fn watch(&self) -> StepTimes {
        self.watched.as_ref().map_or_else(StepTimes::default, |watch| StepTimes {
            count: watch.count,
            longest_us: watch.longest_us,
            median_us: median(&watch.steps),
            before_median_us: watch.before_median_us,
        })
    }

    /// The same, and ends the watch.
    pub(super) fn end_watch(&mut self) -> StepTimes {
        let times = self.watch();
        self.watched = None;
        times
    }
}

fn push(steps: &mut VecDeque<u64>, us: u64) {
    if steps.len() == STEPS_KEPT {
        steps.pop_front();
    }
    steps.push_back(us);
}

fn median(steps: &VecDeque<u64>) -> u64 {
    let mut sorted: Vec<u64> = steps.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_compares_with_the_steps_before_it() {
        let mut clock = StepClock::default();
        (1..=9).for_each(|ms| clock.record(Duration::from_millis(ms), &StepPhases::default()));
        clock.begin_watch();
        [3, 20, 4].into_iter().for_each(|ms| clock.record(Duration::from_millis(ms), &StepPhases::default()));
        let times = clock.end_watch();
        assert_eq!((times.count, times.longest_us, times.median_us), (3, 20_000, 4_000));
        assert_eq!(times.before_median_us, 5_000);
        assert_eq!(clock.watch(), StepTimes::default());
    }
}
