//! Whether this broker's log gets on. A disk that hangs fails nothing, and all else of the broker lives: its
//! links answer, and its leaders are taken for living while nothing they are given becomes durable.
//!
//! Invariant: nobody watches while nobody asks. The first look that finds work only begins to count.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chronik_storage::{Storage, WalProgress};
use tokio::time::Instant;

/// Looks at the progress of the WAL.
pub struct DiskWatch {
    storage: Storage,
    stuck_after: Duration,
    seen: Mutex<Seen>,
}

struct Seen {
    progress: WalProgress,
    /// When the WAL was last seen to get on, or to have nothing to do.
    at: Instant,
    is_stuck: bool,
}

impl DiskWatch {
    pub fn new(storage: Storage, stuck_after: Duration) -> Self {
        let seen = Seen {
            progress: storage.wal_progress(),
            at: Instant::now(),
            is_stuck: false,
        };
        Self {
            storage,
            stuck_after,
            seen: Mutex::new(seen),
        }
    }

    /// Whether one write has taken longer than the limit. To be asked every now and then.
    pub fn is_stuck(&self) -> bool {
        self.look(self.storage.wal_progress(), Instant::now())
    }

    fn look(&self, progress: WalProgress, now: Instant) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !progress.has_work || progress != seen.progress {
            seen.at = now;
        }
        seen.progress = progress;
        let waits = now.saturating_duration_since(seen.at);
        let is_stuck = waits > self.stuck_after;
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
        let mut is_stuck_after = |seconds| {
            now += Duration::from_secs(seconds);
            watch.look(storage.wal_progress(), now)
        };
        assert!(!is_stuck_after(60), "nothing to write");
        for _ in 0..3 {
            write();
            assert!(!is_stuck_after(0));
            assert!(!is_stuck_after(4));
            while driver.step_wal() {}
        }
        write();
        assert!(!is_stuck_after(60), "the first that is seen of it");
        assert!(is_stuck_after(6));
        while driver.step_wal() {}
        assert!(!is_stuck_after(1));
    }
}
