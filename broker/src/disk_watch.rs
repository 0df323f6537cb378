//! Whether this broker's log gets on. A disk that hangs fails nothing, and all else of the broker lives: its
//! links answer, and its leaders are taken for living while nothing they are given becomes durable.
//!
//! Invariant: nobody watches while nobody asks, which pings of peers do: a broker without peers is not watched. The
//! first look that finds work only begins to count.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chronik_storage::{Storage, WalProgress};
use tokio::time::Instant;

/// Between two looks, at most, where the process runs: what lies between later ones it did not live through.
const LOOKS_APART_MAX: Duration = Duration::from_secs(3);

/// Looks at the progress of the WAL.
pub struct DiskWatch {
    storage: Storage,
    stuck_after: Duration,
    seen: Mutex<Seen>,
}

struct Seen {
    progress: WalProgress,
    looked: Instant,
    /// When the WAL was last seen to get on, or to have nothing to do.
    at: Instant,
    /// When one write was last seen to take more than a fifth of the limit.
    slow_at: Instant,
    is_stuck: bool,
}

impl DiskWatch {
    pub fn new(storage: Storage, stuck_after: Duration) -> Self {
        let now = Instant::now();
        let seen = Seen {
            progress: storage.wal_progress(),
            looked: now,
            at: now,
            slow_at: now,
            is_stuck: false,
        };
        Self {
            storage,
            stuck_after,
            seen: Mutex::new(seen),
        }
    }

    /// Whether one write takes longer than the limit; after that, until none has taken long for as long. To be
    /// asked every now and then.
    pub fn is_stuck(&self) -> bool {
        self.look(self.storage.wal_progress(), Instant::now())
    }

    fn look(&self, progress: WalProgress, now: Instant) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let was_away = now.saturating_duration_since(seen.looked) > LOOKS_APART_MAX;
        if !progress.has_work || progress != seen.progress || was_away {
            seen.at = now;
        }
        (seen.progress, seen.looked) = (progress, now);
        let waits = now.saturating_duration_since(seen.at);
        if waits > self.stuck_after / 5 {
            seen.slow_at = now;
        }
        let is_calm = now.saturating_duration_since(seen.slow_at) > self.stuck_after;
        let is_stuck = waits > self.stuck_after || (seen.is_stuck && !is_calm);
        let was_stuck = std::mem::replace(&mut seen.is_stuck, is_stuck);
        drop(seen);
        match (was_stuck, is_stuck) {
            (false, true) => tracing::error!(
                seconds = waits.as_secs_f64(),
                "the disk does not take the log: this broker leads nothing until it does; look at the disk of \
                 the data folder"
            ),
            (true, false) => tracing::info!("the disk takes the log again"),
            _ => {}
        }
        is_stuck
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
        let watch = DiskWatch::new(storage.clone(), Duration::from_secs(5));
        let log = storage.open_log(RaftGroupId(1)).unwrap();
        let write = || {
            let vote = Bytes::from_static(b"mine");
            log.save_vote(vote, Box::new(|_| {})).unwrap();
        };
        let mut now = Instant::now();
        // Looked at every second, as by pings.
        let mut is_stuck_after = |seconds| {
            let mut is_stuck = watch.look(storage.wal_progress(), now);
            for _ in 0..seconds {
                now += Duration::from_secs(1);
                is_stuck = watch.look(storage.wal_progress(), now);
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
        assert!(!watch.look(storage.wal_progress(), later));
    }
}
