//! The head's time: it never goes back while a head runs, and that of the next head goes on where it was, as far as the
//! clocks of their machines agree.

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two looks of a head at its clock, at most, while its process runs.
pub(super) const LOOK: Duration = Duration::from_millis(250);
/// Between two looks: longer, and the process did not run.
const GAP_MAX: Duration = Duration::from_millis(500);

/// Since 1970 by the machine's clock when the head started, and by a steady one from then on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    started: Instant,
    at: Duration,
}

impl Clock {
    pub(super) fn start() -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), at }
    }

    pub(super) fn now(&self) -> Duration {
        self.at + self.started.elapsed()
    }

    /// The moment that it counts from, for times that end with this process.
    pub(super) fn started(&self) -> Instant {
        self.started
    }
}

/// A clock that stands still while its process does: stopped by a signal, or with its virtual machine. Whoever did not
/// run has heard of nobody, so that no patience may run out meanwhile. The lease of a leader is another matter: others
/// count it by their clocks.
#[derive(Debug)]
pub(super) struct Waking {
    clock: Clock,
    /// The last look, since the clock's start.
    seen: Cell<Duration>,
    slept: Cell<Duration>,
}

impl Waking {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, seen: Cell::new(clock.started.elapsed()), slept: Cell::default() }
    }

    /// To be called every [`LOOK`].
    pub(super) fn now(&self) -> Duration {
        self.look(self.clock.started.elapsed())
    }

    fn look(&self, elapsed: Duration) -> Duration {
        let gap = elapsed.saturating_sub(self.seen.replace(elapsed));
        if gap > GAP_MAX {
            let slept = gap - LOOK;
            self.slept.set(self.slept.get() + slept);
            tracing::warn!(
                "this head stood still for {} ms: its patience goes on from now",
                slept.as_millis()
            );
        }
        self.clock.at + elapsed - self.slept.get()
    }

    /// The moment that the clock counts from.
    pub(super) fn started(&self) -> Instant {
        self.clock.started
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_process_stood_still_does_not_count() {
        let ms = Duration::from_millis;
        let clock = Waking {
            clock: Clock { started: Instant::now(), at: ms(1_000_000) },
            seen: Cell::default(),
            slept: Cell::default(),
        };
        let looks =
            [0, 250, 490, 900, 10_900, 11_000, 11_250, 20_000].map(|at| clock.look(ms(at)).as_millis());
        let running = [0, 250, 490, 900, 1150, 1250, 1500, 1750];
        assert_eq!(looks, running.map(|at| 1_000_000 + at));
    }
}
