//! Whether this broker's log gets on. A disk that hangs fails nothing, and all else of the broker lives: its
//! links answer, and its leaders are taken for living while nothing they are given becomes durable.
//!
//! Invariant: time in which the process did not run counts for nothing. The first look that finds work only begins
//! to count.

use std::time::Duration;

use chronik_storage::{Storage, WalProgress};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// From one look to the next, at most; a tenth of the limit if that is less.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Looks that are less apart are those of a process that ran all the time, on a busy machine.
const AWAY_MIN: Duration = Duration::from_secs(1);

/// Looks at the progress of the WAL, and says when it is stuck.
pub struct DiskWatch {
    storage: Storage,
    looks: Looks,
    is_stuck: watch::Sender<bool>,
    metric: Gauge,
}

impl DiskWatch {
    /// Stuck is a disk on which one write takes longer than `stuck_after`; after that, until none has taken
    /// long for as long.
    pub fn new(storage: Storage, stuck_after: Duration, metric: Gauge) -> Self {
        let looks = Looks::new(storage.wal_progress(), stuck_after, Instant::now());
        Self {
            storage,
            looks,
            is_stuck: watch::Sender::new(false),
            metric,
        }
    }

    pub fn is_stuck(&self) -> watch::Receiver<bool> {
        self.is_stuck.subscribe()
    }

    /// Watches until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let interval = self.looks.interval();
        while stop
            .run_until_cancelled(tokio::time::sleep(interval))
            .await
            .is_some()
        {
            let is_stuck = self.looks.look(self.storage.wal_progress(), Instant::now());
            if is_stuck == *self.is_stuck.borrow() {
                continue;
            }
            match is_stuck {
                true => tracing::error!(
                    limit_ms = self.looks.stuck_after.as_millis(),
                    "the disk does not take the log: this broker leads nothing that others can lead until it does; \
                     look at the disk of the data folder"
                ),
                false => tracing::info!("the disk takes the log again"),
            }
            self.metric.set(i64::from(is_stuck));
            self.is_stuck.send_replace(is_stuck);
        }
    }
}

/// What was seen of the WAL.
struct Looks {
    stuck_after: Duration,
    progress: WalProgress,
    looked: Instant,
    /// When the WAL was last seen to get on, or to have nothing to do.
    at: Instant,
    /// When one write was last seen to take more than a fifth of the limit.
    slow_at: Instant,
    is_stuck: bool,
}

impl Looks {
    fn new(progress: WalProgress, stuck_after: Duration, now: Instant) -> Self {
        Self {
            stuck_after,
            progress,
            looked: now,
            at: now,
            slow_at: now,
            is_stuck: false,
        }
    }

    fn interval(&self) -> Duration {
        (self.stuck_after / 10).min(LOOK_INTERVAL_MAX)
    }

    fn look(&mut self, progress: WalProgress, now: Instant) -> bool {
        // Later looks are those of a process that was stopped: what lies between it did not live through.
        let away = (self.interval() * 4).max(AWAY_MIN);
        let was_away = now.saturating_duration_since(self.looked) > away;
        if was_away && self.is_stuck {
            // Nor does it tell that the disk is well again.
            self.slow_at = now;
        }
        if !progress.has_work || progress != self.progress || was_away {
            self.at = now;
        }
        (self.progress, self.looked) = (progress, now);
        let waits = now.saturating_duration_since(self.at);
        if waits > self.stuck_after / 5 {
            self.slow_at = now;
        }
        let is_calm = now.saturating_duration_since(self.slow_at) > self.stuck_after;
        self.is_stuck = waits > self.stuck_after || (self.is_stuck && !is_calm);
        self.is_stuck
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use chronik_storage::StorageConfig;
    use chronik_storage::disk::FaultyDisk;
    use chronik_types::id::RaftGroupId;

    use super::*;

    #[test]
    fn a_write_that_does_not_end_is_seen_and_a_slow_one_is_not() {
        let (storage, mut driver) =
            Storage::open_driven(StorageConfig::default(), Arc::new(FaultyDisk::new())).unwrap();
        let mut now = Instant::now();
        let mut looks = Looks::new(storage.wal_progress(), Duration::from_secs(5), now);
        let log = storage.open_log(RaftGroupId(1)).unwrap();
        let write = || {
            let vote = Bytes::from_static(b"mine");
            log.save_vote(vote, Box::new(|_| {})).unwrap();
        };
        let mut is_stuck_after = |seconds| {
            let mut is_stuck = looks.look(storage.wal_progress(), now);
            for _ in 0..seconds {
                now += Duration::from_secs(1);
                is_stuck = looks.look(storage.wal_progress(), now);
            }
            is_stuck
        };
        assert!(!is_stuck_after(60), "nothing to write");
        for _ in 0..3 {
            write();
            assert!(!is_stuck_after(4));
            while driver.step_wal() {}
        }
        write();
        assert!(is_stuck_after(6));
        while driver.step_wal() {}
        assert!(is_stuck_after(2), "it was for long");
        write();
        assert!(is_stuck_after(3), "and is slow");
        while driver.step_wal() {}
        assert!(is_stuck_after(4));
        assert!(!is_stuck_after(2));
        // The process was stopped, not the disk.
        write();
        assert!(!is_stuck_after(1));
        let later = Instant::now() + Duration::from_secs(3600);
        assert!(!looks.look(storage.wal_progress(), later));
        let is_stuck = |looks: &mut Looks, second| {
            looks.look(storage.wal_progress(), later + Duration::from_secs(second))
        };
        assert!((1..=6).any(|second| is_stuck(&mut looks, second)));
        assert!(is_stuck(&mut looks, 1_000), "that was not the disk's doing");
        while driver.step_wal() {}
        assert!(is_stuck(&mut looks, 1_001));
    }
}
