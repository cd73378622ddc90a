//! Pauses between attempts to reach a peer that is away.

use std::time::Duration;

/// Doubles from `min` to `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// The first pause is `min`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// For a peer that is restarted in moments: 10 ms to 500 ms.
    pub(crate) fn reconnect() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_millis(500))
    }

    /// The peer is back.
    pub(crate) fn reset(&mut self) {
        self.next = self.min;
    }

    /// Waits before the next attempt.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(self.max);
    }
}
