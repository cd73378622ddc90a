//! Decides what happens to an actor whose incarnation ended: again, later, or never.
//!
//! Pure: time is an argument and the decision is returned, so a simulation can replay any history.

use std::collections::VecDeque;
use std::time::Duration;

use bincode::{Decode, Encode};

use crate::spec::{DeathCause, RestartPolicy};

/// Recent restarts of one actor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct History {
    /// SV-1: oldest first, never longer than `max_restarts`.
    restarted_at: VecDeque<Duration>,
}

/// What to do about a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a new incarnation after `delay`.
    Restart {
        /// Zero for the first death in a window: repair speed matters more than a pause that protects nobody.
        delay: Duration,
        /// Restarts in the window, with this one.
        attempt: u32,
    },
    /// The actor stays dead until somebody revives it.
    GiveUp,
}

impl History {
    /// After a restart of the head, whose clock may be behind that of the one before it.
    pub(super) fn recovered(mut self, now: Duration) -> Self {
        self.restarted_at.iter_mut().for_each(|at| *at = (*at).min(now));
        self
    }

    /// Records that the actor ended at `now` and returns the decision.
    pub fn died(&mut self, policy: &RestartPolicy, cause: &DeathCause, now: Duration) -> Action {
        if cause.is_intended() {
            return Action::GiveUp;
        }
        while self.restarted_at.front().is_some_and(|&at| now.saturating_sub(at) >= policy.window) {
            self.restarted_at.pop_front();
        }
        let restarts = u32::try_from(self.restarted_at.len()).unwrap_or(u32::MAX);
        if restarts >= policy.max_restarts {
            return Action::GiveUp;
        }
        self.restarted_at.push_back(now);
        Action::Restart { delay: backoff(policy, restarts), attempt: restarts + 1 }
    }
}

/// Delay before the restart that follows `restarts` others: 0, then `backoff_min` doubling up to `backoff_max`.
fn backoff(policy: &RestartPolicy, restarts: u32) -> Duration {
    match restarts {
        0 => Duration::ZERO,
        n => policy.backoff_min.saturating_mul(1 << (n - 1).min(16)).min(policy.backoff_max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRASH: DeathCause = DeathCause::Killed { signal: 9 };

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_first_restart_is_immediate_and_later_ones_back_off_to_the_cap() {
        let policy = RestartPolicy { max_restarts: 9, ..RestartPolicy::default() };
        let mut history = History::default();
        let delays: Vec<u64> = (0..9)
            .map(|n| match history.died(&policy, &CRASH, ms(n)) {
                Action::Restart { delay, .. } => delay.as_millis() as u64,
                Action::GiveUp => panic!("gave up at death {n}"),
            })
            .collect();
        assert_eq!(delays, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(history.died(&policy, &CRASH, ms(10)), Action::GiveUp);
    }

    #[test]
    fn restarts_outside_the_window_are_forgotten() {
        let policy = RestartPolicy { max_restarts: 1, window: ms(1000), ..RestartPolicy::default() };
        let mut history = History::default();
        assert_eq!(history.died(&policy, &CRASH, ms(0)), Action::Restart { delay: ms(0), attempt: 1 });
        assert_eq!(history.died(&policy, &CRASH, ms(999)), Action::GiveUp);
        assert_eq!(history.died(&policy, &CRASH, ms(1000)), Action::Restart { delay: ms(0), attempt: 1 });
    }

    #[test]
    fn what_ended_on_purpose_stays_ended() {
        let mut history = History::default();
        assert_eq!(history.died(&RestartPolicy::default(), &DeathCause::Finished, ms(0)), Action::GiveUp);
    }
}
