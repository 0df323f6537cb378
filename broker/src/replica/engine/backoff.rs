//! How long a replica waits for its next Raft instance after one ended by itself or did not start.
//!
//! Invariant: longer with each failure in a row, so that one that always fails costs little.

use std::time::Duration;

use tokio::time::Instant;

/// Before an instance that ended by itself is opened again; doubles each time.
const REOPEN_MIN: Duration = Duration::from_secs(1);
const REOPEN_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Backoff {
    /// Instances in a row that ended by themselves or did not start.
    failures: u32,
    retry_at: Option<Instant>,
}

impl Backoff {
    /// One more has failed; how long to wait.
    pub(super) fn count_failure(&mut self) -> Duration {
        // One that ran for long has nothing to do with the failure before.
        if self
            .retry_at
            .is_some_and(|at| at.elapsed() > REOPEN_MAX * 2)
        {
            self.failures = 0;
        }
        let wait = REOPEN_MIN
            .saturating_mul(1 << self.failures.min(16))
            .min(REOPEN_MAX);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + wait);
        wait
    }

    /// It is too early for the next one.
    pub(super) fn is_waiting(&self) -> bool {
        self.retry_at.is_some_and(|at| Instant::now() < at)
    }

    /// When the next one may be opened.
    pub(super) fn retry_at(&self) -> Instant {
        self.retry_at.unwrap_or_else(Instant::now)
    }
}
