//! The head's time: it never goes back while a head runs, and that of the next head goes on where it was, as far as the
//! clocks of their machines agree.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
